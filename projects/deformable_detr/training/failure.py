"""Explains a step whose loss or gradient is not finite, and keeps it for being repeated."""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..files import replacing
from ..wording import name_first
from .precision import Precision
from .settings import TrainingSettings
from .step import Step, can_be_alone, unwrap

logger = logging.getLogger(__name__)


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite; the message explains where that began."""


class _FirstFoundError(Exception):
    """Ends a forward pass that has nothing more to tell."""


def describe(step: Step, *, losses: dict[str, float], grad_norm: float, reason: str = "") -> str:
    """Return what is wrong with a step, as far as its numbers tell.

    Args:
        losses: of this process; empty where the forward pass ended before there were any.
        reason: the error with which it ended.
    """
    bad = [f"{name} is {value}" for name, value in losses.items() if not _is_finite(value)]
    what = reason or ", ".join(bad) or f"all losses are finite, but the norm of the gradient is {grad_norm}"
    names = [str(x.get("file_name", "<no file_name>")) for x in step.batch]
    return f"Iteration {step.iteration}: {what}.\nImages of the batch: {', '.join(names)}"


def find_cause(step: Step, model: nn.Module, precision: Precision, *, alone: bool = True) -> str:
    """Repeat a step with an eye on every module; costs nothing as long as steps succeed.

    Args:
        model: with the weights from before the step; its gradients are gone afterwards.
        alone: False in one of several processes. It repeats its part of the step without the others, with losses
            divided by its own objects, and nothing where the model cannot do without them.
    """
    model = unwrap(model)
    # Not the buffers: the failed pass has written batch statistics into them, which training does not read.
    if bad := [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]:
        return f"{len(bad)} weights were not finite before the step: {name_first(bad)}"
    if bad := [str(x.get("file_name")) for x in step.batch if not _is_finite(x["image"])]:
        return f"pixels are not finite in {name_first(bad)}"
    if not alone and not can_be_alone(model):
        return "Not repeated here, where this model would wait for the other processes: --replay looks at its modules"
    found: dict[str, str] = {}
    model.zero_grad()
    with _as_written(), _watching(model, found), nullcontext() if alone else model.criterion.alone():
        try:
            step.backward(model, precision)
        except _FirstFoundError:
            pass
        except FloatingPointError as error:
            found.setdefault("forward", f"no output of a module before this error: {error}")
    if "forward" in found:
        return f"First module with a non-finite output: {found['forward']}"
    if "backward" in found:
        return f"All outputs are finite. First non-finite gradient, from behind: of the output of {found['backward']}"
    if bad := [name for name, p in model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]:
        return f"All outputs are finite. Gradients that are not: {name_first(bad)}"
    return "Repeated in this process alone, the step has finite outputs and gradients"


def _as_written() -> AbstractContextManager:
    """Run compiled modules as they are written: their programs do not call hooks."""
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()


def save_step(path: str, step: Step, model: nn.Module, explanation: str) -> None:
    """Write a step and the weights before it, as plain tensors and values."""
    content = {
        "model": unwrap(model).state_dict(),
        "batch": [_to_plain(x) for x in step.batch],
        "iteration": step.iteration,
        "seed": step.seed,
        "rank": step.rank,
        "accumulation_steps": step.accumulation_steps,
        "explanation": explanation,
    }
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with replacing(path) as stream:
        torch.save(content, stream)


def replay(path: str, model: nn.Module, settings: TrainingSettings) -> str:
    """Repeat a step that :func:`save_step` has written.

    Args:
        model: as in the run; its weights are replaced by those of the file.

    Returns:
        What the run said when it stopped, found anew.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds no step, or one of another model.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--replay: there is no file {path!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # Of a file that is something else anything may come out, by what its bytes happen to say.
    except Exception as error:
        raise ValueError(f"--replay: {path} is cut short or no file of a step") from error
    if not isinstance(content, dict) or not {"model", "batch", "iteration"} <= content.keys():
        raise ValueError(f"--replay: {path} does not hold a step that a training has saved")
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise ValueError(f"--replay: {path} is of another model than the configuration describes: {error}") from error
    fields = {name: content[name] for name in ("iteration", "seed", "rank", "accumulation_steps")}
    step = Step([_from_plain(x) for x in content["batch"]], **fields)
    precision = Precision.of(settings, model)
    model.train()
    losses, grad_norm, reason = _numbers_of(step, model, precision)
    if not reason and all(map(_is_finite, [*losses.values(), grad_norm])):
        return (
            f"Iteration {step.iteration}: repeated, the step has finite losses and gradients. Recorded was:\n"
            f"{content['explanation']}"
        )
    told = describe(step, losses=losses, grad_norm=grad_norm, reason=reason)
    return f"{told}\n{find_cause(step, model, precision)}"


def _numbers_of(step: Step, model: nn.Module, precision: Precision) -> tuple[dict[str, float], float, str]:
    model.zero_grad()
    try:
        losses = step.backward(model, precision)
    except FloatingPointError as error:
        return {}, float("nan"), str(error)
    norms = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None])
    return {name: loss.item() for name, loss in losses.items()}, norms.norm().item(), ""


@contextmanager
def _watching(model: nn.Module, found: dict[str, str]) -> Iterator[None]:
    """Record the first module whose output, and the first whose output's gradient, is not finite."""

    def watch_gradient(name: str, gradient: Tensor) -> None:
        if not _is_finite(gradient):
            found.setdefault("backward", name)

    def watch_output(name: str, module: nn.Module, _, output: Any) -> None:
        label = f"{name or 'the model'} ({type(module).__name__})"
        for tensor in _tensors_in(output):
            if not _is_finite(tensor):
                found.setdefault("forward", label)
                raise _FirstFoundError
            if tensor.requires_grad:
                tensor.register_hook(partial(watch_gradient, label))

    handles = [m.register_forward_hook(partial(watch_output, name)) for name, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def _is_finite(value: Tensor | float) -> bool:
    return bool(torch.as_tensor(value).isfinite().all())


def _to_plain(x: dict[str, Any]) -> dict[str, Any]:
    plain = {key: x[key] for key in ("image", "file_name", "image_id", "height", "width") if key in x}
    instances = x["instances"]
    return plain | {
        "image_size": tuple(instances.image_size),
        "gt_boxes": instances.gt_boxes.tensor,
        "gt_classes": instances.gt_classes,
    }


def _from_plain(plain: dict[str, Any]) -> dict[str, Any]:
    instances = Instances(plain["image_size"])
    instances.gt_boxes = Boxes(plain["gt_boxes"])
    instances.gt_classes = plain["gt_classes"]
    return {key: plain[key] for key in plain if key not in ("image_size", "gt_boxes", "gt_classes")} | {
        "instances": instances
    }
