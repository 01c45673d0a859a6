"""Options that are set and that nothing reads."""

import logging
from collections.abc import Iterator

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY as REGISTRY
from detectron2.utils import logger as detectron2_logger
from omegaconf import OmegaConf
from yacs.config import CfgNode as YacsNode

from deformable_detr import engine, load_config
from deformable_detr.config import KEYS, RunConfig, find_config_file
from deformable_detr.data.datasets import register_coco_data
from deformable_detr.startup import setup
from deformable_detr.startup.options import _UNREAD_KEYS, LAZY_OPTIONS, YAML_OPTIONS, Fate, check_options, option_of

REFUSED = {
    "MODEL.MASK_ON": "True",
    "MODEL.KEYPOINT_ON": "True",
    "MODEL.LOAD_PROPOSALS": "True",
    "DATASETS.PROPOSAL_FILES_TRAIN": "('a.pkl',)",
    "DATASETS.PROPOSAL_FILES_TEST": "('a.pkl',)",
    "TEST.AUG.ENABLED": "True",
    "MODEL.ROI_HEADS.NUM_CLASSES": "3",
    "MODEL.RETINANET.NUM_CLASSES": "3",
}


@pytest.fixture(autouse=True)
def tell_again(monkeypatch) -> None:
    monkeypatch.setattr(detectron2_logger, "_LOG_COUNTER", type(detectron2_logger._LOG_COUNTER)())


def check_yaml(*opts: str) -> None:
    check_options(RunConfig(load_config("deformable_detr_R_50", opts)))


def check_lazy(*opts: str) -> None:
    check_options(RunConfig(load_config(find_config_file("deformable_detr_R_50", suffix=".py"), opts)))


def keys_of(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from keys_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


# Keys of the other model


def test_detr_refuses_what_it_has_no_part_for():
    check_options(RunConfig(load_config("detr_R_50")))
    opts = ["MODEL.DEFORMABLE_DETR.TWO_STAGE", "True", "MODEL.DEFORMABLE_DETR.ENC_N_POINTS", "8"]
    message = r"MODEL\.DEFORMABLE_DETR: TWO_STAGE True, ENC_N_POINTS 8 \(DETR has no such part\)"
    with pytest.raises(ValueError, match=message):
        check_options(RunConfig(load_config("detr_R_50", opts)))


def test_deformable_detr_refuses_what_is_detrs():
    with pytest.raises(ValueError, match=r"EOS_COEF 0\.2 \(DeformableDETR has no such part\)"):
        check_yaml("MODEL.DEFORMABLE_DETR.EOS_COEF", "0.2")


@pytest.mark.parametrize("model", ["detr_R_50", "deformable_detr_R_50"])
def test_a_key_is_refused_exactly_where_it_changes_nothing(model):
    """The model is built with keys that note when they are read."""
    cfg = load_config(
        model,
        [
            "MODEL.DEVICE",
            "cpu",
        ],
    )
    node, read = cfg.MODEL.DEFORMABLE_DETR, set()
    noted = type("Noted", (), {"__getattr__": lambda _, key: read.add(key) or node[key]})()
    dict.__setitem__(cfg.MODEL, "DEFORMABLE_DETR", noted)
    REGISTRY.get(cfg.MODEL.META_ARCHITECTURE).from_config(cfg)
    # Of queries that are off; and what training reads by the view's names.
    elsewhere = {yaml_key.rpartition(".")[2] for yaml_key, _ in KEYS.values() if yaml_key}
    if model.startswith("deformable"):
        elsewhere |= {"DN_LABEL_NOISE_RATIO", "DN_BOX_NOISE_SCALE"}
    assert node.keys() - read - elsewhere == _UNREAD_KEYS[cfg.MODEL.META_ARCHITECTURE]


# The whole of Detectron2's keys


@pytest.fixture
def keys_read(monkeypatch) -> set[str]:
    """Keys of the configuration that a run has asked for."""
    read = set()

    def mark(node: CfgNode, path: str = "") -> None:
        # Beside the keys, where copies keep it.
        node.__dict__["path"] = path
        for name, value in dict.items(node):
            if isinstance(value, CfgNode):
                mark(value, f"{path}{name}.")

    def record(node: CfgNode, name: str) -> None:
        if "path" in node.__dict__:
            read.add(f"{node.__dict__['path']}{name}")

    def getitem(node: CfgNode, name: str) -> object:
        record(node, name)
        return dict.__getitem__(node, name)

    def get(node: CfgNode, name: str, default: object = None) -> object:
        record(node, name)
        return dict.get(node, name, default)

    read_config, select = setup._read_config, OmegaConf.select

    def read_and_mark(args) -> CfgNode:
        cfg = read_config(args)
        mark(cfg)
        return cfg

    def select_and_record(cfg, key, **options) -> object:
        # As default_setup asks for the keys of both systems.
        read.add(key)
        return select(cfg, key, **options)

    monkeypatch.setattr(setup, "_read_config", read_and_mark)
    monkeypatch.setattr(OmegaConf, "select", select_and_record)
    # These look at every key.
    monkeypatch.setattr(engine, "check_options", lambda run: None)
    monkeypatch.setattr("deformable_detr.startup.checks.check_options", lambda run: None)
    monkeypatch.setattr(YacsNode, "__getitem__", getitem, raising=False)
    monkeypatch.setattr(YacsNode, "get", get, raising=False)
    return read


def test_each_of_detectron2s_keys_is_read_or_accounted_for(tiny_yaml, write_coco, keys_read):
    data = write_coco()
    register_coco_data("tiny", data.json, data.images)
    used = {
        "DATASETS.TRAIN": "('tiny',)",
        "DATASETS.TEST": "('tiny',)",
        "MODEL.DEFORMABLE_DETR.NUM_CLASSES": "3",
        "MODEL.RESNETS.NORM": "BN",
        "TEST.PRECISE_BN.ENABLED": "True",
        "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
        "DATALOADER.REPEAT_THRESHOLD": "0.5",
        "SOLVER.MAX_ITER": "1",
        "SOLVER.STEPS": "()",
        "SOLVER.REFERENCE_WORLD_SIZE": "1",
    }
    engine.main(engine.argument_parser().parse_args([*tiny_yaml(), *(part for pair in used.items() for part in pair)]))
    # Of another sampler, and of another schedule, in versions of Detectron2 that have them.
    elsewhere = {"DATALOADER.RANDOM_SUBSET_RATIO", "SOLVER.BASE_LR_END", "SOLVER.NUM_DECAYS", "SOLVER.RESCALE_INTERVAL"}
    assert {"SOLVER.GAMMA", "MODEL.RESNETS.DEPTH", "SEED", "TEST.PRECISE_BN.NUM_ITER"} <= keys_read
    unread = {key for key in keys_of(get_cfg()) if key not in keys_read | elsewhere}
    assert {key for key in unread if option_of(key) is None} == set()
    # And the table claims nothing of what is read; Detectron2's mapper asks for what it would do with masks.
    mapper = {"MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS", "INPUT.MASK_FORMAT"}
    assert {key for key in keys_of(get_cfg()) if key in keys_read and option_of(key)} <= mapper


def test_every_entry_is_a_key_or_a_section_of_detectron2s():
    keys = list(keys_of(get_cfg()))
    for entry in YAML_OPTIONS:
        assert any(key == entry or key.startswith(f"{entry}.") for key in keys), entry


# yaml


def test_every_refused_key_is_tried_here():
    assert REFUSED.keys() == {key for key, (fate, _) in YAML_OPTIONS.items() if fate is Fate.REFUSED}


@pytest.mark.parametrize("key", REFUSED)
def test_what_would_be_another_run_is_refused_with_what_to_do(key):
    with pytest.raises(ValueError, match=rf"{key} .*\({YAML_OPTIONS[key][1]}\)"):
        check_yaml(key, REFUSED[key])


def test_classes_that_are_set_in_both_places_are_no_contradiction():
    check_yaml("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3")


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.5", "0.5 (all TEST.DETECTIONS_PER_IMAGE best detections"),
        ("MODEL.RPN.NMS_THRESH", "0.5", "0.5 (of other models"),
        ("MODEL.FPN.OUT_CHANNELS", "128", "128 (of backbones with a pyramid"),
        ("SOLVER.MOMENTUM", "0.5", "0.5 (of SGD"),
        ("VIS_PERIOD", "20", "20 (python -m deformable_detr.report"),
    ],
)
def test_what_changes_nothing_is_pointed_out(key, value, told, caplog):
    check_yaml(key, value)
    assert f"{key} {told}" in caplog.text


