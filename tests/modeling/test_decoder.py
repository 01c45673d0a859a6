"""How boxes move from layer to layer of the decoder, with layers and heads of known numbers.

``S`` is the sigmoid, ``r_i`` a layer's reference box, ``d_i`` what its head adds to it in logit space.
"""

import math

import pytest
import torch
from torch import nn

from deformable_detr.layers import PositionEmbeddingSine
from deformable_detr.modeling.decoder import DeformableTransformerDecoder
from deformable_detr.modeling.geometry import get_geometry
from deformable_detr.modeling.queries import AnchorPositions
from deformable_detr.modeling.reference_points import apply_box_deltas

START = (0.5, 0.25, 0.4, 0.3)


class AddOne(nn.Module):
    """A layer that adds 1, and keeps what it is given."""

    def forward(self, tgt, query_pos, reference_points, *args):
        self.query_pos, self.reference_points = query_pos, reference_points
        return tgt + 1


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


class Deltas(nn.Module):
    """A head that returns a number of its own in all four places."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, hidden):
        return self.value.expand(*hidden.shape[:-1], 4)


class Hidden(nn.Module):
    """A head that returns a tenth of the hidden state."""

    def forward(self, hidden):
        return hidden[..., :4] / 10


@pytest.fixture
def decode():
    """Run a decoder on one query that starts as zeros at START.

    The image is 3/4 as wide as its map of the first level, and as wide as that of the second.
    """

    def run(heads, *, start=START, query_pos=None, **options):
        valid_sizes = torch.tensor([[[3.0, 2.0], [2.0, 2.0]]])
        geometry = get_geometry([(2, 4), (2, 2)], valid_sizes, PositionEmbeddingSine(4), two_stage=False)
        decoder = DeformableTransformerDecoder(AddOne(), len(heads), with_box_refine=True, **options)
        zeros = torch.zeros(1, 1, 4)
        reference_points = torch.tensor([[start]])
        states, boxes = decoder(zeros, query_pos, reference_points, zeros, geometry=geometry, bbox_embed=heads)
        return decoder, states, boxes

    return run


def box(*deltas):
    """START after so many deltas in logit space."""
    return torch.tensor([[[1 / (1 + math.exp(-math.log(x / (1 - x)) - sum(deltas))) for x in START]]])


def looked_at(decoder, layer):
    """Reference box of a layer in the frame of the image, which is 3/4 as wide as the map and as high."""
    return decoder.layers[layer].reference_points[:, :, 0] / torch.tensor([0.75, 1.0, 0.75, 1.0])


@pytest.mark.parametrize("options", [{}, {"look_forward_twice": True}])
def test_every_layer_looks_around_the_boxes_of_the_one_before(decode, options):
    decoder, _, boxes = decode([Deltas(0.3), Deltas(-0.2), Deltas(0.5)], **options)
    for layer, expected in enumerate([box(0.3), box(0.3, -0.2), box(0.3, -0.2, 0.5)]):
        torch.testing.assert_close(boxes[layer], expected)
    torch.testing.assert_close(looked_at(decoder, 0), box())
    torch.testing.assert_close(looked_at(decoder, 1), boxes[0])
    torch.testing.assert_close(looked_at(decoder, 2), boxes[1])
    assert not any(layer.reference_points.requires_grad for layer in decoder.layers)


@pytest.mark.parametrize(
    ("options", "reached"),
    [
        ({}, [{0}, {1}, {2}]),
        ({"look_forward_twice": True}, [{0}, {0, 1}, {1, 2}]),
        ({"look_forward_twice": True, "norm": Double()}, [{0}, {0, 1}, {1, 2}]),
        ({"norm": Double()}, [{0}, {1}, {2}]),
    ],
)
def test_the_box_loss_of_a_layer_reaches_its_own_deltas_and_looking_twice_those_before(decode, options, reached):
    heads = [Deltas(0.3), Deltas(-0.2), Deltas(0.5)]
    _, _, boxes = decode(heads, **options)
    for layer, expected in enumerate(reached):
        found = torch.autograd.grad(boxes[layer].sum(), [h.value for h in heads], retain_graph=True, allow_unused=True)
        assert {index for index, gradient in enumerate(found) if gradient is not None} == expected
        # Deltas are added in logit space, so that both have the gradient of the sigmoid: the sum of p (1 - p).
        slope = (boxes[layer] * (1 - boxes[layer])).sum().detach()
        for index in expected:
            torch.testing.assert_close(found[index], slope)


def test_looking_twice_changes_no_output_whether_gradients_are_kept_or_not(decode):
    heads = [Deltas(0.3), Deltas(-0.2), Deltas(0.5)]
    _, _, plain = decode(heads)
    _, _, twice = decode(heads, look_forward_twice=True)
    with torch.no_grad():
        _, _, without = decode(heads, look_forward_twice=True)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, twice, without, strict=True))


@pytest.mark.parametrize("options", [{}, {"look_forward_twice": True}])
def test_with_a_norm_heads_see_it_and_reference_boxes_do_not(decode, options):
    """Layers return 1, 2 and 3; the norm doubles them; a head adds a tenth."""
    decoder, states, boxes = decode([Hidden()] * 3, norm=Double(), **options)
    assert [state.mean().item() for state in states] == [2.0, 4.0, 6.0]
    # Predictions move by what is normalised, references by what is not: the next reference is not the prediction.
    torch.testing.assert_close(boxes[0], box(0.2))
    torch.testing.assert_close(looked_at(decoder, 1), box(0.1))
    torch.testing.assert_close(boxes[1], box(0.1, 0.4))
    torch.testing.assert_close(looked_at(decoder, 2), box(0.1, 0.2))
    torch.testing.assert_close(boxes[2], box(0.1, 0.2, 0.6))


def test_the_norm_costs_a_second_head_for_all_layers_but_the_last(decode):
    calls = []
    heads = [Deltas(0.1), Deltas(0.1), Deltas(0.1)]
    for index, head in enumerate(heads):
        head.register_forward_hook(lambda *_, index=index: calls.append(index))
    decode(heads, norm=Double())
    decode(heads)
    assert calls == [0, 0, 1, 1, 2] + [0, 1, 2]


def test_boxes_at_the_border_move_from_where_eps_puts_them(decode):
    zero = [Deltas(0.0)]
    _, _, (boxes,) = decode(zero, start=(0.0, 1.0, 0.5, 0.0), inverse_sigmoid_eps=1e-3)
    # The logit of 0 is log(eps / 1), that of 1 log(1 / eps).
    torch.testing.assert_close(boxes[0, 0], torch.tensor([1e-3 / 1.001, 1 / 1.001, 0.5, 1e-3 / 1.001]))
    _, _, (boxes,) = decode(zero, start=(0.0, 1.0, 0.5, 0.0))
    torch.testing.assert_close(boxes[0, 0], torch.tensor([1e-5 / 1.00001, 1 / 1.00001, 0.5, 1e-5 / 1.00001]))
    assert torch.equal(apply_box_deltas(torch.zeros(4), torch.zeros(4), eps=0.25), torch.full((4,), 0.2))


def test_anchors_make_positions_anew_in_every_layer_from_boxes_of_the_padded_map(decode):
    """The image covers 3/4 of the width of its map: the x and the width of its boxes are less there."""

    class Positions(nn.Module):
        def forward(self, boxes):
            return 10 * boxes

    given = torch.full((1, 1, 4), 7.0)
    decoder, _, boxes = decode([Deltas(0.3), Deltas(-0.2)], ref_point_head=Positions(), query_pos=given)
    to_map = torch.tensor([0.75, 1.0, 0.75, 1.0])
    torch.testing.assert_close(decoder.layers[0].query_pos, 10 * box() * to_map)
    torch.testing.assert_close(decoder.layers[1].query_pos, 10 * boxes[0].detach() * to_map)
    plain, _, _ = decode([Deltas(0.3), Deltas(-0.2)], query_pos=given)
    assert all(layer.query_pos is given for layer in plain.layers)


def test_positions_of_anchors_are_an_mlp_over_sines_with_y_before_x():
    torch.manual_seed(0)
    positions = AnchorPositions(4)
    assert [tuple(layer.weight.shape) for layer in positions.layers] == [(4, 8), (4, 4)]
    x, y, w, h = START
    # Two channels for each number, of frequency 1: sine and cosine of 2 pi times it.
    sines = [function(2 * math.pi * value) for value in (y, x, w, h) for function in (math.sin, math.cos)]
    first, second = positions.layers
    nn.init.constant_(first.bias, 1.0)  # Not all of it is below zero, where order would not matter.
    torch.testing.assert_close(positions(torch.tensor([[START]]))[0, 0], second(first(torch.tensor(sines)).relu()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inverse_sigmoid_eps": 0.0}, r"inverse_sigmoid_eps must be above 0 and below 0\.5, got 0\.0"),
        ({"inverse_sigmoid_eps": 0.5}, r"inverse_sigmoid_eps .*got 0\.5"),
        ({"look_forward_twice": True}, "look_forward_twice needs with_box_refine, which is False"),
    ],
)
def test_a_decoder_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DeformableTransformerDecoder(AddOne(), 2, **options)
