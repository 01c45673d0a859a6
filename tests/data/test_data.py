"""Sizes, augmentation, the mapper, and the checks on datasets."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from deformable_detr import load_config
from deformable_detr.data.augmentation import ResizeShortestEdge, augmentation_from_config, build_detr_augmentation
from deformable_detr.data.datasets import check_annotations, get_train_dicts, register_coco_data
from deformable_detr.data.mapper import NamedErrorsMapper

CONFIG = str(Path(__file__).parents[2] / "configs" / "COCO-Detection" / "deformable_detr_R_50.yaml")


def record(*annotations: dict, file_name: str = "a.jpg", image_id: int = 7, **fields) -> dict:
    return {"file_name": file_name, "image_id": image_id, "annotations": list(annotations), **fields}


def annotation(bbox=(10.0, 20.0, 30.0, 40.0), label: int = 0, **fields) -> dict:
    return {"bbox": list(bbox), "bbox_mode": BoxMode.XYWH_ABS, "category_id": label, "iscrowd": 0, **fields}


def mapper(is_train: bool, augmentations) -> NamedErrorsMapper:
    return NamedErrorsMapper(is_train=is_train, augmentations=augmentations, image_format="RGB")


# Sizes


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        # 640 * 800 / 480 = 1066.67: truncated, where Detectron2 rounds to 1067.
        (480, 640, (800, 1066)),
        (640, 480, (1066, 800)),
        # 500 * 800 / 375 = 1066.67.
        (375, 500, (800, 1066)),
        # 640 * 800 / 427 = 1199.06.
        (427, 640, (800, 1199)),
        (600, 600, (800, 800)),
        (800, 1000, (800, 1000)),
        # 640 * 800 / 333 = 1537.5 > 1333: the short side becomes round(1333 * 333 / 640 = 693.59) = 694 and the long
        # one int(694 * 640 / 333) = 1333.
        (333, 640, (694, 1333)),
        # 640 * 800 / 360 = 1422 > 1333: round(749.81) = 750, and int(750 * 640 / 360 = 1333.33) = 1333.
        (360, 640, (750, 1333)),
        # round(1333 * 100 / 1000 = 133.3) = 133, and then 1330, short of the limit.
        (100, 1000, (133, 1330)),
    ],
)
def test_sizes_are_the_official_ones(height, width, expected):
    assert ResizeShortestEdge.get_output_shape(height, width, 800, 1333) == expected


def test_resize_gives_the_size_it_announces():
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    transform = ResizeShortestEdge(80, 1333).get_transform(image)
    assert transform.apply_image(image).shape == (80, 106, 3)
    np.testing.assert_allclose(transform.apply_coords(np.array([[64.0, 48.0]])), [[106.0, 80.0]])


def test_images_of_one_line_keep_it_and_the_limit_on_the_long_side():
    assert ResizeShortestEdge.get_output_shape(1, 5000, 800, 1333) == (1, 1333)
    assert ResizeShortestEdge.get_output_shape(5000, 1, 800, 1333) == (1333, 1)


def test_size_0_keeps_the_image():
    image = np.zeros((17, 31, 3), dtype=np.uint8)
    assert ResizeShortestEdge(0).get_transform(image).apply_image(image).shape == image.shape


def test_range_samples_between_its_ends():
    np.random.seed(0)
    image = np.zeros((10, 10, 3), dtype=np.uint8)
    resize = ResizeShortestEdge((20, 23), sample_style="range")
    sizes = {resize.get_transform(image).apply_image(image).shape[0] for _ in range(60)}
    assert sizes == {20, 21, 22, 23}


# Augmentation


def recorded_sizes(augmentation: T.Augmentation, shape: tuple[int, int], *, times: int) -> list[list[str]]:
    """Names of the transforms that each application of an augmentation used."""
    used = []
    for _ in range(times):
        data = T.AugInput(np.zeros((*shape, 3), dtype=np.uint8))
        used.append([type(t).__name__ for t in T.AugmentationList(augmentation)(data).transforms])
    return used


def test_training_crops_in_half_of_the_cases_and_flips_in_half():
    np.random.seed(0)
    augmentation = build_detr_augmentation(is_train=True, min_size=[48, 64], max_size=96)
    used = recorded_sizes(augmentation, (60, 80), times=100)
    cropped = [names for names in used if "TransformList" in names or "CropTransform" in names]
    flipped = [names for names in used if "HFlipTransform" in names]
    assert 30 < len(cropped) < 70
    assert 30 < len(flipped) < 70
    assert all(names[-1] == "ResizeTransform" for names in used)


@pytest.mark.parametrize("crops", [False, True])
def test_augmented_boxes_stay_on_their_object(tmp_path, crops):
    """A bright rectangle on black: after every augmentation its box frames exactly the bright pixels."""
    np.random.seed(1)
    pixels = np.zeros((120, 160, 3), dtype=np.uint8)
    pixels[30:90, 40:120] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    augmentation = build_detr_augmentation(is_train=True, min_size=[100, 140], max_size=180)
    for part in augmentation:
        if isinstance(part, T.RandomApply):
            part.prob = float(crops)
    train = mapper(True, augmentation)
    seen = 0
    for _ in range(12):
        item = train(record(annotation((40, 30, 80, 60)), file_name=str(tmp_path / "a.png"), height=120, width=160))
        height, width = item["image"].shape[1:]
        assert item["instances"].image_size == (height, width)
        assert max(height, width) <= 181
        for box in item["instances"].gt_boxes.tensor:
            seen += 1
            rows, columns = torch.where(item["image"][0] > 127)
            bright = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            torch.testing.assert_close(box, bright.float(), atol=1.5, rtol=0)
            assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
    assert seen > 6


@pytest.mark.parametrize(
    "scale, size",
    [
        # Fitted to 2 x 200 pixels, 300x400, of which a window of 200x200 is left.
        (2.0, (200, 200)),
        # Fitted to 100 pixels, and not padded: that is done, and masked, with the batch.
        (0.5, (75, 100)),
    ],
)
def test_large_scale_jitter_resizes_and_crops_and_boxes_stay_on_their_object(tmp_path, scale, size):
    np.random.seed(1)
    pixels = np.zeros((120, 160, 3), dtype=np.uint8)
    pixels[30:90, 40:120] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    train = mapper(
        True,
        build_detr_augmentation(is_train=True, min_size=[64], max_size=96, lsj_size=200, lsj_scale=(scale, scale)),
    )
    for _ in range(4):
        item = train(record(annotation((40, 30, 80, 60)), file_name=str(tmp_path / "a.png"), height=120, width=160))
        assert item["image"].shape[1:] == item["instances"].image_size == size
        (box,) = item["instances"].gt_boxes.tensor
        rows, columns = torch.where(item["image"][0] > 127)
        bright = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        torch.testing.assert_close(box, bright.float(), atol=1.5, rtol=0)


def test_large_scale_jitter_leaves_a_line_of_a_long_image():
    """400x1 fitted to 100 pixels would be 100 x 0.25."""
    augmentation = build_detr_augmentation(
        is_train=True, min_size=[64], max_size=96, lsj_size=200, lsj_scale=(0.5, 0.5)
    )
    data = T.AugInput(np.full((1, 400, 3), 7, dtype=np.uint8))
    T.AugmentationList(augmentation)(data)
    assert data.image.shape == (1, 100, 3) and (data.image == 7).all()


def test_colour_jitter_moves_each_property_by_its_amount():
    np.random.seed(2)
    gray = np.full((8, 8, 3), 100, dtype=np.uint8)
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[..., 0] = 100

    def values(image, **amounts):
        augmentation = build_detr_augmentation(
            is_train=True, min_size=[8], max_size=8, random_flip=False, crop_size=None, **amounts
        )
        found = []
        for _ in range(20):
            data = T.AugInput(image.copy())
            T.AugmentationList(augmentation)(data)
            found.append(data.image[0, 0].tolist())
        return found

    brightness = [value[0] for value in values(gray, brightness=0.4)]
    assert 60 <= min(brightness) < 80 and 120 < max(brightness) <= 140
    # One gray has neither contrast nor colour.
    assert all(abs(v - 100) <= 2 for value in values(gray, contrast=0.9, saturation=0.9) for v in value)
    # Its gray is 0.299 * 100: saturation moves red from and to it.
    saturation = [value[0] for value in values(red, saturation=0.5)]
    assert 29.9 + 0.5 * 70.1 - 1 <= min(saturation) < 100 < max(saturation) <= 29.9 + 1.5 * 70.1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"brightness": 1.0}, r"brightness of the colour jitter must be in \[0, 1\), got 1\.0"),
        ({"lsj_size": 64, "lsj_scale": (0.0, 2.0)}, r"0 < min <= max, got 64 and \(0\.0, 2\.0\)"),
    ],
)
def test_jitter_out_of_its_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_detr_augmentation(is_train=True, min_size=[64], max_size=96, **options)


def test_jitter_is_switched_on_by_its_keys_in_both_systems():
    yaml = load_config(
        CONFIG, ["INPUT.COLOR_JITTER.BRIGHTNESS", "0.4", "INPUT.COLOR_JITTER.CONTRAST", "0.3", "INPUT.LSJ.SIZE", "640"]
    )
    prefix = "dataloader.train.mapper.augmentations"
    lazy = load_config(
        str(CONFIG).replace(".yaml", ".py"),
        [f"{prefix}.brightness=0.4", f"{prefix}.contrast=0.3", f"{prefix}.lsj_size=640"],
    )
    names = ["RandomFlip", "ResizeScale", "FixedSizeCrop", "RandomBrightness", "RandomContrast"]
    for augmentation in (
        augmentation_from_config(yaml, is_train=True),
        instantiate(lazy.dataloader.train.mapper.augmentations),
    ):
        assert [type(part).__name__ for part in augmentation] == names
        assert (augmentation[1].target_height, augmentation[1].max_scale, augmentation[2].crop_size) == (
            640,
            2.0,
            (640, 640),
        )
        assert (augmentation[3].intensity_min, augmentation[3].intensity_max) == (0.6, 1.4)


def test_evaluation_resizes_once_and_does_nothing_else():
    cfg = load_config(CONFIG)
    augmentation = augmentation_from_config(cfg, is_train=False)
    assert recorded_sizes(augmentation, (480, 640), times=3) == [["ResizeTransform"]] * 3
    data = T.AugInput(np.zeros((480, 640, 3), dtype=np.uint8))
    T.AugmentationList(augmentation)(data)
    assert data.image.shape == (800, 1066, 3)


def test_configuration_switches_crop_and_flip_off():
    cfg = load_config(CONFIG, ["INPUT.CROP.ENABLED", "False", "INPUT.RANDOM_FLIP", "none"])
    assert [type(a) for a in augmentation_from_config(cfg, is_train=True)] == [ResizeShortestEdge]


def test_unknown_flip_is_refused():
    cfg = load_config(CONFIG, ["INPUT.RANDOM_FLIP", "vertical"])
    with pytest.raises(ValueError, match="RANDOM_FLIP must be 'horizontal' or 'none', got 'vertical'"):
        augmentation_from_config(cfg, is_train=True)


# Mapper


@pytest.fixture
def png(tmp_path: Path) -> str:
    path = tmp_path / "image.png"
    Image.new("RGB", (64, 48), "white").save(path)
    return str(path)


def test_crowds_and_boxes_without_area_are_not_trained_on(png):
    annotations = [annotation((0, 0, 10, 10), 1), annotation((0, 0, 20, 20), 2, iscrowd=1), annotation((5, 5, 0, 9), 3)]
    item = mapper(True, [])(record(*annotations, file_name=png))
    assert item["instances"].gt_classes.tolist() == [1]
    assert item["instances"].gt_boxes.tensor.tolist() == [[0, 0, 10, 10]]


def test_boxes_are_clipped_to_the_image(png):
    item = mapper(True, [])(record(annotation((-10, 8, 1000, 20)), file_name=png))
    assert item["instances"].gt_boxes.tensor.tolist() == [[0, 8, 64, 28]]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_every_kind_of_image_becomes_three_channels(tmp_path, mode):
    path = str(tmp_path / "image.png")
    Image.new(mode, (64, 48)).save(path)
    item = mapper(False, [ResizeShortestEdge(24)])(record(file_name=path))
    assert item["image"].shape == (3, 24, 32)
    assert item["image"].dtype == torch.uint8


def test_grayscale_jpeg_has_equal_channels(tmp_path):
    path = str(tmp_path / "image.jpg")
    Image.linear_gradient("L").save(path)
    image = mapper(False, [])(record(file_name=path))["image"]
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    assert image.float().std() > 10


def broken_file(tmp_path: Path, kind: str) -> str:
    path = tmp_path / f"{kind}.{'png' if kind.endswith('png') else 'jpg'}"
    if kind != "missing":
        Image.effect_noise((64, 48), 50).save(path)
        content = path.read_bytes()
        broken = {"corrupt": b"not an image" * 9, "empty": b"", "truncated_png": content[:-600]}
        path.write_bytes(broken.get(kind, content[: len(content) // 2]))
    return str(path)


@pytest.mark.parametrize("kind", ["missing", "empty", "corrupt", "truncated", "truncated_png"])
@pytest.mark.parametrize("is_train", [True, False])
def test_unreadable_files_are_named(tmp_path, kind, is_train):
    path = broken_file(tmp_path, kind)
    with pytest.raises(OSError, match=rf"cannot read image .*{kind}\..* \(image_id 7\): ."):
        mapper(is_train, [])(record(file_name=path))


def test_other_size_than_annotated_names_the_file(png):
    with pytest.raises(OSError, match=r"cannot read image .*image\.png \(image_id 7\): .*\(64, 48\)"):
        mapper(False, [])(record(file_name=png, height=64, width=48))


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
    with caplog.at_level(logging.WARNING, "deformable_detr"):
        check_annotations([record(annotation(), annotation(box)), record(annotation(box), image_id=8)], num_classes=3)
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
