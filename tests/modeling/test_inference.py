"""Models prepared for inference against the models that they were made of."""

import copy
import pickle

import pytest
import torch

from deformable_detr import prepare_for_inference
from deformable_detr.modeling import inference
from deformable_detr.modeling.cuda_graphs import MAX_GRAPHS, GraphCache, StaticBatch

from .imitated_graphs import imitated_graphs

VARIANTS = {
    "base": {},
    "box_refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
}
# As for autocast: tests/modeling/test_mixed_precision.py.
SCORE_BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-6}


@pytest.fixture(params=VARIANTS)
def model(request, make_model, randomize):
    return randomize(make_model(num_encoder_layers=2, **VARIANTS[request.param])).eval()


@pytest.fixture
def batches(make_input):
    """One image; two of a size; two with padding, and a size in which boxes are wanted."""
    return [
        [make_input(128, 96)],
        [make_input(96, 96, seed=1), make_input(96, 96, seed=2)],
        [make_input(128, 96, seed=3) | {"height": 256, "width": 192}, make_input(60, 64, seed=4)],
    ]


def assert_same_detections(results, expected, *, score_bound=0.0, box_bound=None):
    for result, reference in zip(results, expected, strict=True):
        found, wanted = result["instances"], reference["instances"].to("cpu")
        assert found.image_size == wanted.image_size and len(found) == len(wanted)
        torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=score_bound)
        if box_bound is not None:
            assert torch.equal(found.pred_classes, wanted.pred_classes)
            torch.testing.assert_close(found.pred_boxes.tensor, wanted.pred_boxes.tensor, rtol=0, atol=box_bound)


@torch.no_grad()
def test_float32_detects_exactly_what_the_model_detects(model, batches):
    prepared = prepare_for_inference(model)
    for batch in [*batches, *batches]:
        # Geometry comes from the first pass in the second one.
        assert_same_detections(prepared(batch), model(batch), score_bound=1e-6, box_bound=1e-3)


@pytest.mark.parametrize("dtype", SCORE_BOUNDS, ids=str)
@torch.no_grad()
def test_other_types_are_as_close_as_under_autocast(model, batches, dtype):
    prepared = prepare_for_inference(model, dtype=dtype)
    assert {p.dtype for p in prepared.parameters()} == {dtype} and prepared.dtype == dtype
    for batch in batches:
        assert_same_detections(prepared(batch), model(batch), score_bound=SCORE_BOUNDS[dtype])


@torch.no_grad()
def test_autocast_around_it_has_no_effect(model, batches):
    prepared = prepare_for_inference(model)
    expected = prepared(batches[2])
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_detections(prepared(batches[2]), expected, box_bound=0)


@torch.no_grad()
def test_raw_predictions_are_the_models(model, batches):
    expected = model.predict_raw(batches[2])
    actual = prepare_for_inference(model).predict_raw(batches[2])
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-6)


def test_the_model_it_was_made_of_stays_as_it_is(make_model):
    model = make_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = prepare_for_inference(model, dtype=torch.bfloat16)
    assert model.training and model.criterion is not None and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not prepared.training and not any(p.requires_grad for p in prepared.parameters())
    # Rounding the mean would move every pixel by up to 0.2.
    assert torch.equal(prepared.model.pixel_mean, model.pixel_mean)


@torch.no_grad()
def test_pixels_of_any_type_and_canvases_that_the_model_asks_for(model, make_input):
    model.size_divisibility = 32
    batch = [make_input(70, 90), make_input(96, 64)]
    batch = [x | {"image": x["image"].float() / 3} for x in batch]
    assert_same_detections(prepare_for_inference(model)(batch), model(batch), score_bound=1e-6, box_bound=1e-3)


@pytest.mark.parametrize("second", [(64, 64), (64, 48)], ids=["a canvas for all", "padding"])
@torch.no_grad()
def test_pixels_of_several_types_in_a_batch_are_not_truncated(make_model, make_input, randomize, second):
    model = randomize(make_model()).eval()
    prepared = prepare_for_inference(model)
    integers, fractions = make_input(64, 64, seed=1), make_input(*second, seed=2)
    fractions["image"] = fractions["image"] / 255
    batch = [integers, fractions]
    expected = model(batch)
    assert_same_detections(prepared(batch), expected, score_bound=1e-6, box_bound=1e-3)
    prepared._graphs = GraphCache(prepared._detect)
    with imitated_graphs():
        for _ in range(3):
            assert_same_detections(prepared(batch), expected, score_bound=1e-6, box_bound=1e-3)
    assert len(prepared._graphs) == 1


def test_a_batch_made_under_inference_mode_is_filled_again_outside_of_it():
    image, sizes = torch.ones(3, 2, 2), [(2, 2)]
    with torch.inference_mode():
        batch = StaticBatch(1, 3, (2, 4), True, torch.float32, device=torch.device("cpu")).fill([image], sizes)
    batch.fill([5 * image], sizes)
    assert batch.pixels[0, 0].tolist() == [[5, 5, 0, 0]] * 2 and batch.image_sizes.tolist() == [[2, 2]]


