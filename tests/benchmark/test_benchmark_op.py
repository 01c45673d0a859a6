"""`python -m deformable_detr.benchmark op` on a tiny shape, and how calls are timed."""

import json

import pytest
import torch

from deformable_detr.benchmark.__main__ import main
from deformable_detr.benchmark.shapes import SHAPES, Shape, make_inputs
from deformable_detr.benchmark.timing import time_in_turns

TINY = Shape(((4, 6), (2, 3)), 5, M=2, D=4, P=2)


def test_bytes_count_every_tensor_once_and_every_corner():
    inputs = make_inputs(TINY, batch=3, dtype=torch.bfloat16, device="cpu", distribution="uniform")
    value, output, points = 3 * 30 * 2 * 4, 3 * 5 * 2 * 4, 3 * 5 * 2 * 2 * 2
    locations_and_weights = 4 * (2 * points + points)
    assert inputs.bytes_once(backward=False) == 2 * (value + output) + locations_and_weights
    # Once more for the gradients; the output's takes the place of the output.
    assert inputs.bytes_once(backward=True) == 2 * (2 * value + output) + 2 * locations_and_weights
    assert inputs.bytes_gathered(backward=False) == 2 * 4 * 4 * points
    assert inputs.bytes_gathered(backward=True) == (2 + 8) * 4 * 4 * points


def test_op_benchmark_has_a_row_for_every_combination(monkeypatch, capsys, tmp_path):
    path = tmp_path / "out.json"
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr("deformable_detr.benchmark.op.SETTLE_MS", 0.1)
    monkeypatch.setattr("deformable_detr.benchmark.op.measure_bandwidth", lambda device: 1e9)
    dtypes = ["float32", "bfloat16"]
    arguments = ["op", "--devices", "cpu", "--shapes", "tiny", "--rounds", "2", "--threads", "1", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments, "--dtypes", *dtypes])
    main()
    assert "cold ratio" in capsys.readouterr().out
    ours, twin = (
        [row for row in json.loads(path.read_text())["results"] if row["implementation"] == name]
        for name in ("deformable_detr", "twin")
    )
    expected = [(dtype, part) for dtype in dtypes for part in ("fwd", "fwd+bwd")]
    assert [(row["dtype"], row["pass"]) for row in ours] == expected
    assert [(row["dtype"], row["pass"]) for row in twin] == expected
    assert all(row["ratio"] == row["cold ratio"] == 1 for row in ours)
    assert all(row["ms"] > 0 and row["cold ms"] > 0 for row in ours + twin)
    inputs = make_inputs(TINY, batch=1, dtype=torch.float32, device="cpu", distribution="grid")
    assert ours[0]["bound ms"] == pytest.approx(1e-6 * inputs.bytes_once(backward=False))


@pytest.mark.parametrize("settle_ms", [None, 8])
def test_calls_take_turns_and_are_repeated_only_to_settle(monkeypatch, settle_ms):
    """On a clock that only the calls move: one takes 2 ms, the other 10, and the first call of a turn 3 ms more."""
    now, calls = 0.0, []

    def make_call(name, milliseconds):
        def call():
            nonlocal now
            now += 1e-3 * (milliseconds + (3 if calls[-1:] != [name] else 0))
            calls.append(name)

        return call

    monkeypatch.setitem(time_in_turns.__globals__["CLOCKS"], "wall", lambda: now)
    times = time_in_turns(
        {name: make_call(name, ms) for name, ms in (("a", 2), ("b", 10))}, rounds=2, device="cpu", settle_ms=settle_ms
    )
    cold = settle_ms is None
    assert times["a"] == pytest.approx([5, 5] if cold else [2, 2])
    assert times["b"] == pytest.approx([13, 13] if cold else [10, 10])
    assert "".join(calls) == ("abab" if cold else "aaaaaabbaaaaaabb")
