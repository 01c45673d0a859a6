"""What may change time and memory of the transformer, but not its results."""

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model

from deformable_detr import load_config
from deformable_detr.modeling import transformer as deformable_transformer
from deformable_detr.modeling.frozen_bn import FrozenBNConv2d, fold_frozen_batch_norm

TWO_STAGE = {"with_box_refine": True, "two_stage": True}


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


@pytest.mark.parametrize("options", [{}, TWO_STAGE], ids=["base", "two_stage"])
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
    monkeypatch.setattr(deformable_transformer, "_SLICE", 7)
    sliced = model.predict_raw(images)
    monkeypatch.setattr(deformable_transformer, "_SLICE", 10**9)
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
    assert fold_frozen_batch_norm(conv) is conv and type(conv) is FrozenBNConv2d
    actual = conv(image)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert list(conv.state_dict()) == names
    if trainable:
        gradients = [torch.autograd.grad(output.square().sum(), conv.weight)[0] for output in (expected, actual)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
