"""Training and evaluation through ``main``, as ``train_net.py`` runs it, with yaml and with LazyConfig files."""

import argparse
import copy
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator

from deformable_detr import load_config
from deformable_detr.data.datasets import register_coco_data
from deformable_detr.engine import Trainer, argument_parser, build_evaluator, configured_device, main
from deformable_detr.startup.user_data import apply_user_data

CLASSES = ["square", "bar", "disc"]


def run(arguments: list[str]) -> dict | None:
    return main(argument_parser().parse_args(arguments))


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def read_checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=False)


def optimizer_of(checkpoint: dict) -> dict:
    # DefaultTrainer holds another trainer, which holds the optimiser.
    trainer = checkpoint["trainer"]
    return trainer.get("_trainer", trainer)["optimizer"]


def iterations_of(checkpoint: dict) -> set[float]:
    """How many steps the optimiser of a checkpoint has made."""
    return {float(entry["step"]) for entry in optimizer_of(checkpoint)["state"].values()}


def rates_of(checkpoint: dict) -> list[float]:
    return [group["lr"] for group in optimizer_of(checkpoint)["param_groups"]]


class World:
    """One of the two configuration systems: how its command line sets values."""

    def __init__(self, name: str, arguments: Callable[..., list[str]], output: Path) -> None:
        self.name = name
        self.arguments = arguments
        self.output = output

    def __call__(self, flags: list[str], *, variant: str = "", **values: object) -> dict | None:
        """Run ``main`` with flags and values among max_iter, weights, output, eval_period, train and test datasets."""
        return run([*flags, *self.arguments(variant), *self.overrides(**values)])

    def overrides(self, **values: object) -> list[str]:
        yaml_keys = {
            "max_iter": "SOLVER.MAX_ITER",
            "weights": "MODEL.WEIGHTS",
            "output": "OUTPUT_DIR",
            "eval_period": "TEST.EVAL_PERIOD",
            "train": "DATASETS.TRAIN",
            "test": "DATASETS.TEST",
            "num_classes": "MODEL.DEFORMABLE_DETR.NUM_CLASSES",
            "batch": "SOLVER.IMS_PER_BATCH",
            "best_metric": "TEST.BEST_METRIC",
        }
        lazy_keys = {
            "max_iter": "train.max_iter",
            "weights": "train.init_checkpoint",
            "output": "train.output_dir",
            "eval_period": "train.eval_period",
            "train": "dataloader.train.dataset.names",
            "test": "dataloader.test.dataset.names",
            "num_classes": "model.num_classes",
            "batch": "dataloader.train.total_batch_size",
            "best_metric": "train.best_metric",
        }
        if self.name == "lazy":
            return [f"{lazy_keys[key]}={value}" for key, value in values.items()]
        values = {key: f"('{v}',)" if key in ("train", "test") else str(v) for key, v in values.items()}
        return [part for key, value in values.items() for part in (yaml_keys[key], value)]


@pytest.fixture(params=["yaml", "lazy"])
def world(request, tiny_yaml, tiny_lazy, tmp_path) -> World:
    return World(request.param, {"yaml": tiny_yaml, "lazy": tiny_lazy}[request.param], tmp_path / "output")


@pytest.fixture
def flags(write_coco) -> list[str]:
    """Command-line flags that train and evaluate on tiny data."""
    return write_coco("train").flags("train") + write_coco("val").flags("val")


# Training and evaluation


