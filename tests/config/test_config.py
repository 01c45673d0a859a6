"""Reading configurations and overriding what they say."""

import re

import pytest
from detectron2.config import CfgNode, LazyConfig
from omegaconf import DictConfig

from deformable_detr import load_config

from .facts import BASE


def test_yaml_becomes_a_cfg_node_with_overrides():
    cfg = load_config(BASE, ["MODEL.DEFORMABLE_DETR.NUM_QUERIES", "17", "SOLVER.BASE_LR", "0.5"])
    assert isinstance(cfg, CfgNode)
    assert cfg.MODEL.DEFORMABLE_DETR.NUM_QUERIES == 17
    assert cfg.SOLVER.BASE_LR == 0.5


def test_py_becomes_a_lazy_config_with_overrides():
    cfg = load_config(BASE.replace(".yaml", ".py"), ["model.num_queries=17", "optimizer.lr=0.5"])
    assert isinstance(cfg, DictConfig)
    assert cfg.model.num_queries == 17
    assert cfg.optimizer.params.base_lr == 0.5


def test_override_of_the_width_reaches_every_part_of_a_lazy_config():
    cfg = load_config(BASE.replace(".yaml", ".py"), ["model.transformer.d_model=64"])
    assert cfg.model.backbone.hidden_dim == 64
    assert cfg.model.position_embedding.embed_dim == 64


@pytest.mark.parametrize("config", ["model.json", "deformable_detr_R_51"])
def test_what_is_no_configuration_is_named_beside_the_models_of_the_zoo(config):
    with pytest.raises(ValueError, match=rf"must be a \.yaml .*, got '{config}'; .*deformable_detr_R_50_two_stage"):
        load_config(config)


def test_models_and_output_folders_are_read_by_name(tmp_path):
    assert load_config("deformable_detr_R_50") == load_config(BASE)
    LazyConfig.save(load_config(BASE.replace(".yaml", ".py")), str(tmp_path / "config.yaml"))
    for folder in (str(tmp_path), tmp_path):
        assert load_config(folder, ["model.num_queries=17"]).model.num_queries == 17


@pytest.mark.parametrize("name", ["absent.yaml", "absent.py"])
def test_missing_file_is_named(name):
    with pytest.raises(FileNotFoundError, match=name):
        load_config(name)


def test_a_misspelt_file_gets_the_nearest_name(tmp_path):
    (tmp_path / "retina.yaml").touch()
    with pytest.raises(FileNotFoundError, match=rf"did you mean {re.escape(str(tmp_path))}/retina\.yaml\?$"):
        load_config(str(tmp_path / "retinaa.yaml"))
    with pytest.raises(FileNotFoundError, match=r"did you mean deformable_detr_R_50_two_stage\?$"):
        load_config(str(tmp_path / "deformable_detr_R50_two_stage.py"))
    with pytest.raises(FileNotFoundError, match=r"other\.yaml'$"):
        load_config(str(tmp_path / "other.yaml"))
    with pytest.raises(ValueError, match=r"got 'deformable_detr_R50'; did you mean deformable_detr_R_50\?; there are"):
        load_config("deformable_detr_R50")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.yaml", "SOLVER: {MAX_ITER: [", "is not a configuration: while parsing"),
        ("a.yaml", "- 1", "is not a configuration: "),
        ("a.yaml", " \n", "is not a configuration: it is empty"),
        ("a.yaml", "model:\n  _target_: a.B\ntrain: [", "is not a configuration: while parsing"),
        ("a.yaml", "SOLVER: {MAX_ITER: many}", "is not a configuration: .*MAX_ITER"),
        (
            "a.yaml",
            "SOLVER: {MAX_ITR: 3}",
            "the configuration has no key SOLVER.MAX_ITR; did you mean SOLVER.MAX_ITER?",
        ),
        ("a.py", "x = 1 +", r"is not Python: invalid syntax \(.*line 1\)"),
    ],
)
def test_a_broken_file_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises((KeyError, ValueError), match=rf"(?s){re.escape(str(tmp_path))}/{name}:? .*{message}"):
        load_config(str(tmp_path / name))


