import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torchvision.ops import box_convert

from deformable_detr import load_config
from deformable_detr.modeling import MultiScaleBackbone
from deformable_detr.modeling import deformable_detr as room
from deformable_detr.modeling.detections import select_detections
from deformable_detr.modeling.padding import padding_masks

# Total and trainable parameters of the official models with 91 classes.
OFFICIAL_PARAMETERS = {
    "deformable_detr_R_50_single_scale": (34_066_593, 33_844_193),
    "deformable_detr_R_50_single_scale_dc5": (34_066_593, 33_844_193),
    "deformable_detr_R_50": (40_069_665, 39_847_265),
    "deformable_detr_R_50_box_refine": (40_849_660, 40_627_260),
    "deformable_detr_R_50_two_stage": (41_181_529, 40_959_129),
}
VARIANTS = [{}, {"with_box_refine": True}, {"with_box_refine": True, "two_stage": True}]


@pytest.mark.parametrize("name", OFFICIAL_PARAMETERS)
def test_published_models_have_the_official_number_of_parameters(name):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "91"]
    model = build_model(load_config(f"configs/COCO-Detection/{name}.yaml", opts))
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (total, trainable) == OFFICIAL_PARAMETERS[name]
    backbone = [p for p in model.backbone.bottom_up.parameters() if p.requires_grad]
    assert len(backbone) == 42


@pytest.mark.parametrize("options", VARIANTS)
def test_padded_features_do_not_change_predictions(make_model, make_input, randomize, options, monkeypatch):
    model = randomize(make_model(**options)).eval()
    images = [make_input(64, 96), make_input(96, 64, seed=1)]
    clean = model.predict_raw(images)
    forward = model.backbone.forward

    def with_garbage_at_padding(x):
        features = forward(x)
        for mask, feature in zip(masks, features.values(), strict=True):
            feature.masked_fill_(mask[:, None], 1e3)
        return features

    sizes = torch.tensor([[64, 96], [96, 64]])
    shapes = [feature.shape[-2:] for feature in forward(torch.zeros(2, 3, 96, 96)).values()]
    masks = padding_masks((96, 96), sizes, shapes)
    monkeypatch.setattr(model.backbone, "forward", with_garbage_at_padding)
    polluted = model.predict_raw(images)
    assert all(torch.equal(clean[k], polluted[k]) for k in ("pred_logits", "pred_boxes"))


@pytest.mark.parametrize("options", VARIANTS)
def test_batch_mates_do_not_change_predictions_on_a_fixed_canvas(make_model, make_input, randomize, options):
    model = randomize(make_model(**options)).eval()
    largest = make_input(96, 96, seed=2)
    image = make_input(70, 60)
    one = model.predict_raw([image, largest])
    other = model.predict_raw([image, make_input(96, 96, seed=3)])
    for key in one:
        dim = 1 if key.startswith("pred") else 0
        torch.testing.assert_close(one[key].select(dim, 0), other[key].select(dim, 0), rtol=1e-4, atol=1e-5)


def test_padding_mask_samples_the_nearest_pixel_of_the_full_mask():
    (mask,) = padding_masks((800, 480), torch.tensor([[647, 480], [800, 480]]), [(100, 60)])
    assert mask.shape == (2, 100, 60)
    # Cell i looks at pixel 8 i: 81 of 100 cells see pixels below 647.
    assert (~mask[0, :, 0]).sum() == 81 and not mask[1].any()


@pytest.mark.parametrize(
    ("own", "backbone", "canvas"), [(0, 0, (50, 81)), (32, 0, (64, 96)), (0, 9, (54, 81)), (6, 9, (54, 90))]
)
def test_the_canvas_is_a_multiple_of_what_model_and_backbone_ask_for(
    make_model, make_input, monkeypatch, own, backbone, canvas
):
    monkeypatch.setattr(MultiScaleBackbone, "size_divisibility", backbone)
    model = make_model(size_divisibility=own)
    assert model.preprocess_image([make_input(50, 64), make_input(32, 81)]).tensor.shape[-2:] == canvas