@pytest.mark.parametrize("variant", ["", "_two_stage"])
def test_training_writes_losses_results_and_checkpoints(world, flags, variant):
    world(flags, variant=variant, eval_period=2)
    output = world.output
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert {p.name for p in output.glob("*.pth")} == {"model_0000001.pth", "model_0000003.pth", "model_final.pth"}
    assert iterations_of(read_checkpoint(output / "model_final.pth")) == {4.0}
    assert (output / "config.yaml").is_file() and (output / "log.txt").is_file()

    # Losses and results of the last iteration are on different lines.
    final = {key: value for line in read_metrics(output) for key, value in line.items()}
    assert math.isfinite(final["total_loss"])
    assert {"loss_ce", "loss_bbox_0", "loss_giou"} <= final.keys()
    assert ("loss_ce_enc" in final) == (variant == "_two_stage")
    assert 0 <= final["bbox/AP"] <= 100
    assert {f"bbox/AP-{name}" for name in CLASSES} <= final.keys()
    # Dropped by 10 after iteration 3 of 4.
    assert final["lr"] == pytest.approx(2e-5, rel=1e-3)


def test_evaluation_reproduces_the_result_at_the_end_of_training(world, flags, tmp_path):
    world(flags, eval_period=4)
    trained = read_metrics(world.output)[-1]
    results = world(
        ["--eval-only", *flags], weights=world.output / "model_final.pth", output=tmp_path / "again", num_classes=3
    )
    for metric in ("AP", "AP50", "APs"):
        assert results["bbox"][metric] == pytest.approx(trained[f"bbox/{metric}"], nan_ok=True)
    detections = json.loads((tmp_path / "again" / "inference" / "coco_instances_results.json").read_text())
    before = json.loads((world.output / "inference" / "coco_instances_results.json").read_text())
    assert detections == before and len(detections) > 0
    assert {d["category_id"] for d in detections} <= {3, 4, 9}
    assert (tmp_path / "again" / "config.yaml").is_file()


def test_resumed_training_continues_where_it_stopped(world, flags):
    """A run that lost its second half goes on from the middle to the same iteration, rates and optimiser steps."""
    world(flags)
    halfway, uninterrupted = (read_checkpoint(world.output / f"model_{n}.pth") for n in ("0000001", "final"))
    assert (halfway["iteration"], iterations_of(halfway)) == (1, {2.0})
    assert (uninterrupted["iteration"], iterations_of(uninterrupted)) == (3, {4.0})
    for name in ("model_final.pth", "model_0000003.pth", "metrics.json"):
        (world.output / name).unlink()
    (world.output / "last_checkpoint").write_text("model_0000001.pth")

    world(["--resume", *flags])
    resumed = read_checkpoint(world.output / "model_final.pth")
    assert (resumed["iteration"], iterations_of(resumed)) == (3, {4.0})
    assert rates_of(resumed) == pytest.approx(rates_of(uninterrupted))
    assert read_metrics(world.output)[0]["iteration"] == 3
    assert read_metrics(world.output)[0]["lr"] == pytest.approx(2e-5, rel=1e-3)
    assert resumed["model"].keys() == uninterrupted["model"].keys()
    assert not torch.equal(resumed["model"]["query_embed.weight"], halfway["model"]["query_embed.weight"])


def test_resume_without_a_checkpoint_starts_at_0(world, flags):
    world(["--resume", *flags], max_iter=1)
    assert iterations_of(read_checkpoint(world.output / "model_final.pth")) == {1.0}


def test_training_without_resume_starts_again(world, flags):
    world(flags, max_iter=2)
    world(flags, max_iter=1)
    final = read_checkpoint(world.output / "model_final.pth")
    assert final["iteration"] == 0 and iterations_of(final) == {1.0}


def test_evaluation_with_resume_takes_the_last_checkpoint(world, flags):
    world(flags, max_iter=1, eval_period=1)
    trained = (world.output / "inference" / "coco_instances_results.json").read_text()
    config = (path := world.output / "config.yaml").read_text(), path.stat().st_mtime_ns
    world(["--eval-only", "--resume", *flags])
    assert (world.output / "inference" / "coco_instances_results.json").read_text() == trained
    # It describes the training: the evaluation was told nothing of its max_iter.
    assert (path.read_text(), path.stat().st_mtime_ns) == config


