"""Each yaml configuration and its LazyConfig twin make the same model, optimiser, data and schedule."""

import copy
import math
import re
from dataclasses import dataclass, replace

import detectron2.data.transforms as T
import pytest
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from omegaconf import DictConfig, ListConfig
from torch import nn

from deformable_detr import load_config
from deformable_detr.data.augmentation import augmentation_from_config
from deformable_detr.solver import build_optimizer
from deformable_detr.training.settings import TrainingSettings

from .facts import CONFIGS, facts, flatten

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


@pytest.mark.parametrize(
    "key, lazy_key, value, expected",
    [
        # Linear layer, norm.
        ("WEIGHT_DECAY", "weight_decay", 0.05, (0.05, 0.05)),
        ("WEIGHT_DECAY_NORM", "params.weight_decay_norm", 0.0, (1e-4, 0.0)),
    ],
)
def test_a_weight_decay_of_the_users_decays_the_same_in_both_systems(key, lazy_key, value, expected):
    layers = nn.ModuleDict({"backbone": nn.Linear(1, 1), "norm": nn.LayerNorm(1)})
    cfg = load_config(str(CONFIGS / "deformable_detr_R_50.yaml"), [f"SOLVER.{key}", str(value)])
    lazy = load_config(str(CONFIGS / "deformable_detr_R_50.py"), [f"+optimizer.{lazy_key}={value}"])
    lazy.optimizer.params.model = layers
    for optimizer in (build_optimizer(cfg, layers), instantiate(lazy.optimizer)):
        decay = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
        assert tuple(decay[layers[name].weight] for name in ("backbone", "norm")) == expected


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
        assert in_yaml.pop("SOLVER.WEIGHT_DECAY") == 0.05
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
    assert lazy.optimizer.weight_decay == cfg.SOLVER.WEIGHT_DECAY and cfg.SOLVER.WEIGHT_DECAY_NORM is None


def test_lazy_config_survives_a_file(twins, tmp_path):
    path = tmp_path / "saved.yaml"
    LazyConfig.save(twins.lazy, str(path))
    # A pickle beside the yaml is Detectron2's sign that something could not be written as text.
    assert [p.name for p in tmp_path.iterdir()] == ["saved.yaml"]
    again = LazyConfig.load(str(path))
    LazyConfig.save(again, str(tmp_path / "saved_again.yaml"))
    assert (tmp_path / "saved_again.yaml").read_text() == path.read_text()
    assert facts(instantiate(again.model)) == facts(twins.lazy_model)
