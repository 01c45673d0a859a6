"""What may change time and memory of the transformer, but not its results."""

from functools import partial

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import FPN, build_model, build_resnet_backbone
from torch import nn

from deformable_detr import load_config
from deformable_detr.layers import PositionEmbeddingSine, tuned
from deformable_detr.modeling.decoder import DeformableTransformerDecoder, DeformableTransformerDecoderLayer
from deformable_detr.modeling.encoder import DeformableTransformerEncoderLayer
from deformable_detr.modeling.frozen_bn import FrozenBNConv2d, fold_for_good, fold_frozen_batch_norm
from deformable_detr.modeling.geometry import get_geometry

TWO_STAGE = {"with_box_refine": True, "two_stage": True}
DINO = TWO_STAGE | {
    "multiclass_proposals": True,
    "mixed_query_selection": True,
    "anchor_query_pos": True,
    "look_forward_twice": True,
    "decoder_norm": True,
    "shared_heads": True,
}


def train_step(model, images, *, dtype=None):
    """Losses and gradients of one step with the same random numbers."""
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        losses = model.train()(images)
    model.zero_grad()
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, TWO_STAGE], ids=["base", "two_stage"])
def test_checkpointing_changes_neither_losses_nor_gradients(make_model, make_input, randomize, options, dtype):
    images = [make_input(96, 64, [[4, 8, 40, 60]], [2]), make_input(70, 90)]
    results = []
    for checkpointed in (False, True):
        model = randomize(make_model(dropout=0.3, activation_checkpoint=checkpointed, **options))
        results.append(train_step(model, images, dtype=dtype))
    (losses, gradients), (checkpointed_losses, checkpointed_gradients) = results
    assert losses == checkpointed_losses
    assert all(torch.equal(gradients[name], checkpointed_gradients[name]) for name in gradients)


def test_checkpointing_keeps_the_input_of_each_layer_alone(make_model, make_input):
    """Bytes saved for the backward pass, without those of parameters."""
    saved = {}
    for checkpointed in (False, True):
        model = make_model(num_encoder_layers=4, activation_checkpoint=checkpointed)
        saved[checkpointed] = 0

        def pack(tensor, checkpointed=checkpointed):
            saved[checkpointed] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train()([make_input(128, 128, [[4, 8, 40, 60]], [2])])
    assert saved[True] < 0.5 * saved[False]


def test_an_encoder_layer_keeps_so_many_bytes_of_a_cell(bytes_kept):
    C, hidden, points = 32, 64, 2 * 1 * 4  # heads, levels, points of a head
    layer = DeformableTransformerEncoderLayer(d_model=C, dim_feedforward=hidden, n_levels=1, n_heads=2)

    def run(cells):
        src, pos, mask = torch.rand(1, cells, C), torch.rand(1, cells, C), torch.zeros(1, cells, dtype=torch.bool)
        with torch.autocast("cpu", torch.bfloat16):
            return layer(src, pos, torch.rand(1, cells, 1, 2), [(1, cells)], mask)

    # Query, value, what the op reads and returns, input of the network; its hidden numbers after ReLU and dropout.
    in_16_bits = 5 * C + hidden
    in_32_bits = 2 * (C + 2) + (1 + 2) * points  # inputs of both norms, mean and deviation; weights, locations
    masks = 2 * C + 1  # of the other two dropouts; of padding
    expected = 2 * in_16_bits + 4 * in_32_bits + masks
    assert bytes_kept(lambda: run(5000)) - bytes_kept(lambda: run(3000)) == 2000 * expected


