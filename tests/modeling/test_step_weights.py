"""Weights made ready at once give the numbers that modules compute one by one, and leave no trace."""

from contextlib import nullcontext

import pytest
import torch
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from deformable_detr.benchmark.launches import count_launches
from deformable_detr.modeling import MultiScaleBackbone, prepare_for_inference
from deformable_detr.modeling import detector as room


@pytest.fixture
def model(make_model):
    """Two-stage on a ResNet-50 whose frozen norms have values of their own; stem and res2 are frozen."""
    torch.manual_seed(0)
    stages = ResNet.make_default_stages(50, norm="FrozenBN")
    resnet = ResNet(BasicStem(norm="FrozenBN"), stages, out_features=["res3", "res4", "res5"], freeze_at=2)
    model = make_model(with_box_refine=True, two_stage=True).train()
    model.backbone = MultiScaleBackbone(resnet, hidden_dim=32)
    for name, buffer in model.backbone.named_buffers():
        buffer.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else buffer.uniform_(-0.5, 0.5)
    return model


@pytest.fixture
def batch(make_input):
    return [make_input(64, 96, [[5, 5, 50, 60]], [1]), make_input(50, 64, [[9, 3, 30, 40]], [4], seed=1)]


def step(model, batch, dtype):
    """Losses and gradients of one step, with autocast to ``dtype`` if there is one."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        losses = model(batch)
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without(monkeypatch):
    monkeypatch.setattr(room, "ready_weights", lambda model: nullcontext())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_losses_and_gradients_are_the_same_bit_for_bit(model, batch, dtype, monkeypatch):
    ready = [step(model, batch, dtype) for _ in range(2)][1]  # The second time with what the first has kept.
    without(monkeypatch)
    assert_equal(ready, step(model, batch, dtype))


def assert_equal(a, b):
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("change", ["load_state_dict", "in place", "replaced"])
def test_frozen_values_that_change_between_steps_count(model, batch, change, monkeypatch):
    step(model, batch, torch.bfloat16)
    conv = model.backbone.bottom_up.stem.conv1
    if change == "load_state_dict":
        model.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    elif change == "in place":
        conv.norm.running_mean.add_(1.0)
    else:
        conv.norm.bias = conv.norm.bias + 1.0
    ready = step(model, batch, torch.bfloat16)
    without(monkeypatch)
    assert_equal(ready, step(model, batch, torch.bfloat16))


def test_modules_and_parameters_that_are_replaced_between_steps_count(model, batch, monkeypatch):
    step(model, batch, torch.bfloat16)
    layer = model.transformer.decoder.layers[0]
    layer.linear1 = torch.nn.Linear(32, 48)
    layer.linear2.weight = torch.nn.Parameter(layer.linear2.weight * 2)
    layer.cross_attn.output_proj.weight.requires_grad_(False)
    ready = step(model, batch, torch.bfloat16)
    assert {"weight", "bias"} <= {name.rpartition(".")[2] for name in ready[1] if "layers.0.linear1" in name}
    assert "transformer.decoder.layers.0.cross_attn.output_proj.weight" not in ready[1]
    without(monkeypatch)
    assert_equal(ready, step(model, batch, torch.bfloat16))


def test_modules_are_left_as_they_were(model, batch):
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, batch, torch.bfloat16)
    with pytest.raises(ValueError, match="gt_classes"):
        batch[0]["instances"].gt_classes += 100
        step(model, batch, torch.bfloat16)
    for name, module in model.named_modules():
        assert set(vars(module)) == before[name], name
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_step_dispatches_a_quarter_less(model, batch, monkeypatch):
    step(model, batch, torch.bfloat16)
    ready = sum(count_launches(lambda: step(model, batch, torch.bfloat16), model).values())
    without(monkeypatch)
    assert ready < 0.75 * sum(count_launches(lambda: step(model, batch, torch.bfloat16), model).values())


def test_what_its_user_lets_compute_twice_is_left_out(model, batch):
    losses, gradients = step(model, batch, torch.bfloat16)
    twice = BottleneckBlock, type(model.transformer.encoder)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, twice))
    again, wrapped = step(model, batch, torch.bfloat16)
    unwrapped = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in wrapped.items()}
    assert_equal((losses, gradients), (again, unwrapped))


def test_a_norm_that_is_not_frozen_any_more_is_computed_as_what_it_is(model, batch):
    step(model, batch, torch.bfloat16)
    stem = model.backbone.bottom_up.stem.conv1
    stem.norm = nn.BatchNorm2d(64)
    step(model, batch, torch.bfloat16)
    # It counts what it sees, which a frozen one does not.
    assert stem.norm.num_batches_tracked == 1 and stem.norm.weight.grad is not None
    image = torch.randn(1, 3, 16, 16)
    prepared = prepare_for_inference(model).model.backbone.bottom_up.stem.conv1
    expected = stem.norm.eval()(nn.functional.conv2d(image, stem.weight, stride=2, padding=3))
    torch.testing.assert_close(prepared(image), expected)
