"""Tiny datasets, tiny configurations and the habits of the whole suite."""

import errno
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

CONFIGS = Path(__file__).parents[1] / "configs" / "COCO-Detection"
# Detectron2 reads the same variable when it is imported.
DATASETS = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
COCO_VAL = DATASETS / "coco" / "annotations" / "instances_val2017.json"
# Not in ascending order of their ids, and with gaps between them, as in users' files.
CATEGORIES = ({"id": 9, "name": "disc"}, {"id": 3, "name": "square"}, {"id": 4, "name": "bar"})

# Tiny models gain nothing from a second thread, and on a busy machine waiting for it takes longer than the work.
torch.set_num_threads(1)

# Autograd counts devices at its first backward pass, and where it finds one no process can be forked after it. Without
# a GPU it finds the one that FakeTensorMode pretends, if a test has been in it before.
if not torch.cuda.is_available():
    torch.zeros((), requires_grad=True).backward()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("dataset") and not COCO_VAL.is_file():
        pytest.skip(f"needs COCO images: there is no {COCO_VAL} (set DETECTRON2_DATASETS to the folder above coco/)")
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def quiet_loggers() -> Iterator[None]:
    """Undo what Detectron2's setup_logger does: its handlers keep files open and hide records from caplog."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "deformable_detr")]
    before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, handlers, propagate, level in before:
        for handler in logger.handlers:
            if handler not in handlers:
                handler.close()
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def forget_datasets() -> Iterator[None]:
    """Forget the datasets that a test registers."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)


@pytest.fixture(params=["open", "fsync"])
def shared_folders(request, monkeypatch, tmp_path) -> None:
    """Pretend folders of a CIFS, VirtualBox or WSL share, which cannot be flushed, or Windows, which opens none."""
    real_open, real_fsync = os.open, os.fsync

    def open_files(path, *args, **kwargs):
        is_shared = os.path.isdir(path) and Path(path).is_relative_to(tmp_path)
        if request.param == "open" and is_shared:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real_open(path, *args, **kwargs)

    def fsync_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_fsync(descriptor)

    monkeypatch.setattr(os, "open", open_files)
    monkeypatch.setattr(os, "fsync", fsync_files)


@dataclass
class CocoFiles:
    """A dataset on disk: an annotation file, the folder of its images, and the file's content."""

    json: str
    images: str
    content: dict

    def flags(self, split: str) -> list[str]:
        """The command-line flags that train ("train") or evaluate ("val") on this dataset."""
        return [f"--{split}-json", self.json, f"--{split}-images", self.images]

    def save(self) -> None:
        """Write ``content`` back."""
        Path(self.json).write_text(json.dumps(self.content), encoding="utf-8")


@pytest.fixture
def write_coco(tmp_path: Path) -> Callable[..., CocoFiles]:
    """A function that writes noise images (width, height) with one bright rectangle each, in COCO's format."""

    def write(
        name: str = "data",
        *,
        sizes: Sequence[tuple[int, int]] = ((80, 60), (60, 90), (64, 64), (100, 50)),
        boxes: Sequence[Sequence[float]] | None = None,
    ) -> CocoFiles:
        folder = tmp_path / name
        folder.mkdir()
        # Other pixels under every name: images of one split must not be in the other.
        rng = np.random.default_rng(list(name.encode()))
        content = {"images": [], "annotations": [], "categories": [dict(c) for c in CATEGORIES]}
        for index, (width, height) in enumerate(sizes):
            image_id = 10 + index
            x, y, w, h = boxes[index] if boxes else (width * 0.25, height * 0.25, width * 0.5, height * 0.5)
            pixels = rng.integers(0, 64, (height, width, 3), dtype=np.uint8)
            pixels[int(y) : int(y + h) + 1, int(x) : int(x + w) + 1, index % 3] = 255
            file_name = f"{image_id}.png"
            Image.fromarray(pixels).save(folder / file_name)
            content["images"].append({"id": image_id, "file_name": file_name, "width": width, "height": height})
            category = CATEGORIES[index % len(CATEGORIES)]["id"]
            annotation = {"id": index + 1, "image_id": image_id, "category_id": category, "iscrowd": 0}
            content["annotations"].append({**annotation, "bbox": [x, y, w, h], "area": w * h})
        files = CocoFiles(str(folder / "instances.json"), str(folder), content)
        files.save()
        return files

    return write


def stem_of(variant: str) -> str:
    """The name of a configuration: of DETR, or of what follows in the names of Deformable DETR's."""
    return variant if variant.startswith("detr") else f"deformable_detr_R_50{variant}"


TINY_YAML = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.DEFORMABLE_DETR.HIDDEN_DIM": 32,
    "MODEL.DEFORMABLE_DETR.NHEADS": 4,
    "MODEL.DEFORMABLE_DETR.ENC_LAYERS": 1,
    "MODEL.DEFORMABLE_DETR.DEC_LAYERS": 2,
    "MODEL.DEFORMABLE_DETR.DIM_FEEDFORWARD": 32,
    "MODEL.DEFORMABLE_DETR.NUM_QUERIES": 20,
    "INPUT.MIN_SIZE_TRAIN": (48, 64),
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.STEPS": (3,),
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "DATALOADER.NUM_WORKERS": 0,
    "SEED": 1,
}


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Callable[..., list[str]]:
    """A function (variant) -> ``--config-file`` and tiny values, for the command line.

    Flags go before them, further ``KEY VALUE`` pairs after them. Output goes to ``tmp_path / "output"``.
    """

    def arguments(variant: str = "") -> list[str]:
        values = {**TINY_YAML, "OUTPUT_DIR": tmp_path / "output"}
        opts = [str(part) for pair in values.items() for part in pair]
        return ["--config-file", str(CONFIGS / f"{stem_of(variant)}.yaml"), *opts]

    return arguments


TINY_LAZY = """
from detectron2.config import LazyConfig

config = LazyConfig.load({path!r})
model, dataloader, optimizer, lr_multiplier, train = (
    config[key] for key in ("model", "dataloader", "optimizer", "lr_multiplier", "train")
)
stages = model.backbone.bottom_up.stages
stages.depth = 18
# The blocks of a ResNet-18 have no 1x1 convolutions.
del stages["stride_in_1x1"]
model.transformer.update(d_model=32, n_heads=4, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=32)
model.num_queries = 20
dataloader.train.update(total_batch_size=2, num_workers=0)
dataloader.train.mapper.augmentations.update(min_size=[48, 64], max_size=96)
dataloader.test.num_workers = 0
dataloader.test.mapper.augmentations.update(min_size=64, max_size=96)
lr_multiplier.scheduler.milestones = [3, 4]
train.update(device="cpu", init_checkpoint="", max_iter=4, eval_period=0, seed=1, output_dir={output!r})
train.checkpointer.period = 2
"""


@pytest.fixture
def tiny_lazy(tmp_path: Path) -> Callable[..., list[str]]:
    """As ``tiny_yaml``, with a LazyConfig file of the same values."""

    def arguments(variant: str = "") -> list[str]:
        source = TINY_LAZY.format(path=str(CONFIGS / f"{stem_of(variant)}.py"), output=str(tmp_path / "output"))
        path = tmp_path / "tiny.py"
        path.write_text(source, encoding="utf-8")
        return ["--config-file", str(path)]

    return arguments


@pytest.fixture
def bytes_kept():
    """A function that tells how much memory autograd keeps for the backward pass of what a function returns."""

    def count(function):
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()  # Shared memory counts once.
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = function()  # As long as it lives no memory is used twice.
        assert result.requires_grad
        return sum(kept.values())

    return count
