"""Sizes of images, and augmentation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T
from PIL import Image

from deformable_detr import load_config
from deformable_detr.data.augmentation import ResizeShortestEdge, augmentation_from_config, build_detr_augmentation

from .records import annotation, mapper, record

CONFIG = str(Path(__file__).parents[2] / "configs" / "COCO-Detection" / "deformable_detr_R_50.yaml")


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
    key = "dataloader.train.mapper.augmentations.random_flip"
    with pytest.raises(ValueError, match="its value must be true or false, got 'none'"):
        load_config(CONFIG.replace(".yaml", ".py"), [f"{key}=none"])
    with pytest.raises(ValueError, match=r"random_flip must be True \(horizontal\) or False, got 'vertical'"):
        build_detr_augmentation(is_train=True, min_size=[64], max_size=96, random_flip="vertical")


@pytest.mark.parametrize(
    "crop_type, size, rule",
    [
        # The base model's size, which is in pixels, with another type alone.
        ("relative", [384, 600], r"two shares in \(0, 1\]"),
        ("relative_range", [0.5, 1.1], r"two shares in \(0, 1\]"),
        ("relative", [0.0, 0.5], r"two shares in \(0, 1\]"),
        ("absolute", [0.9, 0.9], "two numbers of pixels from 1"),
        ("absolute_range", [384], "two numbers of pixels from 1"),
    ],
)
def test_crop_size_of_another_type_is_refused(crop_type, size, rule):
    with pytest.raises(
        ValueError, match=rf"crop_size \(INPUT\.CROP\.SIZE\) must be {rule} .*'{crop_type}', got \{size}"
    ):
        build_detr_augmentation(is_train=True, min_size=[64], max_size=96, crop_type=crop_type, crop_size=size)


def test_relative_crop_keeps_its_share():
    """Of 80x120 pixels, first made 400 to 600 wide; 0.25 x 0.5 of both sides have the aspect of 80 to 240."""
    opts = ["INPUT.CROP.TYPE", "relative", "INPUT.CROP.SIZE", "[0.25, 0.5]", "INPUT.RANDOM_FLIP", "none"]
    crop, _ = augmentation_from_config(load_config(CONFIG, opts), is_train=True)
    data = T.AugInput(np.zeros((80, 120, 3), dtype=np.uint8))
    T.AugmentationList(crop.aug.augs)(data)
    assert data.image.shape in [(100, 300, 3), (125, 375, 3), (150, 450, 3)]