@pytest.mark.parametrize(("divisibility", "cells"), [(0, [17, 9, 5, 3]), (64, [16, 8, 4, 2])])
def test_on_a_canvas_of_whole_strides_an_image_has_the_cells_that_fit(make_model, make_input, divisibility, cells):
    """An image 128 pixels wide beside one of 191; strides 8, 16, 32, 64."""
    model = make_model(size_divisibility=divisibility).eval()
    masks = []

    def collect(_, inputs):
        flat, shapes = inputs[1].padding_mask, inputs[1].spatial_shapes
        levels = flat.split([height * width for height, width in shapes], dim=1)
        masks.extend(level.unflatten(1, shape) for level, shape in zip(levels, shapes, strict=True))

    model.transformer.register_forward_pre_hook(collect)
    model([make_input(64, 128), make_input(64, 191)])
    assert [int((~mask[0, 0]).sum()) for mask in masks] == cells


def test_images_are_normalised_before_they_are_padded_with_zeros(make_model, make_input):
    model = make_model()
    small = make_input(10, 20)
    images = model.preprocess_image([small, make_input(13, 20)])
    assert images.tensor.shape == (2, 3, 13, 20) and images.tensor[0, :, 10:].abs().max() == 0
    expected = (small["image"][2, 4, 5] - 103.53) / 57.375
    assert images.tensor[0, 2, 4, 5].item() == pytest.approx(expected.item(), abs=1e-6)


def test_detections_are_the_best_class_scores_over_all_queries(make_model, make_input):
    model = make_model(num_queries=2, num_classes=3)
    model.test_topk_per_image = 4
    logits = torch.tensor([[[0.0, 3.0, 2.0], [1.0, -4.0, -5.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.9, 0.1, 0.4, 0.4]]])
    image = make_input(20, 40) | {"height": 100, "width": 200}
    (result,) = model.inference(logits, boxes, model.preprocess_image([image]), [image])
    instances = result["instances"]
    assert instances.image_size == (100, 200)
    assert instances.pred_classes.tolist() == [1, 2, 0, 0]
    torch.testing.assert_close(instances.scores, torch.tensor([3.0, 2.0, 1.0, 0.0]).sigmoid())
    # A query may appear several times, and boxes are not clipped to the image.
    expected = torch.tensor([[80.0, 30, 120, 70], [80, 30, 120, 70], [140, -10, 220, 30], [80, 30, 120, 70]])
    torch.testing.assert_close(instances.pred_boxes.tensor, expected)


def test_detections_without_a_wanted_size_are_in_pixels_of_the_input(make_model, make_input):
    model = make_model().eval()
    result = model([make_input(48, 64) | {"instances": None}])[0]["instances"]
    assert result.image_size == (48, 64) and len(result) == 55
    assert isinstance(result.pred_boxes, Boxes) and (result.scores.diff() <= 0).all()


@pytest.mark.parametrize("options", VARIANTS)
def test_raw_predictions_have_the_documented_shapes_and_keep_the_mode(make_model, make_input, options):
    model = make_model(**options).train()
    outputs = model.predict_raw([make_input(64, 64), make_input(64, 64)])
    assert model.training
    cells = 8 * 8 + 4 * 4 + 2 * 2 + 1
    shapes = {"pred_logits": (3, 2, 11, 5), "pred_boxes": (3, 2, 11, 4)}
    if options.get("two_stage"):
        shapes |= {"enc_logits": (2, cells, 5), "enc_boxes": (2, cells, 4)}
    assert {k: tuple(v.shape) for k, v in outputs.items()} == shapes
    assert all(((0 <= v) & (v <= 1)).all() for k, v in outputs.items() if "boxes" in k)


def test_criterion_accepts_raw_predictions(make_model, make_input):
    model = make_model(two_stage=True, with_box_refine=True)
    images = [make_input(64, 64, [[2, 3, 40, 50]], [4])]
    torch.testing.assert_close(model.criterion(model.predict_raw(images), model.prepare_targets(images)), model(images))


