import dataclasses
import json
import subprocess
import sys
import threading
import time

import pytest

from deformable_detr.study import run as running
from deformable_detr.study.cells import Workshop
from deformable_detr.study.children import Children
from deformable_detr.study.page import BEGIN, END, as_markdown, fill_markdown
from deformable_detr.study.run import count_finished, make_page, run_studies, summaries
from deformable_detr.study.table import Cell, read_table

ALL_CELLS = ["detr-1", "multi_scale-1", "detr-2", "multi_scale-2"]


@pytest.fixture(autouse=True)
def played_latency(monkeypatch):
    """Latency is timed by the end-to-end test; here it is 7 ms."""

    def measure(table, size_name, variants):
        rows = [{"variant": v, "test_queries": 0, "ms": 7.0, "parameters": 1_500_000} for v in variants]
        return {"machine": "a machine", "rounds": table.sizes[size_name].rounds, "rows": rows}

    monkeypatch.setattr(running, "measure_latency", measure)


@pytest.fixture
def no_page(monkeypatch):
    """Draw nothing, which takes longer than all else here."""
    monkeypatch.setattr(running, "write_results", lambda folder, *_, **__: folder / "study.html")


def again(workshop, **options):
    return type(workshop)(workshop.folder, workshop.table, workshop.size_name, **options)


def test_cells_of_several_studies_are_trained_once_and_the_first_seed_first():
    cells = read_table().cells(["convergence", "ablation"], seeds=2)
    assert len(cells) == len(set(cells)) == 20
    assert [cell.seed for cell in cells] == [1] * 10 + [2] * 10
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        read_table().cells(["convergence"], seeds=0)


def test_all_studies_have_fifteen_variants_and_every_variant_is_in_a_study():
    table = read_table()
    assert {cell.variant for cell in table.cells(list(table.studies), seeds=1)} == set(table.variants)
    assert len(table.variants) == 15


def test_finished_cells_are_kept_and_new_seeds_added(workshop, no_page):
    run_studies(workshop, ["pair"], seeds=1)
    assert workshop.trained == ALL_CELLS[:2]
    later = again(workshop)
    run_studies(later, ["pair"], seeds=2)
    assert later.trained == ALL_CELLS[2:]


