"""What is said when a loss or a gradient is not finite."""

import re

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from deformable_detr.modeling import DeformableDETR
from deformable_detr.training.failure import NonFiniteError, find_cause
from deformable_detr.training.loop import TrainingLoop
from deformable_detr.training.precision import Precision
from deformable_detr.training.settings import TrainingSettings
from deformable_detr.training.step import Step

from .conftest import losses_of, read_checkpoint

FLOAT32 = Precision("cpu")


def break_output(module: torch.nn.Module) -> None:
    module.register_forward_hook(lambda _, __, output: output * float("nan"))


def break_gradient(module: torch.nn.Module) -> None:
    module.register_forward_hook(lambda _, __, output: output.register_hook(lambda g: g * float("inf")) and None)


def test_first_module_with_a_non_finite_output_is_named(model_and_batch):
    model, batch = model_and_batch
    break_output(model.transformer.encoder.layers[0].linear2)
    cause = find_cause(Step(batch, 0, 0), model, FLOAT32)
    assert cause == "First module with a non-finite output: transformer.encoder.layers.0.linear2 (Linear)"


def test_one_process_of_several_repeats_all_of_the_step_without_the_others(model_and_batch, monkeypatch):
    """Also what follows the losses of the first part: its gradients, and the second part."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda *_: pytest.fail("the other processes have ended"))
    model, batch = model_and_batch
    step = Step(batch, 0, 0, accumulation_steps=2)
    cause = find_cause(step, model, FLOAT32, alone=False)
    assert cause == "Repeated in this process alone, the step has finite outputs and gradients"
    layer = model.transformer.encoder.layers[0].linear2
    factors = iter((1.0, float("nan")))
    hook = layer.register_forward_hook(lambda _, __, output: output * next(factors))
    assert "non-finite output: transformer.encoder.layers.0.linear2" in find_cause(step, model, FLOAT32, alone=False)
    hook.remove()
    break_gradient(layer)
    assert "All outputs are finite. First non-finite" in find_cause(step, model, FLOAT32, alone=False)
    model.backbone.norm = torch.nn.SyncBatchNorm(4)
    assert find_cause(step, model, FLOAT32, alone=False).startswith("Not repeated here, where this model would wait")


def test_output_from_which_gradients_are_not_finite_is_named(model_and_batch):
    model, batch = model_and_batch
    break_gradient(model.transformer.encoder.layers[0].linear2)
    cause = find_cause(Step(batch, 0, 0), model, FLOAT32)
    assert re.search(r"All outputs are finite\. First non-finite gradient.*: of the output of \S*layers\.0\.", cause)


def test_broken_weights_and_pixels_are_named(model_and_batch):
    model, batch = model_and_batch
    batch[2]["image"] = batch[2]["image"].float() * float("nan")
    assert find_cause(Step(batch, 0, 0), model, FLOAT32) == "pixels are not finite in 2.jpg"
    model.class_embed[0].bias.data[0] = float("inf")
    cause = find_cause(Step(batch, 0, 0), model, FLOAT32)
    assert cause == "1 weights were not finite before the step: class_embed.0.bias"


def test_skipped_step_takes_its_batch_statistics_back(run_yaml, monkeypatch, tmp_path):
    """A pass with broken pixels writes NaN into the running averages, with which no evaluation would work again.

    Precise batch norm has put other tensors in their place before.
    """
    preprocess = DeformableDETR.preprocess_image
    calls = []

    def break_third_step(self, batch):
        images = preprocess(self, batch)
        if self.training:
            calls.append(1)
        # The third pass is that of precise batch norm.
        if len(calls) == 4:
            images.tensor[0, 0, 0, 0] = float("nan")
        return images

    monkeypatch.setattr(DeformableDETR, "preprocess_image", break_third_step)
    monkeypatch.setattr("deformable_detr.engine.Trainer.test", lambda *_: {})
    arguments = run_yaml.arguments
    norms = ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"]
    precise = ["TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "1"]
    run_yaml.arguments = lambda: [*arguments(), *norms, *precise]
    run_yaml(tmp_path / "run", max_skipped=1, max_iter=4, eval_period=2)
    final = read_checkpoint(tmp_path / "run")
    assert final["trainer"]["_trainer"]["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in final["model"].values())


def test_looking_for_the_cause_leaves_no_hook_behind(model_and_batch):
    model, batch = model_and_batch
    find_cause(Step(batch, 0, 0), model, FLOAT32)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def breaks_at_iteration_2(monkeypatch):
    """From the third batch on, a loss is infinite; also when the batch is repeated."""
    calls = []
    forward = DeformableDETR.forward

    def forward_and_break(self, batch):
        losses = forward(self, batch)
        calls.append(1)
        return {k: v * (float("inf") if k == "loss_giou" and len(calls) >= 3 else 1) for k, v in losses.items()}

    monkeypatch.setattr(DeformableDETR, "forward", forward_and_break)
    return calls


def test_run_stops_explains_and_can_be_replayed(run, breaks_at_iteration_2, tmp_path, capsys):
    output = tmp_path / "my output"
    with pytest.raises(NonFiniteError) as stopped:
        run(output)
    message = str(stopped.value)
    assert "Iteration 2: loss_giou is inf" in message
    assert re.search(r"Images of the batch: \S+\.png, \S+\.png", message)
    assert [i for i, row in losses_of(output).items() if "total_loss" in row] == [0, 1]
    file = output / "failure_0000002_rank0.pt"
    assert f"  deformable-detr train --config-file '{output / 'config.yaml'}' --replay '{file}'" in message
    saved = torch.load(file, weights_only=True)
    weights = read_checkpoint(output, "model_0000001")["model"]
    assert all(torch.equal(weights[name], value) for name, value in saved["model"].items())
    told = run(tmp_path / "replayed", "--replay", str(file))
    assert told in message and "non-finite output: the model (DeformableDETR)" in told


def test_steps_are_skipped_up_to_a_limit(run_yaml, monkeypatch, tmp_path):
    forward = DeformableDETR.forward
    calls = []

    def forward_and_break(self, batch):
        result = forward(self, batch)
        if not self.training:
            return result
        calls.append(1)
        return {name: loss * (float("nan") if len(calls) in (2, 4) else 1) for name, loss in result.items()}

    monkeypatch.setattr(DeformableDETR, "forward", forward_and_break)
    with pytest.raises(NonFiniteError, match="Iteration 3: "):
        run_yaml(tmp_path / "run", max_skipped=1, max_iter=5)
    halfway = read_checkpoint(tmp_path / "run", "model_0000001")
    assert halfway["trainer"]["_trainer"]["skipped_steps"] == 1
    steps = {float(state["step"]) for state in halfway["trainer"]["_trainer"]["optimizer"]["state"].values()}
    assert steps == {1.0}
    assert all(value.isfinite().all() for value in halfway["model"].values())
    assert losses_of(tmp_path / "run")[1]["skipped_steps"] == 1
    assert "Skipped, 1 of at most 1 steps" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("processes", [1, 2])
def test_process_that_fails_alone_among_several_ends_and_does_not_skip(
    model_and_batch, processes, monkeypatch, tmp_path
):
    """The others know nothing of its error: they would wait for the gradients of a step that it has left out."""

    def refuse(*_):
        raise FloatingPointError("matching costs must be finite")

    model, batch = model_and_batch
    settings = TrainingSettings(output_dir=str(tmp_path), seed=1, max_skipped_steps=5)
    loop = TrainingLoop(model, [batch], torch.optim.SGD(model.parameters(), lr=0.1), settings)
    monkeypatch.setattr(model.criterion, "forward", refuse)
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    with EventStorage():
        if processes == 1:
            loop.run_step()
        else:
            with pytest.raises(NonFiniteError, match="Iteration 0: matching costs must be finite"):
                loop.run_step()
    assert loop.skipped_steps == (processes == 1)


def test_gradient_norm_of_any_optimiser_is_logged(model_and_batch, tmp_path):
    model, batch = model_and_batch
    settings = TrainingSettings(output_dir=str(tmp_path), seed=1)
    loop = TrainingLoop(model, [batch], torch.optim.SGD(model.parameters(), lr=0.0), settings)
    with EventStorage() as storage:
        loop.run_step()
    squares = sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)
    assert storage.latest()["grad_norm"][0] == pytest.approx(squares**0.5, rel=1e-4)


def test_prediction_that_the_matcher_refuses_is_explained(run_yaml, monkeypatch, tmp_path):
    def predict_nan(self, images):
        outputs = predict(self, images)
        return {**outputs, "pred_boxes": outputs["pred_boxes"] * float("nan")}

    predict = DeformableDETR.predict
    monkeypatch.setattr(DeformableDETR, "predict", predict_nan)
    with pytest.raises(NonFiniteError, match=r"Iteration 0: .* must be finite.*(?s:.*)Images of the batch: .*png"):
        run_yaml(tmp_path / "output")


def test_replay_names_a_file_that_is_none(run_yaml, tmp_path):
    with pytest.raises(FileNotFoundError, match="--replay: there is no file 'absent.pt'"):
        run_yaml(tmp_path / "output", "--replay", "absent.pt")
    torch.save({"model": {}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="does not hold a step that a training has saved"):
        run_yaml(tmp_path / "output", "--replay", str(tmp_path / "weights.pt"))
