"""Attention with fewer operations is PyTorch's."""

import pytest
import torch
from torch import nn

from deformable_detr.layers import MultiheadAttention


@pytest.mark.parametrize("mask", [None, "attn_mask", "key_padding_mask", "both", "of every image and head"])
def test_outputs_and_gradients_are_those_of_pytorch(mask):
    torch.manual_seed(0)
    ours = MultiheadAttention(8, 2)
    nn.init.normal_(ours.in_proj_bias)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, value = torch.randn(2, 2, 5, 8).unbind()
    masks = {
        "attn_mask": torch.eye(5).bool(),
        "key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
    }
    options = masks if mask == "both" else {name: masks[name] for name in masks if name == mask}
    if mask == "of every image and head":
        options = {"attn_mask": (torch.rand(2 * 2, 5, 5) > 0.5) & ~torch.eye(5).bool()}
    found, expected = (module(query, query, value, need_weights=False, **options)[0] for module in (ours, theirs))
    torch.testing.assert_close(found, expected)
    for output in (found, expected):
        (output * torch.arange(8.0)).sum().backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_weights_that_are_wanted_come_from_pytorch():
    attention = MultiheadAttention(8, 2).eval()
    query = torch.randn(1, 5, 8)
    weights = attention(query, query, query, need_weights=True)[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 5))
