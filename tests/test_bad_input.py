"""What users do wrong, through the entry points they use: an error that names the thing, or the sensible result."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from torch import nn

from deformable_detr import load_config
from deformable_detr.cli import run
from deformable_detr.data.augmentation import build_detr_augmentation
from deformable_detr.data.datasets import register_coco_data
from deformable_detr.data.mapper import NamedErrorsMapper
from deformable_detr.engine import argument_parser, main, train_net
from deformable_detr.report.run import find_dataset, read_run

# No input may hang; the slowest of these tests takes seconds.
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=["yaml", "lazy"])
def start(request, tiny_yaml, tiny_lazy) -> Callable[..., object]:
    """Run ``main`` with flags, and with one pair of overrides in the syntax of either configuration system."""

    def run(flags: list[str], *, yaml: tuple[str, ...] = (), lazy: tuple[str, ...] = ()) -> object:
        arguments = [*tiny_yaml(), *yaml] if request.param == "yaml" else [*tiny_lazy(), *lazy]
        return main(argument_parser().parse_args([*flags, *arguments]))

    return run


@pytest.fixture(params=["", "_box_refine", "_two_stage"], ids=["base", "box_refine", "two_stage"])
def model(request, tiny_yaml) -> nn.Module:
    _, path, *opts = tiny_yaml(request.param)
    torch.manual_seed(0)
    return build_model(load_config(path, opts))


def image(height: int, width: int, boxes: list[list[float]] | None = None, labels: list[int] | None = None) -> dict:
    """A training input with xyxy boxes."""
    boxes = torch.tensor(boxes or []).reshape(-1, 4)
    classes = torch.tensor(labels or [0] * len(boxes), dtype=torch.int64)
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    instances = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=classes)
    return {"image": pixels, "instances": instances, "file_name": "a.jpg", "image_id": 7}


def registered(json_file: str, images: str) -> dict[str, tuple[str, ...]]:
    """Overrides that train and evaluate on data which no check of the command line has seen."""
    register_coco_data("tiny", json_file, images)
    return {
        "yaml": (
            *("DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "('tiny',)"),
            *("MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"),
        ),
        "lazy": (
            *("dataloader.train.dataset.names=tiny", "dataloader.test.dataset.names=tiny"),
            "model.num_classes=3",
        ),
    }


def check_step(model: nn.Module, batch: list[dict]) -> dict[str, torch.Tensor]:
    """A training step has finite losses and a finite gradient for every trainable parameter."""
    losses = model.train()(batch)
    assert losses and all(loss.isfinite() for loss in losses.values()), losses
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    return losses


# Names that do not exist


def test_unknown_training_dataset_is_named(start, write_coco):
    data = write_coco()
    register_coco_data("tiny", data.json, data.images)
    with pytest.raises(KeyError, match="'no_such_dataset' is not registered"):
        start(
            [],
            yaml=("DATASETS.TRAIN", "('no_such_dataset',)", "DATASETS.TEST", "('tiny',)"),
            lazy=("dataloader.train.dataset.names=no_such_dataset", "dataloader.test.dataset.names=tiny"),
        )


@pytest.mark.parametrize("flags", [[], ["--eval-only"]], ids=["train", "eval"])
def test_unknown_evaluation_dataset_is_named_before_training(start, write_coco, tmp_path, flags):
    data = write_coco()
    register_coco_data("tiny", data.json, data.images)
    with pytest.raises(KeyError, match="dataset 'no_such_dataset' is not registered; registered are .*'tiny'"):
        start(
            flags,
            yaml=("DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "('no_such_dataset',)"),
            lazy=("dataloader.train.dataset.names=tiny", "dataloader.test.dataset.names=no_such_dataset"),
        )
    assert not list((tmp_path / "output").glob("*.pth"))


@pytest.mark.parametrize("evaluator_type", ["cityscapes_instance", None])
def test_unknown_evaluator_is_named_before_training(start, write_coco, tmp_path, evaluator_type):
    data = write_coco()
    register_coco_data("tiny", data.json, data.images)
    DatasetCatalog.register("special", lambda: DatasetCatalog.get("tiny"))
    if evaluator_type:
        MetadataCatalog.get("special").evaluator_type = evaluator_type
    message = f"dataset 'special' has evaluator_type {evaluator_type!r}; supported are .*'coco'.*'lvis'.*'pascal_voc'"
    with pytest.raises(NotImplementedError, match=message):
        start(
            [],
            yaml=("DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "('special',)"),
            lazy=("dataloader.train.dataset.names=tiny", "dataloader.test.dataset.names=special"),
        )
    assert not list((tmp_path / "output").glob("*.pth"))


@pytest.mark.parametrize("flags", [[], ["--eval-only"]], ids=["train", "eval"])
def test_missing_weights_file_is_named(start, write_coco, flags):
    flags = flags + write_coco("train").flags("train") + write_coco("val").flags("val")
    with pytest.raises(FileNotFoundError, match=r"no_such_weights\.pth"):
        start(flags, yaml=("MODEL.WEIGHTS", "no_such_weights.pth"), lazy=("train.init_checkpoint=no_such_weights.pth",))


def test_yaml_key_that_does_not_exist_is_named(tiny_yaml, tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("SOLVER:\n  LEARNING_RATE: 1.0\n", encoding="utf-8")
    with pytest.raises(KeyError, match=r"SOLVER\.LEARNING_RATE"):
        main(argument_parser().parse_args(["--config-file", str(path)]))
    with pytest.raises(KeyError, match=r"SOLVER\.LEARNING_RATE"):
        main(argument_parser().parse_args([*tiny_yaml(), "SOLVER.LEARNING_RATE", "1.0"]))


# Annotations that cannot be trained on


def test_more_classes_than_the_model_has_are_refused_before_training(start, write_coco, tmp_path):
    data = write_coco()
    register_coco_data("tiny", data.json, data.images)
    with pytest.raises(ValueError, match=r"(NUM_CLASSES|num_classes) is 2, but dataset 'tiny' has 3 classes .* to 3$"):
        start(
            [],
            yaml=(
                *("DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "('tiny',)"),
                *("MODEL.DEFORMABLE_DETR.NUM_CLASSES", "2"),
            ),
            lazy=(
                *("dataloader.train.dataset.names=tiny", "dataloader.test.dataset.names=tiny"),
                "model.num_classes=2",
            ),
        )
    assert not list((tmp_path / "output").glob("*.pth"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_boxes_that_are_not_finite_are_refused_before_training(start, write_coco, tmp_path, value):
    data = write_coco()
    data.content["annotations"][1]["bbox"][2] = value
    data.save()
    with pytest.raises(ValueError, match=rf"bbox must be finite, got \[.*{value}.*11\.png \(image_id 11\)"):
        start([], **registered(data.json, data.images))
    assert not list((tmp_path / "output").glob("*.pth"))


def test_boxes_without_area_are_reported_and_left_out(start, write_coco, tmp_path):
    data = write_coco(boxes=[(10, 10, 20, 20), (5, 5, 0, 10), (10, 10, 20, 20), (5, 5, 10, 0)])
    start([], **registered(data.json, data.images))
    log = (tmp_path / "output" / "log.txt").read_text()
    assert "2 boxes without area are left out of training" in log
    assert "11.png (image_id 11)" in log
    assert (tmp_path / "output" / "model_final.pth").is_file()


def test_category_that_the_file_does_not_define_is_named(start, write_coco):
    data = write_coco()
    data.content["annotations"][0]["category_id"] = 77
    data.save()
    with pytest.raises(KeyError, match="category_id=77"):
        start([], **registered(data.json, data.images))


def test_model_names_the_image_of_bad_ground_truth(model):
    model.train()
    for bad, message in [
        (image(40, 40, [[1, 1, 9, 9]], [80]), r"gt_classes must be in \[0, 80\), got \[80\]"),
        (image(40, 40, [[1, 1, 9, 9]], [-1]), r"gt_classes must be in \[0, 80\), got \[-1\]"),
        (image(40, 40, [[1, float("nan"), 9, 9]]), r"gt_boxes must be finite, got \[\[1\.0, nan"),
        (image(40, 40, [[1, 1, float("inf"), 9]]), r"gt_boxes must be finite, got \[\[1\.0, 1\.0, inf"),
        (image(40, 40, [[5, 5, 5, 9]]), r"gt_boxes \(xyxy\) must have an area, got \[\[5\.0, 5\.0, 5\.0"),
        ({"image": torch.zeros(3, 40, 40), "file_name": "a.jpg", "image_id": 7}, 'training needs "instances"'),
    ]:
        with pytest.raises(ValueError, match=rf"{message}.*image a\.jpg \(image_id 7\)"):
            model([image(40, 40), bad])


# Images without objects


def test_image_without_objects_trains(model):
    losses = check_step(model, [image(40, 50), image(50, 40, [[5, 5, 20, 30]])])
    assert losses["loss_bbox"] > 0


def test_batch_without_objects_trains(model):
    losses = check_step(model, [image(40, 50), image(50, 40)])
    assert losses["loss_ce"] > 0
    assert losses["loss_bbox"] == 0 and losses["loss_giou"] == 0


def test_training_set_almost_without_objects_trains(start, write_coco, tmp_path):
    train = write_coco()
    del train.content["annotations"][1:]
    train.save()
    start(train.flags("train"))
    assert (tmp_path / "output" / "model_final.pth").is_file()


def test_more_objects_than_queries_train(model):
    boxes = [[x, y, x + 6, y + 6] for x in range(0, 40, 8) for y in range(0, 40, 8)]
    assert len(boxes) > model.num_queries
    check_step(model, [image(48, 48, boxes)])


# Images of unusual sizes


SIZES = [(17, 31), (31, 17), (1, 1), (8, 200), (200, 8), (1, 40)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_tiny_images_train_and_evaluate(model, size):
    height, width = size
    data = image(height, width, [[0, 0, width, height]])
    check_step(model, [data])
    with torch.no_grad():
        (output,) = model.eval()([data])
    instances = output["instances"]
    assert instances.image_size == size
    assert len(instances) == 100
    assert instances.pred_boxes.tensor.isfinite().all() and instances.scores.isfinite().all()


def test_tiny_image_beside_a_large_one_trains_and_evaluates(model):
    batch = [image(1, 1, [[0, 0, 1, 1]]), image(90, 120, [[10, 10, 50, 60]])]
    check_step(model, batch)
    with torch.no_grad():
        outputs = model.eval()(batch)
    assert all(o["instances"].pred_boxes.tensor.isfinite().all() for o in outputs)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_tiny_files_pass_the_augmentation(tmp_path, size):
    height, width = size
    path = tmp_path / "tiny.png"
    Image.new("RGB", (width, height)).save(path)
    augmentation = build_detr_augmentation(is_train=True, min_size=[48, 64], max_size=96)
    mapper = NamedErrorsMapper(is_train=True, augmentations=augmentation, image_format="RGB")
    box = {"bbox": [0, 0, width, height], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    for _ in range(8):
        item = mapper({"file_name": str(path), "height": height, "width": width, "annotations": [box]})
        # The official rounding of the short side lets the long side exceed the limit by half the aspect ratio.
        assert max(item["image"].shape[1:]) <= 96 + 0.5 * max(size) / min(size)
        assert item["instances"].gt_boxes.tensor.isfinite().all()


def test_dataset_of_tiny_images_trains_and_evaluates(start, write_coco, tmp_path):
    sizes = [(31, 17), (1, 1), (200, 8), (64, 64)]
    boxes = [(0, 0, width, height) for width, height in sizes]
    train, val = write_coco("train", sizes=sizes, boxes=boxes), write_coco("val", sizes=sizes, boxes=boxes)
    start(train.flags("train") + val.flags("val"))
    assert (tmp_path / "output" / "model_final.pth").is_file()
    assert (tmp_path / "output" / "inference" / "coco_instances_results.json").is_file()


# Files


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_images_without_three_channels_train_and_evaluate(start, write_coco, tmp_path, mode):
    data = write_coco()
    for path in Path(data.images).glob("*.png"):
        Image.open(path).convert(mode).save(path)
    start(data.flags("train") + data.flags("val"))
    assert (tmp_path / "output" / "model_final.pth").is_file()


@pytest.mark.parametrize("content", [None, b"", b"not an image"], ids=["missing", "empty", "corrupt"])
@pytest.mark.parametrize("flags", [[], ["--eval-only"]], ids=["train", "eval"])
def test_unreadable_image_is_named(start, write_coco, content, flags):
    data = write_coco(sizes=[(60, 60)])
    path = Path(data.images) / "10.png"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(OSError, match=r"cannot read image .*10\.png \(image_id 10\)"):
        start(flags, **registered(data.json, data.images))


def test_unreadable_image_in_a_worker_process_ends_the_run_with_its_name(tiny_yaml, write_coco):
    data = write_coco(sizes=[(60, 60)])
    (Path(data.images) / "10.png").write_bytes(b"not an image")
    args = [*tiny_yaml(), *registered(data.json, data.images)["yaml"], "DATALOADER.NUM_WORKERS", "2"]
    with pytest.raises(OSError, match=r"cannot read image .*10\.png \(image_id 10\)"):
        main(argument_parser().parse_args(args))


# Disks


def test_a_training_into_a_folder_that_cannot_be_flushed_comes_to_its_end(
    shared_folders, tiny_yaml, write_coco, tmp_path
):
    data = write_coco()
    data.content["annotations"][0]["bbox"][2] = -1
    data.save()
    main(argument_parser().parse_args([*data.flags("train"), "--repair", *tiny_yaml()]))
    assert (tmp_path / "output" / "last_checkpoint").read_text() == "model_final.pth"
    assert not [name for name in os.listdir(tmp_path / "output") if "unfinished" in name]


# The command line


@pytest.mark.parametrize(
    "flags, yaml, lazy, message",
    [
        ([], ("MODEL.DEVICE", "gpu"), ("train.device=gpu",), "device must be one of PyTorch's, .*got 'gpu'"),
        (
            [],
            ("DATASETS.TRAIN", "('no_such_dataset',)", "DATASETS.TEST", "()"),
            ("dataloader.train.dataset.names=no_such_dataset", "dataloader.test.dataset.names=no_such_dataset"),
            "dataset 'no_such_dataset' is not registered; registered are .*coco_2017_train",
        ),
        (["--replay", __file__], (), (), f"--replay: {__file__} is cut short or no file of a step"),
    ],
    ids=["device", "dataset", "replay"],
)
def test_a_mistake_ends_train_net_in_one_line(tiny_yaml, tiny_lazy, flags, yaml, lazy, message, capsys):
    for arguments in ([*tiny_yaml(), *yaml], [*tiny_lazy(), *lazy]):
        with pytest.raises(SystemExit, match="2"):
            run(train_net, ["--num-gpus", "0", *flags, *arguments])
        assert re.match(f"error: {message}", capsys.readouterr().err.splitlines()[-1])


def test_the_stack_of_a_mistake_while_training_is_in_the_log_alone(tiny_yaml, write_coco, tmp_path, capsys):
    data = write_coco(sizes=[(60, 60)])
    (Path(data.images) / "10.png").write_bytes(b"not an image")
    arguments = [*tiny_yaml(), *registered(data.json, data.images)["yaml"], "DATALOADER.NUM_WORKERS", "1"]
    with pytest.raises(SystemExit, match="2"):
        run(train_net, ["--num-gpus", "0", *arguments])
    out, err = capsys.readouterr()
    assert re.match(r"error: cannot read image .*10\.png \(image_id 10\)", err.splitlines()[-1])
    assert "Starting training" in out and "Traceback" not in out + err
    assert "Traceback" in (tmp_path / "output" / "log.txt").read_text()


def test_a_lazy_config_without_a_model_is_told_so(tmp_path):
    (tmp_path / "a.py").write_text("train = {}")
    with pytest.raises(ValueError, match=r"a\.py has no model and no dataloader, which a LazyConfig needs"):
        train_net(["--config-file", str(tmp_path / "a.py")])


def test_an_output_folder_is_evaluated_with_its_model_and_its_data(start, write_coco, tmp_path, caplog):
    start(write_coco("train").flags("train") + write_coco("val").flags("val"))
    for split in ("train", "val"):
        DatasetCatalog.remove(f"user_{split}")
        MetadataCatalog.remove(f"user_{split}")
    output = tmp_path / "output"
    detections = output / "inference" / "coco_instances_results.json"
    before = detections.read_text()
    detections.unlink()
    main(argument_parser().parse_args(["--eval-only", "--config-file", str(output)]))
    assert detections.read_text() == before
    assert find_dataset(read_run(output)) == "user_val"  # for a report


def test_an_output_folder_trains_on_with_its_data(tiny_yaml, write_coco, tmp_path):
    train, val = write_coco("train"), write_coco("val")
    train.content["annotations"][0]["bbox"][2] = -1
    train.save()
    main(argument_parser().parse_args([*train.flags("train"), *val.flags("val"), "--repair", *tiny_yaml()]))
    arguments = ["--config-file", str(tmp_path / "output"), "OUTPUT_DIR", str(tmp_path / "again")]
    main(argument_parser().parse_args(arguments))
    recorded = json.loads((tmp_path / "again" / "user_data.json").read_text())
    assert recorded["train"] == [str(tmp_path / "output" / "train_repaired.json"), train.images]
    assert recorded["val"] == [val.json, val.images]
