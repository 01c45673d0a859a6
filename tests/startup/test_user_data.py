"""Fine-tuning from the command line: weights, schedule and repaired data, in both configuration systems."""

import copy
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, LazyConfig
from detectron2.data import DatasetCatalog
from detectron2.solver import LRMultiplier
from detectron2.utils import comm

from deformable_detr import load_config
from deformable_detr.config import RunConfig
from deformable_detr.data.coco_format import DatasetError
from deformable_detr.engine import argument_parser, main
from deformable_detr.solver import build_lr_multiplier, build_lr_scheduler
from deformable_detr.startup.schedule import FINETUNE_EPOCHS, apply_schedule, scale_to_processes
from deformable_detr.startup.user_data import apply_user_data

CONFIG = Path(__file__).parents[2] / "configs" / "COCO-Detection" / "deformable_detr_R_50"


@pytest.fixture(params=["yaml", "py"])
def configure(request) -> Callable:
    """A function (flags) -> the configuration that a command line with these flags makes of the base model's file."""

    def read(*flags: str, yaml: tuple[str, ...] = (), lazy: tuple[str, ...] = ()) -> CfgNode | dict:
        opts = yaml if request.param == "yaml" else lazy
        args = argument_parser().parse_args(["--config-file", f"{CONFIG}.{request.param}", *flags, *opts])
        cfg = load_config(args.config_file, args.opts)
        apply_user_data(cfg, args)
        return cfg

    return read


def schedule_of(cfg) -> dict[str, object]:
    if isinstance(cfg, CfgNode):
        solver = cfg.SOLVER
        (drop,) = solver.STEPS
        periods = solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD
        values = solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER, drop, solver.AMP.ENABLED, *periods
    else:
        train = cfg.train
        drop, end = cfg.lr_multiplier.scheduler.milestones
        assert end == train.max_iter
        periods = train.checkpointer.period, train.eval_period
        values = (
            *(cfg.dataloader.train.total_batch_size, cfg.optimizer.lr, train.max_iter, drop, train.amp.enabled),
            *periods,
        )
    return dict(zip(("batch", "lr", "max_iter", "drop", "amp", "checkpoints", "evaluations"), values, strict=True))


def save(cfg, path: Path) -> str:
    """Write the config.yaml that a run with this configuration leaves."""
    if isinstance(cfg, CfgNode):
        path.write_text(cfg.dump(), encoding="utf-8")
    else:
        LazyConfig.save(cfg, str(path))
    return str(path)


# The schedule


def test_fine_tuning_gets_a_schedule_for_one_gpu_that_is_logged(configure, write_coco, caplog):
    caplog.set_level(logging.INFO)
    cfg = configure(*write_coco().flags("train"), "--weights", "deformable-detr://deformable_detr_R_50")
    # 4 images in batches of 2: 2 iterations an epoch, evaluation every third epoch.
    iterations = 2 * FINETUNE_EPOCHS
    expected = {"batch": 2, "lr": 2e-4 * 2 / 32, "max_iter": iterations, "drop": 0.8 * iterations, "amp": True}
    assert schedule_of(cfg) == pytest.approx(expected | {"checkpoints": 6, "evaluations": 6})
    assert "25 epochs of 4 images in batches of 2 are 50 iterations" in caplog.text
    assert "1.25e-05 = 0.0002 x 2/32, dropped after iteration 40 (80 %)." in caplog.text


@pytest.mark.parametrize("flags", [("--weights", "x.pth"), ("--epochs", "3")], ids=lambda flags: flags[0])
def test_fine_tuning_pads_to_whole_strides_unless_told_otherwise(configure, write_coco, flags):
    data = write_coco().flags("train")
    official = {"yaml": ("MODEL.DEFORMABLE_DETR.SIZE_DIVISIBILITY", "0"), "lazy": ("model.size_divisibility=0",)}
    other = {"yaml": ("MODEL.DEFORMABLE_DETR.SIZE_DIVISIBILITY", "64"), "lazy": ("model.size_divisibility=64",)}
    configurations = (
        configure(*data, *flags),
        configure(*data, *flags, **official),
        configure(*data, *flags, **other),
        configure(*data),
        configure(*data, *flags, "--eval-only"),
    )
    assert [RunConfig(cfg).get("size_divisibility") for cfg in configurations] == [32, 0, 64, 0, 0]