def test_a_decoder_keeps_one_copy_of_the_memory_and_a_value_for_each_layer(bytes_kept):
    C, layers = 32, 3
    layer = partial(DeformableTransformerDecoderLayer, d_model=C, dim_feedforward=64, n_levels=1, n_heads=2)
    decoder, query = DeformableTransformerDecoder(layer, layers), torch.zeros(1, 4, C)

    def run(cells):
        sizes = torch.tensor([[[cells, 1.0]]])
        geometry = get_geometry([(1, cells)], sizes, PositionEmbeddingSine(C), two_stage=False)
        memory = torch.rand(1, cells, C, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            states, _ = decoder(
                query, query, torch.rand(1, 4, 2), memory, geometry=geometry, bbox_embed=[nn.Linear(C, 4)] * layers
            )
        return states[-1]

    expected = 2 * C + layers * 2 * C + 1  # in 16 bits; a byte of the mask
    assert bytes_kept(lambda: run(5000)) - bytes_kept(lambda: run(3000)) == 2000 * expected


@pytest.mark.parametrize("world", ["tiny_yaml", "tiny_lazy"])
def test_checkpointing_is_an_option_of_both_kinds_of_config(world):
    path = f"configs/COCO-Detection/deformable_detr_R_50.{'yaml' if world == 'tiny_yaml' else 'py'}"
    cfg = load_config(path)
    if world == "tiny_yaml":
        cfg.merge_from_list(["MODEL.DEFORMABLE_DETR.ACTIVATION_CHECKPOINT", True, "MODEL.DEVICE", "cpu"])
        transformer = build_model(cfg).transformer
    else:
        from detectron2.config import instantiate

        cfg.model.transformer.activation_checkpoint = True
        cfg.model.transformer.num_feature_levels = 4
        transformer = instantiate(cfg.model.transformer)
    assert transformer.encoder.activation_checkpoint and transformer.decoder.activation_checkpoint


@pytest.mark.parametrize("options", [{}, TWO_STAGE, DINO], ids=["base", "two_stage", "dino"])
def test_the_transformer_compiles_to_one_graph_without_breaks(make_model, make_input, randomize, options):
    model = randomize(make_model(num_decoder_layers=2, **options)).eval()
    images = [make_input(136, 100), make_input(110, 130)]
    expected = model.predict_raw(images)
    torch._dynamo.reset()
    model.transformer.compile(fullgraph=True, backend="eager")
    actual = model.predict_raw(images)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_slices_of_the_feed_forward_network_change_nothing(make_model, make_input, randomize, monkeypatch):
    model = randomize(make_model(**TWO_STAGE)).eval()
    images = [make_input(96, 64), make_input(70, 90)]
    monkeypatch.setattr(tuned, "ROWS_AT_ONCE", 7)
    sliced = model.predict_raw(images)
    monkeypatch.setattr(tuned, "ROWS_AT_ONCE", 10**9)
    whole = model.predict_raw(images)
    for name in whole:
        torch.testing.assert_close(sliced[name], whole[name])


def test_detections_do_not_need_the_boxes_of_all_proposals(make_model, make_input, randomize):
    model = randomize(make_model(**TWO_STAGE)).eval()
    images = [make_input(96, 64), make_input(70, 90)]
    detected = model(images)
    outputs = model.predict_raw(images)
    assert outputs["enc_boxes"].shape[1] > outputs["pred_boxes"].shape[2]
    scores = outputs["pred_logits"][-1].sigmoid().flatten(1)
    best = scores.sort(descending=True).values[:, : model.test_topk_per_image]
    for scores, detections in zip(best, detected, strict=True):
        torch.testing.assert_close(detections["instances"].scores, scores)


@pytest.mark.parametrize("trainable", [False, True])
def test_folded_frozen_batch_norm_equals_the_two_layers(trainable):
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(6)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2.0)
    conv = Conv2d(4, 6, 3, padding=1, bias=False, norm=norm)
    conv.requires_grad_(trainable)
    names, image = list(conv.state_dict()), torch.randn(2, 4, 9, 7)
    expected = conv(image)
    folding = fold_frozen_batch_norm(conv)
    assert type(folding) is FrozenBNConv2d and folding.weight is conv.weight
    actual = folding(image)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert list(folding.state_dict()) == names
    if trainable:
        gradients = [torch.autograd.grad(output.square().sum(), conv.weight)[0] for output in (expected, actual)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    folded = fold_for_good(folding)
    assert type(folded) is Conv2d and list(folded.state_dict()) == ["weight", "bias"]
    assert torch.equal(folded(image), actual)


def test_folding_reaches_convolutions_that_a_module_keeps_in_a_list_too():
    """Detectron2's FPN calls its convolutions from lists beside their names."""
    torch.manual_seed(0)
    fpn = FPN(build_resnet_backbone(resnet_cfg(), ShapeSpec(channels=3)), ["res4", "res5"], 8, norm="FrozenBN").eval()
    image = torch.randn(1, 3, 64, 64)
    expected = fpn(image)
    fpn = fold_frozen_batch_norm(fpn)
    assert {type(conv) for conv in fpn.lateral_convs} == {FrozenBNConv2d}
    torch.testing.assert_close(fpn(image), expected, rtol=1e-4, atol=1e-4)
    fpn = fold_for_good(fpn).double()
    torch.testing.assert_close(fpn(image.double())["p5"].float(), expected["p5"], rtol=1e-4, atol=1e-4)


def resnet_cfg():
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    return cfg