@torch.no_grad()
def test_a_recording_without_enough_memory_says_so(make_model, make_input, monkeypatch):
    prepared = prepare_for_inference(make_model().eval())
    prepared._graphs = GraphCache(prepared._detect)

    def without_memory(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with imitated_graphs():
        prepared([make_input(64, 64)])
        monkeypatch.setattr(torch.cuda, "graph", without_memory)
        with pytest.raises(torch.cuda.OutOfMemoryError, match="^CUDA out of memory$"):
            prepared([make_input(64, 64)])


@torch.no_grad()
def test_the_geometry_of_few_canvases_is_kept_and_of_no_padded_batch(model, make_input, monkeypatch):
    monkeypatch.setattr(inference, "MAX_GEOMETRIES", 2)
    prepared = prepare_for_inference(model)
    for height in (64, 96, 64, 128):
        prepared([make_input(height, 64)])
    prepared([make_input(128, 64), make_input(64, 128)])
    assert list(prepared._geometries) == [(64, 64), (128, 64)]


def test_what_cannot_be_prepared_is_named(make_model, monkeypatch):
    model = make_model()
    with pytest.raises(TypeError, match="needs a DeformableDETR or a DETR, got Linear"):
        prepare_for_inference(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="floating point type, got torch.int8"):
        prepare_for_inference(model, dtype=torch.int8)
    with pytest.raises(ValueError, match="cuda_graphs needs a model on CUDA, this one is on cpu"):
        prepare_for_inference(model, cuda_graphs=True)
    model.backbone.use_rel_pos = True  # As in the attention of Detectron2's ViT.
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert prepare_for_inference(model)._graphs is None
    with pytest.raises(ValueError, match=r"cuda_graphs does not go with a ViT of relative positions \(use_rel_pos\)"):
        prepare_for_inference(model, cuda_graphs=True)
    with pytest.raises(RuntimeError, match="cannot train"):
        prepare_for_inference(model).train()


@torch.no_grad()
def test_new_weights_type_forgets_what_was_kept(model, batches):
    prepared = prepare_for_inference(model)
    prepared(batches[0])
    assert_same_detections(prepared.double()(batches[0]), model.double()(batches[0]), score_bound=1e-6)


@torch.no_grad()
def test_graphs_are_recorded_on_one_stream_of_the_models_device(make_model, make_input, randomize):
    model = randomize(make_model(with_box_refine=True, two_stage=True)).eval()
    prepared = prepare_for_inference(model)
    prepared._graphs = GraphCache(prepared._detect)
    with imitated_graphs() as streams:
        for seed in range(3):
            for batch in ([make_input(64, 64, seed=seed)], [make_input(80, 64, seed=seed), make_input(64, 48, seed=9)]):
                assert_same_detections(prepared(batch), model(batch), score_bound=1e-6, box_bound=1e-3)
    assert len(prepared._graphs) == 2
    copies = copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))
    for copied in copies:
        # Bound to the copy, and without the original's graphs, which hold its addresses.
        assert copied._graphs._detect.__self__ is copied and len(copied._graphs) == 0
    assert len(prepared._graphs) == 2
    assert len(streams) == 2 and streams[0] is streams[1] and streams[0].device == model.device


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_graphs_detect_exactly_what_the_same_kernels_detect_eagerly(model, batches, make_input, dtype):
    model.cuda()
    eager = prepare_for_inference(model, dtype=dtype, cuda_graphs=False)
    graphs = prepare_for_inference(model, dtype=dtype)
    for seed in range(3):
        for batch in [*batches, [make_input(128, 96, seed=seed), make_input(64 + 20 * seed, 50, seed=9)]]:
            assert_same_detections(graphs(batch), eager(batch), box_bound=0)
    assert len(graphs._graphs) == 3


@pytest.mark.cuda
@torch.no_grad()
def test_graphs_outlive_what_is_kept_for_few_canvases(make_model, make_input, randomize):
    model = randomize(make_model(with_box_refine=True, two_stage=True)).eval().cuda()
    eager, graphs = prepare_for_inference(model, cuda_graphs=False), prepare_for_inference(model)
    for _ in range(3):
        for height in range(64, 64 + 8 * (MAX_GRAPHS + 3), 8):
            batch = [make_input(height, 64)]
            assert_same_detections(graphs(batch), eager(batch), box_bound=0)
    assert len(graphs._graphs) == MAX_GRAPHS


@pytest.mark.cuda
@torch.no_grad()
def test_graphs_of_another_than_the_current_device_detect_what_it_detects_eagerly(model, batches, make_input):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    model.to("cuda:1")
    eager, graphs = prepare_for_inference(model, cuda_graphs=False), prepare_for_inference(model)
    for seed in range(4):
        for batch in [*batches, [make_input(128, 96, seed=seed)]]:
            assert_same_detections(graphs(batch), eager(batch), box_bound=0)
    assert len(graphs._graphs) == 3 and torch.cuda.current_device() == 0


@pytest.mark.cuda
@torch.no_grad()
def test_on_a_gpu_canvases_share_their_memory(make_model, make_input, memory_of_graphs):
    prepared, reserved = prepare_for_inference(make_model(d_model=64).eval().cuda()), []
    for height in (512, 480, 448, 416, 384, 352):
        for _ in range(3):
            prepared([make_input(height, 512)])
        reserved.append(memory_of_graphs())
    assert len(prepared._graphs) == 6 and 0 < reserved[-1] < 2 * reserved[0]


@pytest.mark.cuda
@torch.no_grad()
def test_a_model_that_cannot_be_recorded_is_named(model, make_input):
    prepared = prepare_for_inference(model.cuda())
    prepared.model.backbone.register_forward_hook(lambda module, args, output: output["level0"].sum().item() and None)
    prepared([make_input(64, 64)])
    with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph"):
        prepared([make_input(64, 64)])
