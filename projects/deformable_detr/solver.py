"""The official optimiser: AdamW with slower backbone and location layers, gradients clipped over the whole model."""

import itertools
import logging
import math
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
    if name.startswith("backbone.") and not name.startswith("backbone.input_proj."):
        return backbone_multiplier
    if "sampling_offsets" in name or "reference_points" in name:
        return location_multiplier
    return 1.0


def get_param_groups(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float | None = None,
    weight_decay_bias: float | None = None,
    backbone_multiplier: float = 0.1,
    location_multiplier: float = 0.1,
) -> list[dict[str, Any]]:
    """Parameter groups by learning rate and weight decay, trainable parameters only.

    Args:
        model: a :class:`DeformableDETR`, before it is wrapped for distributed training.
        weight_decay_norm, weight_decay_bias: None decays them like every other parameter, as the official code does.
    """
    groups = get_default_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay=weight_decay,
        weight_decay_norm=weight_decay_norm,
        weight_decay_bias=weight_decay_bias,
    )
    for name, parameter in model.named_parameters():
        factor = lr_factor(name, backbone_multiplier=backbone_multiplier, location_multiplier=location_multiplier)
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
            not provide.
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
    )
    return ClippedAdamW(groups, lr=solver.BASE_LR, max_norm=clip.CLIP_VALUE if clip.ENABLED else None)


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
