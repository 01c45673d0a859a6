"""DETR: what it has in place of Deformable DETR's parts, and that all around the model works with it."""

import pytest
import torch
from detectron2.modeling import build_model

from deformable_detr import load_config, prepare_for_inference
from deformable_detr.modeling import DETR, HungarianMatcher, SetCriterion
from deformable_detr.modeling import detector as room
from deformable_detr.modeling.padding import padding_masks
from deformable_detr.training.per_layer_ap import EveryLayer

# Total and trainable parameters of the official models, with 91 classes and "no object".
OFFICIAL_PARAMETERS = {"detr_R_50": (41_524_768, 41_302_368), "detr_R_101_DC5": (60_464_672, 60_242_272)}


@pytest.fixture
def batch(make_input):
    return [make_input(64, 96, [[5, 5, 50, 60]], [1]), make_input(96, 64, [[9, 3, 30, 40]], [4], seed=1)]


@pytest.mark.parametrize("name", OFFICIAL_PARAMETERS)
def test_published_models_have_the_official_number_of_parameters(name):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "91"]
    model = build_model(load_config(f"configs/COCO-Detection/{name}.yaml", opts))
    total = sum(p.numel() for p in model.parameters())
    assert (total, sum(p.numel() for p in model.parameters() if p.requires_grad)) == OFFICIAL_PARAMETERS[name]


