import json

import numpy as np
import pytest
from PIL import Image

from deformable_detr.visualization import plot_training_curves, read_metrics
from deformable_detr.visualization.training_curves import series


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


def test_series_skips_iterations_without_the_metric():
    assert series({1: {"a": 1.0}, 2: {"b": 5.0}, 3: {"a": 2.0}}, "a") == ([1, 3], [1.0, 2.0])


@pytest.mark.parametrize("evaluated", [True, False])
def test_curves_are_drawn_with_and_without_an_evaluation(metrics_file, tmp_path, evaluated):
    lines = [row(i, total_loss=9 / i, lr=1e-4, loss_ce=2 / i, loss_ce_0=9.0, loss_ce_enc=9.0) for i in range(1, 50)]
    if evaluated:
        lines.append(row(50, **{"bbox/AP": 40.0, "bbox/AP50": 71.0}))
    png = plot_training_curves(metrics_file(*lines), tmp_path / "curves.png")
    with Image.open(png) as picture:
        assert picture.size == (1200, 750)
        pixels = np.asarray(picture.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_only_the_last_decoder_layers_losses_are_main_terms():
    from deformable_detr.visualization.training_curves import _MAIN_LOSS

    names = ["loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_giou_12", "loss_ce_enc", "total_loss"]
    assert [name for name in names if _MAIN_LOSS.fullmatch(name)] == ["loss_ce", "loss_bbox", "loss_giou"]
