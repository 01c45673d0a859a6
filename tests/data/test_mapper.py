"""From a dataset dict to what the model takes."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from deformable_detr.data.augmentation import ResizeShortestEdge

from .records import annotation, mapper, record


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