def test_dense_attention_equals_the_formula(make_detr):
    """Cross-attention of one head: content and position ask, cells with positions answer, cells without give."""
    layer = make_detr(d_model=8, n_heads=1).transformer.decoder.layers[0].eval()
    torch.manual_seed(1)
    tgt, query_pos, memory, pos = (torch.randn(1, n, 8) for n in (3, 3, 5, 5))
    mask = torch.tensor([[False, False, True, False, True]])
    asked = []
    layer.multihead_attn.register_forward_hook(lambda _, args, out: asked.append((args[0], out[0])))
    layer(tgt, query_pos, memory + pos, memory, mask)
    (query, attended), attention = asked[0], layer.multihead_attn
    (wq, wk, wv), (bq, bk, bv) = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    logits = (query @ wq.T + bq) @ ((memory + pos) @ wk.T + bk).transpose(1, 2) / 8**0.5
    weights = logits.masked_fill(mask[:, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(attended, attention.out_proj(weights @ (memory @ wv.T + bv)))


def test_every_layer_is_read_through_the_decoders_norm_and_predicts_boxes_from_nothing(make_detr, batch, randomize):
    model = randomize(make_detr()).eval()
    raw = {}
    for index, layer in enumerate(model.transformer.decoder.layers):
        layer.register_forward_hook(lambda _, args, output, index=index: raw.update({index: output}))
    outputs = model.predict_raw(batch)
    for index, hidden in raw.items():
        hidden = model.transformer.decoder.norm(hidden)
        torch.testing.assert_close(outputs["pred_logits"][index], model.class_embed[0](hidden))
        torch.testing.assert_close(outputs["pred_boxes"][index], model.bbox_embed[0](hidden).sigmoid())


def test_raw_predictions_have_a_logit_more_than_classes(make_detr, batch):
    model = make_detr().train()
    outputs = model.predict_raw(batch)
    assert model.training
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "pred_logits": (3, 2, 11, 6),
        "pred_boxes": (3, 2, 11, 4),
    }


def test_contents_start_from_zero_and_heads_are_shared(make_detr, batch):
    model = make_detr()
    started = []
    layer = model.transformer.decoder.layers[0]
    layer.register_forward_pre_hook(lambda _, args: started.append(args[0]))
    model(batch)
    assert started[0].shape == (2, 11, 32) and not started[0].any()
    assert len(set(model.class_embed)) == len(set(model.bbox_embed)) == 1
    assert model.query_embed.weight.shape == (11, 32)


def test_padded_cells_change_nothing(make_detr, batch, randomize, monkeypatch):
    model = randomize(make_detr()).eval()
    clean = model.predict_raw(batch)
    forward = model.backbone.forward
    (mask,) = padding_masks((96, 96), torch.tensor([[64, 96], [96, 64]]), [(3, 3)])

    def with_garbage_at_padding(x):
        return {name: feature.masked_fill(mask[:, None], 1e3) for name, feature in forward(x).items()}

    monkeypatch.setattr(model.backbone, "forward", with_garbage_at_padding)
    polluted = model.predict_raw(batch)
    assert all(torch.equal(clean[name], polluted[name]) for name in clean)


def test_each_query_is_detected_once(make_detr, batch, randomize):
    model = randomize(make_detr()).eval()
    raw = model.predict_raw(batch)
    scores, labels = raw["pred_logits"][-1].softmax(-1)[..., :-1].max(-1)
    with torch.no_grad():
        for image, found in enumerate(model(batch)):
            instances = found["instances"]
            assert len(instances) == 11
            torch.testing.assert_close(instances.scores, scores[image].sort(descending=True).values)
            assert instances.pred_classes.tolist() == labels[image][scores[image].argsort(descending=True)].tolist()


@pytest.mark.parametrize("size", [(1, 1), (31, 17), (8, 200)])
def test_tiny_images_train_and_detect(make_detr, make_input, size):
    model = make_detr()
    height, width = size
    losses = model([make_input(height, width, [[0, 0, width, height]], [0])])
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert len(model.eval()([make_input(height, width)])[0]["instances"]) == 11


def test_losses_are_those_of_every_layer(make_detr, batch):
    names = {f"loss_{term}{suffix}" for term in ("ce", "bbox", "giou") for suffix in ("", "_0", "_1")}
    assert set(make_detr()(batch)) == names
    assert set(make_detr(aux_loss=False)(batch)) == {"loss_ce", "loss_bbox", "loss_giou"}


def test_layers_computed_a_second_time_have_the_same_gradients(make_detr, batch):
    gradients = []
    for again in (False, True):
        model = make_detr(activation_checkpoint=again)
        sum(model(batch).values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_weights_made_ready_for_a_step_give_the_same_losses(make_detr, batch, dtype, monkeypatch):
    model, losses = make_detr(), []
    for _ in range(2):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            losses.append(model(batch))
        monkeypatch.setattr(room, "ready_weights", lambda model: torch.enable_grad())
    torch.testing.assert_close(*losses, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_prepared_for_inference_detects_the_same(make_detr, batch, randomize, dtype):
    model = randomize(make_detr()).eval()
    prepared = prepare_for_inference(model, dtype=dtype)
    tolerance = {} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.0}
    with torch.no_grad():
        for images in (batch, batch[:1]):
            for ours, theirs in zip(prepared(images), model(images), strict=True):
                torch.testing.assert_close(ours["instances"].scores, theirs["instances"].scores, **tolerance)


def test_layers_are_told_apart_for_their_ap(make_detr, batch, randomize):
    model = randomize(make_detr()).eval()
    every_layer = EveryLayer(model)
    with torch.no_grad():
        layers, expected = every_layer(batch), model(batch)
    assert len(layers) == every_layer.num_layers == 3
    for first, last, x in zip(layers[0], layers[-1], expected, strict=True):
        assert torch.equal(last["instances"].scores, x["instances"].scores)
        assert not torch.equal(first["instances"].scores, x["instances"].scores)


def test_a_compiled_transformer_is_one_graph(make_detr, batch):
    model = make_detr().eval()
    expected = model.predict_raw(batch)
    model.transformer.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model.predict_raw(batch), expected)


def test_parts_that_do_not_fit_are_named(make_detr, make_model):
    detr, other = make_detr(), make_model()
    parts = {"position_embedding": detr.position_embedding, "transformer": detr.transformer, "num_classes": 5}
    with pytest.raises(ValueError, match=r"1 levels of 32 channels.*\[32, 32, 32, 32\]"):
        DETR(backbone=other.backbone, criterion=detr.criterion, **parts)
    with pytest.raises(ValueError, match="DETR needs a criterion with a SoftmaxClassification, got Focal"):
        DETR(backbone=detr.backbone, criterion=SetCriterion(HungarianMatcher()), **parts)
    with pytest.raises(ValueError, match="num_decoder_layers must be at least 1, got 0"):
        make_detr(num_decoder_layers=0)
    with pytest.raises(ValueError, match=r"d_model \(32\) must be divisible by 4 and by n_heads \(5\)"):
        make_detr(n_heads=5)
