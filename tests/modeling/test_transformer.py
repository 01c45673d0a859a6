import math

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from torch import nn

from deformable_detr import load_config
from deformable_detr.modeling.padding import get_valid_sizes
from deformable_detr.modeling.queries import AnchorPositions, ExtraQueries
from deformable_detr.modeling.reference_points import (
    apply_box_deltas,
    gen_encoder_proposals,
    get_encoder_reference_points,
    inverse_sigmoid,
)
from deformable_detr.modeling.transformer import (
    DeformableTransformer,
    DeformableTransformerDecoder,
    DeformableTransformerDecoderLayer,
    DeformableTransformerEncoder,
    DeformableTransformerEncoderLayer,
)


def padding(height, width, valid_height, valid_width):
    mask = torch.ones(1, height, width, dtype=torch.bool)
    mask[:, :valid_height, :valid_width] = False
    return mask


def valid_sizes(masks):
    sizes = [torch.stack(((~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)), dim=-1) for mask in masks]
    return torch.stack(sizes, dim=1).float()


def test_inverse_sigmoid_clamps_numerator_and_denominator_at_1e_5():
    x = torch.tensor([0.0, 0.25, 1.0, -3.0, 7.0])
    expected = [math.log(1e-5), math.log(1 / 3), -math.log(1e-5), math.log(1e-5), -math.log(1e-5)]
    torch.testing.assert_close(inverse_sigmoid(x), torch.tensor(expected))


def test_zero_deltas_return_the_reference_box():
    box = torch.tensor([[[0.3, 0.6, 0.2, 0.1]]])
    torch.testing.assert_close(apply_box_deltas(torch.zeros(1, 1, 4), box), box)


def test_reference_centres_do_not_shift_width_and_height():
    boxes = apply_box_deltas(torch.tensor([[[0.0, 0.0, -2.0, 1.0]]]), torch.tensor([[[0.3, 0.6]]]))
    expected = [0.3, 0.6, 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-1))]
    torch.testing.assert_close(boxes, torch.tensor([[expected]]))


def test_valid_sizes_are_width_before_height():
    assert get_valid_sizes((4, 6), torch.tensor([[3, 5]]), [(4, 6), (2, 3)]).tolist() == [[[5, 3], [3, 2]]]


def test_encoder_reference_points_are_cell_centres_of_the_padded_maps():
    # Level 0: 2x4 cells of which 2x3 are valid; level 1: 1x2, fully valid.
    sizes = torch.tensor([[[3.0, 2.0], [2.0, 1.0]]])
    points = get_encoder_reference_points([(2, 4), (1, 2)], sizes)
    assert points.shape == (1, 10, 2, 2)
    # Cell (row 1, column 2) of level 0 is at (2.5/3, 1.5/2) of the image, which is 3/4 as wide as level 0's map.
    torch.testing.assert_close(points[0, 6, 0], torch.tensor([2.5 / 4, 1.5 / 2]))
    torch.testing.assert_close(points[0, 6, 1], torch.tensor([2.5 / 3, 1.5 / 2]))
    # Column 1 of level 1 is at 1.5/2 of the image, so at 1.5/2 * 3/4 of level 0's map.
    torch.testing.assert_close(points[0, 9, 0], torch.tensor([1.5 / 2 * 3 / 4, 0.5]))


def test_proposals_are_squares_on_cell_centres_that_double_per_level():
    masks = [padding(4, 4, 4, 4), padding(2, 2, 2, 2)]
    flat = torch.cat([m.flatten(1) for m in masks], 1)
    boxes = gen_encoder_proposals([(4, 4), (2, 2)], valid_sizes(masks), flat).sigmoid()
    torch.testing.assert_close(boxes[0, 5], torch.tensor([0.375, 0.375, 0.05, 0.05]))
    torch.testing.assert_close(boxes[0, 18], torch.tensor([0.25, 0.75, 0.1, 0.1]))


def test_proposals_at_padding_or_at_the_border_are_infinite():
    mask = padding(1, 200, 1, 120)
    proposals = gen_encoder_proposals([(1, 200)], valid_sizes([mask]), mask.flatten(1))
    finite = proposals[0].isfinite().all(-1)
    # Centres (i + 0.5) / 120 are inside (0.01, 0.99) for i = 1 ... 118.
    assert finite.nonzero().flatten().tolist() == list(range(1, 119))
    assert (proposals[0][~finite] == float("inf")).all()


