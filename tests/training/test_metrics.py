import json

import pytest

from deformable_detr.training.metrics import cut_metrics, read_metrics, series, training_seconds


def row(iteration, **values):
    return json.dumps({"iteration": iteration, **values})


def training(iteration, loss):
    return row(iteration, total_loss=loss)


def evaluation(iteration, ap):
    return row(iteration, **{"bbox/AP": ap})


@pytest.fixture
def run_with(tmp_path):
    def write(*lines, torn=b""):
        (tmp_path / "metrics.json").write_bytes("".join(f"{line}\n" for line in lines).encode() + torn)
        return tmp_path

    return write


def test_lines_become_values_by_iteration(run_with):
    run = run_with(row(19, total_loss=5.0, lr=1e-4), row(39, total_loss=4.0, lr=1e-4))
    assert read_metrics(run) == {19: {"total_loss": 5.0, "lr": 1e-4}, 39: {"total_loss": 4.0, "lr": 1e-4}}


def test_evaluation_written_at_the_same_iteration_joins_it(run_with):
    run = run_with(row(40, total_loss=4.0), row(40, **{"bbox/AP": 12.5}))
    assert read_metrics(run) == {40: {"total_loss": 4.0, "bbox/AP": 12.5}}


@pytest.mark.parametrize("torn", [b'{"iteration": 39, "total', row(39).encode()])
def test_torn_last_line_is_left_out_with_a_warning(run_with, caplog, torn):
    assert list(read_metrics(run_with(row(19), torn=torn))) == [19]
    assert "metrics.json, line 2 is not complete" in caplog.text


@pytest.mark.parametrize("torn", [b'{"iteration": 39, "total', b'{"iteration": 39, "bbox/AP-\xc3', b"\0" * 64])
def test_line_that_ran_into_a_torn_one_is_left_out_with_it(run_with, caplog, torn):
    assert list(read_metrics(run_with(row(19), torn=torn + f"{row(39)}\n{row(59)}\n".encode()))) == [19, 59]
    assert "metrics.json, line 2 is not complete" in caplog.text


def test_resumed_run_replaces_what_the_interrupted_one_wrote_past_its_checkpoint(run_with):
    interrupted = [training(iteration, 1.0) for iteration in (19, 39, 59, 79)]
    run = run_with(*interrupted, training(39, 2.0), training(59, 3.0))
    assert series(read_metrics(run), "total_loss") == ([19, 39, 59], [1.0, 2.0, 3.0])


def test_evaluation_written_after_the_next_line_of_training_takes_nothing_away(run_with):
    metrics = read_metrics(run_with(training(19, 5.0), training(39, 4.0), evaluation(30, 1.0), training(59, 3.0)))
    assert series(metrics, "total_loss") == ([19, 39, 59], [5.0, 4.0, 3.0])
    assert list(metrics) == [19, 30, 39, 59]


def test_resumed_run_may_repeat_an_evaluation_after_the_next_line_of_training(run_with):
    once = [training(39, 4.0), evaluation(30, 1.0), training(59, 3.0), evaluation(50, 2.0)]
    resumed = [training(39, 4.5), evaluation(30, 1.5)]
    metrics = read_metrics(run_with(training(19, 5.0), *once, *resumed))
    assert metrics == {19: {"total_loss": 5.0}, 30: {"bbox/AP": 1.5}, 39: {"total_loss": 4.5}}


def test_run_that_has_just_begun_has_no_metrics(run_with):
    assert read_metrics(run_with()) == {}


@pytest.mark.parametrize("line", ['{"total_loss": 1.0}', "[1, 2]", "null", '{"iteration": true}'])
@pytest.mark.parametrize("use", [read_metrics, lambda run: cut_metrics(run, 19)])
def test_line_without_an_iteration_is_an_error_that_names_it(run_with, use, line):
    with pytest.raises(ValueError, match="metrics.json, line 2 must be a JSON object with a whole number") as caught:
        use(run_with(row(19), line))
    assert line in str(caught.value)


def test_metrics_are_cut_where_a_resumed_run_goes_on(run_with):
    run = run_with(row(39), row(19), row(59)[:-4] + row(59), row(59), torn=b'{"iteration": 79, "total')
    with open(run / "metrics.json", "a") as writer:
        cut_metrics(run, 19)
        writer.write(row(20) + "\n")
    assert (run / "metrics.json").read_text().splitlines() == [row(19), row(20)]


def test_training_time_counts_every_iteration_at_its_logged_speed():
    assert training_seconds({9: {"time": 0.5}, 29: {"time": 0.25}, 30: {"bbox/AP": 1.0}}) == 10 * 0.5 + 20 * 0.25


def test_series_skips_iterations_without_the_metric():
    assert series({1: {"a": 1.0}, 2: {"b": 5.0}, 3: {"a": 2.0}}, "a") == ([1, 3], [1.0, 2.0])


def test_cutting_makes_no_file(tmp_path):
    cut_metrics(tmp_path, 3)
    assert not list(tmp_path.iterdir())
