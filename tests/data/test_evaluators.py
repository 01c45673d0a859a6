"""Images with more objects than COCO's standard figures count detections."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances

from deformable_detr import load_config
from deformable_detr.config import find_config_file
from deformable_detr.data.datasets import register_coco_data
from deformable_detr.engine import Trainer

NAME = "crowded"
MODEL = "deformable_detr_R_50"


@pytest.fixture
def objects(write_coco) -> torch.Tensor:
    """(200, 4) boxes (x, y, width, height) of one image's objects, which are registered as ``NAME``."""
    data = write_coco(sizes=[(200, 100)])
    template = data.content["annotations"][0]
    boxes = [[x, y, 8, 8] for x in range(0, 200, 10) for y in range(0, 100, 10)]
    data.content["annotations"] = [
        {**template, "id": index + 1, "category_id": 3, "bbox": box, "area": 64} for index, box in enumerate(boxes)
    ]
    data.save()
    register_coco_data(NAME, data.json, data.images)
    return torch.tensor(boxes, dtype=torch.float32)


@pytest.fixture(params=["yaml", "lazy"])
def parts(request, tmp_path) -> Callable[[int], tuple[DatasetEvaluator, object]]:
    """A function (detections per image) -> evaluator and data of a configuration in one of the two systems."""

    def build(limit: int) -> tuple[DatasetEvaluator, object]:
        if request.param == "yaml":
            opts = ["TEST.DETECTIONS_PER_IMAGE", str(limit), "OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", "0"]
            cfg = load_config(MODEL, opts)
            return Trainer.build_evaluator(cfg, NAME), Trainer.build_test_loader(cfg, NAME)
        opts = [f"model.test_topk_per_image={limit}", f"dataloader.test.dataset.names={NAME}"]
        opts += [f"train.output_dir={tmp_path}", "dataloader.test.num_workers=0"]
        cfg = load_config(find_config_file(MODEL, suffix=".py"), opts)
        return instantiate(cfg.dataloader.evaluator), instantiate(cfg.dataloader.test)

    return build


def ap_of_perfect_detections(evaluator: DatasetEvaluator, objects: torch.Tensor) -> float:
    instances = Instances((100, 200))
    instances.pred_boxes = Boxes(torch.cat((objects[:, :2], objects[:, :2] + objects[:, 2:]), dim=1))
    instances.scores = torch.linspace(0.9, 0.5, len(objects))
    instances.pred_classes = torch.zeros(len(objects), dtype=torch.int64)
    evaluator.reset()
    evaluator.process([{"image_id": 10}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]["AP"]


@pytest.mark.parametrize("limit, ap", [(50, 100 * 51 / 101), (100, 100 * 51 / 101), (150, 100 * 76 / 101), (200, 100)])
def test_all_detections_that_the_model_returns_count(parts, objects, limit, ap):
    """200 objects, all found: 100 detections have a precision of 1 at 51 of the 101 recalls from 0 to 0.5."""
    evaluator, _ = parts(limit)
    assert ap_of_perfect_detections(evaluator, objects) == pytest.approx(ap)


def test_an_object_with_id_0_counts(parts, objects):
    """Some tools number objects from 0, with which pycocotools marks detections that match nothing."""
    path = Path(MetadataCatalog.get(NAME).json_file)
    content = json.loads(path.read_text())
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number
    path.write_text(json.dumps(content))
    evaluator, _ = parts(200)
    assert ap_of_perfect_detections(evaluator, objects) == pytest.approx(100)


def test_images_with_more_objects_than_detections_are_pointed_out(parts, objects, caplog):
    parts(200)
    assert "more objects" not in caplog.text
    parts(100)
    assert f"1 of 1 images of {NAME} have more objects than the model returns detections (100)" in caplog.text
    assert "Raise TEST.DETECTIONS_PER_IMAGE (in a LazyConfig model.test_topk_per_image)" in caplog.text
    assert "The most are 200 in" in caplog.text