def test_proposals_of_the_sixth_level_are_all_invalid():
    shapes = [(1, 1)] * 6
    masks = [padding(1, 1, 1, 1)] * 6
    flat = torch.cat([m.flatten(1) for m in masks], 1)
    proposals = gen_encoder_proposals(shapes, valid_sizes(masks), flat)
    assert proposals[0].isfinite().all(-1).tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("two_stage", [False, True])
@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize(
    ("levels", "d_model", "n_heads", "points"), [(3, 32, 4, 2), (4, 48, 6, 1), (5, 20, 1, 3), (4, 64, 8, 4)]
)
def test_every_combination_trains_and_no_parameter_is_unused(
    make_model, make_input, two_stage, refine, levels, d_model, n_heads, points
):
    model = make_model(
        levels=levels,
        d_model=d_model,
        n_heads=n_heads,
        enc_n_points=points,
        dec_n_points=points + 1,
        with_box_refine=refine,
        two_stage=two_stage,
    )
    images = [make_input(96, 64, [[4, 8, 40, 60]], [2]), make_input(70, 90)]
    losses = model(images)
    layers = {"", "_0", "_1"} | ({"_enc"} if two_stage else set())
    assert set(losses) == {f"loss_{name}{s}" for name in ("ce", "bbox", "giou") for s in layers}
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("in_features", "cells"), [(("res5",), 2 * 3 + 1 * 2), (("res4", "res5"), 4 * 6 + 2 * 3)])
def test_levels_may_start_at_any_feature(make_model, make_input, in_features, cells):
    model = make_model(levels=2, in_features=in_features, two_stage=True, num_queries=300).eval()
    outputs = model.predict_raw([make_input(64, 96)])
    assert outputs["enc_logits"].shape[1] == cells
    # There are never more queries than cells to propose them.
    assert outputs["pred_logits"].shape[2] == cells


def test_refinement_moves_references_without_gradient(make_model, make_input, randomize):
    model = randomize(make_model(with_box_refine=True, aux_loss=False))
    images = [make_input(64, 64, [[4, 4, 30, 40]], [1])]
    sum(model(images).values()).backward()
    # Without auxiliary losses nothing but detached references connects the first head to the loss.
    assert model.bbox_embed[0].layers[-1].weight.grad.abs().max() == 0
    assert model.bbox_embed[2].layers[-1].weight.grad.abs().max() > 0


def test_initial_state_follows_the_official_code(make_model):
    model = make_model(d_model=64, n_heads=8, with_box_refine=True)
    prior = -math.log(99)
    assert all(torch.allclose(h.bias, torch.tensor(prior)) for h in model.class_embed)
    assert [h.layers[-1].bias.tolist() for h in model.bbox_embed] == [[0, 0, -2, -2], [0] * 4, [0] * 4]
    transformer = model.transformer
    assert transformer.reference_points.bias.tolist() == [0, 0]
    layer = transformer.encoder.layers[0]
    assert layer.self_attn.sampling_offsets.weight.abs().max() == 0
    assert layer.self_attn.sampling_offsets.bias.view(8, 4, 4, 2)[1, 2, 1].tolist() == [2, 2]
    bound = (6 / (64 + 48)) ** 0.5
    assert 0.9 * bound < layer.linear1.weight.abs().max() <= bound
    # Biases of linear layers keep PyTorch's default, level embeddings and queries are standard normal.
    assert layer.linear1.bias.abs().max() > 0
    assert transformer.level_embed.std().item() == pytest.approx(1, abs=0.2)
    assert model.query_embed.weight.std().item() == pytest.approx(1, abs=0.1)


def test_two_stage_heads_start_without_a_size_bias(make_model):
    model = make_model(two_stage=True, with_box_refine=True)
    assert len(model.class_embed) == len(model.bbox_embed) == 4
    assert all(h.layers[-1].bias.abs().max() == 0 for h in model.bbox_embed)
    assert model.query_embed is None and not hasattr(model.transformer, "reference_points")


