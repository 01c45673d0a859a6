"""The configurations of H-DETR and DINO beside their forward pass written out plainly, in float64.

What is not written out are the backbone, the layers of encoder and decoder, and the heads: those of Deformable DETR,
which is compared with transformers. Facts are those of the authors' code.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model

from deformable_detr import load_config

CONFIGS = Path(__file__).parents[2] / "configs" / "COCO-Detection"
SMALL = {"HIDDEN_DIM": 32, "NHEADS": 4, "ENC_LAYERS": 2, "DEC_LAYERS": 3, "DIM_FEEDFORWARD": 48}
SMALL |= {"NUM_CLASSES": 7, "NUM_QUERIES": 40}


def sine(values, width, temperature):
    """(...) -> (..., width): sine and cosine in turns."""
    angles = values[..., None] / temperature ** (2 * (torch.arange(width) // 2) / width)
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2)


def inverse_sigmoid(x, eps):
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def centres(height, width):
    """(1, H * W, 2): x and y in cells, row by row."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack((x, y), dim=-1).double().view(1, -1, 2)


def flatten(features, mask, level_embed, *, temperature, offset):
    """All levels as one sequence: features, positions, masks, valid ratios (w, h), proposals in [0, 1]."""
    parts = []
    for level, feature in enumerate(features):
        height, width = feature.shape[-2:]
        padded = F.interpolate(mask[:, None].float(), size=(height, width))[:, 0].bool()
        y, x = (~padded).double().cumsum(1), (~padded).double().cumsum(2)
        valid = torch.stack((x[:, 0, -1], y[:, -1, 0]), dim=-1)
        y = (y + offset) / (y[:, -1:] + 1e-6) * 2 * math.pi
        x = (x + offset) / (x[:, :, -1:] + 1e-6) * 2 * math.pi
        half = len(level_embed[0]) // 2
        position = torch.cat([sine(axis, half, temperature) for axis in (y, x)], dim=-1).flatten(1, 2)
        centre = centres(height, width) / valid[:, None]
        box = torch.cat((centre, torch.full_like(centre, 0.05 * 2**level)), dim=-1)
        ratio = valid / torch.tensor([width, height])
        parts.append((feature.flatten(2).mT, position + level_embed[level], padded.flatten(1), box, ratio))
    sequence = [torch.cat(part, dim=1) for part in list(zip(*parts, strict=True))[:4]]
    return *sequence, torch.stack([part[4] for part in parts], dim=1)


def predict(model, images, *, is_dino):
    """Logits and boxes of every decoder layer."""
    transformer, width, queries = model.transformer, model.transformer.d_model, model.num_queries
    temperature, offset, eps = (20.0, 0.0, 1e-3) if is_dino else (10000.0, -0.5, 1e-5)
    batch = model.preprocess_image(images)
    mask = torch.ones_like(batch.tensor[:, 0], dtype=torch.bool)
    for padded, (height, width_) in zip(mask, batch.image_sizes, strict=True):
        padded[:height, :width_] = False
    features = list(model.backbone(batch.tensor.double()).values())
    shapes = [tuple(feature.shape[-2:]) for feature in features]
    memory, pos, mask, proposals, ratios = flatten(
        features, mask, transformer.level_embed, temperature=temperature, offset=offset
    )

    centre = torch.cat([centres(h, w) / torch.tensor([w, h]) for h, w in shapes], dim=1)
    level = torch.cat([torch.full((h * w,), i) for i, (h, w) in enumerate(shapes)])
    points = (centre / ratios[:, level])[:, :, None] * ratios[:, None]
    for layer in transformer.encoder.layers:
        memory = layer(memory, pos, points, shapes, mask)

    usable = ((proposals > 0.01) & (proposals < 0.99)).all(-1) & ~mask
    anchors = torch.log(proposals / (1 - proposals)).masked_fill(~usable[..., None], math.inf)
    scored = transformer.enc_output_norm(transformer.enc_output(memory * usable[..., None]))
    scores = model.class_embed[-1](scored)
    best = (scores.max(-1).values if is_dino else scores[..., 0]).topk(queries, dim=1).indices
    boxes = (model.bbox_embed[-1](scored) + anchors).sigmoid()
    reference = boxes.gather(1, best[..., None].expand(-1, -1, 4))

    # Contents are learned, by rank.
    hidden = model.query_embed.weight[:queries].expand(len(memory), -1, -1)
    logits, predicted = [], []
    if not is_dino:
        encoded = torch.cat([sine(2 * math.pi * part, width // 2, 10000.0) for part in reference.unbind(-1)], dim=-1)
        query_pos = transformer.pos_trans_norm(transformer.pos_trans(encoded))[..., :width]
    for i, layer in enumerate(transformer.decoder.layers):
        on_map = reference[:, :, None] * ratios.repeat(1, 1, 2)[:, None]
        if is_dino:
            x, y, w, h = on_map[:, :, 0].unbind(-1)
            encoded = torch.cat([sine(2 * math.pi * part, width // 2, 10000.0) for part in (y, x, w, h)], dim=-1)
            first, second = transformer.decoder.ref_point_head.layers
            query_pos = second(first(encoded).relu())
        hidden = layer(hidden, query_pos, on_map, memory, shapes, mask)
        seen = transformer.decoder.norm(hidden) if is_dino else hidden
        origin = inverse_sigmoid(reference, eps)
        logits.append(model.class_embed[i](seen))
        predicted.append((model.bbox_embed[i](seen) + origin).sigmoid())
        # Not the box that is predicted: heads see the norm of the state, references do not.
        reference = (model.bbox_embed[i](hidden) + origin).sigmoid()
    return torch.stack(logits), torch.stack(predicted)


def randomize(model):
    """Weights that keep the scale of what they are given, so that predictions differ from query to query."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 and "embed" not in name else 0.3
        is_norm = "norm" in name and name.endswith("weight")
        parameter.copy_(torch.randn_like(parameter) * scale + is_norm)
    return model


@pytest.mark.parametrize("stem", ("h_deformable_detr_R_50", "dino_R_50_4scale"))
@torch.no_grad()
def test_predictions_are_those_of_the_forward_pass_written_out(stem):
    opts = "MODEL.DEVICE cpu MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64".split()
    opts += [str(part) for key, value in SMALL.items() for part in (f"MODEL.DEFORMABLE_DETR.{key}", value)]
    model = randomize(build_model(load_config(str(CONFIGS / f"{stem}.yaml"), opts))).eval().double()
    images = [{"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8)} for size in ((96, 128), (128, 80))]
    found = model.predict_raw(images)
    logits, boxes = predict(model, images, is_dino=stem.startswith("dino"))
    torch.testing.assert_close(found["pred_logits"], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["pred_boxes"], boxes, atol=1e-6, rtol=0)
    # The comparison would say little of predictions that are all alike.
    assert logits.std(dim=2).mean() > 0.1 and boxes.std(dim=2).mean() > 0.01
