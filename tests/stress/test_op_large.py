"""Gradients of a value with offsets beyond 2^31 elements, in as much memory as they take themselves."""

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ..layers.large_ms_deform_attn import LARGE, SMALL, check_gradients_at_the_end


def status(path: str, key: str) -> float:
    """GiB, from a file of /proc."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path(path).read_text())[1]) / 2**20


# Sums in float32 and, for bfloat16, beside them the gradient or the value copied head by head. In float32 "heads
# first" would take that copy and the gradient twice: 18 GB.
@pytest.mark.parametrize(
    ("case", "dtype", "bytes_per_element"),
    [
        ("one image", torch.float32, 4),
        ("one image", torch.bfloat16, 4 + 2),
        ("two images", torch.float32, 4),
        ("heads first", torch.bfloat16, 4 + 2),
    ],
    ids=str,
)
def test_gradients_reach_offsets_beyond_two_to_the_31_elements(
    case: str,
    dtype: torch.dtype,
    bytes_per_element: int,
    amount: Callable[[dict, dict], dict],
    outcomes: Counter[str],
) -> None:
    sizes = amount(SMALL, LARGE)[case]
    needed = math.prod(sizes[:5]) * bytes_per_element / 2**30 + 0.25
    available = status("/proc/meminfo", "MemAvailable")
    if available < needed + 1:
        pytest.skip(f"needs {needed + 1:.0f} GiB of memory, {available:.0f} are available")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("/proc/self/status", "VmRSS")
    check_gradients_at_the_end(sizes, dtype, "cpu")
    peak = status("/proc/self/status", "VmHWM") - before
    assert peak < needed
    outcomes[f"with {peak:.1f} GiB of memory at the peak"] += 1
