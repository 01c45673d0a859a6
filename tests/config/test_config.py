"""Reading configurations, their keys, and the pairs of yaml and LazyConfig twins."""

import ast
import copy
import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import detectron2.data.transforms as T
import pytest
from detectron2.config import CfgNode, LazyCall, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from omegaconf import DictConfig, ListConfig
from torch import nn

import deformable_detr
from deformable_detr import add_deformable_detr_config, load_config
from deformable_detr.config import KEYS
from deformable_detr.data.augmentation import augmentation_from_config
from deformable_detr.modeling import ContrastiveDenoising, FocalClassification, SoftmaxClassification
from deformable_detr.solver import build_optimizer
from deformable_detr.training.settings import TrainingSettings

CONFIGS = Path(__file__).parents[2] / "configs" / "COCO-Detection"
PACKAGE = Path(deformable_detr.__file__).parent
STEMS = [
    "deformable_detr_R_50_single_scale",
    "deformable_detr_R_50_single_scale_dc5",
    "deformable_detr_R_50",
    "deformable_detr_R_50_box_refine",
    "deformable_detr_R_50_two_stage",
    "deformable_detr_R_50_two_stage_plus",
    "detr_R_50",
    "detr_R_50_DC5",
    "detr_R_101",
    "detr_R_101_DC5",
    "dino_R_50_4scale",
    "dino_R_50_5scale",
    "dino_swin_large_4scale",
    "h_deformable_detr_R_50",
    "h_deformable_detr_swin_large",
    "h_deformable_detr_swin_tiny",
]
# Longer trainings of these.
LONGER = sorted(path.stem for path in CONFIGS.glob("*ep.yaml"))
# Iterations of a training -> where its learning rate drops: 400 epochs of 1,848, 40 of 3,696, and 11, 20 and 30 of
# 7,393.
DROPS = {924000: 739200, 184800: 147840, 88716: 81323, 177432: 147860, 266148: 221790}
QUICK = CONFIGS.parent / "quick_schedules"
QUICK_STEMS = ["overfit_10_images", "shapes_two_stage"]
BACKBONES = CONFIGS.parent / "backbones"
BACKBONE_STEMS = sorted(path.stem for path in BACKBONES.glob("*.yaml"))
# What they need that a test environment may be without: version 0.6 of Detectron2 has no Swin and no ViT.
SWIN_STEMS = [stem for stem in STEMS if "swin" in stem]
NEEDED = dict.fromkeys(["deformable_detr_swin_tiny", *SWIN_STEMS], "detectron2.modeling.backbone.swin")
NEEDED |= {"deformable_detr_convnext_tiny": "timm", "deformable_detr_vit_base": "detectron2.modeling.backbone.vit"}
# In both systems: a second less for each model that is built.
ONE_LAYER = {"ENC_LAYERS": "num_encoder_layers", "DEC_LAYERS": "num_decoder_layers"}
BASE = str(CONFIGS / "deformable_detr_R_50.yaml")


# load_config


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
    assert load_config(str(tmp_path), ["model.num_queries=17"]).model.num_queries == 17


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


# add_deformable_detr_config


def flatten(node: CfgNode | DictConfig, prefix: str = "") -> dict:
    flat = {}
    for key, value in node.items():
        is_node = isinstance(value, CfgNode | DictConfig)
        flat |= flatten(value, f"{prefix}{key}.") if is_node else {f"{prefix}{key}": value}
    return flat


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


def test_solver_keys_of_another_project_are_kept():
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.7
    cfg.SOLVER.LOCATION_MULTIPLIER = 0.6
    add_deformable_detr_config(cfg)
    solver = cfg.SOLVER
    assert (solver.OPTIMIZER, solver.BACKBONE_MULTIPLIER, solver.LOCATION_MULTIPLIER) == ("SGD", 0.7, 0.6)


def test_standard_recipe_does_not_depend_on_another_projects_defaults():
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    cfg.SOLVER.LOCATION_MULTIPLIER = 1.0
    add_deformable_detr_config(cfg)
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


# Twins


PLAIN = (bool, int, float, str, tuple, type(None), FocalClassification, SoftmaxClassification)


