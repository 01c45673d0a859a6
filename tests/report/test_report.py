import math
import os
import re
import sys
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from deformable_detr.cli import run
from deformable_detr.detect.results import BEST_SCORES, RESULTS, read_best_score
from deformable_detr.report import __main__ as command_line
from deformable_detr.report import sections, write_report
from deformable_detr.report.figures import thin_out
from deformable_detr.report.gallery import PANEL_SIZE
from deformable_detr.report.run import read_run
from deformable_detr.report.sections import summary

VOID = {"meta", "img"}


class Page(HTMLParser):
    """A page taken apart: its text, pictures and links; elements that are not closed in order are an error."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.images, self.addresses, self.tags, self.words = [], [], [], set(), []
        self.enlarged = 0
        self.feed(source)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.addresses += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag == "img":
            self.images.append(attrs)
            self.enlarged += self.open[-2:] == ["details", "summary"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def section(self, title):
        """Text between a heading and the end."""
        return self.text.rpartition(title)[2]


def training_rows(stop=200):
    suffixes = ("", "_0", "_1", "_enc")
    losses = {f"loss_{term}{suffix}": 1.0 for term in ("ce", "bbox", "giou") for suffix in suffixes}
    return [
        {
            "iteration": i,
            "total_loss": 9 / (i + 1),
            "lr": 1e-4,
            "time": 0.5,
            "data_time": 0.1,
            "grad_norm": 2.0,
            **losses,
        }
        for i in range(19, stop, 20)
    ]


def write(run_folder, **kwargs):
    return Page(write_report(run_folder.path, **kwargs).read_text(encoding="utf-8"))


@pytest.fixture
def complete(evaluated):
    evaluations = [
        {"iteration": 80, "bbox/AP": 10.0, "bbox/AP50": 20.0, "bbox/APs": math.nan, "bbox/AP-cat": 5.0},
        {"iteration": 100, "bbox/AP": 12.5, "bbox/AP50": 25.0, "bbox/APs": math.nan, "bbox/AP-cat": 7.0},
    ]
    evaluated.write_metrics(*sorted([*training_rows(100), *evaluations], key=lambda row: row["iteration"]))
    return evaluated


def test_page_of_a_finished_run_is_complete_and_loads_nothing(complete):
    page = write(complete)
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe"}
    assert all(image["alt"] for image in page.images)
    assert "iteration 100 of 100, finished" in page.text
    assert "12.5 at iteration 100; best 12.5 at iteration 100" in page.text
    # Of seven detections one lies in a crowd region; of the five others from 0.3 two are right.
    told = "Scores of 6 detections; of those from 0.3 (dotted), 40% are right"
    assert told in [image["alt"] for image in page.images]
    alts = [image["alt"] for image in page.images]
    for beginning in (
        "Total loss",
        "loss_giou of encoder, decoder 1, decoder 2, decoder 3",
        "Learning rate",
        "grad_norm",
    ):
        assert any(alt.startswith(beginning) for alt in alts), beginning
    assert "Confusion of 2 categories: 2 of 4 objects detected as what they are" in alts
    assert "AP of 1 categories, from cat (7.0) to cat (7.0)" in alts
    assert "no object that is small" in page.text


def test_losses_of_further_queries_have_curves_of_their_own(complete):
    rows = training_rows(100)
    suffixes = [f"_{queries}{layer}" for queries in ("dn", "one2many") for layer in ("", "_0", "_1")]
    for row in rows:
        row |= {f"loss_{term}{suffix}": 2.0 for term in ("ce", "bbox") for suffix in suffixes}
    complete.write_metrics(*rows)
    page = write(complete)
    alts = [image["alt"] for image in page.images]
    for expected in (
        "loss_bbox, loss_ce, loss_giou of the last decoder layer over the iterations",
        "loss_bbox_dn, loss_ce_dn of the last decoder layer over the iterations",
        "loss_bbox_one2many, loss_ce_one2many of the last decoder layer over the iterations",
        "loss_ce of encoder, decoder 1, decoder 2, decoder 3 over the iterations",
        "loss_ce_dn of decoder 1, decoder 2, decoder 3 over the iterations",
        "loss_ce_one2many of decoder 1, decoder 2, decoder 3 over the iterations",
    ):
        assert alts.count(expected) == 1, expected
    assert "loss_ce_dn: focal loss of the classes, of the denoising queries." in page.text


def test_data_are_named_by_their_paths(complete):
    page = write(complete)
    assert f"Evaluated on {complete.data / 'val.json'}" in page.text
    assert f"3 of 3 images of {complete.data / 'val.json'}" in page.text


def test_every_picture_can_be_enlarged(complete):
    page = write(complete)
    assert len(page.images) == page.enlarged > 10


def test_best_scores_are_listed_and_stored_for_detect(complete):
    page = write(complete)
    assert "all together 4 0.85 0.67 1.00 0.50 dog 2 0.80 0.67 1.00 0.50 cat 2 0.85 0.67 1.00 0.50" in page.text
    assert read_best_score(complete.path) == pytest.approx(0.85)
    (complete.path / BEST_SCORES).unlink()
    with pytest.raises(ValueError, match="there is no .*best_scores.json; make a report first"):
        read_best_score(complete.path)


def test_best_scores_from_before_the_last_evaluation_are_refused(complete):
    write(complete)
    later = (complete.path / BEST_SCORES).stat().st_mtime + 10
    os.utime(complete.path / RESULTS, (later, later))
    with pytest.raises(ValueError, match="older than the last evaluation; make a report first"):
        read_best_score(complete.path)


def test_letters_that_no_font_has_are_named_on_the_page(complete, monkeypatch):
    monkeypatch.setattr(sections, "missing_letters", lambda names: "猫")
    assert "In place of the letters 猫 pictures show boxes" in write(complete).text


def test_images_come_most_errors_first_and_those_without_stay_away(complete):
    page = write(complete, num_images=2)
    pairs = [image["alt"] for image in page.images if image["src"].startswith("data:image/jpeg")]
    assert pairs[:4:2] == ["1.png: 1 missed, 1 false: ground truth", "2.png: 1 missed, 1 false: ground truth"]
    assert len(pairs) == 2 * (2 + 2)  # as many evenly spaced ones follow
    assert "0 of 3 images have none" in page.text


def test_the_best_of_equal_values_is_the_first_as_in_the_checkpoint_of_the_best(run_folder):
    run_folder.write_metrics(*({"iteration": i, "bbox/AP": ap} for i, ap in ((9, 0.0), (19, 5.0), (29, 5.0))))
    (table,) = summary(read_run(run_folder.path))
    assert ("Box AP", "5.0 at iteration 29; best 5.0 at iteration 19") in [row[:2] for row in table.rows]


@pytest.mark.parametrize(
    "metrics, told",
    [
        ({"bbox/AP50": 1.0}, "Detectron2 leaves it out for Pascal VOC."),
        ({"bbox/APs": 1.0, "bbox/APr": 1.0}, "Detectron2 leaves it out for LVIS."),
        ({"bbox/APs": 1.0}, "Detectron2 leaves it out for a single category."),
        ({"bbox/APs": math.nan, "bbox/AP-cat": math.nan}, "none has an object in it."),
    ],
)
def test_why_there_is_no_ap_by_category_depends_on_the_evaluator(run_folder, metrics, told):
    run_folder.write_metrics({"iteration": 9, "bbox/AP": 1.0, **metrics})
    grids = [part for part in sections.average_precision(read_run(run_folder.path)) if hasattr(part, "parts")]
    (reason,) = (part.text for grid in grids for part in grid.parts if hasattr(part, "text"))
    assert reason.endswith(told)


def test_a_folder_whose_name_is_no_text_has_a_page(run_folder, capsys):
    folder = run_folder.path.rename(os.fsdecode(os.fsencode(run_folder.path) + b"\xff"))
    command_line.main([str(folder)])
    assert capsys.readouterr().out.endswith("run?/report.html\n")
    assert "<title>run?" in (folder / "report.html").read_text(encoding="utf-8")


def test_sections_without_data_say_why(run_folder):
    page = write(run_folder)
    assert "iteration 20 of 100, running" in page.text
    assert page.text.count("No evaluation has ended yet") == 6
    for reason in (
        "Only the last decoder layer has losses",
        "No evaluation yet: metrics.json holds no bbox/AP",
        "GPU memory is not in log.txt",
        "Detectron2 records no time for single images",
        "The versions are not known",
    ):
        assert reason in page.text


def test_names_are_text_and_never_markup(complete):
    complete.names = {7: "<b>bold</b>", 3: "a$b$ & 'c'"}
    complete.write_truth((1, 7, [0, 0, 10, 10]), (1, 3, [50, 50, 10, 10]))
    config = complete.path / "config.yaml"
    config.write_text(config.read_text().replace("WEIGHTS: ''", "WEIGHTS: '<script>alert(1)</script>'"))
    page = write(complete)
    assert not page.tags & {"b", "script"}
    assert "<b>bold</b>: AP" in page.text
    assert "<script>alert(1)</script>" in page.text
    assert unescape("a$b$ &amp; 'c'") + ": AP" in page.text


def test_values_that_are_not_finite_are_reported_and_drawn_around(run_folder):
    rows = training_rows()
    rows[2]["total_loss"] = math.nan
    rows[5]["total_loss"] = math.inf
    rows[5]["loss_ce"] = -math.inf
    run_folder.write_metrics(*rows, {"iteration": 200, "bbox/AP": math.nan})
    page = write(run_folder)
    assert "total_loss is not finite in 2 lines, first at iteration 59." in page.text
    assert "loss_ce is not finite in 1 lines, first at iteration 119." in page.text


def test_repeated_iterations_of_a_resumed_run_count_once(run_folder):
    interrupted, resumed = training_rows(100), training_rows(60)[1:]
    resumed[-1]["total_loss"] = 7.0
    run_folder.write_metrics(*interrupted, *resumed, end='\n{"iteration": 79, "total')
    (table,) = summary(read_run(run_folder.path))
    values = {label: value for label, value, _ in table.rows}
    assert values["Total loss"] == "7.000 at iteration 59"
    assert values["Time of the iterations"] == "0:00:30"  # 60 of 0.5 s


def test_image_that_is_gone_is_named_and_the_others_are_drawn(complete):
    (complete.data / "1.png").unlink()
    page = write(complete)
    assert "1.png cannot be read" in page.text
    assert any(image["alt"].startswith("2.png") for image in page.images)


def test_several_test_datasets_are_kept_apart(run_folder):
    run_folder.write_metrics({"iteration": 50, "first_val/bbox/AP": 10.0, "last/val/bbox/AP": 20.0})
    page = write(run_folder)
    assert "Box AP on first_val 10.0 at iteration 50" in page.text
    assert "Box AP on last/val 20.0 at iteration 50" in page.text


def test_ap_of_every_decoder_layer_is_one_figure(run_folder):
    layers = {f"bbox_layer_{layer}/{name}": 10.0 * layer for layer in (0, 1) for name in ("AP", "AP50", "APs")}
    run_folder.write_metrics({"iteration": 50, "bbox/AP": 10.0, **layers})
    page = write(run_folder)
    figures = [image["alt"] for image in page.images if "AP" in image["alt"] or "layer" in image["alt"]]
    assert figures[1:] == ["AP by decoder layer (%). At last: decoder 1 0.0, decoder 2 10.0"]
    assert page.text.count("Box AP") == 1


def test_many_points_are_thinned_by_their_means_and_keep_their_gaps():
    values = np.arange(1000.0)
    values[500] = np.nan
    iterations, thinned = thin_out(range(1000), values)
    assert (len(thinned), thinned[0], iterations[0], thinned[-1]) == (334, 1.0, 1.0, 999.0)
    assert np.flatnonzero(np.isnan(thinned)).tolist() == [166]
    assert thin_out([1, 2], [3.0, 4.0])[1].tolist() == [3.0, 4.0]
    assert thin_out([], [])[1].tolist() == []


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    assert run(command_line.main) == 0


def test_command_writes_the_page_where_it_is_told_to(complete, tmp_path, monkeypatch, capsys):
    data = ["--val-json", complete.data / "val.json", "--val-images", complete.data]
    run_command(
        monkeypatch, complete.path, "--output", tmp_path / "page.html", "--num-images", 1, "--score", 0.5, *data
    )
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert "score from 0.5" in Page((tmp_path / "page.html").read_text()).text


def test_command_draws_the_sheet_beside_the_page(complete, tmp_path, monkeypatch, capsys):
    run_command(monkeypatch, complete.path, "--sheet", tmp_path / "sheet.png", "--num-images", 2)
    assert capsys.readouterr().out.splitlines() == [str(complete.path / "report.html"), str(tmp_path / "sheet.png")]
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width > 4 * PANEL_SIZE  # two pairs


def test_sheet_of_a_run_without_an_evaluation_ends_with_the_reason(run_folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_command(monkeypatch, run_folder.path, "--sheet", tmp_path / "sheet.png")
    assert "error: No evaluation has ended yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output", "nowhere/page.html"], "cannot write nowhere/page.html: there is no folder nowhere"),
        (["--sheet", "nowhere/sheet.png"], "cannot write nowhere/sheet.png: there is no folder nowhere"),
        (["--num-images", "0"], "num_images must be at least 1, got 0"),
        (["--score", "30"], r"score_threshold must be in \[0, 1\], got 30"),
        (["--val-json", "gone.json", "--val-images", "."], "no annotation file 'gone.json'"),
    ],
)
def test_wrong_arguments_end_with_one_line(run_folder, monkeypatch, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_command(monkeypatch, run_folder.path, *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_folder_without_metrics_ends_with_what_is_expected(run_folder, monkeypatch, capsys):
    (run_folder.path / "metrics.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        run_command(monkeypatch, run_folder.path)
    assert "no metrics.json; expected the OUTPUT_DIR" in capsys.readouterr().err


def test_annotations_without_images_are_refused(run_folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_command(monkeypatch, run_folder.path, "--val-json", "val.json")
    assert "--val-images" in capsys.readouterr().err
