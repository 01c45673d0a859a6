"""`python -m deformable_detr.benchmark op` on a tiny shape, and how calls are timed."""

import json
from contextlib import contextmanager

import pytest
import torch

from deformable_detr.benchmark.__main__ import main
from deformable_detr.benchmark.inference import Contender
from deformable_detr.benchmark.shapes import SHAPES, Shape, make_inputs
from deformable_detr.benchmark.timing import CLOCKS, peak_memory, time_cold_and_settled, time_in_turns, time_on_host

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
    for forward, both in zip(ours[::2], ours[1::2], strict=True):
        assert forward["bwd ms"] is None and both["bwd ms"] == both["ms"] - forward["ms"]
    inputs = make_inputs(TINY, batch=1, dtype=torch.float32, device="cpu", distribution="grid")
    assert ours[0]["bound ms"] == pytest.approx(1e-6 * inputs.bytes_once(backward=False))


def test_op_benchmark_leaves_out_peers_and_sums_in_any_order_again_afterwards(monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr("deformable_detr.benchmark.op.SETTLE_MS", 0.1)
    seen = set()

    def measure_bandwidth(device):
        seen.add(torch.are_deterministic_algorithms_enabled())
        return 1e9

    monkeypatch.setattr("deformable_detr.benchmark.op.measure_bandwidth", measure_bandwidth)
    arguments = ["op", "--devices", "cpu", "--shapes", "tiny", "--rounds", "1", "--peers", "--deterministic"]
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    main()
    assert seen == {True} and not torch.are_deterministic_algorithms_enabled()
    output = capsys.readouterr().out
    assert "deformable_detr" in output and "twin" not in output


@pytest.mark.parametrize("command", ["op", "model", "train"])
@pytest.mark.parametrize("option", ["--batches", "--rounds", "--threads"])
def test_there_must_be_one_at_least_of_what_is_counted(monkeypatch, capsys, command, option):
    monkeypatch.setattr("sys.argv", ["benchmark", command, option, "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.endswith(f"argument {option}: must be a whole number of at least 1, got '0'\n")


@pytest.mark.parametrize("command", ["op", "model"])
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (["--devices", "cpu", "gpu"], ValueError, "device must be one of PyTorch's"),
        (["--json", "absent/out.json"], FileNotFoundError, "cannot write absent/out.json: there is no folder absent"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_measured(monkeypatch, command, arguments, error, message):
    monkeypatch.delattr("deformable_detr.benchmark.op.measure_bandwidth")
    monkeypatch.delattr("deformable_detr.benchmark.inference.make_batch")
    monkeypatch.setattr("sys.argv", ["benchmark", command, *arguments])
    with pytest.raises(error, match=message):
        main()


@pytest.mark.parametrize("command", ["op", "model"])
def test_what_was_measured_before_an_error_is_printed_and_saved(monkeypatch, capsys, tmp_path, command):
    path = tmp_path / "out.json"

    def measure_op(shape, number, *_, **__):
        return measure_model(None, None, range(number), None)

    def measure_model(contenders, variant, batch, args):
        if len(batch) == 4:
            raise MemoryError("4 images are too many")
        return [{"ms": 10 * len(batch)}]

    monkeypatch.setattr("deformable_detr.benchmark.op.measure_bandwidth", lambda device: 1e9)
    monkeypatch.setattr("deformable_detr.benchmark.op.measure", measure_op)
    monkeypatch.setattr("deformable_detr.benchmark.inference.make_batch", lambda *_, size, **__: range(size))
    monkeypatch.setattr("deformable_detr.benchmark.inference.make_contenders", lambda *_: [Contender({}, None, None)])
    monkeypatch.setattr("deformable_detr.benchmark.inference.measure", measure_model)
    arguments = [command, "--batches", "1", "2", "4", "--devices", "cpu", "--json", str(path)]
    arguments += ["--shapes", "r50_decoder", "--dtypes", "float32"] if command == "op" else []
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    with pytest.raises(MemoryError, match="4 images are too many"):
        main()
    assert [row["ms"] for row in json.loads(path.read_text())["results"]] == [10, 20]
    assert "20" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["op", "model"])
def test_the_gpu_that_is_measured_is_the_current_one(monkeypatch, capsys, command):
    current, measured = ["cuda:0"], []

    @contextmanager
    def device(name):
        current.append(name)
        yield
        current.pop()

    def measure(*_, **__):
        measured.append(current[-1])
        return [{"ms": 1}]

    monkeypatch.setattr("torch.cuda.device", device)
    monkeypatch.setattr("deformable_detr.benchmark.timing.check_device", lambda device: None)
    monkeypatch.setattr("deformable_detr.benchmark.timing.describe_machine", lambda *_: "")
    monkeypatch.setattr("deformable_detr.benchmark.op.measure_bandwidth", lambda device: 1e9)
    monkeypatch.setattr("deformable_detr.benchmark.op.measure", measure)
    monkeypatch.setattr("deformable_detr.benchmark.inference.make_batch", lambda *_, **__: None)
    monkeypatch.setattr("deformable_detr.benchmark.inference.make_contenders", lambda *_: [Contender({}, None, None)])
    monkeypatch.setattr("deformable_detr.benchmark.inference.measure", measure)
    arguments = ["--shapes", "r50_decoder", "--dtypes", "float32"] if command == "op" else []
    monkeypatch.setattr("sys.argv", ["benchmark", command, "--devices", "cuda:1", "cpu", *arguments])
    main()
    assert measured == ["cuda:1", "cuda:0"] and current == ["cuda:0"]


def test_times_and_memory_are_those_of_the_device(monkeypatch):
    asked = []
    values = {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 0}
    for name, value in {**values, "max_memory_allocated": 3 << 20}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device=None, value=value: (asked.append(device), value)[1])
    assert peak_memory(int, "cuda:1") == 3 and time_on_host(int, "cuda:1") >= 0
    assert asked == ["cuda:1"] * 6


@pytest.fixture
def calls(monkeypatch):
    """Two calls on a clock that only they move, and the names of those made.

    One takes 2 ms, the other 10, and the first call of a turn 3 ms more.
    """
    now, made = 0.0, []

    def make_call(name, milliseconds):
        def call():
            nonlocal now
            now += 1e-3 * (milliseconds + (3 if made[-1:] != [name] else 0))
            made.append(name)

        return call

    monkeypatch.setitem(CLOCKS, "wall", lambda: now)
    return {"a": make_call("a", 2), "b": make_call("b", 10)}, made


def test_calls_take_turns(calls):
    calls, made = calls
    times = time_in_turns(calls, rounds=2, device="cpu")
    assert times["a"] == pytest.approx([5, 5]) and times["b"] == pytest.approx([13, 13])
    assert "".join(made) == "abab"


def test_calls_are_timed_cold_and_then_repeated_only_to_settle(calls):
    calls, made = calls
    cold, settled = time_cold_and_settled(calls, rounds=2, device="cpu", settle_ms=8)
    assert cold["a"] == pytest.approx([5, 5]) and cold["b"] == pytest.approx([13, 13])
    assert settled["a"] == pytest.approx([2, 2]) and settled["b"] == pytest.approx([10, 10])
    assert "".join(made) == "aaaaaabbaaaaaabb"
