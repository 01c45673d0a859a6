#!/usr/bin/env python3
"""Train or evaluate Deformable DETR with Detectron2's own flags; ``--help`` has examples."""

from detectron2.engine import launch

from deformable_detr.engine import argument_parser, main

if __name__ == "__main__":
    args = argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