def test_the_published_configurations_set_nothing_in_vain(caplog):
    caplog.set_level(logging.WARNING)
    check_yaml()
    check_lazy()
    assert caplog.text == ""


def test_a_backbone_with_a_pyramid_reads_its_section(caplog):
    check_yaml("MODEL.DEFORMABLE_DETR.BOTTOM_UP", "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", "128")
    assert caplog.text == ""


def test_other_models_may_read_anything():
    check_yaml("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", "True")


# LazyConfig


@pytest.mark.parametrize("name", [name for name, (fate, _) in LAZY_OPTIONS.items() if fate is Fate.REFUSED])
def test_sections_of_other_projects_are_refused_where_they_are_enabled(name, caplog):
    check_lazy(f"+train.{name}={{enabled: false, params: {{max_norm: 0.5}}}}")
    assert caplog.text == ""
    with pytest.raises(ValueError, match=rf"train\.{name} \("):
        check_lazy(f"+train.{name}={{enabled: true, params: {{max_norm: 0.5}}}}")


def test_clipping_that_the_optimiser_does_already_is_no_contradiction():
    check_lazy("+train.clip_grad={enabled: true, params: {max_norm: 0.1, norm_type: 2}}")
    with pytest.raises(ValueError, match=r"train\.clip_grad \(the optimiser clips: .*max_norm=0\.1"):
        check_lazy("+train.clip_grad={enabled: true, params: {max_norm: 0.1, norm_type: 1}}")


def test_wandb_as_detrex_says_it_is_refused_where_it_is_enabled():
    check_lazy("+train.wandb.params={project: x}")
    with pytest.raises(ValueError, match=r"train\.wandb\.params \(set train\.wandb\.project and train\.wandb\.name\)"):
        check_lazy("train.wandb.enabled=true", "+train.wandb.params={project: x}")


def test_unknown_options_of_the_training_are_pointed_out(caplog):
    check_lazy("+train.note=new")
    assert "Options that nothing reads: train.note (no such option here)" in caplog.text


# Through the entry points


def test_command_line_and_trainer_refuse_before_a_model_is_built(tiny_yaml, monkeypatch):
    monkeypatch.setattr(engine.Trainer, "build_model", lambda cfg: pytest.fail("a model is built"))
    args = engine.argument_parser().parse_args([*tiny_yaml(), "MODEL.MASK_ON", "True"])
    with pytest.raises(ValueError, match=r"MODEL\.MASK_ON True \(the model predicts boxes alone"):
        engine.main(args)
    with pytest.raises(ValueError, match=r"MODEL\.MASK_ON True \(the model predicts boxes alone"):
        engine.Trainer(load_config(args.config_file, args.opts))
