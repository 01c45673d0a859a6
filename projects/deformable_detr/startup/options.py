"""Options that mean something elsewhere and nothing here: each set one is refused or pointed out."""

import logging
from collections.abc import Iterator
from enum import Enum
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.utils.logger import log_first_n
from omegaconf import DictConfig, OmegaConf

from ..config import KEYS, RunConfig, add_deformable_detr_config

# The models of this project, and which of its keys they have no part for; others may read what these do not.
_UNREAD_KEYS = {
    "DeformableDETR": {"EOS_COEF"},
    "DETR": set(
        "WITH_BOX_REFINE TWO_STAGE NUM_QUERIES_TEST MIXED_QUERY_SELECTION LOOK_FORWARD_TWICE ANCHOR_QUERY_POS "
        "MULTICLASS_PROPOSALS DECODER_NORM SHARED_HEADS INVERSE_SIGMOID_EPS NUM_ONE2MANY_QUERIES ONE2MANY_REPEAT "
        "ONE2MANY_WEIGHT DN_NUMBER DN_LABEL_NOISE_RATIO DN_BOX_NOISE_SCALE ENC_N_POINTS DEC_N_POINTS "
        "FOCAL_ALPHA".split()
    ),
}


class Fate(Enum):
    """What becomes of an option that nothing here reads, where it is set."""

    REFUSED = "the run would be another one than was asked for"
    WARNED = "it changes nothing"
    INERT = "nobody expects it to do anything"


_PART = Fate.WARNED, "of other models: DeformableDETR has no such part"
_PROPOSALS = Fate.REFUSED, "queries take the place of proposals: leave it as it is"
_CLASSES = Fate.REFUSED, "set MODEL.DEFORMABLE_DETR.NUM_CLASSES"
_SCORES = Fate.WARNED, "all TEST.DETECTIONS_PER_IMAGE best detections are returned: cut their scores afterwards"
_NMS = Fate.WARNED, "overlapping detections are not suppressed: the matching of the training leaves none"
_SGD = Fate.WARNED, "of SGD; the optimiser is AdamW"

# Detectron2's keys that nothing here reads, or whole sections of them; an entry for a key comes before its section's.
YAML_OPTIONS: dict[str, tuple[Fate, str]] = {
    "MODEL.MASK_ON": (Fate.REFUSED, "the model predicts boxes alone: leave it False"),
    "MODEL.KEYPOINT_ON": (Fate.REFUSED, "the model predicts boxes alone: leave it False"),
    "MODEL.LOAD_PROPOSALS": _PROPOSALS,
    "DATASETS.PROPOSAL_FILES_TRAIN": _PROPOSALS,
    "DATASETS.PROPOSAL_FILES_TEST": _PROPOSALS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": (Fate.INERT, "of LOAD_PROPOSALS, which is refused"),
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": (Fate.INERT, "of LOAD_PROPOSALS, which is refused"),
    "INPUT.MASK_FORMAT": (Fate.INERT, "of MASK_ON, which is refused"),
    "MODEL.ROI_HEADS.NUM_CLASSES": _CLASSES,
    "MODEL.RETINANET.NUM_CLASSES": _CLASSES,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _SCORES,
    "MODEL.RETINANET.SCORE_THRESH_TEST": _SCORES,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _NMS,
    "MODEL.RETINANET.NMS_THRESH_TEST": _NMS,
    "MODEL.RETINANET": _PART,
    "MODEL.ROI_HEADS": _PART,
    "MODEL.ROI_BOX_HEAD": _PART,
    "MODEL.ROI_BOX_CASCADE_HEAD": _PART,
    "MODEL.ROI_MASK_HEAD": _PART,
    "MODEL.ROI_KEYPOINT_HEAD": _PART,
    "MODEL.SEM_SEG_HEAD": _PART,
    "MODEL.PANOPTIC_FPN": _PART,
    "MODEL.PROPOSAL_GENERATOR": _PART,
    "MODEL.ANCHOR_GENERATOR": _PART,
    "MODEL.RPN": _PART,
    "MODEL.FPN": (Fate.WARNED, "of backbones with a pyramid, which MODEL.DEFORMABLE_DETR.BOTTOM_UP may name"),
    "SOLVER.MOMENTUM": _SGD,
    "SOLVER.NESTEROV": _SGD,
    "TEST.AUG.ENABLED": (Fate.REFUSED, "images are tested in one size, INPUT.MIN_SIZE_TEST: leave it False"),
    "TEST.AUG": (Fate.INERT, "of TEST.AUG.ENABLED, which is refused"),
    "TEST.KEYPOINT_OKS_SIGMAS": _PART,
    "VIS_PERIOD": (Fate.WARNED, "python -m deformable_detr.report draws a run and its detections"),
    "VERSION": (Fate.INERT, "of the file's format"),
    "GLOBAL": (Fate.INERT, "for hacks of one's own"),
}