def test_batch_grows_with_the_gpus_up_to_the_configurations(configure):
    for num_gpus, batch in ((0, 2), (1, 2), (8, 16), (64, 32)):
        cfg = configure()
        apply_schedule(RunConfig(cfg), reference=RunConfig(configure()), epochs=1, num_images=320, num_gpus=num_gpus)
        assert schedule_of(cfg)["batch"] == batch
        assert schedule_of(cfg)["lr"] == pytest.approx(2e-4 * batch / 32)


def test_a_resumed_run_keeps_its_batch_and_length_on_another_number_of_gpus(configure, write_coco, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    output = {"yaml": ("OUTPUT_DIR", str(tmp_path)), "lazy": (f"train.output_dir={tmp_path}",)}
    flags = (*write_coco().flags("train"), "--epochs", "12", "--resume")
    here = configure(*flags, **output)
    begun = copy.deepcopy(here)
    apply_schedule(RunConfig(begun), reference=RunConfig(configure()), epochs=12, num_images=4, num_gpus=2)
    save(begun, tmp_path / "config.yaml")
    # As long as there is no checkpoint a new run begins.
    assert schedule_of(configure(*flags, **output)) == schedule_of(here) and schedule_of(here)["batch"] == 2
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert schedule_of(configure(*flags, **output)) == schedule_of(begun) and schedule_of(begun)["batch"] == 4
    assert "12 epochs of 4 images in batches of 4 (the resumed run's) are 12 iterations" in caplog.text
    for cut in ("", "SOLVER: {"):
        (tmp_path / "config.yaml").write_text(cut)
        with pytest.raises(ValueError, match=r"(?s)config\.yaml, of the run that goes on, is empty, .*: .* Remove it"):
            configure(*flags, **output)


def test_what_is_set_on_the_command_line_stays_and_the_rest_follows_from_it(configure, write_coco):
    cfg = configure(
        *(*write_coco().flags("train"), "--epochs", "12"),
        yaml=("SOLVER.IMS_PER_BATCH", "4", "SOLVER.AMP.ENABLED", "False", "TEST.EVAL_PERIOD", "7"),
        lazy=("dataloader.train.total_batch_size=4", "train.amp.enabled=False", "train.eval_period=7"),
    )
    expected = {"batch": 4, "lr": 2e-4 * 4 / 32, "max_iter": 12, "drop": 9, "amp": False}
    assert schedule_of(cfg) == pytest.approx(expected | {"checkpoints": 2, "evaluations": 7})


def test_learning_rate_on_the_command_line_is_not_scaled(configure, write_coco):
    flags = (*write_coco().flags("train"), "--epochs", "3")
    cfg = configure(*flags, yaml=("SOLVER.BASE_LR", "0.5"), lazy=("optimizer.lr=0.5",))
    assert schedule_of(cfg)["lr"] == 0.5


def test_the_schedule_that_is_logged_is_the_one_after_overrides(configure, write_coco, caplog):
    caplog.set_level(logging.INFO)
    cfg = configure(
        *(*write_coco().flags("train"), "--epochs", "12"),
        yaml=("SOLVER.MAX_ITER", "10", "SOLVER.BASE_LR", "0.5", "TEST.EVAL_PERIOD", "3"),
        lazy=("train.max_iter=10", "optimizer.lr=0.5", "train.eval_period=3"),
    )
    # 20 of 4 images; the drop is where 80 % of what is left of the run is over.
    assert schedule_of(cfg)["drop"] == 8
    assert (
        "5 epochs of 4 images in batches of 2 are 10 iterations. Learning rate 0.5, dropped after iteration 8"
        in caplog.text
    )
    assert "Evaluation every 3 iterations, checkpoint every 4." in caplog.text
    assert "As set on the command line: " in caplog.text


def test_mixed_precision_is_for_gpus(configure, write_coco):
    flags = (*write_coco().flags("train"), "--epochs", "3")
    assert not schedule_of(configure(*flags, yaml=("MODEL.DEVICE", "cpu"), lazy=("train.device=cpu",)))["amp"]


@pytest.mark.parametrize("flags", ([], ["--eval-only", "--weights", "x.pth"]), ids=("own schedule", "evaluation"))
def test_without_fine_tuning_the_schedule_is_the_configurations(configure, write_coco, flags):
    assert schedule_of(configure(*write_coco().flags("train"), *flags)) == schedule_of(configure())


def test_flags_about_data_that_are_not_given_are_refused(configure, write_coco):
    with pytest.raises(ValueError, match="--epochs needs --train-json"):
        configure(*write_coco().flags("val"), "--epochs", "3")
    with pytest.raises(ValueError, match="--repair needs --train-json or --val-json"):
        configure("--repair")


def test_a_schedule_for_these_gpus_is_not_scaled_to_them_again(configure, write_coco):
    flags = (*write_coco().flags("train"), "--epochs", "25")
    cfg = configure(*flags, yaml=("SOLVER.REFERENCE_WORLD_SIZE", "16"))
    expected = schedule_of(configure(*flags))
    assert expected["batch"] == 2 and schedule_of(scale_to_processes(cfg, 8)) == expected


@pytest.mark.parametrize("typed", (False, True), ids=("one image", "max_iter"))
def test_a_run_of_one_iteration_has_no_drop(configure, write_coco, caplog, typed):
    caplog.set_level(logging.INFO)
    data = write_coco() if typed else write_coco(sizes=[(80, 60)])
    length = {"yaml": ("SOLVER.MAX_ITER", "1"), "lazy": ("train.max_iter=1",)} if typed else {}
    cfg = configure(*data.flags("train"), "--epochs", "1", **length)
    assert RunConfig(cfg).get("max_iter") == 1
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    if isinstance(cfg, CfgNode):
        build_lr_scheduler(cfg, optimizer)
    else:
        LRMultiplier(optimizer, build_lr_multiplier(cfg.lr_multiplier), max_iter=1)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert "1 iterations. " in caplog.text and "dropped" not in caplog.text


# Weights and classes


@pytest.mark.parametrize("flags", ([], ["--eval-only"]))
def test_weights_flag_sets_the_weights(configure, flags):
    cfg = configure(*flags, "--weights", "model.pth")
    assert (cfg.MODEL.WEIGHTS if isinstance(cfg, CfgNode) else cfg.train.init_checkpoint) == "model.pth"


@pytest.mark.parametrize(
    "yaml, lazy, message",
    [
        (("MODEL.DEFORMABLE_DETR.NUM_CLASSES", "5"), "model.num_classes=5", "is 3 by --train-json, but 5 by"),
        (("DATASETS.TRAIN", "('x',)"), "dataloader.train.dataset.names=x", r"is .*'user_train'.* but .*'x'.* by"),
        (("DATASETS.TEST", "('x',)"), "dataloader.test.dataset.names=x", r"is (\(\)|\[\]) by .* but .*'x'.* by"),
        (("MODEL.WEIGHTS", "x"), "train.init_checkpoint=x", "is 'a.pth' by --weights, but 'x' by"),
    ],
)
def test_override_that_says_something_else_than_a_flag_is_refused(configure, write_coco, yaml, lazy, message):
    flags = [*write_coco().flags("train"), "--weights", "a.pth"]
    key = rf"({re.escape(yaml[0])}|{re.escape(lazy.partition('=')[0])})"
    with pytest.raises(ValueError, match=f"^{key} {message}"):
        configure(*flags, yaml=yaml, lazy=(lazy,))


def test_override_that_says_the_same_as_a_flag_is_harmless(configure, write_coco):
    yaml = ("MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3", "DATASETS.TEST", "()", "MODEL.WEIGHTS", "a.pth")
    lazy = ("model.num_classes=3", "dataloader.test.dataset.names=[]", "train.init_checkpoint=a.pth")
    flags = [*write_coco().flags("train"), "--weights", "a.pth"]
    assert configure(*flags, yaml=yaml, lazy=lazy) == configure(*flags)


@pytest.fixture(params=["yaml", "lazy"])
def start(request, tiny_yaml, tiny_lazy, tmp_path) -> Callable[..., dict | None]:
    """Run ``main`` with flags and a tiny model of a variant; output goes to a folder under ``tmp_path``."""

    def run(flags: list[str], variant: str = "", *, output: str = "output") -> dict | None:
        if request.param == "yaml":
            arguments = [*tiny_yaml(variant), "OUTPUT_DIR", str(tmp_path / output)]
            if "--weights" in flags:
                # The tiny values say that there are none, as overrides.
                index = arguments.index("MODEL.WEIGHTS")
                del arguments[index : index + 2]
        else:
            arguments = [*tiny_lazy(variant), f"train.output_dir={tmp_path / output}"]
        return main(argument_parser().parse_args([*flags, *arguments]))

    return run


def detections_by_class(results: Path, annotations: Path) -> dict[str, torch.Tensor]:
    names = {c["id"]: c["name"].lower() for c in json.loads(annotations.read_text())["categories"]}
    detections = {name: [] for name in names.values()}
    for x in json.loads(results.read_text()):
        detections[names[x["category_id"]]].append((x["image_id"], *x["bbox"], x["score"]))
    return {name: torch.tensor(sorted(found)) for name, found in detections.items()}


@pytest.mark.parametrize("variant", ["", "_two_stage"])
def test_before_the_first_step_shared_classes_are_detected_as_by_the_source(start, write_coco, tmp_path, variant):
    val = write_coco("val")
    start([*write_coco("train").flags("train"), *val.flags("val")], variant, output="source")
    source = tmp_path / "source"
    expected = detections_by_class(source / "inference" / "coco_instances_results.json", Path(val.json))

    # The same images: "bar" is renamed, "blob" is new, and the others have another order and spelling.
    other = {9: {"id": 1, "name": "Disc"}, 4: {"id": 2, "name": "rod"}, 3: {"id": 8, "name": "SQUARE"}}
    val.content["categories"] = [*other.values(), {"id": 5, "name": "blob"}]
    for annotation in val.content["annotations"]:
        annotation["category_id"] = other[annotation["category_id"]]["id"]
    val.save()
    weights = source / "model_final.pth"
    results = start(["--eval-only", *val.flags("val"), "--weights", str(weights)], variant)

    actual = detections_by_class(tmp_path / "output" / "inference" / "coco_instances_results.json", Path(val.json))
    assert actual.keys() == {"disc", "rod", "square", "blob"}
    for name in ("disc", "square"):
        assert len(expected[name]) == 4 * 20  # every query of every image
        torch.testing.assert_close(actual[name], expected[name])
    before = json.loads((source / "metrics.json").read_text().splitlines()[-1])
    for name, old in (("Disc", "disc"), ("SQUARE", "square")):
        assert results["bbox"][f"AP-{name}"] == pytest.approx(before[f"bbox/AP-{old}"], nan_ok=True)
    log = (tmp_path / "output" / "log.txt").read_text()
    assert "Disc <- row 2 (disc)" in log and "from their initialisation: rod, blob" in log


def test_checkpoint_names_its_classes(start, write_coco, tmp_path):
    start(write_coco().flags("train"))
    checkpoint = torch.load(tmp_path / "output" / "model_final.pth", weights_only=False)
    assert checkpoint["class_names"] == ["square", "bar", "disc"]


def test_after_a_run_without_validation_data_they_can_be_named(configure, write_coco, tmp_path):
    begun = configure(*write_coco("train").flags("train"))
    assert RunConfig(begun).evaluated_datasets() == ()
    # The last --config-file counts: the run's own.
    again = configure(*write_coco("val").flags("val"), "--config-file", save(begun, tmp_path / "config.yaml"))
    assert RunConfig(again).evaluated_datasets() == ("user_val",)


def test_validation_data_for_a_lazy_config_without_an_evaluator_are_refused(write_coco):
    flags = ["--config-file", f"{CONFIG}.py", *write_coco().flags("val")]
    cfg = load_config(f"{CONFIG}.py")
    del cfg.dataloader.evaluator
    with pytest.raises(ValueError, match=r"^--val-json needs an evaluator, .* no dataloader\.evaluator$"):
        apply_user_data(cfg, argument_parser().parse_args(flags))


# Checked data


def test_bad_data_stop_the_run_before_the_first_step_and_repaired_data_do_not(start, write_coco, tmp_path):
    train, val = write_coco("train"), write_coco("val")
    train.content["annotations"][0]["bbox"] = [-30, 5, 60, 20]
    train.save()
    (Path(val.images) / "11.png").unlink()
    flags = [*train.flags("train"), *val.flags("val")]
    with pytest.raises(DatasetError, match=r"(?s)1 x box that leaves its image.*1 x missing image file"):
        start(flags)
    assert not list((tmp_path / "output").glob("*.pth"))
    start([*flags, "--repair"])
    output = tmp_path / "output"
    assert (output / "model_final.pth").is_file()
    assert "--repair changed the data" in (output / "log.txt").read_text()
    results = json.loads((output / "inference" / "coco_instances_results.json").read_text())
    assert {x["image_id"] for x in results} == {10, 12, 13}


@pytest.mark.parametrize("wanted", (False, True))
def test_segmentations_are_loaded_where_the_mapper_takes_them_and_only_there(configure, write_coco, wanted):
    data = write_coco()
    for annotation in data.content["annotations"]:
        annotation["segmentation"] = [[0, 0, 9, 0, 9, 9]]
    data.save()
    yaml, lazy = ("MODEL.MASK_ON", str(wanted)), (f"dataloader.train.mapper.use_instance_mask={wanted}",)
    configure(*data.flags("train"), yaml=yaml, lazy=lazy)
    loaded = [annotation for record in DatasetCatalog.get("user_train") for annotation in record["annotations"]]
    assert [a.get("segmentation") for a in loaded] == 4 * ([[[0, 0, 9, 0, 9, 9]]] if wanted else [None])


def test_objects_whose_segmentation_is_broken_are_trained_on(start, write_coco, tmp_path):
    train, val = write_coco("train"), write_coco("val")
    for annotation in train.content["annotations"] + val.content["annotations"]:
        annotation["segmentation"] = [1, 2, 3, 4]
    train.save()
    # As editors on Windows write it.
    Path(val.json).write_text(json.dumps(val.content), encoding="utf-8-sig")
    start([*train.flags("train"), *val.flags("val")])
    results = json.loads((tmp_path / "output" / "inference" / "coco_instances_results.json").read_text())
    assert {x["image_id"] for x in results} == {10, 11, 12, 13}


@pytest.mark.parametrize("is_main", (True, False))
def test_error_in_the_process_that_checks_the_data_reaches_all(configure, write_coco, monkeypatch, is_main):
    """Nobody is left to wait: every process takes part in sharing the outcome, and none goes on."""
    gathered = []

    def fill_the_disk(*_, **__):
        raise OSError("No space left on device")

    def gather(own):
        gathered.append(own)
        return [own if is_main else (None, "OSError: No space left on device"), own]

    monkeypatch.setattr("deformable_detr.startup.user_data.check_user_data", fill_the_disk)
    monkeypatch.setattr(comm, "is_main_process", lambda: is_main)
    monkeypatch.setattr(comm, "all_gather", gather)
    with pytest.raises(OSError if is_main else RuntimeError, match="No space left on device"):
        configure(*write_coco().flags("train"))
    assert gathered == [(None, "OSError: No space left on device" if is_main else None)]