def test_shared_heads_are_one_module_but_the_encoder_has_its_own(make_model):
    model = make_model(two_stage=True)
    assert model.class_embed[0] is model.class_embed[2]
    assert model.class_embed[3] is not model.class_embed[0]
    assert model.bbox_embed[3] is not model.bbox_embed[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 30, "n_heads": 5}, r"d_model \(30\) .* 4 "),
        ({"d_model": 32, "n_heads": 5}, r"d_model \(32\) .*n_heads \(5\)"),
        ({"num_decoder_layers": 0}, "num_decoder_layers .*0"),
    ],
)
def test_impossible_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DeformableTransformer(**options)


class GatedEncoderLayer(DeformableTransformerEncoderLayer):
    """Somebody's own layer: half of each step."""

    def forward(self, src, *args):
        return (src + super().forward(src, *args)) / 2


def test_a_lazy_config_swaps_a_layer(make_input):
    model = load_config("configs/COCO-Detection/deformable_detr_R_50.py").model
    model.transformer.update(d_model=32, n_heads=4, num_decoder_layers=2, dim_feedforward=32)
    model.transformer.encoder = L(DeformableTransformerEncoder)(
        layer=L(GatedEncoderLayer)(d_model="${...d_model}", n_heads="${...n_heads}", dim_feedforward=16),
        num_layers=3,
    )
    detector = instantiate(model).eval()
    layers = detector.transformer.encoder.layers
    assert [type(layer) for layer in layers] == [GatedEncoderLayer] * 3
    # Copies, not one layer three times; and the decoder is still made of the flat values.
    assert len({id(p) for p in layers.parameters()}) == 3 * len(list(layers[0].parameters()))
    assert len(detector.transformer.decoder.layers) == 2
    assert detector.predict_raw([make_input(64, 64)])["pred_logits"].shape == (2, 1, 300, 80)


def test_a_decoder_of_ones_own_tells_the_number_of_heads(make_model, make_input):
    layer = DeformableTransformerDecoderLayer(d_model=32, n_heads=4, dim_feedforward=16)
    decoder = DeformableTransformerDecoder(layer, 2, with_box_refine=True)
    model = make_model(decoder=decoder, with_box_refine=True).eval()
    assert len(model.class_embed) == 2 and len(model.predict_raw([make_input(64, 64)])["pred_boxes"]) == 2
    with pytest.raises(ValueError, match="with_box_refine is False and that of the decoder True"):
        make_model(decoder=decoder)


def test_switches_of_a_decoder_of_ones_own_are_those_of_the_transformer(make_model, make_input):
    layer = DeformableTransformerDecoderLayer(d_model=32, n_heads=4, dim_feedforward=16)
    switches = {"with_box_refine": True, "look_forward_twice": True, "inverse_sigmoid_eps": 1e-3}
    decoder = DeformableTransformerDecoder(
        layer, 2, norm=torch.nn.LayerNorm(32), ref_point_head=AnchorPositions(32), **switches
    )
    switches |= {"decoder_norm": True, "anchor_query_pos": True, "two_stage": True}
    model = make_model(decoder=decoder, **switches)
    assert all(loss.isfinite() for loss in model([make_input(64, 64, [[4, 8, 30, 36]], [2])]).values())
    for name in ("look_forward_twice", "decoder_norm", "anchor_query_pos"):
        with pytest.raises(ValueError, match=f"{name} is False and that of the decoder True: they must be the same"):
            make_model(decoder=decoder, **switches | {name: False})
    with pytest.raises(ValueError, match=r"inverse_sigmoid_eps is 1e-05 and that of the decoder 0\.001"):
        make_model(decoder=decoder, **switches | {"inverse_sigmoid_eps": 1e-5})
    with pytest.raises(ValueError, match="activation_checkpoint is True and that of the decoder False"):
        make_model(decoder=decoder, activation_checkpoint=True, **switches)
    decoder.activation_checkpoint = True
    make_model(decoder=decoder, activation_checkpoint=True, **switches)


def test_an_encoder_of_ones_own_trains_with_layers_and_forward_alone(make_model, make_input):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(32, 32)])

        def forward(self, src, pos, geometry):
            return self.layers[0](src + pos)

    model = make_model(encoder=Own())
    sum(model([make_input(64, 64, [[4, 8, 40, 60]], [2])]).values()).backward()
    assert model.transformer.encoder.layers[0].weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="activation_checkpoint is True and that of the encoder False"):
        make_model(encoder=Own(), activation_checkpoint=True)