def test_evaluation_in_another_precision_moves_scores_a_little(world, flags):
    world(flags, max_iter=1, eval_period=1)
    path = world.output / "inference" / "coco_instances_results.json"
    trained = [detection["score"] for detection in json.loads(path.read_text())]
    world(["--eval-only", "--resume", "--precision", "bfloat16", *flags])
    scores = [detection["score"] for detection in json.loads(path.read_text())]
    assert scores != trained and scores == pytest.approx(trained, abs=1e-2)
    with pytest.raises(ValueError, match="cuda_graphs needs a model on CUDA"):
        world(["--eval-only", "--resume", "--cuda-graphs", *flags])


def test_schedule_is_refused_before_the_data_are_read(world):
    DatasetCatalog.register("unread", lambda: pytest.fail("the data are read first"))
    MetadataCatalog.get("unread").evaluator_type = "coco"
    steps = ["lr_multiplier.scheduler.milestones=[4,4]"] if world.name == "lazy" else ["SOLVER.STEPS", "(3, 3)"]
    with pytest.raises(ValueError, match=r"lr_multiplier cannot be built|SOLVER\.STEPS must be iterations"):
        run([*world.arguments(""), *world.overrides(train="unread", test="unread"), *steps])


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("max_iter", 0, r"(SOLVER\.MAX_ITER|train\.max_iter) must be at least 1, got 0"),
        ("batch", 0, r"(SOLVER\.IMS_PER_BATCH|total_batch_size) must be at least 1, got 0"),
        ("best_metric", "AP50", r"(TEST\.BEST_METRIC|train\.best_metric).*got 'AP50'; did you mean bbox/AP50\?"),
    ],
)
def test_values_out_of_their_range_are_refused_before_anything_is_built(world, flags, name, value, message):
    with pytest.raises(ValueError, match=message):
        world(flags, **{name: value})
    assert not (world.output / "config.yaml").exists()


@pytest.mark.parametrize("split, mode", [("train", []), ("test", []), ("test", ["--eval-only"])])
@pytest.mark.parametrize("root, told", [("/data", "/data"), (None, "datasets, as it is not set")])
def test_dataset_that_is_not_there_is_named_before_anything_is_built(
    world, write_coco, monkeypatch, split, mode, root, told
):
    if root is None:
        monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    else:
        monkeypatch.setenv("DETECTRON2_DATASETS", root)
    data = write_coco()
    register_coco_data("here", data.json, data.images)
    register_coco_instances("absent", {}, "absent/instances.json", "absent")
    message = rf"dataset 'absent' needs absent/instances\.json, .* DETECTRON2_DATASETS \({told}\); .* --train-json"
    with pytest.raises(FileNotFoundError, match=message):
        world(mode, **{"train": "here", "test": "here", split: "absent"})
    assert not (world.output / "config.yaml").exists()


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("split, mode", [("train", []), ("test", []), ("test", ["--eval-only"])])
def test_another_number_of_outputs_than_classes_is_refused_before_anything_is_built(
    world, write_coco, split, mode, num_classes
):
    data = write_coco()
    # Of what is evaluated the classes are found in the file; what is trained on has said them.
    metadata = {"thing_classes": CLASSES} if split == "train" else {}
    register_coco_instances("wrong", metadata, data.json, data.images)
    DatasetCatalog.register("silent", lambda: [])
    MetadataCatalog.get("silent").evaluator_type = "coco"
    key = r"model\.num_classes" if world.name == "lazy" else r"MODEL\.DEFORMABLE_DETR\.NUM_CLASSES"
    message = rf"{key} is {num_classes}, but dataset 'wrong' has 3 classes \(square, bar, disc\): set {key} to 3"
    with pytest.raises(ValueError, match=message):
        world(mode, **{"train": "silent", "test": "silent", split: "wrong"}, num_classes=num_classes)
    assert not (world.output / "config.yaml").exists()


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_trainer_of_ones_own_compares_the_data_to_evaluate_on_with_the_outputs(
    tiny_yaml, write_coco, num_classes, monkeypatch
):
    data = write_coco()
    register_coco_instances("tiny_script", {}, data.json, data.images)
    _, path, *opts = tiny_yaml()
    cfg = load_config(path, [*opts, "DATASETS.TEST", "('tiny_script',)"])
    cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES = num_classes
    monkeypatch.setattr(Trainer, "build_model", lambda cfg: pytest.fail("a model is built"))
    with pytest.raises(ValueError, match=rf"NUM_CLASSES is {num_classes}, but dataset 'tiny_script' has 3 classes"):
        Trainer(cfg)


