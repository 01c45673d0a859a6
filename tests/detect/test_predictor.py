"""Predictor: one image or many, in any form, with the same result."""

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, Instances
from PIL import Image

from deformable_detr.config import load_config
from deformable_detr.detect import Predictor
from deformable_detr.loading import load_model


def as_rows(instances: Instances) -> torch.Tensor:
    """(n, 6): boxes, score, class."""
    columns = (instances.pred_boxes.tensor, instances.scores[:, None], instances.pred_classes[:, None])
    return torch.cat(columns, dim=1)


def test_paths_pillow_images_and_arrays_give_equal_detections(tiny_model, tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    predictor = Predictor(tiny_model, score_threshold=0.0)
    images = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels]
    expected = as_rows(predictor(pixels))
    assert len(expected) == 100
    for image in images:
        assert torch.equal(as_rows(predictor(image)), expected)
    bgr = Predictor(tiny_model, score_threshold=0.0, input_format="BGR")
    assert torch.equal(as_rows(bgr(pixels[:, :, ::-1])), expected)


def test_results_keep_the_order_of_the_images_and_do_not_depend_on_the_batch_size(tiny_model):
    rng = np.random.default_rng(0)
    shapes = [(40, 60), (60, 40), (80, 120), (1, 1), (40, 60), (300, 30)] * 2
    images = [rng.integers(0, 255, (*shape, 3), dtype=np.uint8) for shape in shapes]
    one = Predictor(tiny_model, score_threshold=0.0)
    many = Predictor(tiny_model, score_threshold=0.0, batch_size=3)
    for image, single, batched in zip(images, [one(image) for image in images], many(images), strict=True):
        assert single.image_size == batched.image_size == image.shape[:2]
        torch.testing.assert_close(batched.scores, single.scores, atol=1e-6, rtol=0)


def test_images_of_any_sizes_share_a_batch_of_a_padding_invariant_model(tiny_yaml, monkeypatch):
    _, path, *opts = tiny_yaml("_two_stage")
    model = load_model(path, "", opts=[*opts, "MODEL.DEFORMABLE_DETR.PADDING_INVARIANT", "True"])
    images = [np.full((*shape, 3), 90, np.uint8) for shape in [(40, 60), (60, 40), (80, 120), (300, 30)]]
    one, many = (Predictor(model, score_threshold=0.0, batch_size=size) for size in (1, 3))
    sizes, forward = [], many.detector.forward
    monkeypatch.setattr(many.detector, "forward", lambda batch: sizes.append(len(batch)) or forward(batch))
    for single, batched in zip(one(images), many(images), strict=True):
        torch.testing.assert_close(batched.scores, single.scores, atol=1e-6, rtol=0)
    assert sizes == [3, 1]


def test_images_of_equal_size_share_a_batch(tiny_model, monkeypatch):
    sizes = []
    predictor = Predictor(tiny_model, batch_size=2)
    forward = predictor.detector.forward
    monkeypatch.setattr(predictor.detector, "forward", lambda batch: sizes.append(len(batch)) or forward(batch))
    shapes = [(40, 60), (60, 40), (40, 60), (60, 40), (40, 60)]
    predictor([np.zeros((*shape, 3), np.uint8) for shape in shapes])
    assert sizes == [2, 1, 2]


def test_chosen_classes_are_those_of_all_and_unknown_ones_are_refused(tiny_model, pixels):
    everything = as_rows(Predictor(tiny_model, score_threshold=0.0)(pixels))
    first, second = everything[:, 5].unique()[:2].int().tolist()
    names = [tiny_model.class_names[second], tiny_model.class_names[first]]
    chosen = as_rows(Predictor(tiny_model, score_threshold=0.0, classes=names)(pixels))
    is_chosen = (everything[:, 5] == first) | (everything[:, 5] == second)
    assert torch.equal(chosen, everything[is_chosen]) and 0 < len(chosen) < len(everything)
    assert len(Predictor(tiny_model, score_threshold=0.0, classes=[])(pixels)) == 0
    with pytest.raises(ValueError, match="class 'zebar' is not one of .* did you mean zebra"):
        Predictor(tiny_model, classes=["zebar"])


def test_no_image_gives_no_result(tiny_model):
    assert Predictor(tiny_model)([]) == []


@pytest.mark.parametrize("score", [-0.1, 30])
def test_a_threshold_that_is_no_score_is_refused(score, tiny_model):
    with pytest.raises(ValueError, match=f"score_threshold must be from 0 to 1, got {score}"):
        Predictor(tiny_model, score_threshold=score)


