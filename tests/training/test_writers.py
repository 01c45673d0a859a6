"""What writes the numbers of a run, and the ways to add to it."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

from deformable_detr.engine import Trainer
from deformable_detr.training.metrics import read_metrics
from deformable_detr.training.writers import MetricsWriter, build_writers

from .conftest import Runner


class Recorder(EventWriter):
    """Remembers the iteration and the names of every write."""

    def __init__(self) -> None:
        self.written: list[tuple[int, set[str]]] = []
        self.closed = False

    def write(self) -> None:
        storage = get_event_storage()
        self.written.append((storage.iter, set(storage.latest())))

    def close(self) -> None:
        self.closed = True


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_writers_of_an_overridden_method_are_written_after_the_evaluation_and_closed(run_yaml, tmp_path, monkeypatch):
    recorder = Recorder()

    class OwnTrainer(Trainer):
        def build_writers(self) -> list[EventWriter]:
            return [*super().build_writers(), recorder]

    monkeypatch.setattr("deformable_detr.engine.Trainer", OwnTrainer)
    monkeypatch.setattr(Trainer, "test", lambda *_: {"bbox": {"AP": 0.5}})
    run_yaml(tmp_path / "run", max_iter=2, eval_period=1)
    assert [iteration for iteration, _ in recorder.written] == [0, 1, 2] and recorder.closed
    assert all({"total_loss", "bbox/AP"} <= names for _, names in recorder.written)
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_an_overridden_method_may_leave_out_our_writers(run_yaml, tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(Trainer, "build_writers", lambda self: [recorder])
    run_yaml(tmp_path / "run", max_iter=1)
    assert recorder.written and not (tmp_path / "run" / "metrics.json").exists()


LAZY_WRITER = """
from detectron2.config import LazyCall as L
from detectron2.utils.events import TensorboardXWriter

train.writers = [L(TensorboardXWriter)(log_dir={folder!r})]
"""


def test_a_lazy_config_names_further_writers(tiny_lazy, data, tmp_path):
    _, path = arguments = tiny_lazy()
    with open(path, "a", encoding="utf-8") as file:
        file.write(LAZY_WRITER.format(folder=str(tmp_path / "elsewhere")))
    Runner(lambda: arguments, is_lazy=True, flags=data)(tmp_path / "run", max_iter=1)
    assert list((tmp_path / "elsewhere").glob("events.*")) and list((tmp_path / "run").glob("events.*"))
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_second_line_of_an_iteration_has_what_has_come_since_the_first(tmp_path):
    writer = MetricsWriter(str(tmp_path / "metrics.json"), window_size=1)
    with EventStorage(7) as storage:
        storage.put_scalar("total_loss", 2.0)
        writer.write()
        writer.write()
        storage.put_scalar("bbox/AP", 0.5, smoothing_hint=False)
        writer.write()
    writer.close()
    assert lines_of(tmp_path / "metrics.json") == [
        {"iteration": 7, "total_loss": 2.0},
        {"iteration": 7, "bbox/AP": 0.5},
    ]


@pytest.mark.parametrize("period, written", [(1, 9.0), (3, 6.0), (100, 4.5)])
def test_values_are_smoothed_over_the_iterations_since_the_last_line(tmp_path, period, written):
    """The median of 0, 1, 4, 5, 6 and 9 over a window of the last 1, 3 and (at most 20) all of them."""
    _, writer, _ = writers = build_writers(str(tmp_path), 6, period)
    with EventStorage(0) as storage:
        for storage.iter, value in enumerate((0.0, 1.0, 4.0, 5.0, 6.0, 9.0)):
            storage.put_scalar("total_loss", value)
        writer.write()
    for each in writers:
        each.close()
    assert lines_of(tmp_path / "metrics.json") == [{"iteration": 5, "total_loss": written}]


@pytest.fixture
def wandb(monkeypatch) -> list[tuple]:
    """Calls of a module that takes the place of Weights & Biases."""
    calls = []

    class Run:
        def log(self, values, step):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish",))

    module = ModuleType("wandb")
    module.init = lambda **options: calls.append(("init", options)) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_gets_what_metrics_json_gets(run, tmp_path, wandb):
    run(tmp_path / "shapes", max_iter=2, eval_period=1, wandb=True)
    (_, options), *logged, finished = wandb
    assert (options["project"], options["name"], options["dir"]) == (
        "deformable_detr",
        "shapes",
        str(tmp_path / "shapes"),
    )
    key = "train.max_iter" if run.is_lazy else "SOLVER.MAX_ITER"
    assert options["config"][key] == 2 and finished == ("finish",)
    rows = {}
    for _, step, values in logged:
        rows.setdefault(step, {}).update(values)
    assert rows == {
        iteration: pytest.approx(row, nan_ok=True) for iteration, row in read_metrics(tmp_path / "shapes").items()
    }


def test_without_the_package_nothing_begins(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("deformable_detr.engine.Trainer.build_model", lambda cfg: pytest.fail("a model is built"))
    with pytest.raises(
        ModuleNotFoundError, match=r"(WANDB\.ENABLED|train\.wandb\.enabled) needs .*: pip install wandb"
    ):
        run(tmp_path / "run", wandb=True)