@pytest.mark.parametrize("split, mode", [("train", []), ("val", ["--eval-only"])])
def test_configuration_of_a_run_with_own_data_asks_for_them_again(world, write_coco, split, mode):
    data = write_coco()
    register_coco_data("here", data.json, data.images)
    names = {"train": "here", "test": "here", "test" if split == "val" else split: f"user_{split}"}
    with pytest.raises(ValueError, match=f"give --{split}-json and --{split}-images again"):
        world(mode, **names)


def test_models_of_the_zoo_are_configurations(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"MODEL\.DEVICE 'cuda' needs a GPU"):
        run(["--config-file", "deformable_detr_R_50_two_stage"])


def test_frozen_parameters_keep_their_values_and_all_others_are_trained(world, flags):
    world(flags)
    before, after = (read_checkpoint(world.output / f"model_000000{n}.pth")["model"] for n in (1, 3))
    unchanged = {key for key in after if torch.equal(before[key], after[key])}
    frozen = ("backbone.bottom_up.stem.", "backbone.bottom_up.res2.")
    norm = re.compile(r"backbone\.bottom_up\..*\.norm\.")
    assert unchanged == {key for key in after if key.startswith(frozen) or norm.match(key)}


# The user's own data


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_flags_set_datasets_and_classes(flags, kind):
    path = Path(__file__).parents[1] / "configs" / "COCO-Detection" / f"deformable_detr_R_50.{kind}"
    args = argument_parser().parse_args(["--config-file", str(path), *flags])
    cfg = load_config(args.config_file)
    apply_user_data(cfg, args)
    if isinstance(cfg, CfgNode):
        assert cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES == 3
        assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("user_train",), ("user_val",))
    else:
        assert cfg.model.num_classes == cfg.dataloader.train.dataset.num_classes == 3
        assert cfg.dataloader.train.dataset.names == "user_train"
        assert cfg.dataloader.test.dataset.names == cfg.dataloader.evaluator.dataset_name == "user_val"
    assert MetadataCatalog.get("user_val").thing_classes == ["square", "bar", "disc"]


def test_without_flags_the_configuration_is_untouched():
    path = Path(__file__).parents[1] / "configs" / "COCO-Detection" / "deformable_detr_R_50.yaml"
    args = argument_parser().parse_args(["--config-file", str(path)])
    cfg = load_config(args.config_file)
    before = copy.deepcopy(cfg)
    apply_user_data(cfg, args)
    assert cfg == before


def test_training_data_alone_trains_without_evaluation(world, write_coco):
    world(write_coco().flags("train"), max_iter=1, eval_period=1)
    assert not any(key.startswith("bbox") for key in read_metrics(world.output)[-1])
    assert (world.output / "model_final.pth").is_file()


def test_splits_with_other_categories_are_refused(world, write_coco):
    train, val = write_coco("train"), write_coco("val")
    val.content["categories"][0]["name"] = "ring"
    val.save()
    with pytest.raises(ValueError, match=r"same categories, got \['square', 'bar', 'disc'\] and \[.*'ring'\]"):
        world(train.flags("train") + val.flags("val"))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("part", [slice(0, 2), slice(2, 4)])
