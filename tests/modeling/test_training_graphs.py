"""Training steps as CUDA graphs against the same steps as they are written. Without a GPU graphs are imitated."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from deformable_detr.modeling import training_graphs
from deformable_detr.modeling.training_graphs import TrainingGraphs
from deformable_detr.solver import ClippedAdamW
from deformable_detr.training.step import unwrap

from .imitated_graphs import imitated_graphs

TWO_STAGE = {"with_box_refine": True, "two_stage": True}
# PyTorch 2.14's; its new name is none of older versions.
IGNORED = pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated:FutureWarning")


@pytest.fixture
def imitation():
    with imitated_graphs():
        yield


def recorded(model):
    """A copy that trains with graphs."""
    model = copy.deepcopy(model)
    model.graphs = TrainingGraphs(model)
    return model


@contextmanager
def distributed(model, backend):
    """A model in DistributedDataParallel, of one process, and how often it has exchanged gradients."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped, exchanged = DistributedDataParallel(model, broadcast_buffers=False), []

        def exchange(state, bucket):
            exchanged.append(bucket.index())
            return allreduce_hook(state, bucket)

        wrapped.register_comm_hook(None, exchange)
        yield wrapped, exchanged
    finally:
        dist.destroy_process_group()


def step(model, batch, *, dtype=None, seed=0):
    """Losses and gradients of a step."""
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
        losses = model(batch)
    sum(losses.values()).backward()
    parameters = unwrap(model).named_parameters()
    gradients = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
    return {name: loss.detach().clone() for name, loss in losses.items()}, gradients


def two_canvases(make_input, seed=0):
    """One batch with padding, one without; other images and objects for every seed."""
    boxes = [[5.0, 5, 40 + seed, 50], [20, 10, 60, 40 + 2 * seed]]
    return [
        [make_input(96, 80, boxes, [1, 2], seed=seed), make_input(64 + 8 * seed, 96, boxes[:1], [3], seed=seed + 1)],
        [make_input(64, 64, boxes[1:], [0], seed=seed + 2), make_input(64, 64, seed=seed + 3)],
    ]


VARIANTS = {
    "base": {},
    "two_stage": TWO_STAGE,
    "one2many": {**TWO_STAGE, "num_queries": 6, "num_one2many_queries": 8},
    "denoising": {**TWO_STAGE, "denoising": {"dn_number": 5}},
}


def assert_same_steps(graphs, model, make_input, *, dtype=None, steps=3, **bounds):
    """Of two canvases in turns; the first step of each runs eagerly, the second is recorded."""
    for seed in range(steps):
        for batch in two_canvases(make_input, seed):
            expected, expected_gradients = step(model, batch, dtype=dtype, seed=seed)
            losses, gradients = step(graphs, batch, dtype=dtype, seed=seed)
            torch.testing.assert_close(losses, expected, **bounds)
            assert gradients.keys() == expected_gradients.keys()
            # Of a bias before a norm nothing but rounding is left: it counts beside the whole.
            whole = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm()
            for name, gradient in gradients.items():
                bound = bounds["rtol"] * (expected_gradients[name].norm() + 0.01 * whole)
                assert (gradient - expected_gradients[name]).norm() <= bound, name
    assert len(unwrap(graphs).graphs) == 2


EXACTLY = {"rtol": 0, "atol": 0}


@pytest.mark.parametrize("variant", ["base", "one2many", "denoising"])
def test_recorded_steps_are_the_steps_as_they_are_written(imitation, make_model, make_input, randomize, variant):
    model = randomize(make_model(dropout=0.1, num_decoder_layers=2, **VARIANTS[variant])).train()
    assert_same_steps(recorded(model), model, make_input, **EXACTLY)


