"""Sigmoid focal loss over sparse positives, with no temporary of the size of the logits.

Shapes: Ld layers, E logits of a layer, T positives of a layer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layers.precision import at_least_float32
from ..layers.tuned import LOGITS_AT_ONCE, at_once


def matched_focal_loss(logits: Tensor, positives: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Sum of the sigmoid focal loss (arXiv 1708.02002, eq. 5) of every layer.

    Equals ``fvcore.nn.sigmoid_focal_loss`` with targets of 1 at ``positives`` and 0 elsewhere, but holds neither these
    targets nor anything else of the logits' size, except for their gradient; two-stage models have four million
    logits in a batch of two. Computed and summed in float32 where the logits have half precision.

    Args:
        logits: (Ld, E), floating point.
        positives: (Ld, T) int64, different indices into the logits of each layer.
        alpha: weight of positives; negatives get ``1 - alpha``.
        gamma: focusing exponent.

    Returns:
        (Ld,) float32 (float64 for float64), differentiable once with respect to ``logits``.
    """
    return _MatchedFocalLoss.apply(logits, positives, alpha, gamma)


class _MatchedFocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, positives: Tensor, alpha: float, gamma: float) -> Tensor:
        ctx.save_for_backward(logits, positives)
        ctx.alpha, ctx.gamma = alpha, gamma
        background = sum(_negative(at_least_float32(part), gamma).sum(1) for part in logits.split(_columns(logits), 1))
        matched = at_least_float32(logits.gather(1, positives))
        # A positive with logit x costs what a negative with logit -x does.
        as_negative, as_positive = _negative(torch.stack((matched, -matched)), gamma).sum(-1)
        return (1 - alpha) * (background - as_negative) + alpha * as_positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        logits, positives = ctx.saved_tensors
        alpha, gamma = ctx.alpha, ctx.gamma
        grad, scale = torch.empty_like(logits), grad_output[:, None]
        columns, negative_scale = _columns(logits), (1 - alpha) * scale
        for part, out in zip(logits.split(columns, 1), grad.split(columns, 1), strict=True):
            # Scaled in float32: gradients this small would vanish in half precision.
            torch.mul(_negative_grad(at_least_float32(part), gamma), negative_scale, out=out)
        matched = _negative_grad(-at_least_float32(logits.gather(1, positives)), gamma).mul_(-alpha * scale)
        return grad.scatter_(1, positives, matched.to(grad.dtype)), None, None, None


def _columns(logits: Tensor) -> int:
    """How many logits (Ld, E) of every layer to compute at a time."""
    return max(1, at_once(LOGITS_AT_ONCE, logits.device) // max(1, len(logits)))


def _negative(x: Tensor, gamma: float) -> Tensor:
    """Unweighted focal loss p^gamma * -log(1 - p) of negatives with logits ``x``, p = sigmoid(x)."""
    return F.softplus(x).mul_(x.sigmoid().pow_(gamma))


def _negative_grad(x: Tensor, gamma: float) -> Tensor:
    """Return the derivative of :func:`_negative`: p^gamma * (p + gamma * (1 - p) * -log(1 - p))."""
    prob = x.sigmoid()
    factor = F.softplus(x).mul_(1 - prob).mul_(gamma).add_(prob)
    return factor.mul_(prob.pow_(gamma))
