#!/usr/bin/env python3
"""Train or evaluate Deformable DETR with Detectron2's own flags; ``--help`` has examples."""

from deformable_detr.engine import argument_parser, configured_device, main
from deformable_detr.startup.launch import launch

if __name__ == "__main__":
    args = argument_parser().parse_args()
    launch(main, args, device=configured_device(args))
