"""What transformers are made of: stacks of equal layers, how a layer is run, how all of them start."""

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


def check_width(d_model: int, n_heads: int) -> None:
    """Raise ValueError if heads, or sines and cosines of two axes, do not divide the width."""
    if d_model % 4 or d_model % n_heads:
        raise ValueError(f"d_model ({d_model}) must be divisible by 4 and by n_heads ({n_heads})")


def init_matrices(transformer: nn.Module) -> None:
    """Initialise all matrices by Xavier's rule, as the official codes of DETR and Deformable DETR do."""
    for parameter in transformer.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
