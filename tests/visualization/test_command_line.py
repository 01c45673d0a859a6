import json
import sys

import pytest
from detectron2.config import CfgNode, LazyConfig
from omegaconf import OmegaConf
from PIL import Image

from deformable_detr.visualization import __main__ as command_line

YAML = CfgNode({"DATASETS": {"TRAIN": ("a",), "TEST": ("user_val", "another")}})
LAZY = {"dataloader": {"test": {"dataset": {"_target_": "some.function", "names": "user_val"}}}}


def write_yaml(path):
    path.write_text(YAML.dump())


def write_lazy(path):
    LazyConfig.save(OmegaConf.create(LAZY), str(path))


@pytest.fixture(params=[write_yaml, write_lazy])
def run_folder(request, tmp_path):
    """What train_net.py leaves behind after evaluating one image of the user's data."""
    request.param(tmp_path / "config.yaml")
    (tmp_path / "metrics.json").write_text(json.dumps({"iteration": 0, "total_loss": 1.0}))
    Image.new("RGB", (64, 48)).save(tmp_path / "1.png")
    box = {"image_id": 1, "category_id": 5, "bbox": [8, 8, 30, 20]}
    val = {
        "images": [{"id": 1, "file_name": "1.png", "width": 64, "height": 48}],
        "annotations": [{"id": 1, "area": 600, "iscrowd": 0, **box}],
        "categories": [{"id": 5, "name": "cat"}],
    }
    (tmp_path / "val.json").write_text(json.dumps(val))
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "coco_instances_results.json").write_text(json.dumps([{"score": 0.9, **box}]))
    return tmp_path


def test_both_pictures_of_a_run_are_drawn(run_folder, monkeypatch):
    data = ["--val-json", str(run_folder / "val.json"), "--val-images", str(run_folder)]
    monkeypatch.setattr(sys, "argv", ["visualization", str(run_folder), *data])
    command_line.main()
    for name in ("training_curves.png", "detections.png"):
        with Image.open(run_folder / name) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 20


def test_annotations_without_images_are_refused(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["visualization", str(run_folder), "--val-json", "val.json"])
    with pytest.raises(SystemExit):
        command_line.main()
    assert "--val-images" in capsys.readouterr().err
