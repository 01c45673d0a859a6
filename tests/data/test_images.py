"""One reader for training, evaluation and every tool: what becomes of every kind of image."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, detection_utils
from PIL import Image

from deformable_detr.data.checks import load_coco_data
from deformable_detr.data.images import ImageError, read_file
from deformable_detr.data.mapper import NamedErrorsMapper
from deformable_detr.detect import read_image

BLACK, WHITE, HALF = [0, 0, 0], [255, 255, 255], [128, 128, 128]


def palette(path: Path) -> None:
    """Colour 0 is red and transparent, colour 1 is blue."""
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    image.save(path, transparency=0)


def gray(values: list[float], dtype: str, *, mode: str | None = None):
    def save(path: Path) -> None:
        image = Image.fromarray(np.array([values], dtype=dtype))
        assert mode is None or image.mode == mode
        image.save(path)

    return save


def colours(mode: str, *values: tuple[int, ...]):
    def save(path: Path) -> None:
        image = Image.new(mode, (len(values), 1))
        for x, value in enumerate(values):
            image.putpixel((x, 0), value)
        image.save(path)

    return save


# Kind -> what writes a file of it, the mode that Pillow finds in it, the pixels that training and all tools see.
KINDS = {
    "1.png": (lambda path: Image.frombytes("1", (2, 1), b"\x40").save(path), "1", [BLACK, WHITE]),
    "L.png": (colours("L", (0,), (128,), (255,)), "L", [BLACK, HALF, WHITE]),
    "LA.png": (colours("LA", (0, 0), (0, 255), (0, 127)), "LA", [WHITE, BLACK, HALF]),
    "P with transparency.png": (palette, "P", [WHITE, [0, 0, 200]]),
    "RGB.png": (colours("RGB", (1, 2, 3), (255, 0, 9)), "RGB", [[1, 2, 3], [255, 0, 9]]),
    "RGB with transparency.png": (
        lambda path: Image.new("RGB", (1, 1), (1, 2, 3)).save(path, transparency=(1, 2, 3)),
        "RGB",
        [WHITE],
    ),
    "RGBA.png": (colours("RGBA", (200, 0, 0, 0), (200, 0, 0, 255)), "RGBA", [WHITE, [200, 0, 0]]),
    "CMYK.tif": (colours("CMYK", (0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)), "CMYK", [WHITE, [0, 255, 255], BLACK]),
    "YCbCr.tif": (colours("YCbCr", (0, 128, 128), (255, 128, 128)), "YCbCr", [BLACK, WHITE]),
    "I;16.png": (gray([0, 257, 32896, 65535], "<u2"), "I;16", [BLACK, [1, 1, 1], HALF, WHITE]),
    "I;16.tif": (gray([0, 257, 32896, 65535], "<u2"), "I;16", [BLACK, [1, 1, 1], HALF, WHITE]),
    "I;16B.tif": (gray([0, 257, 32896, 65535], ">u2", mode="I;16B"), "I;16B", [BLACK, [1, 1, 1], HALF, WHITE]),
    # The format says that these are 16 bits, although Pillow gives them 32.
    "I.pgm": (lambda path: path.write_bytes(b"P5 3 1 65535\n\0\0\x80\x80\xff\xff"), "I", [BLACK, HALF, WHITE]),
    "I.tif": (gray([0, 128, 255], "<i4", mode="I"), "I", [BLACK, HALF, WHITE]),
    "F.tif": (gray([0, 128 / 255, 1], "<f4", mode="F"), "F", [BLACK, HALF, WHITE]),
}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path) -> tuple[str, list[list[int]]]:
    """A file, and its pixels."""
    write, mode, pixels = KINDS[request.param]
    path = tmp_path / request.param
    write(path)
    with Image.open(path) as image:
        assert image.mode == mode
    return str(path), pixels


def mapped(path: str, *, is_train: bool, image_format: str = "RGB") -> list[list[list[int]]]:
    mapper = NamedErrorsMapper(is_train, augmentations=[], image_format=image_format)
    return mapper({"file_name": path, "image_id": 1})["image"].permute(1, 2, 0).tolist()


def test_training_evaluation_and_detection_see_the_same_pixels(kind):
    path, pixels = kind
    assert read_image(path).tolist() == [pixels]
    assert mapped(path, is_train=True) == mapped(path, is_train=False) == [pixels]
    assert mapped(path, is_train=True, image_format="BGR") == [[pixel[::-1] for pixel in pixels]]


def test_every_kind_that_can_be_read_is_sound_to_the_check_of_the_data(kind, write_coco):
    path, pixels = kind
    data = write_coco(sizes=[(len(pixels), 1)], boxes=[(0, 0, 1, 1)])
    data.content["images"][0]["file_name"] = path
    data.save()
    assert not load_coco_data(data.json, data.images).problems


@pytest.mark.parametrize(
    "name, write, reason",
    [
        ("F.tif", gray([0, 300.5], "<f4"), r"floating-point pixels must be in \[0, 1\], got values from 0.0 to 300.5"),
        ("NaN.tif", gray([0, float("nan")], "<f4"), r"floating-point pixels must be in \[0, 1\], got .* nan"),
        ("I.tif", gray([0, 256], "<i4"), r"32-bit pixels must be in \[0, 255\], got values from 0 to 256"),
    ],
)
def test_what_cannot_be_read_is_refused_by_all_and_named_by_the_check_of_the_data(
    tmp_path, write_coco, name, write, reason
):
    path = tmp_path / name
    write(path)
    with pytest.raises(ImageError, match=f"cannot read image .*{name}: .*{reason}"):
        read_image(path)
    with pytest.raises(OSError, match=rf"cannot read image .*{name} \(image_id 1\): .*{reason}"):
        mapped(str(path), is_train=True)
    data = write_coco(sizes=[(2, 1)], boxes=[(0, 0, 1, 1)])
    data.content["images"][0]["file_name"] = str(path)
    data.save()
    problems = load_coco_data(data.json, data.images).problems
    ((what, _),) = problems.cases
    assert what == "unreadable image file" and not load_coco_data(data.json, data.images).content["images"]
    assert str(path) in str(problems)
    assert re.search(reason, str(problems))


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_images_of_8_bits_have_the_pixels_that_detectron2_gives_them(tmp_path, suffix, mode, image_format):
    path = str(tmp_path / f"image.{suffix}")
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    # What each format can hold.
    image = image.convert(
        {"CMYK": "CMYK" if suffix == "jpg" else "RGB", "P": "RGB" if suffix == "jpg" else "P"}.get(mode, mode)
    )
    image.save(path)
    expected = detection_utils.read_image(path, image_format)
    assert np.array_equal(mapped(path, is_train=True, image_format=image_format), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_images_stand_upright_and_the_check_of_the_data_knows_their_size(tmp_path, write_coco, suffix, orientation):
    path = str(tmp_path / f"image.{suffix}")
    exif = Image.Exif()
    exif[0x0112] = orientation
    # A corner of its own, large enough for JPEG's blocks.
    stored = np.zeros((32, 48, 3), dtype=np.uint8)
    stored[:16, :16] = 255
    Image.fromarray(stored).save(path, exif=exif)
    # Where row 0 and column 0 of what is stored belong, by the EXIF standard.
    edges = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "lt", 6: "rt", 7: "rb", 8: "lb"}[orientation]
    corners = {"".join(sorted(edge)): edge for edge in ("tl", "tr", "bl", "br")}
    expected = np.zeros((48, 32) if edges[0] in "lr" else (32, 48), dtype=bool)
    vertical, horizontal = corners["".join(sorted(edges))]
    rows = slice(16) if vertical == "t" else slice(-16, None)
    columns = slice(16) if horizontal == "l" else slice(-16, None)
    expected[rows, columns] = True
    assert np.array_equal(read_file(path)[:, :, 0] > 127, expected)
    height, width = expected.shape
    data = write_coco(sizes=[(width, height)], boxes=[(0, 0, 9, 9)])
    data.content["images"][0]["file_name"] = path
    data.save()
    assert not load_coco_data(data.json, data.images).problems


def test_exif_data_that_cannot_be_read_count_as_none(tmp_path):
    path = tmp_path / "image.jpg"
    Image.new("RGB", (5, 4), "white").save(path, exif=b"Exif\0\0broken data")
    assert read_file(path).tolist() == [[WHITE] * 5] * 4


def test_what_the_mapper_passes_on_is_what_detectron2s_passes_on(tmp_path):
    path = str(tmp_path / "image.png")
    Image.effect_noise((64, 48), 50).convert("RGB").save(path)
    objects = [
        {"bbox": [4, 5, 20, 30], "bbox_mode": 1, "category_id": 3, "iscrowd": 0, "segmentation": [[0, 0, 9, 9, 0, 9]]},
        {"bbox": [0, 0, 20, 20], "bbox_mode": 1, "category_id": 2, "iscrowd": 1},
    ]
    record = {"file_name": path, "image_id": 7, "height": 48, "width": 64, "annotations": objects}
    for is_train in (True, False):
        ours, theirs = (
            kind(is_train, augmentations=[], image_format="BGR")(record) for kind in (NamedErrorsMapper, DatasetMapper)
        )
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours.pop("image"), theirs.pop("image"))
        assert str(ours) == str(theirs)


@pytest.mark.parametrize("image_format", ["L", "YUV-BT.601", "rgb"])
def test_other_channel_orders_are_refused_when_the_mapper_is_built(image_format):
    with pytest.raises(ValueError, match=f'INPUT.FORMAT .* must be "RGB" or "BGR", got \'{image_format}\''):
        NamedErrorsMapper(True, augmentations=[], image_format=image_format)
