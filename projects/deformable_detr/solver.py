"""The official optimiser: AdamW with slower backbone and location layers, gradients clipped over the whole model."""

import bisect
import itertools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2 import solver as detectron2_solver
from detectron2.config import CfgNode, instantiate
from detectron2.solver.build import get_default_optimizer_params, reduce_param_groups
from omegaconf import DictConfig
from torch import nn

logger = logging.getLogger(__name__)


def lr_factor(name: str, *, backbone_multiplier: float, location_multiplier: float) -> float:
    """Learning-rate factor of a parameter: the pre-trained backbone and the layers that output locations are slower."""
    name = _unwrapped(name)
    if name.startswith("backbone.") and not name.startswith("backbone.input_proj."):
        return backbone_multiplier
    if "sampling_offsets" in name or "reference_points" in name:
        return location_multiplier
    return 1.0


# What DistributedDataParallel, torch.compile, activation checkpoints and FullyShardedDataParallel put into names.
_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def _unwrapped(name: str) -> str:
    """Name of a parameter as it is in a model that nothing wraps."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Learning-rate factors of a backbone's parameters by depth: ``decay`` for each block from here to the last.

    The rule of Detectron2's ViTDet, for every backbone with "blocks" (ViT, MViT) and with "layers" or "stages" of
    "blocks" (Swin, ConvNeXt).
    The last block has ``decay``; the embeddings before the first of n blocks have ``decay ** (n + 1)``. What follows
    the blocks has no factor, nor have the residual convolutions inside of a ViT's blocks, which are not pre-trained.

    Raises:
        ValueError: if ``decay`` is not in (0, 1], or if the backbone has no blocks.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {decay}")
    if decay == 1:
        return {}
    names = [name for name, _ in model.named_parameters() if _unwrapped(name).startswith("backbone.")]
    # In the first stage nothing halves the resolution, but at its end.
    ends = any(".layers.0.downsample." in name for name in names)
    blocks = sorted({_block_of(match, ends) for name in names if (match := _BLOCK.search(name)) and match["block"]})
    if not blocks:
        raise ValueError(f"layer_decay ({decay}) needs a backbone with blocks, such as a ViT or a Swin; this has none")
    factors = {}
    for name in names:
        match = _BLOCK.search(name)
        if match and ".residual." not in name:
            # What halves the resolution between two stages goes with the last block of the first.
            factors[name] = decay ** (len(blocks) - bisect.bisect_right(blocks, _block_of(match, ends)) + 1)
        elif "patch_embed." in name or "pos_embed" in name or ".stem." in name:
            factors[name] = decay ** (len(blocks) + 1)
    return factors


# Of a block, or of what halves the resolution: its stage, if it is in one, and its number.
_BLOCK = re.compile(r"\.(?:(?:layers|stages)\.(?P<stage>\d+)\.)?(?:blocks\.(?P<block>\d+)|downsample)\.")


def _block_of(match: re.Match, ends: bool) -> tuple[int, float]:
    # It ends a stage in Microsoft's and Detectron2's Swins, and begins the next one in timm's Swins and in ConvNeXts.
    between = math.inf if ends else -1
    return int(match["stage"] or 0), int(match["block"]) if match["block"] else between


def _check_overrides(model: nn.Module, overrides: Mapping[str, Mapping[str, Any]]) -> None:
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    for name, values in overrides.items():
        if unknown := values.keys() - {"lr", "weight_decay"}:
            raise ValueError(f"overrides of {name} must be of lr or weight_decay, got {', '.join(sorted(unknown))}")
        if name not in names:
            logger.warning(f"The overrides of {name} change nothing: no parameter's name ends in it")


def get_param_groups(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float | None = None,
    weight_decay_bias: float | None = None,
    backbone_multiplier: float = 0.1,
    location_multiplier: float = 0.1,
    layer_decay: float = 1.0,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups by learning rate and weight decay, trainable parameters only.

    Args:
        model: a :class:`SetPredictionDetector`, also one that is compiled or wrapped for distributed training. In
            another model, where no name begins with "backbone.", all of it but locations learns at one rate, with a
            warning.
        weight_decay_norm, weight_decay_bias: None decays them like every other parameter, as the official code does.
        layer_decay: as for :func:`layer_factors`.
        lr_factor_func: one more factor on the learning rate, from the name of a parameter, as in Detectron2.
        overrides: last part of a parameter's name -> its "lr" or "weight_decay", as in Detectron2: values, which no
            factor changes, such as ``{"relative_position_bias_table": {"weight_decay": 0.0}}``.

    Raises:
        ValueError: if an override is of anything but these two, or ``layer_decay`` does not fit.
    """
    # Detectron2's function writes into it.
    overrides = {name: dict(values) for name, values in (overrides or {}).items()}
    _check_overrides(model, overrides)
    groups = get_default_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay=weight_decay,
        weight_decay_norm=weight_decay_norm,
        weight_decay_bias=weight_decay_bias,
        overrides=overrides,
    )
    names = [name for name, _ in model.named_parameters()]
    if names and backbone_multiplier != 1 and not any(_unwrapped(name).startswith("backbone.") for name in names):
        logger.warning(
            f"The backbone_multiplier ({backbone_multiplier}) changes nothing: no parameter's name begins with "
            f'"backbone.", the first is {names[0]}. Of a detector inside of another model, give the detector itself'
        )
    by_layer = layer_factors(model, layer_decay)
    for name, parameter in model.named_parameters():
        if "lr" in overrides.get(name.rpartition(".")[2], {}):
            continue
        factor = lr_factor(name, backbone_multiplier=backbone_multiplier, location_multiplier=location_multiplier)
        factor *= by_layer.get(name, 1.0) * (lr_factor_func(name) if lr_factor_func else 1.0)
        if parameter.requires_grad and factor != 1.0:
            groups.append({"params": [parameter], "lr": base_lr * factor})
    # Later entries override earlier ones of the same parameter.
    return reduce_param_groups(groups)


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that first clips the norm of all gradients together.

    Clipping in ``step`` is correct under mixed precision: GradScaler unscales before it calls ``step``.

    Args:
        max_norm: limit on the 2-norm over the gradients of all parameters; None or 0 does not clip.
        fused: update all of a parameter in one pass over memory. PyTorch's default on the CPU takes a pass per
            operation, which for the 41 M parameters of the R50 models is about nine times as long.
    """

    def __init__(
        self,
        params,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_norm: float | None = 0.1,
        fused: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=fused)
        # A fused optimiser tells GradScaler to leave unscaling to it; it would come after the clipping.
        self._step_supports_amp_scaling = False
        self.max_norm = max_norm
        self._is_clipped = False

    @torch.no_grad()
    def clip_gradients(self) -> torch.Tensor:
        """Clip now what the next ``step`` would clip, to see the norm before it decides anything.

        Returns:
            The norm of the gradient before clipping, a scalar on the device of the parameters.
        """
        self._is_clipped = True
        parameters = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        return nn.utils.clip_grad_norm_(parameters, self.max_norm or math.inf)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._is_clipped = False

    @torch.no_grad()
    def step(self, closure=None):
        if self.max_norm and not self._is_clipped:
            self.clip_gradients()
        self._is_clipped = False
        return super().step(closure)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser from ``cfg.SOLVER``.

    Raises:
        ValueError: if ``SOLVER.OPTIMIZER``, ``CLIP_GRADIENTS`` or ``BIAS_LR_FACTOR`` asks for what this project does
            not provide; what :func:`get_param_groups` does.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER.upper() != "ADAMW":
        raise ValueError(f"SOLVER.OPTIMIZER must be ADAMW, got {solver.OPTIMIZER!r}")
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED and (clip.CLIP_TYPE != "full_model" or clip.NORM_TYPE != 2.0):
        raise ValueError(
            "SOLVER.CLIP_GRADIENTS must have CLIP_TYPE full_model and NORM_TYPE 2.0, "
            f"got {clip.CLIP_TYPE!r} and {clip.NORM_TYPE}"
        )
    if solver.BIAS_LR_FACTOR not in (None, 1.0):
        raise ValueError(
            f"SOLVER.BIAS_LR_FACTOR must be 1.0, as the recipe has no other learning rate for biases, "
            f"got {solver.BIAS_LR_FACTOR}"
        )
    groups = get_param_groups(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        backbone_multiplier=solver.BACKBONE_MULTIPLIER,
        location_multiplier=solver.LOCATION_MULTIPLIER,
        layer_decay=solver.LAYER_DECAY,
        overrides=_read_overrides(solver.OVERRIDES),
    )
    return ClippedAdamW(groups, lr=solver.BASE_LR, max_norm=clip.CLIP_VALUE if clip.ENABLED else None)


def _read_overrides(triples: Sequence[tuple[str, str, float]]) -> dict[str, dict[str, float]]:
    overrides: dict[str, dict[str, float]] = {}
    for triple in triples:
        if not isinstance(triple, tuple | list) or len(triple) != 3:
            raise ValueError(
                'SOLVER.OVERRIDES must be triples such as ("pos_embed", "weight_decay", 0.0): the last part of a '
                f"parameter's name, what of it, and the value; got {triple!r}"
            )
        name, what, value = triple
        overrides.setdefault(name, {})[what] = value
    return overrides


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Detectron2's scheduler. Steps beyond the end are left out with a warning, as there, and so is one at the end.

    Raises:
        ValueError: if ``SOLVER.STEPS`` do not increase.
    """
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        max_iter, steps = cfg.SOLVER.MAX_ITER, tuple(cfg.SOLVER.STEPS)
        if any(step <= before for before, step in itertools.pairwise((0, *steps))):
            raise ValueError(f"SOLVER.STEPS must be iterations that increase from 1 or more, got {steps}")
        kept = tuple(step for step in steps if step < max_iter)
        if kept != steps:
            logger.warning(f"SOLVER.STEPS {steps}: {steps[len(kept) :]} are left out, as SOLVER.MAX_ITER is {max_iter}")
            cfg = cfg.clone()
            cfg.merge_from_list(["SOLVER.STEPS", kept])
    return detectron2_solver.build_lr_scheduler(cfg, optimizer)


def build_lr_multiplier(lr_multiplier: DictConfig) -> Any:
    """Instantiate a LazyConfig's ``lr_multiplier``.

    Raises:
        ValueError: naming it, for what a scheduler refuses, such as milestones that do not increase.
    """
    try:
        return instantiate(lr_multiplier)
    except ValueError as error:
        raise ValueError(f"lr_multiplier cannot be built: {error}. It is {lr_multiplier}") from error
