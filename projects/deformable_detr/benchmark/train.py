"""Time and peak memory of one training step: forward, losses, backward, optimizer."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

from torch import nn

from ..solver import ClippedAdamW
from .inference import Contender, add_common_arguments, autocast, run_combinations, tf32, time_contenders
from .peers import OURS, TRANSFORMERS, Batch, build, find_peers
from .timing import peak_memory

NOTES = """\
ms: median of the rounds; spread: quartile range / median; ratio: median over rounds of time / time of the first row of
the same input; MiB: peak on top of weights and optimizer state, gradients included. All have the same weights, images,
objects and ClippedAdamW; transformers has no loss for the encoder's proposals. The memory of recorded steps (graphs)
is kept for them, and not measured."""
OPTIONS = ("default", "checkpoint", "compiled", "graphs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line of this benchmark."""
    add_common_arguments(parser, size="480x640", variant="deformable_detr_R_50_two_stage")
    parser.add_argument("--options", nargs="+", default=OPTIONS[:2], choices=OPTIONS, help="of our model")
    parser.add_argument("--peers", nargs="*", default=[TRANSFORMERS], choices=[TRANSFORMERS])
    parser.add_argument("--memory-only", action="store_true", help="one step each, untimed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure every combination, print a table and write the JSON file."""
    run_combinations(make_contenders, measure, args, NOTES)


def make_contenders(variant: str, batch: Batch, args: argparse.Namespace) -> list[Contender]:
    """Our model with every option, and its peers, in every dtype."""
    contenders = []
    for name in [OURS, *find_peers(args.peers)]:
        for option in args.options if name == OURS else ["default"]:
            for dtype in args.dtypes:
                # Recordings do not tell TF32 from float32: each has a model of its own.
                if option == "graphs" or dtype == args.dtypes[0]:
                    model = build(name, variant, batch, opts=args.opts)
                    _switch_on(option, model)
                columns = {"implementation": name, "option": option, "dtype": dtype}
                contenders.append(Contender(columns, model, make_step(model, batch, dtype=dtype)))
    return contenders


def _switch_on(option: str, model: nn.Module) -> None:
    if option == "checkpoint":
        transformer = model.model.transformer
        transformer.encoder.activation_checkpoint = transformer.decoder.activation_checkpoint = True
    if option == "compiled":
        model.model.compile_for_training()
    if option == "graphs":
        model.model.record_for_training()


def measure(
    contenders: list[Contender], variant: str, batch: Batch, args: argparse.Namespace
) -> list[dict[str, object]]:
    """Measure times, unless it is the memory alone that is asked for, and memory of every contender."""
    is_recorded = [contender.columns["option"] == "graphs" for contender in contenders]
    for contender in itertools.compress(contenders, is_recorded):
        contender.call()  # Recorded is the second step.
        contender.call()
    rows = [{}] * len(contenders) if args.memory_only else time_contenders(contenders, batch, args)
    if args.memory_only:
        for contender in contenders:
            contender.call()  # The optimizer makes its state in its first step.
    memory = [
        None if args.no_memory or recorded else peak_memory(contender.call, batch.device)
        for contender, recorded in zip(contenders, is_recorded, strict=True)
    ]
    return [{**row, "MiB": mib} for row, mib in zip(rows, memory, strict=True)]


def make_step(model: nn.Module, batch: Batch, *, dtype: str) -> Callable[[], float]:
    """Return a call that makes one step and returns the loss."""
    model.train()
    optimizer = ClippedAdamW(model.parameters(), lr=1e-5)

    def call() -> float:
        with tf32(dtype):
            with autocast(batch, dtype):
                loss = model(batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return call
