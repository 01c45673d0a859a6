"""The keys that this project adds to Detectron2's, and what each of them changes."""

import ast
from functools import lru_cache
from pathlib import Path

import pytest
from detectron2.config import CfgNode, LazyCall, get_cfg, instantiate
from detectron2.modeling import build_model

import deformable_detr
from deformable_detr import add_deformable_detr_config, load_config
from deformable_detr.config import KEYS
from deformable_detr.modeling import ContrastiveDenoising

from .facts import BASE, facts, flatten

PACKAGE = Path(deformable_detr.__file__).parent


def test_configuration_only_gains_keys():
    before = flatten(get_cfg())
    cfg = get_cfg()
    add_deformable_detr_config(cfg)
    after = flatten(cfg)
    assert {key: after[key] for key in before} == before
    added = {key for key in after.keys() - before.keys() if not key.startswith("MODEL.DEFORMABLE_DETR.")}
    backbones = {key for key in added if key.startswith(("MODEL.SWIN.", "MODEL.REGNET.", "MODEL.TIMM.", "MODEL.VIT."))}
    assert added - backbones == {
        "MODEL.EMA.DECAY",
        "MODEL.EMA.ENABLED",
        "SOLVER.ACCUMULATION_STEPS",
        "SOLVER.AMP.PRECISION",
        "SOLVER.BACKBONE_MULTIPLIER",
        "SOLVER.FIND_UNUSED_PARAMETERS",
        "SOLVER.LAYER_DECAY",
        "SOLVER.LOCATION_MULTIPLIER",
        "SOLVER.LOG_PERIOD",
        "SOLVER.MAX_SKIPPED_STEPS",
        "SOLVER.OPTIMIZER",
        "SOLVER.OVERRIDES",
        "INPUT.COLOR_JITTER.BRIGHTNESS",
        "INPUT.COLOR_JITTER.CONTRAST",
        "INPUT.COLOR_JITTER.SATURATION",
        "INPUT.LSJ.SCALE",
        "INPUT.LSJ.SIZE",
        "TEST.BEST_METRIC",
        "TEST.PATIENCE",
        "DATALOADER.SHOW_DATA",
        "SOLVER.AUTO_BATCH",
        "WANDB.ENABLED",
        "WANDB.NAME",
        "WANDB.PROJECT",
        "TEST.FIRST_EVAL",
        "TEST.PER_LAYER_AP",
    }


def config_of_another_project(**solver) -> CfgNode:
    """Solver keys that are there before ours are added."""
    cfg = get_cfg()
    cfg.SOLVER.update(solver)
    add_deformable_detr_config(cfg)
    return cfg


def test_solver_keys_of_another_project_are_kept():
    solver = config_of_another_project(OPTIMIZER="SGD", BACKBONE_MULTIPLIER=0.7, LOCATION_MULTIPLIER=0.6).SOLVER
    assert (solver.OPTIMIZER, solver.BACKBONE_MULTIPLIER, solver.LOCATION_MULTIPLIER) == ("SGD", 0.7, 0.6)


def test_keys_that_are_added_twice_keep_their_values():
    cfg = get_cfg()
    add_deformable_detr_config(cfg)
    cfg.merge_from_list(["MODEL.DEFORMABLE_DETR.NUM_CLASSES", 3, "WANDB.NAME", "run"])
    before = flatten(cfg)
    add_deformable_detr_config(cfg)
    assert flatten(cfg) == before


def test_standard_recipe_does_not_depend_on_another_projects_defaults():
    cfg = config_of_another_project(OPTIMIZER="SGD", BACKBONE_MULTIPLIER=1.0, LOCATION_MULTIPLIER=1.0)
    cfg.merge_from_file(BASE)
    assert cfg.SOLVER == load_config(BASE).SOLVER


