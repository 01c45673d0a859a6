"""The published configurations on real COCO images: unchanged but for size, device, batch and starting weights."""

import json
import math
from pathlib import Path

import pytest
import torch

from deformable_detr.engine import argument_parser, main

pytestmark = [pytest.mark.dataset, pytest.mark.slow]

CONFIGS = Path(__file__).parents[1] / "configs" / "COCO-Detection"
METRICS = ("bbox/AP", "bbox/AP50", "bbox/AP75", "bbox/APs", "bbox/APm", "bbox/APl")
YAML = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "INPUT.MIN_SIZE_TRAIN": "(96,128)",
    "INPUT.MAX_SIZE_TRAIN": 192,
    "INPUT.MIN_SIZE_TEST": 96,
    "INPUT.MAX_SIZE_TEST": 160,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": "()",
    "DATALOADER.NUM_WORKERS": 0,
}
LAZY = {
    "train.device": "cpu",
    "train.init_checkpoint": "",
    "dataloader.train.mapper.augmentations.min_size": "[96,128]",
    "dataloader.train.mapper.augmentations.max_size": 192,
    "dataloader.test.mapper.augmentations.min_size": 96,
    "dataloader.test.mapper.augmentations.max_size": 160,
    "dataloader.train.total_batch_size": 2,
    "train.max_iter": 2,
    "dataloader.train.num_workers": 0,
    "dataloader.test.num_workers": 0,
}


def check_run(output: Path) -> None:
    """Two steps with finite losses, and a result for all 44 images of the validation split."""
    metrics = {k: v for line in (output / "metrics.json").read_text().splitlines() for k, v in json.loads(line).items()}
    losses = {name: value for name, value in metrics.items() if "loss" in name}
    # Three losses of six decoder layers, and their sum.
    assert len(losses) >= 19
    assert all(math.isfinite(value) for value in losses.values()), losses
    assert all(0 <= metrics[name] <= 100 for name in METRICS)
    detections = json.loads((output / "inference" / "coco_instances_results.json").read_text())
    assert len({d["image_id"] for d in detections}) == 44
    assert len(detections) == 44 * 100
    assert all(math.isfinite(value) for d in detections for value in (*d["bbox"], d["score"]))
    assert torch.load(output / "model_final.pth", weights_only=False)["iteration"] == 1


@pytest.mark.parametrize(
    "stem",
    [
        "deformable_detr_R_50_single_scale",
        "deformable_detr_R_50_single_scale_dc5",
        "deformable_detr_R_50",
        "deformable_detr_R_50_box_refine",
        "deformable_detr_R_50_two_stage",
    ],
)
def test_yaml_configuration_trains_and_evaluates_on_coco(stem, tmp_path):
    opts = [str(part) for pair in {**YAML, "OUTPUT_DIR": tmp_path}.items() for part in pair]
    main(argument_parser().parse_args(["--config-file", str(CONFIGS / f"{stem}.yaml"), *opts]))
    check_run(tmp_path)


def test_lazy_configuration_trains_and_evaluates_on_coco(tmp_path):
    opts = [f"{key}={value}" for key, value in {**LAZY, "train.output_dir": tmp_path}.items()]
    main(argument_parser().parse_args(["--config-file", str(CONFIGS / "deformable_detr_R_50_two_stage.py"), *opts]))
    check_run(tmp_path)