def test_batches_that_denoise_other_numbers_of_objects_are_recorded_apart(imitation, make_model, make_input):
    model = make_model(num_decoder_layers=1, **VARIANTS["denoising"]).train()
    graphs, boxes = recorded(model), [[5.0, 5, 40, 50], [20, 10, 60, 40], [1, 2, 30, 20]]
    for seed in range(3):
        for most in (3, 0, 1):
            batch = [make_input(64, 64, boxes[:count], [0, 1, 2][:count], seed=seed) for count in (most, most // 2)]
            torch.testing.assert_close(step(graphs, batch, seed=seed), step(model, batch, seed=seed), **EXACTLY)
    assert [kind.objects for kind in graphs.graphs._recordings] == [3, 0, 1]


def accumulated(model, batches):
    """Gradients of batches one after the other, of which none is forgotten."""
    model.zero_grad()
    for batch in batches:
        sum(model(batch).values()).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_gradients_are_accumulated(imitation, make_model, make_input, randomize):
    model = randomize(make_model(num_decoder_layers=1)).train()
    graphs, (first, second) = recorded(model), two_canvases(make_input)
    # Eager, recorded and replayed passes in all orders; the same kind twice in a row is the hardest.
    for batches in ([first, second], [first, first, second], [second, first, first, second, second]):
        torch.testing.assert_close(accumulated(graphs, batches), accumulated(model, batches), **EXACTLY)
    assert len(graphs.graphs) == 2


def test_a_detr_is_recorded_too(imitation, make_detr, make_input):
    model = make_detr(dropout=0.1, num_decoder_layers=1).train()
    assert_same_steps(recorded(model), model, make_input, **EXACTLY)


@IGNORED
def test_gradients_are_exchanged_after_a_replay(imitation, make_model, make_input, randomize):
    model = randomize(make_model(dropout=0.1, num_decoder_layers=2, **TWO_STAGE)).train()
    with distributed(recorded(model), "gloo") as (graphs, exchanged):
        assert_same_steps(graphs, model, make_input, **EXACTLY)
    assert len(exchanged) >= 6


def test_types_of_autocast_are_recorded_apart(imitation, make_model, make_input, randomize):
    model = randomize(make_model(num_decoder_layers=1)).train()
    graphs = recorded(model)
    batch, dtypes = two_canvases(make_input)[1], (torch.bfloat16, None)
    expected = {dtype: step(model, batch, dtype=dtype) for dtype in dtypes}
    for dtype in dtypes * 3:
        torch.testing.assert_close(step(graphs, batch, dtype=dtype), expected[dtype], **EXACTLY)
    assert [kind.autocast for kind in graphs.graphs._recordings] == [torch.bfloat16, None]


def test_dropout_draws_anew_in_every_replay(imitation, make_model, make_input, randomize):
    graphs = recorded(randomize(make_model(dropout=0.5, num_decoder_layers=1)).train())
    batch = two_canvases(make_input)[1]
    losses = [step(graphs, batch, seed=seed)[0]["loss_bbox"].item() for seed in (0, 0, 1, 2, 0)]
    assert losses[0] == losses[1] == losses[4] and len(set(losses)) == 3


def test_training_ends_where_it_ends_without_graphs(imitation, make_model, make_input, randomize):
    model = randomize(make_model(num_decoder_layers=1)).train()
    # A batch norm that trains: neither warming up nor recording may count.
    model.backbone.bottom_up.res4 = torch.nn.Sequential(model.backbone.bottom_up.res4, torch.nn.BatchNorm2d(12))
    graphs = recorded(model)
    for trained in (model, graphs):
        optimizer = ClippedAdamW(trained.parameters(), lr=1e-3)
        for seed in range(3):
            for batch in two_canvases(make_input, seed):
                step(trained, batch)
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(graphs.state_dict(), model.state_dict(), **EXACTLY)
    evaluated = [m.eval()(two_canvases(make_input)[1])[0]["instances"].scores for m in (graphs, model)]
    assert torch.equal(*evaluated)


@pytest.fixture
def recorded_model(imitation, make_model, make_input):
    """A model that has recorded one canvas, and a batch of it."""
    model = recorded(make_model(num_decoder_layers=1).train())
    batch = two_canvases(make_input)[1]
    step(model, batch), step(model, batch)
    assert len(model.graphs) == 1
    return model, batch


def test_copies_and_pickles_have_no_graphs(recorded_model):
    model, _ = recorded_model
    assert copy.deepcopy(model).graphs is None and pickle.loads(pickle.dumps(model)).graphs is None
    assert len(model.graphs) == 1


def test_what_would_be_wrong_is_refused(recorded_model):
    model, batch = recorded_model
    first, _ = model(batch), model(batch)
    with pytest.raises(RuntimeError, match="before the model sees another batch"):
        sum(first.values()).backward()
    total = sum(model(batch).values())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a backward pass runs once"):
        total.backward()


def test_recordings_of_other_tensors_are_forgotten(recorded_model):
    model, batch = recorded_model
    norm = model.backbone.input_proj[0][0]
    for change in (model.double, lambda: norm.requires_grad_(False), model.float):
        change()
        before = len(model.graphs)
        step(model, batch)
        assert (before, len(model.graphs)) == (1, 0)
        step(model, batch)


def test_the_model_runs_as_it_is_written_for_hooks_and_without_gradients(recorded_model):
    model, batch = recorded_model
    seen = []
    handle = model.transformer.encoder.layers[0].register_forward_hook(lambda *_: seen.append(1))
    step(model, batch)
    handle.remove()
    with torch.no_grad():
        assert not any(loss.requires_grad for loss in model(batch).values())
    step(model, batch)
    assert seen == [1] and len(model.graphs) == 1


def test_few_recordings_are_kept_and_too_many_kinds_reported_once(
    imitation, make_model, make_input, monkeypatch, caplog
):
    monkeypatch.setattr(training_graphs, "MAX_RECORDINGS", 2)
    model = recorded(make_model(num_decoder_layers=1, num_encoder_layers=0).train())
    for height in (32, 64, 32, 96):
        for _ in range(2):
            step(model, [make_input(height, 64)])
    assert [kind.canvas for kind in model.graphs._recordings] == [(32, 64), (96, 64)] and not caplog.text
    for height in (64, 32, 96):
        step(model, [make_input(height, 64)])
    assert caplog.text.count("4 recordings of training steps were made, and 2 are kept: batches are of so many") == 1


def test_recordings_hold_what_is_kept_between_calls_and_nothing_else(make_model, make_input):
    model = make_model(num_decoder_layers=1, **TWO_STAGE).train()
    batch = training_graphs.Batch.of(model, [make_input(64, 64)["image"]], [])
    inputs = training_graphs.Inputs(batch, model.device)
    training_graphs._predict(model, inputs)
    with training_graphs._Reads() as reads:
        outputs = training_graphs._predict(model, inputs)
    del outputs
    static = (inputs.images.pixels, inputs.images.image_sizes)
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers(), *static)}
    kept = [tensor for tensor in reads.still_there() if id(tensor) not in own]
    # Level, centres, sizes and strides of cells, sampled pixels, sizes of a pixel, wavelengths.
    assert len(kept) == 7 and sum(tensor.numel() for tensor in kept) < 1500
    assert len(own & {id(tensor) for tensor in reads.still_there()}) > 50


