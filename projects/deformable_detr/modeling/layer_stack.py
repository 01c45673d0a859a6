"""Stacks of equal layers, and how a layer of them is run."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# A layer, which is copied, or a function that makes one: layers then start with random numbers of their own.
LayerSource = nn.Module | Callable[[], nn.Module]


def stack_layers(layer: LayerSource, num_layers: int) -> nn.ModuleList:
    make = partial(copy.deepcopy, layer) if isinstance(layer, nn.Module) else layer
    return nn.ModuleList(make() for _ in range(num_layers))


def run_layer(layer: nn.Module, *args: object, recompute: bool) -> Tensor:
    """Run a layer; with ``recompute`` the backward pass computes it again, dropout's random numbers too."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)