def test_annotations_and_images_belong_together(world, write_coco, split, part):
    with pytest.raises(ValueError, match=f"--{split}-json and --{split}-images must be given together"):
        world(write_coco().flags(split)[part])


def test_training_on_validation_data_alone_is_refused(world, write_coco):
    with pytest.raises(ValueError, match="there is no dataset to train on"):
        world(write_coco().flags("val"))


def test_evaluation_without_data_is_refused(world, write_coco):
    with pytest.raises(ValueError, match="--eval-only needs a dataset to evaluate on"):
        world(["--eval-only", *write_coco().flags("train")])


def test_configuration_file_is_required():
    with pytest.raises(ValueError, match="--config-file is required"):
        run([])


def test_processes_are_for_the_configured_device(world, monkeypatch):
    options = ["train.device=cuda:1"] if world.name == "lazy" else ["MODEL.DEVICE", "cuda:1"]
    for opts, device in ([], "cpu"), (options, "cuda:1"):
        asked = configured_device(argument_parser().parse_args([*world.arguments(""), *opts]))
        assert asked == {"device": device, "device_key": "train.device" if world.name == "lazy" else "MODEL.DEVICE"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    key = r"train\.device" if world.name == "lazy" else r"MODEL\.DEVICE"
    with pytest.raises(RuntimeError, match=f"{key} 'cuda:1' needs a GPU .*set it to cpu"):
        run([*world.arguments(""), *options])


def test_command_line_is_detectron2s_own_and_the_flags_for_own_data():
    from detectron2.engine import default_argument_parser

    def options(parser: argparse.ArgumentParser) -> set[str]:
        return {option for action in parser._actions for option in action.option_strings}

    ours, theirs = options(argument_parser()), options(default_argument_parser())
    files = {"--train-json", "--train-images", "--val-json", "--val-images", "--data"}
    inference = {"--precision", "--cuda-graphs"}
    other_names = {"--model", "--opts", "--show-data", "--batch-size"}
    assert ours - theirs == files | inference | other_names | {"--repair", "--weights", "--epochs", "--replay"}
    assert theirs <= ours


# Evaluators


def register(name: str, **metadata: object) -> None:
    DatasetCatalog.register(name, lambda: [])
    MetadataCatalog.get(name).set(thing_classes=["a"], **metadata)


@pytest.mark.parametrize("evaluator_type", ["coco", "coco_panoptic_seg"])
def test_coco_data_gets_the_coco_evaluator(write_coco, evaluator_type):
    register("tiny", evaluator_type=evaluator_type, json_file=write_coco().json)
    assert type(build_evaluator("tiny")) is COCOEvaluator


def test_voc_data_gets_the_voc_evaluator(tmp_path):
    (tmp_path / "Annotations").mkdir()
    register("tiny", evaluator_type="pascal_voc", dirname=str(tmp_path), split="test", year=2007)
    assert type(build_evaluator("tiny")) is PascalVOCDetectionEvaluator


def test_lvis_data_gets_the_lvis_evaluator(monkeypatch, tmp_path):
    """Detectron2's evaluator runs; the optional package lvis itself is replaced by the two calls it needs."""

    class LVIS:
        def __init__(self, path: str) -> None:
            self.path = path

        def get_ann_ids(self) -> list[int]:
            return [1]

    package = ModuleType("lvis")
    package.LVIS = LVIS
    monkeypatch.setitem(sys.modules, "lvis", package)
    path = tmp_path / "lvis.json"
    path.write_text("{}")
    register("tiny", evaluator_type="lvis", json_file=str(path))
    evaluator = build_evaluator("tiny")
    assert type(evaluator).__name__ == "LVISEvaluator"
    assert evaluator._lvis_api.path == str(path)


def test_missing_lvis_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lvis", None)
    register("tiny", evaluator_type="lvis", json_file="lvis.json")
    with pytest.raises(ModuleNotFoundError, match="dataset 'tiny' needs the package 'lvis': pip install lvis"):
        build_evaluator("tiny")