def test_a_model_that_cannot_be_recorded_is_named(recorded_model, make_input, monkeypatch):
    model, _ = recorded_model
    relu = torch.Tensor.relu
    monkeypatch.setattr(torch.Tensor, "relu", lambda x: relu(x) if x.sum().item() else x)
    step(model, [make_input(96, 64)])
    with pytest.raises(RuntimeError, match="waits for the device.*CUDA_GRAPHS.*train.cuda_graphs") as caught:
        step(model, [make_input(96, 64)])
    assert "_local_scalar_dense" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_checkpoint": True}, r"activation_checkpoint \(MODEL.DEFORMABLE_DETR.ACTIVATION_CHECKPOINT\)"),
        ({"padding_invariant": True}, r"padding_invariant \(MODEL.DEFORMABLE_DETR.PADDING_INVARIANT\)"),
        ({}, "need a model on CUDA, this one is on cpu"),
    ],
)
def test_models_whose_steps_are_no_graphs_are_refused(make_model, options, message):
    with pytest.raises(ValueError, match=message):
        make_model(**options).record_for_training()


def test_a_compiled_model_and_one_with_hooks_are_refused(make_model):
    model = make_model()
    model.backbone.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a module with hooks"):
        model.record_for_training()
    model.backbone.use_rel_pos = True
    with pytest.raises(ValueError, match="a ViT of relative positions"):
        model.record_for_training()
    model.is_compiled = True
    with pytest.raises(ValueError, match="MODEL.DEFORMABLE_DETR.COMPILE"):
        model.record_for_training()


@pytest.mark.parametrize("norm", [torch.nn.SyncBatchNorm, NaiveSyncBatchNorm])
def test_statistics_that_several_processes_exchange_are_refused(make_model, monkeypatch, norm):
    model = make_model()
    model.backbone.norm = norm(4)
    with pytest.raises(ValueError, match="need a model on CUDA"):
        model.record_for_training()
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="a batch norm that exchanges statistics with other processes does not go"):
        model.record_for_training()


# The order in which a GPU adds changes from run to run. Where such a sum is rounded it may change by one unit: 2^-11 of
# it in convolutions (TF32, PyTorch's default), 2^-8 in bfloat16.
BOUNDS = {None: {"rtol": 1e-3, "atol": 1e-6}, torch.bfloat16: {"rtol": 0.03, "atol": 1e-3}}


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("two_stage", None),
        ("two_stage", torch.bfloat16),
        ("base", torch.bfloat16),
        ("one2many", None),
        ("denoising", None),
        ("denoising", torch.bfloat16),
    ],
    ids=str,
)
def test_on_a_gpu_recorded_steps_are_the_steps_as_they_are_written(make_model, make_input, randomize, variant, dtype):
    model = randomize(make_model(dropout=0.1, **VARIANTS[variant])).train().cuda()
    graphs = recorded(model)
    assert_same_steps(graphs, model, make_input, dtype=dtype, **BOUNDS[dtype])


