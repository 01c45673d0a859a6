"""The command line, with trainings in processes of their own."""

import json
import sys

import pytest

from deformable_detr.engine import train_net
from deformable_detr.study import queries
from deformable_detr.study.__main__ import main
from deformable_detr.study.cells import Workshop
from deformable_detr.study.page import BEGIN, END


def run_here(workshop, command, run_folder):
    """As Workshop does, in this process, which has loaded all that it needs."""
    if command[2].endswith(".queries"):
        queries.main(command[3:])
    else:
        train_net(command[4:])


@pytest.mark.slow
def test_two_variants_are_trained_timed_and_shown_and_a_killed_one_goes_on(tmp_path, capfd, monkeypatch):
    folder, notes = tmp_path / "study", tmp_path / "notes.md"
    notes.write_text(f"{BEGIN}\n{END}\n")
    arguments = ["queries", "--size", "tiny", "--seeds", "1", "--output", str(folder)]
    arguments += ["--keep-weights", "--variants", "two_stage_30", "two_stage_300"]
    main([*arguments, "--jobs", "2", "--fill", str(notes)])
    said = capfd.readouterr().out.splitlines()
    assert said[-1] == str(folder / "study.html") and said[-2] == "2 of 2 cells are finished"
    files = [folder / "cells" / f"{name}-1.json" for name in ("two_stage_30", "two_stage_300")]
    few, many = (json.loads(file.read_text()) for file in files)
    assert [point["iteration"] for point in few["curve"]] == [point["iteration"] for point in many["curve"]] == [2, 4]
    assert [*few["test_queries"]] == ["30", "100", "300", "900"]
    # Evaluated once more with as many queries as in training.
    assert few["test_queries"]["30"]["AP"] == pytest.approx(few["curve"][-1]["AP"])
    timed = json.loads((folder / "latency" / "queries.json").read_text())["rows"]
    assert [row["test_queries"] for row in timed] == [0, 30, 100, 300, 900] * 2 and all(row["ms"] > 0 for row in timed)
    assert "| 30 queries | 900 |" in notes.read_text()

    # As if the process had been killed before it could write the results.
    files[1].unlink()
    before = files[0].stat().st_mtime_ns
    main([*arguments, "--list"])
    assert capfd.readouterr().out.split() == ["finished", "two_stage_30-1", "begun", "two_stage_300-1"]
    monkeypatch.setattr(Workshop, "_run_child", run_here)
    main(arguments)
    assert json.loads(files[1].read_text())["curve"] == many["curve"]
    assert "Starting training from iteration 4" in (folder / "runs" / "two_stage_300-1" / "log.txt").read_text()
    assert files[0].stat().st_mtime_ns == before
    assert [json.loads(file.read_text())["jobs"] for file in files] == [2, 1]


def test_windows_is_refused_by_its_name(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(OSError, match="needs Linux or macOS"):
        main(["convergence"])


def test_a_study_without_the_variants_asked_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="convergence has none of the variants two_stage_30"):
        main(["convergence", "--variants", "two_stage_30", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--fill", "notes.md"], "notes.md must have the marks"), (["--size", "gpu"], "cuda needs a GPU")],
)
def test_what_would_fail_after_hours_is_refused_before_anything_is_drawn(tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(ValueError, match=reason):
        main(["convergence", "--output", "study", *arguments])
    assert not (tmp_path / "study" / "data").exists()