# Of LazyConfigs, below "train"; where an option is a section with a key "enabled", that decides whether it is set.
LAZY_OPTIONS: dict[str, tuple[Fate, str]] = {
    "clip_grad": (
        Fate.REFUSED,
        "the optimiser clips: optimizer = L(ClippedAdamW)(..., max_norm=0.1), from deformable_detr.solver",
    ),
    "model_ema": (Fate.REFUSED, "set train.ema.enabled and train.ema.decay"),
    "fast_dev_run": (Fate.REFUSED, "set train.max_iter"),
}
# What Detectron2, the loop and the hooks read there, besides the keys of the view.
_TRAIN_KEYS = {"amp", "checkpointer", "ema", "ddp", "cudnn_benchmark", "float32_precision", "writers"} | {
    lazy_key.split(".")[1] for _, lazy_key in KEYS.values() if lazy_key.startswith("train.")
}


def check_options(run: RunConfig) -> None:
    """Refuse, or warn of, options that are set and that nothing reads.

    Raises:
        ValueError: naming all that are refused, and what to set in their place.
    """
    train = run.lazy_node("train")
    found = list(_yaml_options(run.cfg) if train is None else _lazy_options(run.cfg, train))
    if refused := [told for fate, told in found if fate is Fate.REFUSED]:
        raise ValueError(f"options that this project does not follow: {'; '.join(refused)}")
    if warned := [told for fate, told in found if fate is Fate.WARNED]:
        # Once, by whichever comes first of the command line's checks and the trainer.
        message = f"Options that nothing reads: {'; '.join(warned)}"
        log_first_n(logging.WARNING, message, name=__name__, key="message")


def option_of(key: str) -> str | None:
    """Return the entry of :data:`YAML_OPTIONS` that a key belongs to; None for a key that is read."""
    parts = key.split(".")
    sections = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((section for section in sections if section in YAML_OPTIONS), None)


def _yaml_options(cfg: CfgNode) -> Iterator[tuple[Fate, str]]:
    """Yield what is set to another value than Detectron2's, by the reason why it is not read."""
    model = cfg.MODEL.META_ARCHITECTURE
    if model not in _UNREAD_KEYS:
        return
    node = cfg.MODEL.DEFORMABLE_DETR
    plain = get_cfg()
    add_deformable_detr_config(plain)
    differences = _differences(node, plain.MODEL.DEFORMABLE_DETR)
    if unread := [f"{key} {value!r}" for key, value in differences if key in _UNREAD_KEYS[model]]:
        yield Fate.REFUSED, f"MODEL.DEFORMABLE_DETR: {', '.join(unread)} ({model} has no such part)"
    by_entry: dict[tuple[Fate, str], list[str]] = {}
    for key, value in _differences(cfg, get_cfg()):
        option = option_of(key)
        if option is None or (option == "MODEL.FPN" and node.BOTTOM_UP != "build_resnet_backbone"):
            continue
        # Said twice, and the same.
        if YAML_OPTIONS[option] is _CLASSES and value == node.NUM_CLASSES:
            continue
        by_entry.setdefault(YAML_OPTIONS[option], []).append(f"{key} {value!r}")
    for (fate, reason), keys in by_entry.items():
        yield fate, f"{', '.join(keys)} ({reason})"


def _differences(cfg: CfgNode, defaults: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, default in defaults.items():
        # Another version's file, or a section that somebody has deleted.
        if name not in cfg:
            continue
        if isinstance(default, dict):
            yield from _differences(cfg[name], default, f"{prefix}{name}.")
        elif cfg[name] != default:
            yield f"{prefix}{name}", cfg[name]


def _lazy_options(cfg: DictConfig, train: DictConfig) -> Iterator[tuple[Fate, str]]:
    for name in sorted(train.keys() - _TRAIN_KEYS):
        value = train[name]
        is_section = OmegaConf.is_dict(value) and "enabled" in value
        if (is_section and not value.enabled) or (name == "clip_grad" and _clips_the_same(cfg, value)):
            continue
        fate, reason = LAZY_OPTIONS.get(name, (Fate.WARNED, "no such option here"))
        yield fate, f"train.{name} ({reason})"
    yield from _wandb_options(train)


def _wandb_options(train: DictConfig) -> Iterator[tuple[Fate, str]]:
    """Yield what detrex' files say in another way."""
    if train.get("wandb") and train.wandb.get("enabled") and "params" in train.wandb:
        yield Fate.REFUSED, "train.wandb.params (set train.wandb.project and train.wandb.name)"


def _clips_the_same(cfg: DictConfig, clip_grad: Any) -> bool:
    limit = OmegaConf.select(cfg, "optimizer.max_norm")
    wanted = clip_grad.get("params", {}) if OmegaConf.is_dict(clip_grad) else {}
    return limit is not None and wanted.get("norm_type", 2) == 2 and wanted.get("max_norm") == limit
