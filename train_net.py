#!/usr/bin/env python3
"""Train or evaluate Deformable DETR with Detectron2's own flags; ``--help`` has examples."""

from deformable_detr.engine import argument_parser, main
from deformable_detr.launch import launch

if __name__ == "__main__":
    launch(main, argument_parser().parse_args())
