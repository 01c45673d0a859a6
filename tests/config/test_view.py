"""One view of both kinds of configuration."""

import ast
import dataclasses
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, LazyConfig
from omegaconf import DictConfig
from torch import nn

import deformable_detr
from deformable_detr import load_config
from deformable_detr.config import KEYS, RunConfig
from deformable_detr.startup.schedule import drops_of
from deformable_detr.training.loop import TrainingLoop
from deformable_detr.training.per_layer_ap import EveryLayer
from deformable_detr.training.precision import Precision
from deformable_detr.training.settings import TrainingSettings

CONFIGS = Path(__file__).parents[2] / "configs"
PACKAGE = Path(deformable_detr.__file__).parent
TWINS = sorted(path.with_suffix("") for path in CONFIGS.glob("*/*.yaml") if path.with_suffix(".py").exists())
SUFFIXES = (".yaml", ".py")


def parse(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.fixture(params=SUFFIXES)
def run(request) -> RunConfig:
    return RunConfig(load_config(str(CONFIGS / "COCO-Detection" / f"deformable_detr_R_50{request.param}")))


def has(cfg: CfgNode | DictConfig, key: str) -> bool:
    first, _, rest = key.partition(".")
    return first in cfg and (not rest or has(cfg[first], rest))


@lru_cache
def twins(stem: Path) -> tuple[RunConfig, RunConfig]:
    return tuple(RunConfig(load_config(f"{stem}{suffix}")) for suffix in SUFFIXES)


@pytest.mark.parametrize("stem", TWINS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", KEYS)
def test_twins_have_every_key_of_the_table_with_equal_values(stem, name):
    yaml, lazy = twins(stem)
    for run in (yaml, lazy):
        # Detectron2's yaml keeps every checkpoint.
        if name == "max_to_keep" and run is yaml:
            assert run.key(name) is None
        elif name != "milestones" or run.get(name) is not None:
            assert has(run.cfg, run.key(name))
    if name == "milestones" and yaml.cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR":
        assert yaml.get(name) is None and lazy.get(name) is None
    elif name != "max_to_keep":
        assert yaml.get(name) == lazy.get(name) is not None


def test_every_name_of_the_table_is_used():
    strings = {field.name for field in dataclasses.fields(TrainingSettings)}
    for path in PACKAGE.rglob("*.py"):
        if path != PACKAGE / "config" / "view.py":
            strings |= {node.value for node in parse(path) if isinstance(node, ast.Constant)}
    assert KEYS.keys() <= strings


def test_only_the_view_and_the_builders_ask_for_the_kind_of_a_configuration():
    asking = {}
    for path in PACKAGE.rglob("*.py"):
        for function in (node for node in parse(path) if isinstance(node, ast.FunctionDef)):
            calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and ast.unparse(n.func) == "isinstance"]
            if any(
                "CfgNode" in ast.unparse(call.args[1]) or "DictConfig" in ast.unparse(call.args[1]) for call in calls
            ):
                asking.setdefault(path.relative_to(PACKAGE).as_posix(), set()).add(function.name)
    assert asking == {"config/view.py": {"__init__"}, "engine.py": {"main", "_replay"}}


def test_what_is_set_is_what_is_got(run):
    values = {"train_datasets": ("a", "b"), "test_datasets": ("c",), "milestones": (3, 5), "max_iter": 5, "lr": 0.5}
    for name, value in values.items():
        run.set(name, value)
    assert {name: run.get(name) for name in values} == values


def test_forms_are_those_of_the_system():
    yaml, lazy = (RunConfig(load_config(str(CONFIGS / "common" / f"base{suffix}"))) for suffix in SUFFIXES)
    for run in (yaml, lazy):
        run.set("milestones", (3, 5))
        run.set("train_datasets", ("a",))
    assert yaml.cfg.SOLVER.STEPS == (3,) and lazy.cfg.lr_multiplier.scheduler.milestones == [3, 5]
    assert yaml.cfg.DATASETS.TRAIN == ("a",) and lazy.cfg.dataloader.train.dataset.names == "a"


@pytest.mark.parametrize(
    "scheduler, told",
    [
        ({"values": [1.0, 0.1, 0.01], "milestones": [6, 8], "num_updates": 9}, (6, 8, 9)),
        ({"values": [1.0, 0.1, 0.01], "milestones": [6, 8, 9]}, (6, 8, 9)),
        # One value drops nowhere.
        ({"values": [1.0], "milestones": [9]}, None),
        ({"values": [1.0], "milestones": [], "num_updates": 9}, None),
    ],
)
def test_the_last_milestone_of_a_lazy_config_is_the_end_however_it_is_written(scheduler, told):
    run = RunConfig(DictConfig({"lr_multiplier": {"scheduler": scheduler}, "train": {"max_iter": 90}}))
    assert run.get("milestones") == told and drops_of(run) == ([60, 80] if told else [])
    if told:
        run.set("milestones", (4, 5))
        assert run.get("milestones") == (4, 5)
        assert run.cfg.lr_multiplier.scheduler == {"values": [1.0, 0.1], "milestones": [4, 5]}


def test_without_a_dataset_to_evaluate_on_nothing_is_evaluated(run):
    assert run.evaluated_datasets() == ("coco_2017_val",)
    run.set("test_datasets", ())
    assert run.evaluated_datasets() == run.get("test_datasets") == ()


def test_overrides_are_known_by_name():
    yaml = RunConfig(load_config("deformable_detr_R_50"), ["SOLVER.BASE_LR", "1.0", "SEED", "3"])
    lazy = RunConfig(load_config(str(CONFIGS / "common" / "base.py")), ["optimizer.lr=1.0", "+train.seed=3"])
    for run in (yaml, lazy):
        assert [name for name in KEYS if run.overridden(name)] == ["seed", "lr"]


def test_what_a_configuration_lacks_is_the_default():
    run = RunConfig(DictConfig({"train": {"max_iter": 3}}))
    assert run.get("max_iter") == 3
    assert run.get("milestones") is None
    assert run.get("log_period", 20) == 20


def test_saved_configuration_of_either_kind_is_read_by_its_own_keys(run, tmp_path):
    path = tmp_path / "config.yaml"
    if isinstance(run.cfg, CfgNode):
        path.write_text(run.cfg.dump(), encoding="utf-8")
    else:
        LazyConfig.save(run.cfg, str(path))
    saved = RunConfig(LazyConfig.load(str(path)))
    assert saved.keys == run.keys
    for name in ("max_iter", "lr", "weights", "test_datasets"):
        assert saved.get(name) == run.get(name), name


@pytest.mark.parametrize(
    "name, value", [("accumulation_steps", 0), ("max_skipped_steps", -1), ("ema_decay", 1.0), ("log_period", 0)]
)
def test_values_out_of_range_are_named_by_the_key_of_the_users_system(run, name, value):
    run.set("ema_enabled", True)
    run.set(name, value)
    with pytest.raises(ValueError, match=rf"^{run.key(name)} must be .*got {value}"):
        TrainingSettings.from_config(run.cfg)


def test_precision_is_named_by_the_key_of_the_users_system(run):
    run.set("amp_enabled", True)
    run.set("amp_precision", "fp8")
    with pytest.raises(ValueError, match=rf"^{run.key('amp_precision')} must be one of .*got 'fp8'"):
        Precision.of(TrainingSettings.from_config(run.cfg), nn.Linear(1, 1))


def test_what_only_our_model_can_do_is_named_by_the_key_of_the_users_system(run, tmp_path):
    run.set("accumulation_steps", 2)
    run.set("output_dir", str(tmp_path))
    model = nn.Linear(1, 1)
    settings = TrainingSettings.from_config(run.cfg)
    with pytest.raises(ValueError, match=rf"^{run.key('accumulation_steps')} needs a model whose criterion"):
        TrainingLoop(model, [], torch.optim.SGD(model.parameters(), lr=0.1), settings)
    with pytest.raises(TypeError, match=rf"^{run.key('per_layer_ap')} needs a DeformableDETR"):
        EveryLayer(model, key=settings.keys["per_layer_ap"])
