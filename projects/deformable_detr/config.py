"""Configuration keys and the one function through which every entry point reads a configuration."""

from collections.abc import Sequence

from detectron2.config import CfgNode, LazyConfig, get_cfg
from iopath.common.file_io import g_pathmgr
from omegaconf import DictConfig


def add_deformable_detr_config(cfg: CfgNode) -> None:
    """Add the keys of this project to a Detectron2 configuration; existing keys are never changed."""
    cfg.MODEL.DEFORMABLE_DETR = CfgNode()
    node = cfg.MODEL.DEFORMABLE_DETR

    # Registered backbone under MultiScaleBackbone, its outputs (finest first), and the number of levels L.
    node.BOTTOM_UP = "build_resnet_backbone"
    node.IN_FEATURES = ["res3", "res4", "res5"]
    node.NUM_FEATURE_LEVELS = 4

    # Class outputs; there is no background class.
    node.NUM_CLASSES = 80
    # Detections before selection; with TWO_STAGE the number of proposals kept.
    node.NUM_QUERIES = 300
    node.WITH_BOX_REFINE = False
    node.TWO_STAGE = False

    # Width C, heads M, layers, hidden width of the feed-forward networks, dropout probability.
    node.HIDDEN_DIM = 256
    node.NHEADS = 8
    node.ENC_LAYERS = 6
    node.DEC_LAYERS = 6
    node.DIM_FEEDFORWARD = 1024
    node.DROPOUT = 0.1
    # Sampling points K of the paper, per head and level.
    node.ENC_N_POINTS = 4
    node.DEC_N_POINTS = 4

    # Loss weights, and supervision of every decoder layer.
    node.AUX_LOSS = True
    node.CLASS_WEIGHT = 2.0
    node.L1_WEIGHT = 5.0
    node.GIOU_WEIGHT = 2.0
    node.FOCAL_ALPHA = 0.25
    # Weights of the matching costs.
    node.COST_CLASS = 2.0
    node.COST_L1 = 5.0
    node.COST_GIOU = 2.0

    # AdamW with these factors on SOLVER.BASE_LR: for the backbone, and for the layers that produce locations
    # (sampling_offsets, reference_points).
    cfg.SOLVER.setdefault("OPTIMIZER", "ADAMW")
    cfg.SOLVER.setdefault("BACKBONE_MULTIPLIER", 0.1)
    cfg.SOLVER.setdefault("LOCATION_MULTIPLIER", 0.1)


def load_config(path: str, opts: Sequence[str] = ()) -> CfgNode | DictConfig:
    """Read a configuration and apply overrides.

    Args:
        path: a ``.yaml`` file (Detectron2's CfgNode with this project's keys), a ``.py`` file (LazyConfig), or the
            ``config.yaml`` that a run with a LazyConfig has left in its output folder.
        opts: overrides as on the command line: ``KEY VALUE`` pairs for yaml, ``key=value`` for LazyConfig.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: on another suffix.
        KeyError: on a yaml key that does not exist.
    """
    if not path.endswith((".yaml", ".yml", ".py")):
        raise ValueError(f"a configuration must be a .yaml or .py file, got {path!r}")
    if not g_pathmgr.exists(path) and "://" not in path:
        raise FileNotFoundError(f"there is no configuration file {path!r}")
    if path.endswith(".py") or _is_saved_lazy_config(path):
        return LazyConfig.apply_overrides(LazyConfig.load(path), list(opts))
    cfg = get_cfg()
    add_deformable_detr_config(cfg)
    cfg.merge_from_file(path)
    cfg.merge_from_list(list(opts))
    return cfg


def _is_saved_lazy_config(path: str) -> bool:
    """Whether a yaml file is a LazyConfig: only such a file names what to call, right below its top level."""
    with g_pathmgr.open(path) as file:
        return any(line.startswith("  _target_:") for line in file)
