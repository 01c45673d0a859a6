import json

import pytest

from deformable_detr.report.metrics import read_metrics, series, training_seconds


def row(iteration, **values):
    return json.dumps({"iteration": iteration, **values})


@pytest.fixture
def metrics_file(tmp_path):
    def write(*lines):
        path = tmp_path / "metrics.json"
        path.write_text("\n".join(lines))
        return path

    return write


def test_lines_become_values_by_iteration(metrics_file):
    path = metrics_file(row(19, total_loss=5.0, lr=1e-4), row(39, total_loss=4.0, lr=1e-4))
    assert read_metrics(path) == {19: {"total_loss": 5.0, "lr": 1e-4}, 39: {"total_loss": 4.0, "lr": 1e-4}}


def test_evaluation_written_at_the_same_iteration_joins_it(metrics_file):
    path = metrics_file(row(40, total_loss=4.0), row(40, **{"bbox/AP": 12.5}))
    assert read_metrics(path) == {40: {"total_loss": 4.0, "bbox/AP": 12.5}}


def test_torn_last_line_is_left_out_with_a_warning(metrics_file, caplog):
    path = metrics_file(row(19, total_loss=5.0), row(39, total_loss=4.0)[:-8])
    assert list(read_metrics(path)) == [19]
    assert "line 2" in caplog.text


def test_resumed_run_replaces_what_the_interrupted_one_wrote_past_its_checkpoint(metrics_file):
    interrupted = [row(i, total_loss=1.0) for i in (19, 39, 59, 79)]
    path = metrics_file(*interrupted, row(39, total_loss=2.0), row(59, total_loss=3.0))
    assert series(read_metrics(path), "total_loss") == ([19, 39, 59], [1.0, 2.0, 3.0])


def test_file_without_a_complete_line_is_an_error_that_names_it(metrics_file):
    with pytest.raises(ValueError, match="metrics.json"):
        read_metrics(metrics_file("{"))


@pytest.mark.parametrize("line", ['{"total_loss": 1.0}', "[1, 2]", '{"iteration": null}'])
def test_line_without_an_iteration_is_an_error_that_names_it(metrics_file, line):
    with pytest.raises(ValueError, match="metrics.json, line 2 must be a JSON object with an iteration"):
        read_metrics(metrics_file(row(19, total_loss=5.0), line))


def test_training_time_counts_every_iteration_at_its_logged_speed():
    assert training_seconds({9: {"time": 0.5}, 29: {"time": 0.25}, 30: {"bbox/AP": 1.0}}) == 10 * 0.5 + 20 * 0.25


def test_series_skips_iterations_without_the_metric():
    assert series({1: {"a": 1.0}, 2: {"b": 5.0}, 3: {"a": 2.0}}, "a") == ([1, 3], [1.0, 2.0])
