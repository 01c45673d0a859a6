import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from deformable_detr.layers import MSDeformAttn
from deformable_detr.modeling.decoder import DeformableTransformerDecoderLayer
from deformable_detr.study.configs import build_config
from deformable_detr.study.parts import LinearAttention, SameScaleAttention, bottleneck_resnet, decoder_layer
from deformable_detr.study.table import Cell, read_table

TABLE = read_table()


def build(variant):
    torch.manual_seed(0)
    return instantiate(build_config(TABLE, "tiny", Cell(variant, 1)).model).eval()


@pytest.mark.parametrize("variant", TABLE.variants)
def test_every_variant_builds_a_model_that_detects(variant):
    model = build(variant)
    image = {"image": torch.zeros(3, 64, 96, dtype=torch.uint8), "height": 64, "width": 96}
    with torch.no_grad():
        (output,) = model([image])
    assert len(output["instances"]) == TABLE.common["model.num_queries"]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("size", TABLE.sizes)
def test_every_size_trains_all_variants_on_its_own_images_as_they_are(size):
    entry = TABLE.sizes[size]
    cfg = build_config(TABLE, size, Cell("multi_scale", 3))
    augmentations = cfg.dataloader.train.mapper.augmentations
    assert [*augmentations.min_size] == [entry.scene.short_side] and augmentations.crop_size is None
    assert augmentations.max_size == max(entry.scene.long_sides)
    assert (cfg.train.max_iter, cfg.train.seed, cfg.train.device) == (entry.iterations, 3, entry.device)
    assert {side % 32 for side in (entry.scene.short_side, *entry.scene.long_sides)} == {0}
    # Otherwise the seconds of an evaluation would be those of an earlier line.
    assert entry.eval_period % cfg.train.log_period == entry.iterations % entry.eval_period == 0


def test_a_size_and_a_variant_decide_the_learning_rate():
    lr = TABLE.sizes["tiny"].lr
    cfg = build_config(TABLE, "tiny", Cell("multi_scale", 1))
    detr = build_config(TABLE, "tiny", Cell("detr", 1))
    assert (cfg.optimizer.lr, detr.optimizer.lr) == (lr, lr / 2)


def test_a_dilated_variant_has_a_map_of_stride_16_and_the_same_parameters():
    plain, dilated = build("detr"), build("detr_dc5")
    strides = [next(iter(m.backbone.bottom_up.output_shape().values())).stride for m in (plain, dilated)]
    assert strides == [32, 16]
    assert [p.shape for p in plain.parameters()] == [p.shape for p in dilated.parameters()]


def test_no_variant_but_those_that_say_so_has_another_attention():
    transformer = build("multi_scale").transformer
    assert type(transformer.decoder.layers[0].self_attn) is type(DeformableTransformerDecoderLayer().self_attn)
    assert type(transformer.encoder.layers[0].self_attn) is MSDeformAttn


def test_without_self_attention_a_query_does_not_depend_on_another_one():
    layer = decoder_layer(self_attention="none", d_model=8, n_heads=2, n_levels=1, dropout=0.0).eval()
    tgt, memory, points = torch.rand(1, 3, 8), torch.rand(1, 4, 8), torch.rand(1, 3, 1, 2)
    other = torch.cat([tgt[:, :1], torch.rand(1, 2, 8)], dim=1)
    outputs = [layer(t, torch.zeros_like(t), points, memory, [(2, 2)], None) for t in (tgt, other)]
    torch.testing.assert_close(outputs[0][:, 0], outputs[1][:, 0])
    assert not any(name.startswith("self_attn") for name, _ in layer.named_parameters())
    with_attention = DeformableTransformerDecoderLayer(d_model=8, n_heads=2, n_levels=1, dropout=0.0).eval()
    outputs = [with_attention(t, torch.zeros_like(t), points, memory, [(2, 2)], None) for t in (tgt, other)]
    assert (outputs[0][:, 0] - outputs[1][:, 0]).abs().max() > 1e-4


def test_linear_attention_equals_its_sum_written_out():
    attention = LinearAttention(4, 2)
    x, y, z = torch.rand(3, 2, 5, 4).unbind()
    (output, weights) = attention(x, y, z)
    query, key, value = attention.query_proj(x), attention.key_proj(y), attention.value_proj(z)
    heads = []
    for head in (slice(0, 2), slice(2, 4)):
        matrix = torch.einsum("nkc,nkd->ncd", key[..., head].softmax(dim=1), value[..., head])
        heads.append(torch.einsum("nqc,ncd->nqd", query[..., head].softmax(dim=-1), matrix))
    assert weights is None
    torch.testing.assert_close(output, attention.output_proj(torch.cat(heads, dim=-1)))


def test_linear_attention_of_equal_values_is_these_values():
    """Both kinds of weights sum to one."""
    attention = LinearAttention(4, 2)
    for projection in (attention.value_proj, attention.output_proj):
        nn.init.eye_(projection.weight)
        nn.init.zeros_(projection.bias)
    value = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 6, 4)
    torch.testing.assert_close(attention(torch.rand(1, 6, 4), torch.rand(1, 6, 4), value)[0], value)


def test_linear_attention_refuses_a_mask():
    with pytest.raises(ValueError, match="attn_mask"):
        LinearAttention(4, 2)(*torch.rand(3, 1, 2, 4), attn_mask=torch.zeros(2, 2, dtype=torch.bool))


def test_with_their_own_scale_alone_levels_do_not_see_each_other():
    shapes, mask = [(2, 3), (1, 2)], torch.zeros(1, 8, dtype=torch.bool)
    attention = SameScaleAttention(8, 2, 4)
    nn.init.normal_(attention.attention.sampling_offsets.weight)
    query, value, points = torch.rand(1, 8, 8), torch.rand(1, 8, 8), torch.rand(1, 8, 2, 2)
    changed = torch.cat([value[:, :6], torch.rand(1, 2, 8)], dim=1)
    before, after = (attention(query, points, v, shapes, mask) for v in (value, changed))
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=0)
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 1e-4
    alone = attention.attention(query[:, 6:], points[:, 6:, 1:], value[:, 6:], shapes[1:], mask[:, 6:])
    torch.testing.assert_close(before[:, 6:], alone)


def test_an_unknown_self_attention_is_refused():
    with pytest.raises(ValueError, match='"none" or "linear", got \'dense\''):
        decoder_layer(self_attention="dense", d_model=8, n_heads=2)


def test_a_resnet_of_width_64_and_3_4_6_3_blocks_is_resnet_50():
    resnet = bottleneck_resnet(width=64, blocks=(3, 4, 6, 3), out_features=["res5"], norm="FrozenBN")
    # torchvision's resnet50 without its classifier: 25,557,032 - 2,049,000 parameters, of which norms have 53,120.
    assert sum(p.numel() for p in resnet.parameters()) == 25_557_032 - 2_049_000 - 53_120