def facts(model: nn.Module) -> tuple[dict, dict]:
    """Shapes of the parameters, and every plain value that a module of the model holds."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    values = {"pixel_mean": model.pixel_mean.tolist(), "pixel_std": model.pixel_std.tolist()}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, PLAIN) and not k.startswith("_")}
        values[name] = {**plain, "type": type(module).__name__}
    return shapes, values


@dataclass
class Twins:
    cfg: CfgNode
    model: nn.Module
    lazy: DictConfig
    lazy_model: nn.Module


@pytest.fixture(scope="module", params=[*STEMS, *QUICK_STEMS, *BACKBONE_STEMS])
def twins(request: pytest.FixtureRequest) -> Twins:
    """Both configurations of a stem and their models; building one takes a second."""
    if request.param in NEEDED:
        pytest.importorskip(NEEDED[request.param])
    folder = next(f for f in (CONFIGS, QUICK, BACKBONES) if (f / f"{request.param}.yaml").is_file())
    opts, lazy_opts = ["MODEL.DEVICE", "cpu"], []
    if folder == BACKBONES or request.param.startswith(("dino", "h_")):
        for key, name in ONE_LAYER.items():
            opts += [f"MODEL.DEFORMABLE_DETR.{key}", "1"]
            lazy_opts += [f"model.transformer.{name}=1"]
    cfg = load_config(str(folder / f"{request.param}.yaml"), opts)
    lazy = load_config(str(folder / f"{request.param}.py"), lazy_opts)
    return Twins(cfg, build_model(cfg), lazy, instantiate(lazy.model))


def test_every_yaml_has_a_twin():
    assert sorted(p.stem for p in CONFIGS.glob("*.yaml")) == sorted(p.stem for p in CONFIGS.glob("*.py"))
    assert sorted(p.stem for p in CONFIGS.glob("*.yaml")) == sorted([*STEMS, *LONGER])
    assert sorted(p.stem for p in QUICK.glob("*.yaml")) == sorted(p.stem for p in QUICK.glob("*.py")) == QUICK_STEMS
    assert sorted(p.stem for p in BACKBONES.glob("*.py")) == BACKBONE_STEMS


def test_twins_have_the_same_parameters(twins):
    assert facts(twins.model)[0] == facts(twins.lazy_model)[0]


def test_twins_have_the_same_hyperparameters(twins):
    assert facts(twins.model)[1] == facts(twins.lazy_model)[1]


def test_twins_have_the_same_convolutions(twins):
    """The dilated variant has the same parameters as the others and differs in strides only."""

    def strides(m: nn.Module) -> dict:
        return {
            name: (conv.stride, conv.padding, conv.dilation)
            for name, conv in m.named_modules()
            if isinstance(conv, nn.Conv2d)
        }

    assert strides(twins.model) == strides(twins.lazy_model)
    assert twins.model.backbone.output_shape() == twins.lazy_model.backbone.output_shape()
    assert {n for n, p in twins.model.named_parameters() if p.requires_grad} == {
        n for n, p in twins.lazy_model.named_parameters() if p.requires_grad
    }


def test_twins_have_the_same_optimizer_and_schedule(twins):
    cfg, lazy = twins.cfg, twins.lazy
    optimizer = build_optimizer(cfg, twins.model)
    recipe = copy.deepcopy(lazy.optimizer)
    recipe.params.model = twins.lazy_model
    lazy_optimizer = instantiate(recipe)

    def groups(opt, m):
        names = {id(p): n for n, p in m.named_parameters()}
        return [
            {**{k: v for k, v in g.items() if k != "params"}, "params": {names[id(p)] for p in g["params"]}}
            for g in opt.param_groups
        ]

    assert type(optimizer) is type(lazy_optimizer)
    assert optimizer.max_norm == lazy_optimizer.max_norm == 0.1
    assert groups(optimizer, twins.model) == groups(lazy_optimizer, twins.lazy_model)

    scheduler, multiplier = build_lr_scheduler(cfg, optimizer), instantiate(lazy.lr_multiplier)
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR":
        # From a hundredth in a straight line, with the cosine where the warmup ends.
        end, last = cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER
        at_end = (1 + math.cos(math.pi * end / last)) / 2
        factors = [(0, 0.01), (end // 2, (0.01 + at_end) / 2), (end, at_end), (last // 2, 0.5), (last, 0.0)]
    else:
        drop, last = DROPS[cfg.SOLVER.MAX_ITER], cfg.SOLVER.MAX_ITER - 1
        factors = [(0, 1.0), (drop - 1, 1.0), (drop, 0.1), (last, 0.1)]
    for iteration, factor in factors:
        scheduler.last_epoch = iteration
        lrs = [group["lr"] * factor for group in lazy_optimizer.param_groups]
        assert scheduler.get_lr() == pytest.approx(lrs)
        assert multiplier(iteration / lazy.train.max_iter) == pytest.approx(factor)


def describe(value) -> object:
    """A list of augmentations in plain values, also those inside of others."""
    if isinstance(value, (T.Augmentation, T.AugmentationList)):
        return type(value).__name__, {key: describe(v) for key, v in vars(value).items()}
    return [describe(v) for v in value] if isinstance(value, (list, tuple, ListConfig)) else value


def test_twins_read_the_same_data(twins):
    cfg, lazy = twins.cfg, twins.lazy
    for is_train, loader in ((True, lazy.dataloader.train), (False, lazy.dataloader.test)):
        theirs = instantiate(loader.mapper.augmentations)
        assert describe(augmentation_from_config(cfg, is_train=is_train)) == describe(theirs)
        assert loader.mapper.is_train is is_train
        assert loader.mapper.image_format == cfg.INPUT.FORMAT
        assert loader.num_workers == cfg.DATALOADER.NUM_WORKERS
    train, test = lazy.dataloader.train, lazy.dataloader.test
    assert train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    # Left out where it is the loader's default: Detectron2's tools/benchmark.py knows no such key.
    assert train.get("aspect_ratio_grouping", False) == cfg.DATALOADER.ASPECT_RATIO_GROUPING
    assert train.dataset.filter_empty == cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert train.dataset.num_queries == cfg.MODEL.DEFORMABLE_DETR.NUM_QUERIES
    assert train.dataset.num_classes == cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES
    assert (train.dataset.names,) == cfg.DATASETS.TRAIN
    assert (test.dataset.names,) == cfg.DATASETS.TEST == (lazy.dataloader.evaluator.dataset_name,)
    assert test.mapper.augmentations.min_size == cfg.INPUT.MIN_SIZE_TEST
    assert test.mapper.augmentations.max_size == cfg.INPUT.MAX_SIZE_TEST


def test_twins_have_the_same_schedule(twins):
    cfg, lazy = twins.cfg, twins.lazy
    train = lazy.train
    assert train.max_iter == cfg.SOLVER.MAX_ITER
    assert train.checkpointer.period == cfg.SOLVER.CHECKPOINT_PERIOD
    assert train.eval_period == cfg.TEST.EVAL_PERIOD
    assert train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert train.output_dir == cfg.OUTPUT_DIR
    assert TrainingSettings.from_config(cfg) == replace(TrainingSettings.from_config(lazy), max_to_keep=None)


@pytest.mark.parametrize("stem", LONGER)
def test_longer_trainings_differ_in_their_schedule_alone(stem):
    shorter = re.sub(r"_\d+ep$", "", stem)
    found = []
    for suffix in (".yaml", ".py"):
        theirs, ours = (flatten(load_config(str(CONFIGS / f"{name}{suffix}"))) for name in (shorter, stem))
        assert theirs.keys() == ours.keys()
        found.append({key: value for key, value in ours.items() if value != theirs[key]})
    in_yaml, in_lazy = found
    epochs = int(stem.split("_")[-1].removesuffix("ep"))
    last, drop = epochs * 7393, DROPS[epochs * 7393]
    assert (in_yaml.pop("SOLVER.MAX_ITER"), in_yaml.pop("SOLVER.STEPS")) == (last, (drop,))
    assert (in_lazy.pop("train.max_iter"), in_lazy.pop("lr_multiplier.scheduler.milestones")) == (last, [drop, last])
    if stem == "h_deformable_detr_swin_large_36ep":
        # As published.
        assert in_yaml.pop("MODEL.SWIN.DROP_PATH_RATE") == in_lazy.pop("model.backbone.bottom_up.drop_path_rate") == 0.5
        assert in_yaml.pop("SOLVER.WEIGHT_DECAY") == in_yaml.pop("SOLVER.WEIGHT_DECAY_NORM") == 0.05
        assert in_lazy.pop("optimizer.weight_decay") == in_lazy.pop("optimizer.params.weight_decay") == 0.05
    assert in_yaml == in_lazy == {}


@pytest.mark.parametrize("stem", SWIN_STEMS)
def test_twins_with_a_swin_say_the_same_of_it_where_none_can_be_built(stem):
    cfg, lazy = (load_config(str(CONFIGS / f"{stem}{suffix}")) for suffix in (".yaml", ".py"))
    swin = {key.lower(): value for key, value in cfg.MODEL.SWIN.items()}
    bottom_up = {key: value for key, value in lazy.model.backbone.bottom_up.items() if key != "_target_"}
    node = cfg.MODEL.DEFORMABLE_DETR
    assert bottom_up == {**swin, "out_features": node.IN_FEATURES, "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT}
    assert lazy.model.backbone.in_features == node.IN_FEATURES
    assert lazy.model.num_queries == node.NUM_QUERIES
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.optimizer.weight_decay == cfg.SOLVER.WEIGHT_DECAY == cfg.SOLVER.WEIGHT_DECAY_NORM


def test_lazy_config_survives_a_file(twins, tmp_path):
    path = tmp_path / "saved.yaml"
    LazyConfig.save(twins.lazy, str(path))
    # A pickle beside the yaml is Detectron2's sign that something could not be written as text.
    assert [p.name for p in tmp_path.iterdir()] == ["saved.yaml"]
    again = LazyConfig.load(str(path))
    LazyConfig.save(again, str(tmp_path / "saved_again.yaml"))
    assert (tmp_path / "saved_again.yaml").read_text() == path.read_text()
    assert facts(instantiate(again.model)) == facts(twins.lazy_model)
