"""Reading datasets, and what is said of them before the first step."""

import json
import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.structures import BoxMode

from deformable_detr.data.datasets import check_annotations, get_train_dicts, register_coco_data

from .records import annotation, record

# Checks before training


@pytest.mark.parametrize("label", [-1, 3, 80])
def test_labels_outside_the_model_are_named(label):
    with pytest.raises(ValueError, match=rf"\[0, 3\) .*got {label} in image a\.jpg \(image_id 7\)"):
        check_annotations([record(annotation(), annotation(label=label))], num_classes=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", range(4))
def test_boxes_that_are_not_finite_are_named(value, position):
    box = [10.0, 20.0, 30.0, 40.0]
    box[position] = value
    with pytest.raises(ValueError, match=rf"bbox must be finite, got \[.*{value}.*\] in image a\.jpg \(image_id 7\)"):
        check_annotations([record(annotation(box))], num_classes=3)


@pytest.mark.parametrize("box", [(10, 20, 0, 40), (10, 20, 30, 0), (10, 20, -5, 40)])
def test_boxes_without_area_are_reported_once(caplog, box):
    corners = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    good = annotation((10, 20, 11, 21), bbox_mode=BoxMode.XYXY_ABS)
    bad = annotation(corners, bbox_mode=BoxMode.XYXY_ABS)
    with caplog.at_level(logging.WARNING, "deformable_detr"):
        check_annotations([record(annotation(), annotation(box)), record(bad, good, image_id=8)], num_classes=3)
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith("2 boxes without area are left out of training")
    assert str(list(box)) in message and "image a.jpg (image_id 7)" in message


def test_valid_annotations_pass_silently(caplog):
    check_annotations([record(annotation(label=2)), record(), {"file_name": "no_annotations.jpg"}], num_classes=3)
    assert not caplog.records


def test_images_without_objects_are_kept_unless_filtered(write_coco):
    data = write_coco()
    data.content["annotations"] = data.content["annotations"][:2]
    data.save()
    register_coco_data("tiny", data.json, data.images)
    assert [len(d["annotations"]) for d in get_train_dicts("tiny", num_classes=3)] == [1, 1, 0, 0]
    assert len(get_train_dicts("tiny", num_classes=3, filter_empty=True)) == 2


def test_dataset_that_filtering_leaves_empty_is_refused(write_coco):
    data = write_coco()
    for entry in data.content["annotations"]:
        entry["iscrowd"] = 1
    data.save()
    register_coco_data("tiny", data.json, data.images)
    with pytest.raises(ValueError, match="none of the 4 images of tiny has an object that is not a crowd"):
        get_train_dicts("tiny", num_classes=3, filter_empty=True)


@pytest.mark.parametrize("iscrowd", [None, 1])
def test_dataset_without_an_object_is_refused_before_the_first_step(write_coco, iscrowd):
    data = write_coco()
    data.content["annotations"] = [{**a, "iscrowd": 1} for a in data.content["annotations"] if iscrowd]
    data.save()
    register_coco_data("tiny", data.json, data.images)
    with pytest.raises(ValueError, match="nothing to learn: none of the 4 images of tiny has an object that is not a"):
        get_train_dicts("tiny", num_classes=3)


def test_classes_without_an_object_are_named_before_the_first_step(write_coco, caplog):
    data = write_coco()
    register_coco_data("tiny", data.json, data.images)
    get_train_dicts("tiny", num_classes=3)
    assert "no object" not in caplog.text
    data.content["categories"] += [{"id": 20 + n, "name": f"new {n}"} for n in range(12)]
    data.content["annotations"][1]["iscrowd"] = 1
    data.save()
    register_coco_data("tiny", data.json, data.images)
    get_train_dicts("tiny", num_classes=15)
    names = ", ".join(["square", *(f"new {n}" for n in range(9))])
    assert (
        f"13 of 15 classes have no object in the training data and are not learned: {names} and 3 more" in caplog.text
    )


def test_images_with_more_objects_than_queries_are_counted(write_coco, caplog):
    data = write_coco()
    extra = [{**data.content["annotations"][0], "id": 10 + n} for n in range(2)]
    data.content["annotations"] += extra
    data.save()
    register_coco_data("tiny", data.json, data.images)
    get_train_dicts("tiny", num_classes=3, num_queries=3)
    assert "more objects" not in caplog.text
    get_train_dicts("tiny", num_classes=3, num_queries=2)
    assert "1 of 4 training images have more objects than the model has queries (2)" in caplog.text
    assert "The most are 3 in image" in caplog.text and "10.png" in caplog.text


def test_category_ids_become_contiguous_in_ascending_order(write_coco):
    data = write_coco()
    register_coco_data("tiny", data.json, data.images)
    # The images show ids 9, 3, 4, 9, which are third, first and second.
    assert [d["annotations"][0]["category_id"] for d in get_train_dicts("tiny", num_classes=3)] == [2, 0, 1, 2]


def test_model_with_fewer_classes_than_the_dataset_is_refused(write_coco):
    data = write_coco()
    register_coco_data("tiny", data.json, data.images)
    with pytest.raises(ValueError, match=r"\[0, 2\) .*got 2 in image .*10\.png \(image_id 10\)"):
        get_train_dicts("tiny", num_classes=2)


@pytest.mark.parametrize("names", [(), [], ""])
def test_training_without_a_dataset_is_refused(names):
    with pytest.raises(ValueError, match="there is no dataset to train on"):
        get_train_dicts(names, num_classes=3)


def test_unregistered_dataset_is_named():
    with pytest.raises(KeyError, match="no_such_dataset"):
        get_train_dicts("no_such_dataset", num_classes=3)


# The user's own data


def test_registered_data_can_be_loaded(write_coco):
    data = write_coco()
    assert register_coco_data("tiny", data.json, data.images) == ["square", "bar", "disc"]
    first = DatasetCatalog.get("tiny")[0]
    assert detection_utils.read_image(first["file_name"]).shape == (first["height"], first["width"], 3)
    assert MetadataCatalog.get("tiny").thing_classes == ["square", "bar", "disc"]
    assert MetadataCatalog.get("tiny").evaluator_type == "coco"


def test_second_registration_replaces_the_first(write_coco):
    first, second = write_coco("first"), write_coco("second", sizes=[(30, 30)])
    second.content["categories"] = [{"id": 9, "name": "only"}]
    second.save()
    register_coco_data("tiny", first.json, first.images)
    assert len(DatasetCatalog.get("tiny")) == 4
    assert register_coco_data("tiny", second.json, second.images) == ["only"]
    assert len(DatasetCatalog.get("tiny")) == 1
    assert MetadataCatalog.get("tiny").thing_classes == ["only"]


def test_missing_annotation_file_and_folder_are_named(write_coco, tmp_path):
    data = write_coco()
    with pytest.raises(FileNotFoundError, match=r"annotation file '.*absent\.json'"):
        register_coco_data("tiny", str(tmp_path / "absent.json"), data.images)
    with pytest.raises(FileNotFoundError, match="image folder '.*absent' for dataset 'tiny'"):
        register_coco_data("tiny", data.json, str(tmp_path / "absent"))
    assert "tiny" not in DatasetCatalog


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "JSON in COCO format: Expecting "),
        ("", "JSON in COCO format: Expecting "),
        (json.dumps({"images": [], "categories": [{"id": 1, "name": "a"}]}), r"no \['annotations'\]"),
        (json.dumps([1, 2]), r"no \['images', 'annotations', 'categories'\]"),
        ("5", r"no \['images', 'annotations', 'categories'\]"),
        (json.dumps({"images": [], "annotations": [], "categories": []}), "at least one category"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"data\.json must .*{message}"):
        register_coco_data("tiny", str(path), str(tmp_path))
    assert "tiny" not in DatasetCatalog
