"""Which queries are chosen, what they are matched to, and what is refused."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.cli import run as run_command
from deformable_detr.detect import prepare_image, read_image
from deformable_detr.explain import Truth, draw_explanation, explain, record, write_page
from deformable_detr.explain.__main__ import main
from deformable_detr.explain.selection import Detection, rank_detections
from deformable_detr.explain.truth import match_truth, read_truth
from deformable_detr.loading import class_index
from deformable_detr.modeling import HungarianMatcher

from .conftest import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_explained_as_picture_and_page(load_tiny, image_file, tmp_path, variant):
    explanation = explain(load_tiny(variant), image_file, detections=2, score=0.0)
    assert explanation.chosen == [0, 1]
    picture = draw_explanation(explanation, tmp_path / "x.png", layer=1)
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 100
    assert write_page(explanation, tmp_path / "x.html").stat().st_size < 3_000_000


@pytest.mark.parametrize("variant", ["", "_two_stage"])
def test_detections_are_those_of_the_model(load_tiny, image_file, variant):
    loaded = load_tiny(variant)
    inputs = [prepare_image(loaded, read_image(image_file))]
    expected = loaded.model(inputs)[0]["instances"]
    ranked = rank_detections(record(loaded.model, inputs)[0], loaded.model.test_topk_per_image)
    assert [d.label for d in ranked] == expected.pred_classes.tolist()
    assert [d.score for d in ranked] == expected.scores.tolist()
    torch.testing.assert_close(torch.tensor([d.box for d in ranked]), expected.pred_boxes.tensor)


def test_a_point_chooses_the_box_around_it_with_the_nearest_centre():
    large, small = Detection(0, 0, 0.9, (0, 0, 90, 90)), Detection(1, 0, 0.5, (10, 10, 30, 30))
    far = Detection(2, 0, 0.8, (60, 0, 70, 10))

    def nearest(x, y):
        return min((large, small, far), key=lambda detection: detection.distance(x, y)).query

    assert [nearest(20, 22), nearest(50, 50), nearest(66, 4), nearest(200, 200)] == [1, 0, 2, 0]


def test_a_point_and_a_class_choose_detections(load_tiny, image_file):
    loaded = load_tiny()
    explanation = explain(loaded, image_file, point=(99, 0), score=0.0)
    (index,) = explanation.chosen
    distances = [detection.distance(99, 0) for detection in explanation.detections]
    assert distances[index] == min(distances) and explanation.pixel == (99, 0)
    name = loaded.class_names[explanation.detections[3].label]
    chosen = explain(loaded, image_file, class_name=name, score=0.0)
    wanted = [i for i, d in enumerate(chosen.detections) if loaded.class_names[d.label] == name]
    assert chosen.chosen == wanted and 3 in wanted


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"point": (100, 5)}, r"0 <= x < 100 and 0 <= y < 80, got \(100, 5\)"),
        ({"point": (float("nan"), 5)}, r"got \(nan, 5\)"),
        ({"class_name": "zebr"}, "class 'zebr' .* 80 classes: did you mean zebra"),
        ({"class_name": "qqqq"}, "it knows person, .* and 60 more"),
        ({"score": 0.9}, r"no detection has a score of at least 0.9: the best has 0\.\d+"),
        ({"point": (1, 1), "class_name": "dog"}, "point or class_name, not both"),
        ({"detections": 0}, "detections must be at least 1, got 0"),
    ],
)
def test_bad_requests_name_thing_rule_and_value(load_tiny, image_file, request_, message):
    with pytest.raises(ValueError, match=message):
        explain(load_tiny(), image_file, **request_)


def test_a_class_without_detection_names_its_best_score(load_tiny, image_file):
    loaded = load_tiny()
    # Only the first class may be detected.
    for head in loaded.model.class_embed:
        head.bias.data[0] = 5.0
    with pytest.raises(ValueError, match="no detection of class 'dog' has a score of at least 0.3"):
        explain(loaded, image_file, class_name="dog")


def test_layers_that_do_not_exist_are_refused(explanation, tmp_path):
    with pytest.raises(ValueError, match="decoder layer must be from 1 to 2, got 3"):
        draw_explanation(explanation, tmp_path / "x.png", layer=3)
    with pytest.raises(ValueError, match="encoder layer must be from 1 to 1, got 0"):
        write_page(explanation, tmp_path / "x.html", encoder_layer=0)


def test_an_image_in_memory_is_explained_without_encoder_layers(load_tiny, tmp_path):
    loaded = load_tiny(**{"MODEL.DEFORMABLE_DETR.ENC_LAYERS": 0})
    explanation = explain(loaded, np.zeros((40, 60, 3), np.uint8), score=0.0)
    assert explanation.name == "image" and explanation.recording.encoder == []
    draw_explanation(explanation, tmp_path / "x.png")
    assert '"encoder":null' in write_page(explanation, tmp_path / "x.html").read_text()


def test_queries_are_matched_to_objects_in_pixels(explanation):
    """Two objects exactly where two queries predict: each goes to its query, whatever their order."""
    recording = explanation.recording
    labels = recording.pred_logits[-1].argmax(-1)
    truths = [Truth(int(labels[query]), tuple(recording.boxes[-1, query].tolist())) for query in (7, 2)]
    matched = match_truth(recording, truths, HungarianMatcher())
    assert [truth.query for truth in matched] == [7, 2]
    assert [truth.iou for truth in matched] == pytest.approx([1, 1])


@pytest.fixture
def coco_file(image_file, tmp_path):
    """One square and one crowd region in the image."""
    annotation = {"image_id": 4, "category_id": 9, "bbox": [10, 20, 30, 40], "area": 1200, "iscrowd": 0}
    content = {
        "images": [{"id": 4, "file_name": f"somewhere/{image_file.name}", "width": 100, "height": 80}],
        "annotations": [{**annotation, "id": 1}, {**annotation, "id": 2, "iscrowd": 1}],
        "categories": [{"id": 9, "name": "dog"}],
    }

    def write(**changes):
        path = tmp_path / "truth.json"
        path.write_text(json.dumps({**content, **changes}))
        return path

    return write


def test_a_matched_query_is_shown_even_below_the_score(load_tiny, image_file, coco_file):
    loaded = load_tiny()
    for head in loaded.model.class_embed:
        head.bias.data[0] = 5.0
    explanation = explain(loaded, image_file, score=0.5, ground_truth=coco_file())
    (truth,) = explanation.truths
    assert truth.box == (10, 20, 40, 60) and loaded.class_names[truth.label] == "dog"
    assert explanation.truth_of(next(d for d in explanation.detections if d.query == truth.query)) is truth


def test_ground_truth_that_does_not_fit_is_refused(coco_file):
    with pytest.raises(ValueError, match="one image of file name other.png, it has 0"):
        read_truth(coco_file(), "other.png", (80, 100), ["dog"])
    with pytest.raises(ValueError, match="noise.png is 100x80 pixels, but the image is 80x100"):
        read_truth(coco_file(), "noise.png", (100, 80), ["dog"])
    with pytest.raises(ValueError, match="class 'dog' is not one of the model's 1 classes"):
        read_truth(coco_file(), "noise.png", (80, 100), ["cat"])
    with pytest.raises(ValueError, match="truth.json must list at least one category"):
        read_truth(coco_file(categories=[]), "noise.png", (80, 100), ["dog"])
    box = {"id": 1, "image_id": 4, "category_id": 9, "bbox": [10, 20, 30, 40]}
    for change, told in (
        ({"bbox": None}, r"truth\.json: annotation 1 of image 4: bbox must be four finite numbers, got null"),
        ({"category_id": 8}, r"truth\.json: annotation 1 has the unknown category 8"),
    ):
        with pytest.raises(ValueError, match=told):
            read_truth(coco_file(annotations=[{**box, **change}]), "noise.png", (80, 100), ["dog"])
    unused = [{**box, **change} for change in ({"ignore": 1}, {"bbox": [10, 20, 0, 5]}, {"image_id": 5, "bbox": None})]
    assert read_truth(coco_file(annotations=unused), "noise.png", (80, 100), ["dog"]) == []
    assert match_truth(None, read_truth(coco_file(annotations=[]), "noise.png", (80, 100), []), None) == []


def test_class_names_are_found_exactly():
    assert class_index("dog", ["cat", "dog"]) == 1


@pytest.fixture
def run(tiny_yaml, monkeypatch, tmp_path):
    """A function that runs the command on an image with a tiny model."""
    _, config, *opts = tiny_yaml("_box_refine")

    def command(image, *flags):
        arguments = [str(image), "--model", config, "--weights", "", "--device", "cpu", "--score", "0", *flags]
        arguments += ["--output", str(tmp_path / "out"), "--opts", *opts]
        monkeypatch.setattr(sys, "argv", ["explain", *arguments])
        assert run_command(main) == 0

    return command


def test_the_command_writes_a_picture_and_a_page(run, image_file, tmp_path, capsys):
    run(image_file, "--point", "20", "30", "--layer", "1")
    written = capsys.readouterr().out.split()
    assert written == [str(tmp_path / "out" / f"noise_explained.{suffix}") for suffix in ("png", "html")]
    assert '"layer":1' in (tmp_path / "out" / "noise_explained.html").read_text()


def test_the_command_ends_with_one_line_about_what_is_wrong(run, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "text.jpg")
    assert re.match(r"error: cannot read image .*text.jpg", capsys.readouterr().err)


def test_an_output_folder_that_cannot_be_written_is_named(run, image_file, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit, match="2"):
        run(image_file)
    assert re.match("error: cannot write to output folder .*out", capsys.readouterr().err)


def test_point_and_class_exclude_each_other(run, image_file, capsys):
    with pytest.raises(SystemExit):
        run(image_file, "--point", "1", "2", "--class", "dog")
    assert "not allowed with argument" in capsys.readouterr().err


def test_names_with_dollar_signs_and_letters_of_any_script_are_drawn(explanation, tmp_path):
    names = [r"$\nothing$ 猫"] * len(explanation.class_names)
    assert draw_explanation(replace(explanation, class_names=names), tmp_path / "x.png").is_file()
