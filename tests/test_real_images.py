"""The published configurations on real COCO images: unchanged but for size, device, batch and starting weights."""

import importlib.util
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog

from deformable_detr import model_zoo
from deformable_detr.checkpoint import export
from deformable_detr.detect import Predictor
from deformable_detr.engine import argument_parser, main
from deformable_detr.export import InputShape, export_model
from deformable_detr.loading import load_model

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
# Beyond that, models that are built and run in no time.
NARROW = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.DEFORMABLE_DETR.HIDDEN_DIM": 32,
    "MODEL.DEFORMABLE_DETR.ENC_LAYERS": 1,
    "MODEL.DEFORMABLE_DETR.DEC_LAYERS": 2,
    "MODEL.DEFORMABLE_DETR.DIM_FEEDFORWARD": 32,
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "SOLVER.LOG_PERIOD": 1,
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


# Entry of the zoo -> what of its losses it alone has.
HEIRS = {
    "deformable_detr_R_50_two_stage_plus": {"loss_ce_dn", "loss_ce_enc"},
    "h_deformable_detr_R_50": {"loss_ce_one2many", "loss_bbox_one2many_0", "loss_giou_enc"},
    "h_deformable_detr_swin_tiny": {"loss_ce_one2many"},
    "h_deformable_detr_swin_large": {"loss_ce_one2many"},
    "dino_R_50_4scale": {"loss_ce_dn", "loss_bbox_dn_0", "loss_giou_enc"},
    "dino_R_50_5scale": {"loss_ce_dn", "loss_bbox_dn_0", "loss_giou_enc"},
    "dino_swin_large_4scale": {"loss_ce_dn"},
}


@pytest.mark.parametrize("name", HEIRS)
def test_heirs_of_two_stage_train_evaluate_export_and_detect(name, tmp_path, monkeypatch):
    if "swin" in name and importlib.util.find_spec("detectron2.modeling.backbone.swin") is None:
        pytest.skip("Detectron2 0.6 has no Swin")
    values = {**YAML, **NARROW, "OUTPUT_DIR": tmp_path / "output"}
    opts = [str(part) for pair in values.items() for part in pair]
    main(argument_parser().parse_args(["--config-file", model_zoo.get_config_file(name), *opts]))
    metrics = [json.loads(line) for line in (tmp_path / "output" / "metrics.json").read_text().splitlines()]
    losses = {key: value for line in metrics for key, value in line.items() if "loss" in key}
    assert HEIRS[name] <= losses.keys() and all(math.isfinite(value) for value in losses.values()), losses
    assert all(0 <= metrics[-1][key] <= 100 for key in METRICS)

    # pytest would collect all of PyTorch's records about tracing, which takes longer than the tracing.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    trained = load_model(str(tmp_path / "output"))
    differences = export_model(
        trained, tmp_path / "model.pt", format_name="torchscript", shape=InputShape(2, (64, 96)), decompose=False
    )
    assert max(difference.boxes for difference in differences) < 1e-3

    if name not in model_zoo.MODELS:
        return
    # The file that its authors would have published, where one that was fetched by hand is looked for.
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    record = model_zoo.MODELS[name]
    file = tmp_path / "cache" / "deformable_detr" / (record.official_file or record.cached_file)
    file.parent.mkdir(parents=True)
    torch.save({"model": export(trained.model, to="official", coco_ids=True)}, file)
    published = load_model(name, record.weights, opts=opts)
    assert published.class_names[79] == "toothbrush"
    image = DatasetCatalog.get("coco_2017_val")[0]["file_name"]
    found, expected = (Predictor(model, score_threshold=0)(image) for model in (published, trained))
    assert len(found) == (300 if name.startswith("dino") else 100)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