@pytest.mark.cuda
def test_on_a_gpu_a_detr_is_recorded_too(make_detr, make_input):
    model = make_detr(dropout=0.1).train().cuda()
    assert_same_steps(recorded(model), model, make_input, **BOUNDS[None])


@pytest.mark.cuda
def test_on_a_gpu_gradients_are_accumulated(make_model, make_input, randomize):
    model = randomize(make_model(**TWO_STAGE)).train().cuda()
    graphs, (first, second) = recorded(model), two_canvases(make_input)
    for batches in ([first, second], [first, first, second], [second, first, first, second]):
        sums = [torch.cat([g.flatten() for g in accumulated(m, batches)]) for m in (graphs, model)]
        assert (sums[0] - sums[1]).norm() < 1e-3 * sums[1].norm()


@pytest.mark.cuda
@IGNORED
def test_on_a_gpu_gradients_are_exchanged_after_a_replay(make_model, make_input, randomize):
    model = randomize(make_model(dropout=0.1, **TWO_STAGE)).train().cuda()
    with distributed(recorded(model), "nccl") as (graphs, exchanged):
        assert_same_steps(graphs, model, make_input, **BOUNDS[None])
    assert len(exchanged) >= 6


@pytest.mark.cuda
def test_on_a_gpu_dropout_draws_anew(make_model, make_input, randomize):
    graphs = recorded(randomize(make_model(dropout=0.5)).train().cuda())
    batch = two_canvases(make_input)[1]
    gradients = [torch.cat([g.flatten() for g in step(graphs, batch, seed=s)[1].values()]) for s in (0, 0, 1, 2, 0)]
    first, again, second, third, last = (gradient / gradients[0].norm() for gradient in gradients)
    assert max((first - again).norm(), (first - last).norm()) < 1e-2
    assert min((first - second).norm(), (first - third).norm(), (second - third).norm()) > 0.1


@pytest.mark.cuda
def test_on_a_gpu_training_ends_where_it_ends_without_graphs(make_model, make_input, randomize):
    model = randomize(make_model()).train().cuda()
    model.backbone.bottom_up.res4 = torch.nn.Sequential(model.backbone.bottom_up.res4, torch.nn.BatchNorm2d(12)).cuda()
    start, graphs = copy.deepcopy(model), recorded(model)
    for trained in (model, graphs):
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-4)
        for seed in range(4):
            for batch in two_canvases(make_input, seed):
                step(trained, batch)
                optimizer.step()
    ends = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (start, model, graphs)]
    assert (ends[2] - ends[1]).norm() < 0.02 * (ends[1] - ends[0]).norm()
    norms = [m.backbone.bottom_up.res4[1] for m in (model, graphs)]
    torch.testing.assert_close(norms[1].running_var, norms[0].running_var, rtol=1e-3, atol=1e-4)
    assert norms[1].num_batches_tracked == 8


@pytest.mark.cuda
def test_on_a_gpu_losses_are_scaled_and_old_losses_do_no_harm(make_model, make_input):
    graphs = recorded(make_model(dropout=0.1).train().cuda())
    optimizer, scaler = torch.optim.SGD(graphs.parameters(), lr=1e-4), torch.amp.GradScaler("cuda", init_scale=8.0)
    kept = []  # What autograd has made for an eager step lives on while others are recorded.
    for seed in range(4):
        for batch in two_canvases(make_input, seed):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                kept.append(sum(graphs(batch).values()))
            scaler.scale(kept[-1]).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 8 and len(graphs.graphs) == 2 and torch.stack(kept).isfinite().all()


@pytest.mark.cuda
def test_on_a_gpu_canvases_share_their_memory(make_model, make_input, memory_of_graphs):
    model = recorded(make_model(d_model=64).train().cuda())
    reserved = []
    for height in (512, 480, 448, 416, 384, 352):
        batch = [make_input(height, 512, [[5.0, 5, 50, 60]], [1], seed=seed) for seed in (0, 1)]
        for _ in range(3):
            step(model, batch)
        reserved.append(memory_of_graphs())
    assert len(model.graphs) == 6 and 0 < reserved[-1] < 2 * reserved[0]
