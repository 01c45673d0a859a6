"""DETR attends to every cell of its map: attention maps in place of sampling points."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.detect import prepare_image, read_image
from deformable_detr.explain import AttentionMap, Recording, Truth, draw_explanation, explain, record, write_page
from deformable_detr.explain.explanation import _missed
from deformable_detr.explain.page import page_data
from deformable_detr.explain.selection import rank_detections
from deformable_detr.modeling import SoftmaxClassification

from .test_page import browse, needs_browser, state  # noqa: F401
from .test_recorder import noise


@pytest.fixture
def loaded(load_tiny):
    """A tiny DETR whose attention and scores differ from query to query."""
    loaded = load_tiny("detr_R_50")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.model.transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        loaded.model.class_embed[0].weight.normal_(generator=generator)
    return loaded


@pytest.fixture
def dense(loaded, image_file):
    """An explanation of three detections; the image has 3 x 2 cells."""
    return explain(loaded, image_file, detections=3, score=0.0)


def test_recording_changes_no_prediction_and_leaves_no_hook(loaded):
    model, inputs = loaded.model, [noise(64, 96), noise(96, 64)]
    before = model.predict_raw(inputs)
    for index, recording in enumerate(record(model, inputs)):
        assert torch.equal(recording.pred_logits, before["pred_logits"][:, index])
        assert torch.equal(recording.pred_boxes, before["pred_boxes"][:, index])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_maps_cover_the_unpadded_cells_and_sum_to_one(loaded):
    recordings = record(loaded.model, [noise(64, 96), noise(96, 64)])
    assert [recording.decoder[1].weights.shape for recording in recordings] == [(20, 4, 2, 3), (20, 4, 3, 2)]
    # The padded map has 3 x 3 cells, all of which are queries of the encoder; its heads are averaged.
    assert [recording.encoder[0].weights.shape for recording in recordings] == [(9, 1, 2, 3), (9, 1, 3, 2)]
    for recording in recordings:
        for layer in (*recording.encoder, *recording.decoder):
            sums = layer.weights.sum((-1, -2))
            torch.testing.assert_close(sums, torch.ones_like(sums))


def test_maps_reproduce_what_a_layer_attends_to(loaded):
    layer, seen = loaded.model.transformer.decoder.layers[1], []
    hook = layer.multihead_attn.register_forward_hook(lambda module, args, output: seen.append((args[2], output[0])))
    weights = record(loaded.model, [noise(64, 96)])[0].decoder[1].weights
    hook.remove()
    (memory, attended), attention = seen[0], layer.multihead_attn
    with torch.no_grad():
        values = torch.nn.functional.linear(memory, attention.in_proj_weight[64:], attention.in_proj_bias[64:])
        values = values[0].unflatten(-1, (4, 8)).transpose(0, 1)
        heads = weights.flatten(2).transpose(0, 1) @ values
        torch.testing.assert_close(attention.out_proj(heads.transpose(0, 1).flatten(1)), attended[0])


def test_detections_are_those_of_the_model(loaded, image_file):
    inputs = [prepare_image(loaded, read_image(image_file))]
    with torch.no_grad():
        expected = loaded.model(inputs)[0]["instances"]
    ranked = rank_detections(record(loaded.model, inputs)[0], loaded.model.test_topk_per_image)
    assert [detection.label for detection in ranked] == expected.pred_classes.tolist()
    assert [detection.score for detection in ranked] == expected.scores.tolist()
    assert len({detection.query for detection in ranked}) == len(ranked) == 20


def test_a_matched_query_that_is_no_detection_has_its_softmax_score(dense):
    query = dense.detections[-1].query
    (missed,) = _missed(dense.recording, dense.detections[:1], [Truth(2, (0.0, 0.0, 9.0, 9.0), query=query)])
    assert missed.score == dense.recording.pred_logits[-1, query].softmax(-1)[2].item()


def test_a_picture_shows_the_map(dense, tmp_path):
    picture = draw_explanation(dense, tmp_path / "x.png", layer=1)
    weights = dense.recording.decoder[0].weights.clone()
    weights[dense.detections[0].query] = 1 / 6
    flat = replace(dense.recording, decoder=[AttentionMap(weights), dense.recording.decoder[1]])
    other = draw_explanation(replace(dense, recording=flat), tmp_path / "y.png", layer=1)
    first, second = (np.asarray(Image.open(path).convert("RGB")) for path in (picture, other))
    assert first.shape == second.shape and (first != second).any(-1).mean() > 0.02


def test_the_page_holds_the_maps(dense, tmp_path):
    path = write_page(dense, tmp_path / "x.html")
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    data = json.loads(text)
    part = data["decoder"]
    shares = np.frombuffer(base64.b64decode(part["samples"]), np.uint8).reshape(part["shape"])
    weights = shares / 255 * np.array(part["highest"])[..., None, None, None]
    for number, detection in enumerate(data["detections"]):
        assert detection["references"] == [None, None]
        for layer, recorded in enumerate(dense.recording.decoder):
            np.testing.assert_allclose(weights[number, 0, layer], recorded.weights[detection["query"]], atol=3e-3)
    assert data["is_dense"] and data["encoder"]["shape"][2:] == [1, 1, 2, 3]


def test_a_page_of_a_dilated_model_stays_below_3_mb(dense, tmp_path):
    """Six layers, eight heads, 50 x 84 cells and 100 queries."""
    decoder = AttentionMap(torch.rand(1, 8, 50, 84).expand(100, -1, -1, -1))
    recording = Recording(
        height=800,
        width=1333,
        encoder=[AttentionMap(torch.rand(1, 1, 50, 84).expand(4200, -1, -1, -1))] * 6,
        decoder=[decoder] * 6,
        valid_sizes=torch.tensor([[84.0, 50.0]]),
        spatial_shapes=[(50, 84)],
        pred_logits=torch.rand(6, 100, 81),
        pred_boxes=torch.rand(6, 100, 4),
        classification=SoftmaxClassification(),
    )
    noise = np.random.default_rng(0).integers(0, 256, (800, 1333, 3), dtype=np.uint8)
    detections = [dense.detections[0]._replace(query=query) for query in range(100)]
    full = replace(dense, recording=recording, detections=detections, image=noise, chosen=[99])
    assert write_page(full, tmp_path / "x.html").stat().st_size < 3_000_000
    data = page_data(full)
    assert len(data["detections"]) >= 3 and len(data["encoder"]["pixels"]) >= 20


@needs_browser
def test_the_page_draws_the_chosen_heads_and_walks_the_encoder(dense, tmp_path, browse):  # noqa: F811
    script = """
      const seen = [], note = () => seen.push(byId("map").getAttribute("href"));
      note();
      byId("heads").querySelectorAll("button")[1].click(); note();
      byId("heads").querySelector("input").click(); note();
      document.body.dataset.heads = byId("state").textContent;
      byId("view-encoder").click(); note();
      document.body.dataset.maps = new Set(seen).size;
      document.body.dataset.hidden = ["heads-card", "levels-card", "sources-card"].every(id => byId(id).hidden);
    """
    document = browse(write_page(dense, tmp_path / "x.html"), "detection=2&layer=1", script)
    assert 'data-maps="4"' in document and 'data-hidden="true"' in document
    assert "decoder layer 1, attention to 3×2 cells, mean of 1 head." in document
    assert "encoder layer 1, 1 cell (crosses), attention to 3×2 cells, mean of all heads." in state(document)
    assert "<title>Where DETR looks: noise.png" in document