def test_ground_truth_is_relative_to_the_unpadded_image(make_model, make_input, monkeypatch):
    images = [make_input(50, 100, [[10, 10, 30, 40]], [2]), make_input(200, 200)]
    model, to, waited = make_model(), torch.Tensor.to, []
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda x, *a, **b: waited.append(not b.get("non_blocking")) or to(x, *a, **b))
        targets = model.prepare_targets(images)
    assert waited == [False] * 4
    torch.testing.assert_close(targets[0]["boxes"], torch.tensor([[0.2, 0.5, 0.2, 0.6]]))
    assert targets[0]["labels"].tolist() == [2] and targets[1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("size", [(1, 1), (31, 17), (8, 200)])
def test_tiny_images_train_and_detect(make_model, make_input, options, size):
    model = make_model(num_queries=300, **options)
    height, width = size
    losses = model([make_input(height, width, [[0, 0, width, height]], [0])])
    assert all(v.isfinite() for v in losses.values())
    assert len(model.eval()([make_input(height, width)])[0]["instances"]) > 0


@pytest.mark.parametrize("options", VARIANTS)
def test_a_batch_without_objects_trains(make_model, make_input, options):
    model = make_model(**options)
    losses = model([make_input(64, 64), make_input(40, 64)])
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values())
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("boxes", "classes", "message"),
    [
        ([[1, 1, 9, 9]], [5], r"gt_classes must be in \[0, 5\), got \[5\] in image 32x32.png \(image_id 0\)"),
        ([[1, 1, 9, 9]], [-1], r"got \[-1\]"),
        ([[1, float("nan"), 9, 9]], [0], r"gt_boxes must be finite, got .*nan.* in image 32x32.png"),
        ([[1, 1, float("inf"), 9]], [0], r"finite, got .*inf"),
        ([[5, 1, 5, 9]], [0], r"must have an area, got \[\[5.0, 1.0, 5.0, 9.0\]\] in image 32x32.png"),
    ],
)
def test_ground_truth_that_cannot_be_trained_on_is_named(make_model, make_input, boxes, classes, message):
    with pytest.raises(ValueError, match=message):
        make_model()([make_input(32, 32, boxes, classes)])


def test_training_without_ground_truth_names_the_image(make_model, make_input):
    image = make_input(32, 32)
    del image["instances"]
    with pytest.raises(ValueError, match='"instances".*32x32.png'):
        make_model()([image])


@pytest.mark.parametrize("name", ["num_classes", "num_queries"])
def test_counts_below_one_are_named(make_model, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        make_model(**{name: 0})


def test_a_backbone_of_another_width_is_named(make_model):
    model = make_model()
    with pytest.raises(ValueError, match=r"4 levels of 64 channels.*\[32, 32, 32, 32\]"):
        room.DeformableDETR(
            backbone=model.backbone,
            position_embedding=model.position_embedding,
            transformer=room.DeformableTransformer(d_model=64),
            criterion=model.criterion,
            num_classes=2,
        )


def test_detections_equal_the_raw_predictions_of_the_last_layer(make_model, make_input, randomize):
    model = randomize(make_model(two_stage=True, with_box_refine=True)).eval()
    images = [make_input(64, 96), make_input(96, 64, seed=1)]
    raw = model.predict_raw(images)
    boxes, scores, labels, _ = model.select_detections(raw["pred_logits"][-1], raw["pred_boxes"][-1])
    with torch.no_grad():
        detections = [result["instances"] for result in model(images)]
    for i, (height, width) in enumerate([(64, 96), (96, 64)]):
        torch.testing.assert_close(detections[i].scores, scores[i])
        assert torch.equal(detections[i].pred_classes, labels[i])
        torch.testing.assert_close(
            detections[i].pred_boxes.tensor, boxes[i] * torch.tensor([width, height, width, height])
        )


def test_a_selected_detection_names_its_query():
    logits = torch.tensor([[[0.0, 3.0], [1.0, -4.0], [-9.0, 2.0]]])
    boxes = torch.rand(1, 3, 4)
    found = select_detections(logits, boxes, 4)
    assert found.labels.tolist() == [[1, 1, 0, 0]] and found.queries.tolist() == [[0, 2, 1, 0]]
    assert torch.equal(found.boxes[0], box_convert(boxes[0], "cxcywh", "xyxy")[found.queries[0]])


def test_training_logs_its_errors_into_the_trainers_storage(make_model, make_input):
    with EventStorage() as storage:
        make_model().train()([make_input(64, 64, [[2, 3, 40, 50]], [4])])
    latest = storage.latest()
    # A fresh model finds nothing: every class has the probability 0.01.
    assert latest["cardinality_error"][0] == 1 and latest["class_error"][0] in (0, 100)


@pytest.mark.parametrize("image_format", ["L", "YUV-BT.601"])
def test_channel_orders_that_not_every_tool_knows_are_refused_when_the_model_is_built(image_format):
    opts = ["MODEL.DEVICE", "cpu", "INPUT.FORMAT", image_format]
    with pytest.raises(ValueError, match=rf'INPUT\.FORMAT .* must be "RGB" or "BGR", got \'{image_format}\''):
        build_model(load_config("configs/COCO-Detection/deformable_detr_R_50.yaml", opts))
