"""Start a program in one process, in those of Detectron2's launcher, or in those of torchrun."""

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from ..cli import user_errors

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch(
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    *,
    device: str = "cuda",
    device_key: str = "MODEL.DEVICE",
) -> Any:
    """Run ``main(args)`` in every process.

    Under torchrun, which has started the processes, this joins them: with NCCL where there is a GPU for each, with
    gloo for models on the CPU and on machines without a GPU, where Detectron2's launcher refuses to work. Otherwise
    that launcher does it all.

    Args:
        main: called with ``args`` in each process.
        args: what :func:`detectron2.engine.default_argument_parser` parses.
        device: of the model.
        device_key: of that setting, for error texts.

    Returns:
        Under torchrun what ``main`` returns, otherwise None.

    Raises:
        ValueError: if ``args`` ask for processes and torchrun has started them already, or for several on the CPU,
            or if the machines run different numbers of them.
        RuntimeError: if there are fewer GPUs than processes; under torchrun on a machine that has a GPU, for a model on
            a GPU.
    """
    if all(name in os.environ for name in TORCHRUN_VARIABLES):
        return _join(main, args, device, device_key)
    if device == "cpu" and (args.num_gpus > 1 or args.num_machines > 1):
        raise ValueError(
            f"--num-gpus ({args.num_gpus}) and --num-machines ({args.num_machines}) start a process for every GPU, but "
            f"{device_key} is cpu; start processes for the CPU with torchrun --nproc-per-node"
        )
    gpus = torch.cuda.device_count()
    if args.num_gpus > max(gpus, 1):
        advice = "" if gpus else f"; on the CPU: --num-gpus 0, and {device_key} cpu"
        raise RuntimeError(
            f"--num-gpus {args.num_gpus} needs as many GPUs that PyTorch can use, and there are {gpus}{advice}"
        )
    several = args.num_gpus * args.num_machines > 1
    return detectron2_launch(
        partial(_tell_mistakes, main) if several else main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def _tell_mistakes(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Run ``main`` in a process of Detectron2's launcher, which would show the stacks of this process and its own."""
    with user_errors():
        main(args)


def _join(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, device: str, device_key: str) -> Any:
    """Run ``main`` as one of torchrun's processes, with the groups that Detectron2 expects."""
    if args.num_gpus > 1 or args.num_machines > 1:
        raise ValueError(
            "under torchrun the processes are counted by --nproc-per-node and --nnodes; leave out --num-gpus "
            f"({args.num_gpus}) and --num-machines ({args.num_machines})"
        )
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if 0 < gpus < local_size:
        raise RuntimeError(
            f"{local_size} processes on this machine need as many GPUs, and it has {gpus}; to train on the CPU set "
            f"{device_key} to cpu"
        )
    if gpus:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if gpus else "gloo", timeout=DEFAULT_TIMEOUT)
    _group_by_machine(local_size)
    comm.synchronize()
    result = main(args)
    # Only after success: a process that fails must end at once, for torchrun to stop the others.
    dist.destroy_process_group()
    return result


def _group_by_machine(local_size: int) -> None:
    """Tell Detectron2 the group of this machine's processes; torchrun numbers those of a machine one after another."""
    world_size = dist.get_world_size()
    if world_size % local_size:
        raise ValueError(f"every machine must run as many processes: {world_size} in all, {local_size} on this one")
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_size)
        return
    # Version 0.6 has no call for it: its launcher sets this, too. All processes must take part in making every group.
    groups = [dist.new_group(range(start, start + local_size)) for start in range(0, world_size, local_size)]
    comm._LOCAL_PROCESS_GROUP = groups[dist.get_rank() // local_size]
