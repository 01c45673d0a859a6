"""A run that does not get better any more ends by itself."""

import json

import pytest

from deformable_detr.files import write_text
from deformable_detr.training.earlier_run import set_aside_earlier_run
from deformable_detr.training.settings import TrainingSettings

from .conftest import losses_of, read_checkpoint


@pytest.fixture
def evaluated(run, monkeypatch) -> list[float]:
    """APs that the evaluations of the test have given, one after the other."""
    aps = iter([0.3, 0.5, 0.4, 0.5, 0.2, 0.1, 0.6])
    given = []

    def evaluate(*_):
        given.append(next(aps))
        return {"bbox": {"AP": given[-1]}}

    monkeypatch.setattr(f"deformable_detr.engine.{'do_test' if run.is_lazy else 'Trainer.test'}", evaluate)
    return given


def test_a_run_ends_when_its_patience_does_and_goes_on_under_a_larger_one(run, evaluated, tmp_path):
    output = tmp_path / "run"
    options = {"max_iter": 9, "eval_period": 1, "checkpoint_period": 9}
    run(output, patience=2, **options)
    # 0.5 after iteration 1; an equal value is no better one.
    assert evaluated == [0.3, 0.5, 0.4, 0.5]
    assert sorted(losses_of(output)) == [0, 1, 2, 3] and losses_of(output)[3]["bbox/AP"] == 0.5
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert read_checkpoint(output)["iteration"] == 3
    assert read_checkpoint(output, "model_best")["best"] == {"metric": "bbox/AP", "value": 0.5, "iteration": 1}
    log = (output / "log.txt").read_text()
    assert "ends after iteration 3: bbox/AP was 0.5000 after iteration 1 and no better in 2 evaluations" in log
    assert "model_best.pth has the best weights" in log and "Exception" not in log

    run(output, "--resume", patience=2, **options)
    assert len(evaluated) == 4 and sorted(losses_of(output)) == [0, 1, 2, 3]
    run(output, "--resume", patience=4, **options)
    assert evaluated[4:] == [0.2, 0.1] and read_checkpoint(output)["iteration"] == 5


def test_a_killed_run_goes_on_counting_where_its_checkpoint_was(run_yaml, monkeypatch, tmp_path):
    """Also what was evaluated right after the checkpoint was written; and nothing that came after it."""
    aps = iter([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    monkeypatch.setattr("deformable_detr.engine.Trainer.test", lambda *_: {"bbox": {"AP": next(aps)}})
    output = tmp_path / "run"
    options = {"max_iter": 9, "eval_period": 1, "checkpoint_period": 2, "patience": 3}
    run_yaml(output, **options)
    assert read_checkpoint(output)["iteration"] == 3
    (output / "model_final.pth").unlink()
    (output / "last_checkpoint").write_text("model_0000001.pth")
    run_yaml(output, "--resume", **options)
    # Waited for 1 evaluation at iteration 1, for 3 at iteration 3.
    values = json.loads((output / "early_stopping.json").read_text())["values"]
    assert values == [[0, 0.5], [1, 0.4], [2, 0.1], [3, 0.0]]
    assert read_checkpoint(output)["iteration"] == 3


def test_a_new_run_in_an_old_folder_begins_to_count(run_yaml, monkeypatch, tmp_path):
    aps = iter([0.9, 0.1, 0.2, 0.3, 0.4, 0.5])
    monkeypatch.setattr("deformable_detr.engine.Trainer.test", lambda *_: {"bbox": {"AP": next(aps)}})
    options = {"eval_period": 1, "checkpoint_period": 9, "patience": 1}
    run_yaml(tmp_path / "run", max_iter=5, **options)
    run_yaml(tmp_path / "run", max_iter=3, **options)
    values = json.loads((tmp_path / "run" / "early_stopping.json").read_text())["values"]
    # The last iteration ends the run anyway.
    assert values == [[0, 0.2], [1, 0.3]]
    aside = tmp_path / "run" / "earlier_run"
    assert (aside / "last_checkpoint").read_text() == "model_final.pth"
    assert read_checkpoint(aside)["iteration"] == 1 and read_checkpoint(aside, "model_best")["best"]["value"] == 0.9
    assert json.loads((aside / "early_stopping.json").read_text())["values"] == [[0, 0.9], [1, 0.1]]


def test_what_an_earlier_run_has_left_is_set_aside_once_and_none_of_its_weights_are_lost(tmp_path, caplog):
    own = ["last_checkpoint", "early_stopping.json", "model_best.pth", "model_final.pth", "model_0000009.pth"]
    others = ["model_of_mine.pth", "metrics.json", "config.yaml"]
    for name in own + others:
        (tmp_path / name).write_text(f"old {name}")
    (tmp_path / "start.pth").symlink_to("model_final.pth")
    set_aside_earlier_run(str(tmp_path), str(tmp_path / "start.pth?ema=True"))
    # The file from which the run begins keeps its name: the run may be started again.
    assert sorted(path.name for path in tmp_path.glob("*.*")) == sorted(["model_final.pth", "start.pth", *others])
    assert not (tmp_path / "last_checkpoint").exists()
    write_text(tmp_path / "model_final.pth", "new")
    aside = tmp_path / "earlier_run"
    assert {path.name: path.read_text() for path in aside.iterdir()} == {name: f"old {name}" for name in own}
    (record,) = caplog.records
    told = f"of an earlier run, whose {', '.join(own)} are now in {aside}"
    assert record.levelname == "WARNING" and told in record.message

    set_aside_earlier_run(str(tmp_path), "")
    assert [path.name for path in (tmp_path / "earlier_run_2").iterdir()] == ["model_final.pth"]
    set_aside_earlier_run(str(tmp_path), "")
    assert not (tmp_path / "earlier_run_3").exists()


def test_patience_needs_evaluations():
    with pytest.raises(ValueError, match=r"TEST\.PATIENCE .* needs evaluations \(TEST\.EVAL_PERIOD\), got 3 and 0"):
        TrainingSettings(output_dir="", patience=3)