def test_only_scores_from_the_threshold_on_are_returned(tiny_model, pixels):
    everything = Predictor(tiny_model, score_threshold=0.0)(pixels)
    threshold = everything.scores[10].item()
    some = Predictor(tiny_model, score_threshold=threshold)(pixels)
    assert torch.equal(some.scores, everything.scores[everything.scores >= threshold])
    assert 11 <= len(some) < 100


def test_duplicates_of_a_class_are_merged_on_request_only(tiny_model):
    found = Instances((100, 100))
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [0, 0, 10, 4]]  # IoU with the first: 1, 0.9, 1, 0.4
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    found.scores, found.pred_classes = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 1, 0])
    assert Predictor(tiny_model)._select(found).scores.tolist() == found.scores.tolist()
    merged = Predictor(tiny_model, merge_iou=0.5)._select(found)
    assert merged.scores.tolist() == found.scores[[0, 2, 3]].tolist()
    assert len(Predictor(tiny_model, merge_iou=0.95)._select(found)) == 4


def test_boxes_are_clipped_to_the_image_and_otherwise_those_of_detectron2s_predictor(tiny_yaml, tiny_model, pixels):
    _, path, *opts = tiny_yaml("_two_stage")
    with torch.no_grad():
        tiny_model.model.bbox_embed[1].layers[-1].bias[2:] = 3.0  # of the last decoder layer: wide boxes
    reference = DefaultPredictor(load_config(path, [*opts, "DATASETS.TEST", "()"]))
    reference.model = tiny_model.model
    # Its resizing rounds where the official one truncates; here both come to 96 x 64.
    expected = reference(np.ascontiguousarray(pixels[:, :, ::-1]))["instances"]
    boxes = expected.pred_boxes.tensor
    assert (boxes < 0).any() and (boxes[:, 2] > 60).any()
    expected.pred_boxes.clip((40, 60))
    torch.testing.assert_close(as_rows(Predictor(tiny_model, score_threshold=0.0)(pixels)), as_rows(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_moves_scores_a_little_and_leaves_the_weights_alone(tiny_model, pixels, dtype):
    exact = Predictor(tiny_model, score_threshold=0.0)(pixels).scores
    half = Predictor(tiny_model, score_threshold=0.0, dtype=dtype)(pixels).scores
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, atol=1e-2, rtol=0)
    assert {p.dtype for p in tiny_model.model.parameters()} == {torch.float32}


def test_channels_last_is_a_matter_of_memory_only(tiny_model, pixels):
    before = as_rows(Predictor(tiny_model, score_threshold=0.0)(pixels))
    after = as_rows(Predictor(tiny_model, score_threshold=0.0, channels_last=True)(pixels))
    kernel = tiny_model.model.backbone.bottom_up.stem.conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(after[:, 4], before[:, 4], atol=1e-5, rtol=0)


def test_the_transformer_is_compiled_for_images_of_any_size(tiny_model, monkeypatch):
    # Compiling takes a minute, even for a tiny model.
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    Predictor(tiny_model)
    assert compiled == []
    Predictor(tiny_model, compile=True)
    assert compiled == [(tiny_model.model.transformer, {"dynamic": True})]


def test_json_has_names_and_boxes_as_x_y_width_height(tiny_model):
    instances = Instances((50, 100))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 20.0, 40.5, 30.0]]))
    instances.scores = torch.tensor([0.75])
    instances.pred_classes = torch.tensor([11])
    # The twelfth of COCO's 80 classes has id 13: 12 is not in use.
    expected = {"category_id": 13, "category": "stop sign", "score": 0.75, "bbox": [10.0, 20.0, 30.5, 10.0]}
    assert Predictor(tiny_model).to_json(instances) == [expected]


@pytest.mark.parametrize(
    "names, ids",
    [
        (["disc", "square"], [1, 2]),
        (["class 0", "class 1"], [1, 2]),
        (["person", "disc"], [1, 2]),
        (["cat", "person"], [17, 1]),
        (["class 0", "person", "bicycle"], [0, 1, 2]),
    ],
)
def test_classes_with_cocos_names_have_cocos_ids(tiny_model, names, ids):
    tiny_model.class_names[:] = names
    assert Predictor(tiny_model).category_ids == ids


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "got 0"),
        ({"dtype": torch.int8}, "got torch.int8"),
        ({"device": "cpu"}, "loaded already"),
        ({"cuda_graphs": True}, "cuda_graphs needs a model on CUDA"),
        ({"cuda_graphs": True, "compile": True}, "compile or cuda_graphs"),
        ({"merge_iou": 1.5}, "merge_iou must be from 0 to 1, got 1.5"),
        ({"score_threshold": "good"}, "must be a number or \"best\", got 'good'"),
        ({"score_threshold": "best"}, "is for the output folder of a training"),
    ],
)
def test_arguments_that_cannot_be_obeyed_are_named(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        Predictor(tiny_model, **arguments)