def test_a_cell_that_was_killed_is_trained_again_and_nothing_else(workshop, no_page):
    workshop.stop_at = {"multi_scale-1": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_studies(workshop, ["pair"], seeds=1)
    assert [workshop.state(Cell(name, 1)) for name in ("detr", "multi_scale")] == ["finished", "begun"]
    later = again(workshop)
    run_studies(later, ["pair"], seeds=1)
    assert later.trained == ["multi_scale-1"]
    assert later.state(Cell("multi_scale", 1)) == "finished"


def test_a_training_goes_on_from_its_last_checkpoint(workshop):
    command = workshop.command(workshop.folder / "c.yaml", workshop.folder / "runs" / "detr-1")
    assert "--resume" in command and command[:4] == [sys.executable, "-m", "deformable_detr", "train"]


def test_a_cell_that_fails_keeps_no_other_from_its_turn(workshop, no_page):
    workshop.stop_at = {"detr-1": RuntimeError("a training has failed")}
    with pytest.raises(RuntimeError, match=r"1 of 4 cells have failed \(detr-1\)"):
        run_studies(workshop, ["pair"], seeds=2)
    assert workshop.trained == ALL_CELLS
    assert [workshop.state(Cell("detr", seed)) for seed in (1, 2)] == ["begun", "finished"]


def test_cells_run_side_by_side_and_their_results_do_not_depend_on_it(workshop, no_page, monkeypatch):
    meeting = threading.Barrier(2, timeout=20)
    train = type(workshop)._train

    def wait_for_the_other(*arguments):
        meeting.wait()
        train(*arguments)

    monkeypatch.setattr(type(workshop), "_train", wait_for_the_other)
    run_studies(again(workshop, jobs=2, threads=3), ["pair"], seeds=1)
    result = workshop.result(Cell("detr", 1))
    assert result["jobs"] == 2 and "; 3 threads;" in result["machine"]
    assert result["curve"][-1]["AP"] == 10.0
    (line,) = summaries(workshop, ["pair"], seeds=1)["pair"]["trained_on"]
    assert line == f"{result['machine']}; 2 trainings side by side"


def test_a_seed_is_done_before_the_next_one_and_in_it_the_longest_cells_first():
    cells = [
        Cell("detr", 2),
        Cell("detr", 1),
        Cell("two_stage_30", 1),
        Cell("two_stage_900", 1),
        Cell("multi_scale", 1),
    ]
    ordered = [str(cell) for cell in read_table().longest_first(cells)]
    assert ordered == ["two_stage_900-1", "two_stage_30-1", "detr-1", "multi_scale-1", "detr-2"]


def test_whatever_ends_the_study_ends_its_trainings_and_writes_the_page(workshop, monkeypatch):
    def train(workshop, config, run_folder):
        if run_folder.name == "multi_scale-1":
            while not (workshop.folder / "runs" / "detr-1" / "console.txt").is_file():
                time.sleep(0.01)
            sys.exit(143)
        workshop._run_child(["sleep", "60"], run_folder)

    pages, started = [], time.monotonic()
    monkeypatch.setattr(running, "write_results", lambda folder, *_, **__: pages.append(folder))
    monkeypatch.setattr(type(workshop), "_train", train)
    both = again(workshop, jobs=2)
    with pytest.raises(SystemExit):
        run_studies(both, ["pair"], seeds=1)
    assert time.monotonic() - started < 30 and pages
    assert [both.state(cell) for cell in both.table.cells(["pair"], seeds=1)] == ["begun", "begun"]
    with pytest.raises(RuntimeError, match="the study ends"):
        both.children.run(["true"], workshop.folder / "console.txt", keep_open=1)
    assert count_finished(both, ["pair"], seeds=1) == "0 of 2 cells are finished"


def test_a_child_has_its_share_of_the_threads(tmp_path):
    Children(threads=3).run(["sh", "-c", "echo $OMP_NUM_THREADS"], tmp_path / "said.txt", keep_open=1)
    assert (tmp_path / "said.txt").read_text() == "3\n"


def test_results_of_other_settings_are_refused_and_labels_do_not_matter(workshop, no_page):
    run_studies(workshop, ["pair"], seeds=1)
    table = workshop.table
    renamed = {**table.variants, "detr": dataclasses.replace(table.variants["detr"], label="another")}
    Workshop(workshop.folder, dataclasses.replace(table, variants=renamed), "tiny").result(Cell("detr", 1))
    longer = {"tiny": dataclasses.replace(table.sizes["tiny"], iterations=8)}
    other = Workshop(workshop.folder, dataclasses.replace(table, sizes=longer), "tiny")
    with pytest.raises(ValueError, match="detr-1.json was made with another size than now: remove it and "):
        other.result(Cell("detr", 1))


def test_a_training_that_was_begun_with_other_settings_is_refused(workshop, no_page):
    workshop.stop_at = {"detr-1": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_studies(workshop, ["pair"], seeds=1)
    table = dataclasses.replace(workshop.table, common={**workshop.table.common, "model.num_queries": 50})
    with pytest.raises(ValueError, match="made_with.json was made with another common than now"):
        type(workshop)(workshop.folder, table, "tiny").run(Cell("detr", 1))


@pytest.mark.parametrize("keep", [False, True])
def test_weights_of_finished_cells_are_kept_where_that_is_asked_for(workshop, no_page, keep):
    run_studies(again(workshop, keep_weights=keep), ["pair"], seeds=1)
    found = {path.parent.name for path in (workshop.folder / "runs").glob("*/model_final.pth")}
    assert found == ({"detr-1", "multi_scale-1"} if keep else set())


def test_two_studies_do_not_share_a_folder(workshop):
    with (
        workshop.locked(),
        pytest.raises(BlockingIOError, match="is in use by another study"),
        again(workshop).locked(),
    ):
        pass
    with again(workshop).locked():
        pass


def test_a_training_that_outlives_its_study_keeps_the_folder(workshop, monkeypatch):
    real = Workshop(workshop.folder, workshop.table, "tiny")
    monkeypatch.setattr(real, "command", lambda *_: [sys.executable, "-c", "import sys; sys.stdin.read()"])
    with real.locked():
        # As Workshop starts it, and not waited for.
        lock = real._lock.fileno()
        child = subprocess.Popen(real.command(), stdin=subprocess.PIPE, pass_fds=[lock])
    with pytest.raises(BlockingIOError), again(workshop).locked():
        pass
    child.communicate()
    with again(workshop).locked():
        pass


def test_a_training_that_ends_with_an_error_is_told_with_its_last_lines(workshop, monkeypatch):
    real = Workshop(workshop.folder, workshop.table, "tiny")
    script = "import sys; print('what was wrong'); sys.exit(3)"
    monkeypatch.setattr(real, "command", lambda *_: [sys.executable, "-c", script])
    with real.locked(), pytest.raises(RuntimeError, match=r"(?s)status 3, see .*console.txt:\nwhat was wrong"):
        real.run(Cell("detr", 1))


def test_the_page_and_the_tables_hold_what_the_results_say(workshop, tmp_path):
    page = run_studies(workshop, ["pair"], seeds=2)
    stored = json.loads((workshop.folder / "study.json").read_text())
    row = stored["studies"]["pair"]["rows"][1]
    # 11 and 21; two boxes in one place.
    assert row["AP"] == {"mean": 16.0, "std": pytest.approx(50**0.5), "n": 2}
    assert (row["detections"]["mean"], row["duplicates"]["mean"]) == (2.0, 1.0)
    html = page.read_text()
    for text in ("Which?", "multi-scale", "16.0 ± 7.1", "8.0 ± 3.5", "a machine", "1.50"):
        assert text in html
    plots = {path.stem for path in (workshop.folder / "plots").glob("*.png")}
    curves = {f"pair_{metric}_{over}" for metric in ("AP", "APs") for over in ("iteration", "seconds")}
    assert plots == curves | {"pair_latency"} and html.count("<img") == 5
    notes = tmp_path / "notes.md"
    notes.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    fill_markdown(notes, as_markdown(summaries(workshop, ["pair"], seeds=2), size="tiny"))
    text = notes.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| multi-scale | 2 | 16.0 ± 7.1 | 8.0 ± 3.5 | 16.0 ± 7.1 | 2 ± 0 | 2 ± 0 | 1 ± 0 | 7.0 | 1.50 |" in text


def test_a_page_of_nothing_says_so_without_a_number(workshop):
    html = make_page(workshop, ["pair"], seeds=3).read_text()
    assert "Latency was not measured yet." in html and "<img" not in html
    assert "±" not in html.partition("<table>")[2]


def test_a_file_without_the_marks_is_refused(tmp_path):
    notes = tmp_path / "notes.md"
    notes.write_text("nothing")
    with pytest.raises(ValueError, match="must have the marks"):
        fill_markdown(notes, "x")
    assert notes.read_text() == "nothing"


def test_some_variants_alone_leave_the_studies_that_have_them():
    some = read_table().only(["detr", "multi_scale"])
    assert {name: [*study.variants] for name, study in some.studies.items()} == {
        "convergence": ["detr", "multi_scale"],
        "self_attention": ["multi_scale"],
        "ablation": ["multi_scale"],
    }