def test_unknown_yaml_key_is_named(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("MODEL:\n  DEFORMABLE_DETR:\n    NUM_QUERYS: 3\n", encoding="utf-8")
    with pytest.raises(KeyError, match=r"MODEL\.DEFORMABLE_DETR\.NUM_QUERYS"):
        load_config(str(path))


@pytest.mark.parametrize(
    "key, near",
    [
        ("MODEL.DEFORMABLE_DETR.NUM_QUERYS", r"MODEL\.DEFORMABLE_DETR\.NUM_QUERIES"),
        ("SOLVER.NUM_QUERIES", r"MODEL\.DEFORMABLE_DETR\.NUM_QUERIES"),
        ("MODEL.DEVICE.c", r"MODEL\.DEVICE"),
    ],
)
def test_unknown_override_is_refused_with_the_nearest_key(key, near):
    with pytest.raises(KeyError, match=rf"has no key {key}; did you mean {near}\?"):
        load_config(BASE, [key, "3"])


@pytest.mark.parametrize(
    "suffix, opts, message",
    [
        (".yaml", ["SOLVER.MAX_ITER", "3", "SEED"], "'SEED' has no value"),
        (".yaml", ["SOLVER.MAX_ITER", "many"], r"'many' cannot be the value of SOLVER\.MAX_ITER"),
        (".yaml", ["SEED", "{[]: 1}"], "cannot be the value of SEED"),
        (".yaml", ["SEED", "1", "--resume"], "--resume is an option: put it before the first KEY VALUE pair"),
        (".yaml", ["SEED", "1", "--resume", "--eval-only"], "--resume is an option"),
        (".yaml", ["SEED=1"], "pairs KEY VALUE; 'SEED=1' is for LazyConfig"),
        (".py", ["train.seed=1", "--resume"], "--resume is an option: put it before the first .* key=value"),
        (".py", ["SEED", "1"], "are key=value, got 'SEED'; KEY VALUE pairs are for yaml"),
        (".py", ["train.max_iter=)"], r"override 'train\.max_iter=\)' cannot be applied"),
        (".py", ["train.amp=True"], r"override 'train\.amp=True' .* a node, got True; .*\(enabled, precision\)"),
        (".py", ["optimizer.lr=abc"], r"override 'optimizer\.lr=abc' .* must be a number, got 'abc'"),
        (".py", ["train.amp.enabled=on_gpus"], r"'train\.amp\.enabled=on_gpus' .* true or false, got 'on_gpus'"),
        (".py", ["train.max_iter=1,2"], r"override 'train\.max_iter=1,2' cannot be applied"),
        (".py", ["train.amp=[1]"], r"override 'train\.amp=\[1\]' cannot be applied"),
        (".py", ["~train.seed"], r"override '~train\.seed' cannot be applied: deletion"),
    ],
)
def test_override_that_cannot_be_applied_is_named(suffix, opts, message):
    with pytest.raises(ValueError, match=message):
        load_config(BASE.replace(".yaml", suffix), opts)


@pytest.mark.parametrize(
    "key, near",
    [
        ("train.max_iters", r"train\.max_iter\?"),
        ("optimiser.lr", r"optimizer\.lr"),
        ("model.backbone.num_queries", r"model\.num_queries"),
        ("trian.amp.enabled", r"train\.amp\.enabled|train\.ema\.enabled"),
    ],
)
def test_unknown_override_of_a_lazy_config_is_refused_with_the_nearest_key(key, near):
    with pytest.raises(KeyError, match=rf"has no key {key}; did you mean .*({near}).*\+{key}="):
        load_config(BASE.replace(".yaml", ".py"), [f"{key}=1"])


def test_override_may_name_a_parameter_that_the_lazy_config_leaves_out_or_add_a_key():
    opts = [
        "model.criterion.focal_gamma=3.0",
        "+train.note=new",
        "dataloader.train.mapper.augmentations.random_flip=False",
    ]
    cfg = load_config(BASE.replace(".yaml", ".py"), opts)
    assert cfg.model.criterion.focal_gamma == 3.0
    assert cfg.train.note == "new"
