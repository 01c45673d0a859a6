"""A run's output folder and its test data, small enough to be worked out by hand."""

import json
import os
from argparse import Namespace
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from PIL import Image

from deformable_detr.data.datasets import USER_DATA, register_coco_data

CAT, DOG = 7, 3  # COCO ids; the contiguous classes are in their order: 0 is the dog, 1 the cat
IMAGE_SIZE = (120, 100)


class RunFolder:
    """Writes what train_net.py would."""

    def __init__(self, root: Path):
        self.path = root / "run"
        self.data = root / "data"
        (self.path / "inference").mkdir(parents=True)
        self.data.mkdir()
        self.names = {CAT: "cat", DOG: "dog"}
        self.write_metrics({"iteration": 19, "total_loss": 3.0})
        config = {"MODEL": {"WEIGHTS": ""}, "DATASETS": {"TEST": ("user_val",)}, "SOLVER": {"MAX_ITER": 100}}
        (self.path / "config.yaml").write_text(CfgNode(config).dump())
        self.log_command(val_json=str(self.data / "val.json"), val_images=str(self.data), repair=False)

    def log_command(self, **arguments: object) -> None:
        with (self.path / "log.txt").open("a") as log:
            log.write(f"[11/22 10:00:00] detectron2 INFO: Command line arguments: {Namespace(**arguments)}\n")

    def record(self, json_file: Path) -> None:
        """Write down what a training was evaluated on."""
        (self.path / USER_DATA).write_text(json.dumps({"val": [str(json_file), str(self.data)]}))

    def write_metrics(self, *rows: dict, end: str = "\n") -> None:
        (self.path / "metrics.json").write_text("\n".join(map(json.dumps, rows)) + end)

    def write_truth(self, *objects: tuple, num_images: int = 3) -> None:
        """Objects are (image id, category id, xywh) or, for crowd regions, (image id, category id, xywh, 1)."""
        images = []
        for image_id in range(1, num_images + 1):
            Image.new("RGB", IMAGE_SIZE, "gray").save(self.data / f"{image_id}.png")
            width, height = IMAGE_SIZE
            images.append({"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height})
        annotations = [
            {
                "id": index,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": sum(crowd),
            }
            for index, (image, category, box, *crowd) in enumerate(objects, start=1)
        ]
        categories = [{"id": key, "name": name} for key, name in self.names.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (self.data / "val.json").write_text(json.dumps(content))

    def write_detections(self, *detections: tuple) -> None:
        """Detections are (image id, category id, xywh, score)."""
        keys = ("image_id", "category_id", "bbox", "score")
        results = [dict(zip(keys, detection, strict=True)) for detection in detections]
        (self.path / "inference" / "coco_instances_results.json").write_text(json.dumps(results))

    def register(self) -> str:
        register_coco_data("by_hand_val", str(self.data / "val.json"), str(self.data))
        return "by_hand_val"

    def age(self, seconds: float) -> None:
        """Make the run silent since so many seconds."""
        for name in ("metrics.json", "log.txt"):
            changed = (self.path / name).stat().st_mtime - seconds
            os.utime(self.path / name, (changed, changed))


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def evaluated(run_folder: RunFolder) -> RunFolder:
    """Three images: a wrong class, a missed object; detections in a crowd, too far away, repeated, too weak."""
    run_folder.write_truth(
        (1, CAT, [0, 0, 10, 10]),
        (1, DOG, [50, 50, 10, 10]),
        (2, CAT, [0, 0, 10, 10]),
        (2, CAT, [60, 60, 40, 40], 1),
        (3, DOG, [20, 20, 30, 30]),
    )
    run_folder.write_detections(
        (1, CAT, [0, 0, 10, 10], 0.9),
        (1, CAT, [50, 50, 10, 10], 0.8),
        (2, DOG, [70, 70, 10, 10], 0.7),
        (2, CAT, [5, 0, 10, 10], 0.6),  # IoU 1/3
        (3, DOG, [20, 20, 30, 28], 0.5),
        (3, DOG, [20, 20, 30, 30], 0.9),
        (3, DOG, [80, 0, 10, 10], 0.2),
    )
    return run_folder
