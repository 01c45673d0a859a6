"""What is said of a configuration and of a model before it is trained."""

import pytest
from detectron2.modeling import build_model

from deformable_detr import load_config
from deformable_detr.config import find_config_file
from deformable_detr.data.datasets import register_coco_data
from deformable_detr.startup.checks import check_unused_parameters
from deformable_detr.startup.setup import argument_parser, setup

MODEL = "deformable_detr_R_50"


@pytest.fixture(params=["yaml", "lazy"])
def config_of(request):
    """A function (find_unused_parameters) -> configuration in one of the two systems."""

    def load(find: bool):
        if request.param == "yaml":
            return load_config(MODEL, ["SOLVER.FIND_UNUSED_PARAMETERS", str(find)])
        return load_config(find_config_file(MODEL, suffix=".py"), [f"train.ddp.find_unused_parameters={find}"])

    return load


@pytest.fixture
def model(tiny_yaml):
    """Without its last stage: the backbone has an output that no level comes from."""
    _, path, *opts = tiny_yaml()
    return build_model(load_config(path, [*opts, "MODEL.DEFORMABLE_DETR.IN_FEATURES", "['res3', 'res4']"]))


def test_several_processes_need_the_key_for_unused_parameters(model, config_of, monkeypatch, caplog):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    key = r"(SOLVER\.FIND_UNUSED_PARAMETERS|train\.ddp\.find_unused_parameters)"
    # Two blocks of two convolutions, and a shortcut in the first; frozen norms have no parameters.
    with pytest.raises(ValueError, match=rf"^5 parameters .*: bottom_up\.res5\.0\..*, or set {key}"):
        check_unused_parameters(model, config_of(False))
    check_unused_parameters(model, config_of(True))
    assert "5 parameters of the backbone are never trained" in caplog.text


def test_one_process_is_warned_of_unused_parameters(model, config_of, caplog):
    check_unused_parameters(model, config_of(False))
    assert "bottom_up.res5.1.conv2.weight" in caplog.text


def test_a_backbone_is_checked_that_is_frozen_as_far_as_it_is_used(model, config_of, caplog):
    bottom_up = model.backbone.bottom_up
    bottom_up.freeze(4)
    # Of res5 alone, which no level comes from.
    check_unused_parameters(model, config_of(False))
    assert "5 parameters of the backbone are never trained" in caplog.text
    caplog.clear()
    bottom_up.freeze(5)
    check_unused_parameters(model, config_of(False))
    assert not caplog.records


def test_nothing_is_said_of_a_model_whose_parameters_are_all_used(tiny_yaml, config_of, caplog):
    _, path, *opts = tiny_yaml()
    check_unused_parameters(build_model(load_config(path, opts)), config_of(False))
    assert not caplog.records


@pytest.fixture
def set_up(tiny_yaml, write_coco, monkeypatch):
    """A function (processes, KEY, VALUE, ...) -> the yaml configuration that a training on so many begins with."""
    data = write_coco()
    register_coco_data("here", data.json, data.images)
    datasets = ["DATASETS.TRAIN", "('here',)", "DATASETS.TEST", "()", "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]
    monkeypatch.setattr("deformable_detr.startup.setup.default_setup", lambda *_: None)

    def start(processes: int, *opts: str):
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: processes)
        return setup(argument_parser().parse_args([*tiny_yaml(), *datasets, *opts]))

    return start


def test_a_batch_is_checked_as_it_is_scaled_to_the_processes(set_up):
    recipe = ("SOLVER.IMS_PER_BATCH", "32", "SOLVER.REFERENCE_WORLD_SIZE", "16")
    # No multiple of 6 before; 2 of a process.
    assert set_up(6, *recipe).SOLVER.IMS_PER_BATCH == 12
    with pytest.raises(ValueError, match=r"STEPS is 16, but the batch of a process has 2 images \(.* is 2\)"):
        set_up(1, *recipe, "SOLVER.ACCUMULATION_STEPS", "16")


def test_a_batch_that_the_gpus_it_is_meant_for_cannot_share_is_refused(set_up):
    with pytest.raises(ValueError, match=r"multiple of SOLVER\.REFERENCE_WORLD_SIZE \(16\), got 2$"):
        set_up(1, "SOLVER.REFERENCE_WORLD_SIZE", "16")


@pytest.mark.parametrize("metric, refused", [("", True), ("bbox/AP", True), ("there/bbox/AP", False)])
def test_a_metric_of_several_datasets_names_one_of_them(set_up, write_coco, metric, refused):
    data = write_coco("there")
    register_coco_data("there", data.json, data.images)
    opts = ("DATASETS.TEST", "('here', 'there')", "TEST.PATIENCE", "3", "TEST.EVAL_PERIOD", "1")
    if not refused:
        set_up(1, *opts, "TEST.BEST_METRIC", metric)
        return
    message = r"with 2 datasets in DATASETS\.TEST, TEST\.BEST_METRIC must begin .* such as here/bbox/AP, got "
    told = "^TEST.PATIENCE 3 asks for one: " if not metric else "^"
    with pytest.raises(ValueError, match=f"{told}{message}'{metric}'$"):
        set_up(1, *opts, "TEST.BEST_METRIC", metric)


def test_a_lazy_config_evaluates_one_dataset(tiny_lazy):
    args = argument_parser().parse_args(["--eval-only", *tiny_lazy(), "dataloader.test.dataset.names=[a,b]"])
    with pytest.raises(
        ValueError, match=r"one dataset, got 2: a, b\. Set dataloader\.test\.dataset\.names to its name"
    ):
        setup(args)