def attributes_read() -> set[str]:
    """Names of all attributes that the package reads outside config/keys.py."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        if path != PACKAGE / "config" / "keys.py":
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            names |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return names


def test_every_key_is_read_somewhere():
    plain, ours = get_cfg(), get_cfg()
    add_deformable_detr_config(ours)
    added = flatten(ours).keys() - flatten(plain).keys()
    assert len(added) > 20
    read = attributes_read()
    # The view's table is read by its names, of which another test says that they are used.
    tabled = {yaml_key for yaml_key, _ in KEYS.values()}
    assert not {key for key in added - tabled if key.rsplit(".", 1)[-1] not in read}


# Another valid value for every key of the node, and nothing but that key has to change the model.
OTHER_VALUES = {
    "BOTTOM_UP": "build_resnet_fpn_backbone",
    "IN_FEATURES": ["res4", "res5"],
    "NUM_FEATURE_LEVELS": 3,
    "NUM_CLASSES": 3,
    "SIZE_DIVISIBILITY": 32,
    "PADDING_INVARIANT": True,
    "PROJECTION_NORM": "",
    "POSITION_TEMPERATURE": 20.0,
    "POSITION_OFFSET": 0.0,
    "NUM_QUERIES": 5,
    "WITH_BOX_REFINE": True,
    "TWO_STAGE": True,
    "NUM_QUERIES_TEST": 7,
    "MIXED_QUERY_SELECTION": True,
    "LOOK_FORWARD_TWICE": True,
    "ANCHOR_QUERY_POS": True,
    "MULTICLASS_PROPOSALS": True,
    "DECODER_NORM": True,
    "SHARED_HEADS": True,
    "INVERSE_SIGMOID_EPS": 1e-3,
    "NUM_ONE2MANY_QUERIES": 7,
    "ONE2MANY_REPEAT": 5,
    "ONE2MANY_WEIGHT": 0.5,
    "DN_NUMBER": 10,
    "DN_LABEL_NOISE_RATIO": 0.2,
    "DN_BOX_NOISE_SCALE": 0.4,
    "HIDDEN_DIM": 32,
    "NHEADS": 2,
    "ENC_LAYERS": 2,
    "DEC_LAYERS": 3,
    "DIM_FEEDFORWARD": 24,
    "DROPOUT": 0.3,
    "ACTIVATION_CHECKPOINT": True,
    "ENC_N_POINTS": 2,
    "DEC_N_POINTS": 2,
    "AUX_LOSS": False,
    "CLASS_WEIGHT": 3.0,
    "L1_WEIGHT": 3.0,
    "GIOU_WEIGHT": 3.0,
    "FOCAL_ALPHA": 0.5,
    "EOS_COEF": 0.2,
    "COST_CLASS": 3.0,
    "COST_L1": 3.0,
    "COST_GIOU": 3.0,
}


def small_cfg(architecture: str = "DeformableDETR") -> CfgNode:
    opts = f"MODEL.META_ARCHITECTURE {architecture} ".split()
    opts += "MODEL.DEVICE cpu MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64".split()
    for key, value in {"HIDDEN_DIM": 64, "ENC_LAYERS": 1, "DEC_LAYERS": 2, "DIM_FEEDFORWARD": 16}.items():
        opts += [f"MODEL.DEFORMABLE_DETR.{key}", str(value)]
    return load_config(BASE, opts)


# What a key needs of others to have an effect.
DENOISING = {"TWO_STAGE": True, "DN_NUMBER": 100}
NEEDS = {
    "DN_NUMBER": {"TWO_STAGE": True},
    "DN_LABEL_NOISE_RATIO": DENOISING,
    "DN_BOX_NOISE_SCALE": DENOISING,
    "MIXED_QUERY_SELECTION": {"TWO_STAGE": True},
    "MULTICLASS_PROPOSALS": {"TWO_STAGE": True},
    "ANCHOR_QUERY_POS": {"TWO_STAGE": True, "WITH_BOX_REFINE": True},
    "LOOK_FORWARD_TWICE": {"WITH_BOX_REFINE": True},
    "SHARED_HEADS": {"WITH_BOX_REFINE": True},
    "EOS_COEF": {"IN_FEATURES": ("res5",), "NUM_FEATURE_LEVELS": 1},
}


@lru_cache
def small_model_facts(architecture: str, *needed: tuple[str, object]) -> tuple:
    cfg = small_cfg(architecture)
    cfg.MODEL.DEFORMABLE_DETR.update(dict(needed))
    return facts(build_model(cfg))


def test_another_value_is_known_for_every_key():
    # The training loop reads these two, which change no model that is built.
    assert OTHER_VALUES.keys() | {"COMPILE", "CUDA_GRAPHS"} == load_config(BASE).MODEL.DEFORMABLE_DETR.keys()


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_every_key_changes_the_model(key):
    architecture, needed = "DETR" if key == "EOS_COEF" else "DeformableDETR", NEEDS.get(key, {})
    cfg = small_cfg(architecture)
    cfg.MODEL.DEFORMABLE_DETR.update({**needed, key: OTHER_VALUES[key]})
    if key == "BOTTOM_UP":
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.DEFORMABLE_DETR.IN_FEATURES = ["p3", "p4", "p5"]
    assert facts(build_model(cfg)) != small_model_facts(architecture, *needed.items())


def test_denoising_of_a_lazy_config_is_that_of_a_yaml_with_its_default_noise():
    opts = "TWO_STAGE True NUM_CLASSES 7 HIDDEN_DIM 32 NHEADS 4 DN_NUMBER 100 INVERSE_SIGMOID_EPS 0.001".split()
    opts[::2] = [f"MODEL.DEFORMABLE_DETR.{key}" for key in opts[::2]]
    model = build_model(load_config(BASE, ["MODEL.DEVICE", "cpu", *opts]))
    lazy = load_config(BASE.replace(".yaml", ".py")).model
    assert lazy.denoising is None and lazy.num_one2many_queries == 0
    lazy.num_classes = 7
    lazy.transformer.update(two_stage=True, d_model=32, n_heads=4, inverse_sigmoid_eps=1e-3)
    lazy.denoising = LazyCall(ContrastiveDenoising)(
        dn_number=100,
        num_classes="${..num_classes}",
        embed_dim="${..transformer.d_model}",
        inverse_sigmoid_eps="${..transformer.inverse_sigmoid_eps}",
    )
    assert facts(instantiate(lazy)) == facts(model)
