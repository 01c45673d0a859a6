"""detections.json is what pycocotools reads."""

import json

import pytest
from pycocotools.coco import COCO

from deformable_detr.detect.results import CocoResults, GroundTruthIds

DETECTION = {"category_id": 1, "category": "disc", "score": 0.5, "bbox": [1.0, 2.0, 30.0, 40.0]}


def test_pycocotools_reads_the_file_as_a_dataset(tmp_path):
    results = CocoResults({"disc": 1, "square": 2})
    results.add("a.jpg", (60, 80), [DETECTION, DETECTION])
    results.add("clip.mp4", (60, 80), [], frame_index=0)
    results.save(tmp_path / "detections.json")
    coco = COCO(str(tmp_path / "detections.json"))
    assert coco.imgs[1] == {"id": 1, "file_name": "a.jpg", "height": 60, "width": 80}
    assert coco.imgs[2]["frame_index"] == 0
    assert coco.getAnnIds(imgIds=[1], areaRng=[1199, 1201]) == [1, 2]
    assert coco.cats[2]["name"] == "square"


def test_results_with_the_ids_of_the_annotations_can_be_compared_with_them(tmp_path, write_coco):
    truth = write_coco()
    ids = GroundTruthIds.load(tmp_path / "data" / "instances.json")
    results = CocoResults(ids.categories, ids.images)
    results.add("12.png", (64, 64), [DETECTION])
    results.save(tmp_path / "detections.json")
    loaded = COCO(truth.json).loadRes(json.loads((tmp_path / "detections.json").read_text())["annotations"])
    assert [(a["image_id"], a["category_id"], a["score"]) for a in loaded.anns.values()] == [(12, 9, 0.5)]


@pytest.mark.parametrize(
    "names, class_names, message",
    [
        (["10.png", "nope.png"], ["disc"], "no image or category nope.png"),
        (["10.png"], ["disc", "star"], "no image or category star"),
        (["10.png", "10.png"], ["disc"], "given once, got several files 10.png"),
    ],
)
def test_images_and_classes_without_an_id_are_refused(tmp_path, write_coco, names, class_names, message):
    write_coco()
    ids = GroundTruthIds.load(tmp_path / "data" / "instances.json")
    with pytest.raises(ValueError, match=message):
        ids.check(names=names, class_names=class_names)


@pytest.mark.parametrize("text", ["{", "[]", '{"images": []}', '{"images": [{}], "categories": []}'])
def test_a_file_without_annotations_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json must be a COCO annotation file"):
        GroundTruthIds.load(tmp_path / "a.json")


def test_a_byte_order_mark_before_the_annotations_is_read(tmp_path):
    text = '{"images": [{"id": 5, "file_name": "a.png"}], "categories": [{"id": 3, "name": "cat"}]}'
    (tmp_path / "a.json").write_text(text, encoding="utf-8-sig")
    assert GroundTruthIds.load(tmp_path / "a.json") == GroundTruthIds({"a.png": 5}, {"cat": 3})


def test_names_that_are_not_utf8_survive(tmp_path):
    results = CocoResults({"disc": 1})
    results.add("\udcff.jpg", (1, 1), [])
    results.save(tmp_path / "detections.json")
    assert json.loads((tmp_path / "detections.json").read_text())["images"][0]["file_name"] == "\udcff.jpg"
