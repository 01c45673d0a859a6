"""The configurations of the zoo, and what models and configurations are made of, for comparing them."""

from pathlib import Path

from detectron2.config import CfgNode
from omegaconf import DictConfig
from torch import nn

from deformable_detr.modeling import FocalClassification, SoftmaxClassification

CONFIGS = Path(__file__).parents[2] / "configs" / "COCO-Detection"
BASE = str(CONFIGS / "deformable_detr_R_50.yaml")
PLAIN = (bool, int, float, str, tuple, type(None), FocalClassification, SoftmaxClassification)


def facts(model: nn.Module) -> tuple[dict, dict]:
    """Shapes of the parameters, and every plain value that a module of the model holds."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    values = {"pixel_mean": model.pixel_mean.tolist(), "pixel_std": model.pixel_std.tolist()}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, PLAIN) and not k.startswith("_")}
        values[name] = {**plain, "type": type(module).__name__}
    return shapes, values


def flatten(node: CfgNode | DictConfig, prefix: str = "") -> dict:
    flat = {}
    for key, value in node.items():
        is_node = isinstance(value, CfgNode | DictConfig)
        flat |= flatten(value, f"{prefix}{key}.") if is_node else {f"{prefix}{key}": value}
    return flat
