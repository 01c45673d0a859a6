#!/usr/bin/env python3
"""Train or evaluate Deformable DETR with Detectron2's own flags; ``--help`` has examples."""

import sys

from deformable_detr.cli import run
from deformable_detr.engine import train_net
from deformable_detr.startup.processors import share_processors

if __name__ == "__main__":
    share_processors(long_running=True)
    sys.exit(run(train_net))
