import json
import math
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.transforms import AugInput, AugmentationList
from PIL import Image
from pycocotools.coco import COCO

from deformable_detr import load_config
from deformable_detr.data import shapes
from deformable_detr.data.augmentation import augmentation_from_config

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_shapes_dataset.py"

NUM_TRAIN, NUM_VAL = 40, 10


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    output = tmp_path_factory.mktemp("shapes")
    shapes.write_split(output, "train", NUM_TRAIN, seed=0, split=0)
    shapes.write_split(output, "val", NUM_VAL, seed=0, split=1)
    return output


def read(dataset, split):
    return json.loads((dataset / f"{split}.json").read_text())


def file_bytes(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_box_lies_inside_its_image_and_holds_its_area(dataset):
    sizes = {image["id"]: (image["width"], image["height"]) for image in read(dataset, "train")["images"]}
    for annotation in read(dataset, "train")["annotations"]:
        x, y, width, height = annotation["bbox"]
        image_width, image_height = sizes[annotation["image_id"]]
        assert 0 <= x < x + width <= image_width
        assert 0 <= y < y + height <= image_height
        assert 0 < annotation["area"] <= width * height


def test_every_file_exists_with_the_size_of_its_entry_and_every_size_occurs(dataset):
    entries = read(dataset, "train")["images"]
    for entry in entries:
        with Image.open(dataset / "train" / entry["file_name"]) as image:
            assert image.size == (entry["width"], entry["height"])
    sizes = {(entry["width"], entry["height"]) for entry in entries}
    assert sizes == {(144, 144), (144, 192), (192, 144), (144, 240), (240, 144)}


def test_the_demo_scales_every_image_to_multiples_of_the_coarsest_stride():
    cfg = load_config(str(TOOL.parents[1] / "configs" / "quick_schedules" / "shapes_two_stage.yaml"))
    coarsest = 32
    assert (cfg.MODEL.RESNETS.OUT_FEATURES[-1], cfg.MODEL.DEFORMABLE_DETR.NUM_FEATURE_LEVELS) == ("res4", 3)
    for augmentation in (augmentation_from_config(cfg, is_train=is_train) for is_train in (True, False)):
        for long_side in shapes.LONG_SIDES:
            image = AugInput(np.zeros((shapes.SHORT_SIDE, long_side, 3), dtype=np.uint8))
            AugmentationList(augmentation)(image)
            assert [side % coarsest for side in image.image.shape[:2]] == [0, 0]


def test_every_class_and_an_image_without_objects_are_present(dataset):
    content = read(dataset, "train")
    annotated = {annotation["category_id"] for annotation in content["annotations"]}
    assert annotated == {category["id"] for category in content["categories"]} == set(shapes.CATEGORIES.values())
    assert {image["id"] for image in content["images"]} > {entry["image_id"] for entry in content["annotations"]}


def test_category_ids_have_gaps(dataset):
    ids = [category["id"] for category in read(dataset, "val")["categories"]]
    assert max(ids) > len(ids)


def test_ids_are_unique_and_splits_share_no_image(dataset):
    for split in ("train", "val"):
        for kind in ("images", "annotations"):
            ids = [entry["id"] for entry in read(dataset, split)[kind]]
            assert len(set(ids)) == len(ids)
    pictures = [file_bytes(dataset / split) for split in ("train", "val")]
    assert [len(files) for files in pictures] == [NUM_TRAIN, NUM_VAL]
    assert len({*pictures[0].values(), *pictures[1].values()}) == NUM_TRAIN + NUM_VAL


def test_same_seed_gives_the_same_bytes_and_another_seed_another_picture(dataset, tmp_path):
    for seed in (0, 1):
        shapes.write_split(tmp_path / str(seed), "val", NUM_VAL, seed=seed, split=1)
    assert file_bytes(tmp_path / "0" / "val") == file_bytes(dataset / "val")
    assert read(tmp_path / "0", "val") == read(dataset, "val")
    assert set(file_bytes(tmp_path / "1" / "val").values()).isdisjoint(file_bytes(dataset / "val").values())


def test_more_images_leave_the_first_ones_as_they_are(dataset, tmp_path):
    shapes.write_split(tmp_path, "train", 3, seed=0, split=0)
    assert file_bytes(tmp_path / "train").items() <= file_bytes(dataset / "train").items()


def test_a_complete_split_is_kept_and_another_request_replaces_it(tmp_path):
    assert shapes.write_split(tmp_path, "val", 2, seed=0, split=1)
    assert not shapes.write_split(tmp_path, "val", 2, seed=0, split=1)
    assert shapes.write_split(tmp_path, "val", 2, seed=5, split=1)


def test_a_split_of_an_earlier_version_is_drawn_again(tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(shapes, "VERSION", 1)
        shapes.write_split(tmp_path, "val", 2, seed=0, split=1)
    assert shapes.write_split(tmp_path, "val", 2, seed=0, split=1)


def test_pycocotools_reads_the_annotations(dataset):
    coco = COCO(str(dataset / "train.json"))
    assert len(coco.getImgIds()) == NUM_TRAIN
    assert coco.getCatIds(catNms=["triangle"]) == [shapes.CATEGORIES["triangle"]]


def test_rasterized_square_covers_its_own_pixels_and_half_of_cut_ones():
    square = np.array([(2, 1), (4, 1), (4, 3), (2, 3)], dtype=float)
    coverage = shapes.rasterize(square, 4, 6)
    assert shapes.polygon_area(square) == 4
    assert coverage[1:3, 2:4].min() > 0.99
    assert coverage[0].max() < 0.5 and coverage[:, :2].max() < 0.5


def test_box_of_an_object_surrounds_its_visible_pixels():
    mask = np.zeros((5, 8), dtype=bool)
    mask[1, 2], mask[3, 6] = True, True
    annotation = shapes.annotate("triangle", mask)
    assert annotation == {"category_id": 7, "bbox": [2, 1, 5, 3], "area": 2, "iscrowd": 0}


def test_colour_is_not_tied_to_the_class(dataset):
    """The mean colour inside the boxes differs less between classes than within one."""
    content = read(dataset, "train")
    by_class = {category_id: [] for category_id in shapes.CATEGORIES.values()}
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        with Image.open(dataset / "train" / f"{annotation['image_id']}.jpg") as image:
            centre = np.asarray(image)[y + height // 2, x + width // 2]
        by_class[annotation["category_id"]].append(centre.astype(float))
    means = np.stack([np.mean(colours, axis=0) for colours in by_class.values()])
    within = np.mean([np.std(colours, axis=0).mean() for colours in by_class.values()])
    fewest = min(len(colours) for colours in by_class.values())
    assert means.std(axis=0).max() < 3 * within / math.sqrt(fewest)
