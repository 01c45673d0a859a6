"""Latency of a study's models: in one process, in turns, so that a busy machine slows all of them alike."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import instantiate
from torch import nn

from ..benchmark.timing import describe_machine, summarise, time_in_turns
from .configs import build_config
from .table import Cell, Table

_WARMUP = 2


def contenders(table: Table, variants: Sequence[str]) -> list[tuple[str, int]]:
    """Return variants with numbers of queries at inference; 0 where that is the number in training."""
    return [(name, number) for name in variants for number in (0, *table.variants[name].test_queries)]


def measure_latency(table: Table, size_name: str, variants: Sequence[str]) -> dict[str, Any]:
    """Time one image of the size's shape; weights are random, as they do not matter.

    Returns:
        "machine", and "rows": for every variant and number of queries the median of milliseconds, their spread
        (quartile range / median) and the parameters.
    """
    size = table.sizes[size_name]
    keys = contenders(table, variants)
    models = {key: _build(table, size_name, *key) for key in keys}
    image = torch.randint(0, 256, (3, size.scene.short_side, max(size.scene.long_sides)), dtype=torch.uint8)
    calls: dict[tuple[str, int], Callable[[], object]] = {key: partial(_detect, models[key], image) for key in keys}
    times = time_in_turns(calls, rounds=size.rounds, device=size.device, warmup=_WARMUP)
    rows = [
        {
            "variant": name,
            "test_queries": number,
            "parameters": sum(parameter.numel() for parameter in models[name, number].parameters()),
            **summarise(times[name, number], times[keys[0]]),
        }
        for name, number in keys
    ]
    return {"machine": describe_machine([size.device], torch.get_num_threads()), "rounds": size.rounds, "rows": rows}


def _build(table: Table, size_name: str, variant: str, test_queries: int) -> nn.Module:
    cfg = build_config(table, size_name, Cell(variant, 1))
    if test_queries:
        cfg.model.num_queries_test = test_queries
    return instantiate(cfg.model).to(table.sizes[size_name].device).eval()


@torch.inference_mode()
def _detect(model: nn.Module, image: torch.Tensor) -> object:
    return model([{"image": image, "height": image.shape[1], "width": image.shape[2]}])
