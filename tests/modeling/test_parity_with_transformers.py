"""The published variants and DETR against transformers' implementation: same random weights, same predictions."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from deformable_detr import load_config
from deformable_detr.checkpoint import convert, read_checkpoint

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

CONFIGS = Path(__file__).parents[2] / "configs" / "COCO-Detection"
VARIANTS = {
    "deformable_detr_R_50_single_scale": {"num_feature_levels": 1},
    "deformable_detr_R_50_single_scale_dc5": {"num_feature_levels": 1, "dilation": True},
    "deformable_detr_R_50": {},
    "deformable_detr_R_50_box_refine": {"with_box_refine": True},
    "deformable_detr_R_50_two_stage": {"with_box_refine": True, "two_stage": True},
    "detr_R_50": {},
    "detr_R_50_DC5": {"dilation": True},
}
# Each image is the larger one in one direction, so that both are padded; no side is a multiple of a stride.
SIZES = ((139, 187), (117, 209))
LOGITS_TOLERANCE = 1e-4
BOXES_TOLERANCE = 1e-5


def build_oracle(name: str, *, seed: int = 0) -> nn.Module:
    """Build transformers' model of a variant with 91 outputs, in eval mode; nothing is downloaded."""
    options = {"num_labels": 91, "use_timm_backbone": True, "backbone": "resnet50", "use_pretrained_backbone": False}
    options |= VARIANTS[name]
    if name.startswith("detr"):
        model = transformers.DetrForObjectDetection(transformers.DetrConfig(**options))
    else:
        config = transformers.DeformableDetrConfig(disable_custom_kernels=True, **options)
        model = transformers.DeformableDetrForObjectDetection(config)
    randomise(model, seed=seed)
    return model.eval()


def build_ours(name: str, *, num_classes: int = 91) -> nn.Module:
    opts = ["MODEL.DEVICE", "cpu", "MODEL.DEFORMABLE_DETR.NUM_CLASSES", str(num_classes)]
    return build_model(load_config(str(CONFIGS / f"{name}.yaml"), opts)).eval()


@torch.no_grad()
def randomise(model: nn.Module, *, seed: int) -> None:
    """Give every floating-point parameter and buffer a random value that keeps activations near unit size."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "level_embed" in key or "query_position_embeddings" in key:
            tensor.copy_(noise)
        elif tensor.dim() > 1:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
        elif key.endswith(("running_var", "weight")):
            tensor.copy_(0.5 + noise.sigmoid())
        else:
            tensor.copy_(noise * (2.0 if "sampling_offsets" in key else 0.2))


def random_images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in SIZES]


def pad(images: list[Tensor]) -> dict[str, Tensor]:
    """Normalise, and pad at the bottom right."""
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    height, width = (max(sizes) for sizes in zip(*SIZES, strict=True))
    pixel_values = torch.zeros(len(images), 3, height, width)
    pixel_mask = torch.zeros(len(images), height, width, dtype=torch.long)
    for i, image in enumerate(images):
        rows, columns = image.shape[1:]
        pixel_values[i, :, :rows, :columns] = (image / 255 - mean) / std
        pixel_mask[i, :rows, :columns] = 1
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}


@torch.no_grad()
def predict_with_oracle(oracle: nn.Module, images: list[Tensor]) -> dict[str, Tensor]:
    """Return the entries of our ``predict_raw`` (of the last layer)."""
    outputs = oracle(**pad(images))
    predictions = {"pred_logits": outputs.logits, "pred_boxes": outputs.pred_boxes}
    if getattr(oracle.config, "two_stage", False):
        predictions["enc_logits"] = outputs.enc_outputs_class
        predictions["enc_boxes"] = outputs.enc_outputs_coord_logits.sigmoid()
    return predictions


def predict_with_ours(model: nn.Module, images: list[Tensor]) -> dict[str, Tensor]:
    outputs = model.predict_raw([{"image": image} for image in images])
    return {key: value[-1] if key.startswith("pred") else value for key, value in outputs.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_predictions_equal_those_of_transformers(name, record_property):
    oracle, model, images = build_oracle(name), build_ours(name), random_images()
    state_dict, report = convert(oracle.state_dict(), model=model)
    model.load_state_dict(state_dict, strict=True)
    assert report.source == ("transformers DETR" if name.startswith("detr") else "transformers")
    assert not report.missing

    expected, actual = predict_with_oracle(oracle, images), predict_with_ours(model, images)

    assert actual.keys() == expected.keys()
    for key in expected:
        difference = (actual[key] - expected[key]).abs().max().item()
        record_property(key, difference)
        print(f"{name} {key}: max difference {difference:.1e}")
        assert difference <= (LOGITS_TOLERANCE if key.endswith("logits") else BOXES_TOLERANCE)


@torch.no_grad()
def test_losses_of_detr_equal_those_of_transformers():
    """Of the last layer: with ``auxiliary_loss`` transformers normalises between layers, unlike the official code."""
    oracle, model, images = build_oracle("detr_R_50"), build_ours("detr_R_50"), random_images()
    model.load_state_dict(convert(oracle.state_dict(), model=model)[0], strict=True)
    generator = torch.Generator().manual_seed(3)
    boxes = [torch.rand(number, 4, generator=generator) * 0.3 + 0.2 for number in (5, 2)]
    labels = [torch.randint(1, 91, (number,), generator=generator) for number in (5, 2)]

    objects = [{"class_labels": label, "boxes": box} for label, box in zip(labels, boxes, strict=True)]
    expected = oracle(**pad(images), labels=objects).loss_dict
    targets = [{"labels": label, "boxes": box} for label, box in zip(labels, boxes, strict=True)]
    losses = model.criterion(model.predict_raw([{"image": image} for image in images]), targets)

    for name, weight in {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}.items():
        torch.testing.assert_close(losses[name], weight * expected[name], rtol=1e-5, atol=1e-5)


def test_a_file_without_the_copies_of_shared_heads_loads_like_the_model_that_wrote_it(tmp_path):
    oracle, model = build_oracle("deformable_detr_R_50"), build_ours("deformable_detr_R_50")
    oracle.save_pretrained(tmp_path)
    saved = read_checkpoint(str(tmp_path / "model.safetensors"))["model"]
    assert "class_embed.0.weight" in saved and "class_embed.5.weight" not in saved

    from_file, _ = convert(saved, model=model)
    from_memory, _ = convert(oracle.state_dict(), model=model)

    assert from_file.keys() == from_memory.keys() == model.state_dict().keys()
    assert all(torch.equal(from_file[key], from_memory[key]) for key in from_file)


def test_a_model_with_the_80_classes_scores_them_as_the_91_outputs_do():
    name = "deformable_detr_R_50_two_stage"
    oracle, images = build_oracle(name), random_images()
    all_ids, contiguous = build_ours(name), build_ours(name, num_classes=80)
    for model in (all_ids, contiguous):
        model.load_state_dict(convert(oracle.state_dict(), model=model)[0], strict=True)

    expected, actual = predict_with_ours(all_ids, images), predict_with_ours(contiguous, images)

    unused = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    used = [i for i in range(91) if i not in unused]
    torch.testing.assert_close(actual["pred_logits"], expected["pred_logits"][..., used])
    torch.testing.assert_close(actual["pred_boxes"], expected["pred_boxes"])