def test_parameters_of_the_flat_values_have_the_official_names(make_model):
    names = set(make_model(num_encoder_layers=2).transformer.encoder.state_dict())
    assert {name.partition(".")[0] for name in names} == {"layers"}
    own = {"self_attn", "norm1", "norm2", "linear1", "linear2"}
    assert {tuple(name.split(".")[1:3]) for name in names} == {(i, part) for i in "01" for part in own}


# Extra queries and the mask of the self-attention


def run_transformer(model, *, images=1, **options):
    """Output of a model's transformer on random maps without padding, with the model's queries and heads."""
    generator = torch.Generator().manual_seed(5)
    features = [torch.randn(images, 32, side, side, generator=generator) for side in (8, 4, 2, 1)]
    geometry = model.get_geometry((64, 64), torch.tensor([[64, 64]] * images), features)
    embed = None if model.query_embed is None else model.query_embed.weight
    heads = {"class_embed": model.class_embed, "bbox_embed": model.bbox_embed}
    return model.transformer(features, geometry, query_embed=embed, num_queries=model.num_queries, **heads, **options)


def test_extra_queries_come_first_and_start_at_their_boxes(make_model):
    """Fresh box heads change nothing, so that every box is where its query starts."""
    model = make_model(two_stage=True, with_box_refine=True).eval()
    extra = ExtraQueries(torch.randn(2, 3, 32), torch.rand(2, 3, 4) * 0.5 + 0.2)
    output = run_transformer(model, images=2, extra_queries=extra)
    assert output.hidden_states[0].shape == (2, 3 + 11, 32)
    torch.testing.assert_close(output.boxes[-1][:, :3], extra.boxes)
    torch.testing.assert_close(output.boxes[-1][:, 3:], run_transformer(model, images=2).boxes[-1])


def test_the_position_of_an_extra_query_is_that_of_a_proposal_with_its_box(make_model, randomize):
    model = randomize(make_model(two_stage=True, with_box_refine=True)).eval()
    boxes = torch.rand(1, 4, 4)
    extra = ExtraQueries(torch.randn(1, 1, 32), boxes[:, :1])
    queries = model.transformer._queries_at(boxes[:, 1:], None, extra)
    plain = model.transformer._queries_at(boxes, None, None)
    assert torch.equal(queries.reference_points, boxes) and torch.equal(queries.position, plain.position)
    assert torch.equal(queries.content, torch.cat((extra.content, plain.content[:, 1:]), dim=1))


def test_queries_behind_the_mask_change_nothing(make_model, randomize):
    model = randomize(make_model(two_stage=True, with_box_refine=True)).eval()
    mask = torch.zeros(13, 13, dtype=torch.bool)
    mask[2:, :2] = True
    plain = run_transformer(model).hidden_states
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        content, boxes = (torch.rand(1, 2, width, generator=generator) for width in (32, 4))
        extra = ExtraQueries(content * 20, boxes)
        masked = run_transformer(model, extra_queries=extra, attn_mask=mask).hidden_states
        seen = run_transformer(model, extra_queries=extra).hidden_states
        torch.testing.assert_close(masked[-1][:, 2:], plain[-1], rtol=1e-5, atol=1e-5)
        assert (seen[-1][:, 2:] - plain[-1]).abs().max() > 2e-3


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_of_ones_own_are_given_a_mask_only_where_there_is_one(make_model, checkpointed):
    class OldLayer(DeformableTransformerDecoderLayer):
        def forward(self, tgt, query_pos, reference_points, memory, spatial_shapes, padding_mask):
            return super().forward(tgt, query_pos, reference_points, memory, spatial_shapes, padding_mask)

    layer = OldLayer(d_model=32, n_heads=4, dim_feedforward=16)
    decoder = DeformableTransformerDecoder(layer, 2, with_box_refine=True, activation_checkpoint=checkpointed)
    model = make_model(decoder=decoder, with_box_refine=True, two_stage=True)
    run_transformer(model)
    with pytest.raises(TypeError, match="positional argument"):
        run_transformer(model, attn_mask=torch.zeros(11, 11, dtype=torch.bool))


def test_extra_queries_need_boxes_as_reference_points(make_model):
    extra = ExtraQueries(torch.zeros(1, 1, 32), torch.ones(1, 1, 4) / 2)
    with pytest.raises(ValueError, match="extra_queries .* needs two_stage; it is False"):
        run_transformer(make_model(with_box_refine=True), extra_queries=extra)
