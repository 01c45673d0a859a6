"""Broken annotation files and images: a named error or a counted repair each time, and never a hang."""

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deformable_detr.data.augmentation import build_detr_augmentation
from deformable_detr.data.coco_format import DatasetError, read_coco_json
from deformable_detr.data.mapper import NamedErrorsMapper
from deformable_detr.startup.user_data import check_user_data

VALUES = (None, -1, 0, 10**12, 1.5, float("nan"), float("inf"), "", "text", [], [1], {}, True)


def harm_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut off, overwritten with noise or zeros, or with bytes left out."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 8, 200]))
    kind = rng.randrange(4)
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + rng.randbytes(end - start) + content[end:]
    return content[:start] + (bytes(end - start) if kind == 2 else b"") + content[end:]


def harm_annotations(content: dict, rng: random.Random) -> None:
    """Replace or remove one thing, at any depth."""
    node = content
    for _ in range(rng.randrange(4)):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        inner = [key for key in keys if isinstance(node[key], dict | list) and node[key]]
        if not inner:
            break
        node = node[rng.choice(inner)]
    key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = rng.choice(VALUES)


def check(json_file: str, images: str, output: Path, *, split: str, repair: bool) -> str:
    """What becomes of the data, in words; an error of any other type than the documented ones passes through."""
    try:
        content = read_coco_json(json_file)
        repaired, _ = check_user_data(
            {split: (json_file, images)}, {split: content}, repair=repair, output_dir=str(output)
        )
    except DatasetError as error:
        assert Path(json_file).name in str(error), f"the error does not name the file: {error!r}"
        return "refused by name"
    return "repaired and counted" if repaired else "nothing wrong"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("split", ["train", "val"])
def test_broken_annotations_are_refused_or_repaired(split, write_coco, tmp_path, amount, outcomes):
    files = write_coco()
    whole, rng = copy.deepcopy(files.content), random.Random(split)
    for _ in range(amount(60, 1000)):
        content = copy.deepcopy(whole)
        for _ in range(rng.randrange(1, 4)):
            harm_annotations(content, rng)
        text = json.dumps(content).encode()
        Path(files.json).write_bytes(harm_bytes(text, rng) if rng.random() < 0.2 else text)
        first = check(files.json, files.images, tmp_path / "out", split=split, repair=False)
        outcomes[check(files.json, files.images, tmp_path / "out", split=split, repair=True)] += 1
        if first == "nothing wrong":
            assert check(files.json, files.images, tmp_path / "out", split=split, repair=True) == "nothing wrong"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_broken_images_are_named_or_read(suffix, tmp_path, amount, outcomes):
    rng = random.Random(suffix)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    path = tmp_path / f"broken{suffix}"
    Image.fromarray(pixels).save(path)
    whole = path.read_bytes()
    augmentations = build_detr_augmentation(is_train=True, min_size=[48], max_size=96)
    mapper = NamedErrorsMapper(is_train=True, augmentations=augmentations, image_format="RGB")
    record = {"file_name": str(path), "image_id": 1, "height": 60, "width": 80, "annotations": []}
    for _ in range(amount(40, 500)):
        path.write_bytes(harm_bytes(whole, rng))
        try:
            mapper(dict(record))
        except OSError as error:
            assert path.name in str(error)
            outcomes["refused by name"] += 1
        else:
            outcomes["still readable"] += 1
