"""Training steps of batches whose canvas comes again, as two CUDA graphs: two launches in place of two thousand.

What is recorded is what needs no host: backbone, transformer and heads, forwards and backwards. Matching, losses and
the optimiser run as they are written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any, NamedTuple
from weakref import ref

import torch
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.structures import ImageList
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..layers.precision import autocast_dtype
from .cuda_graphs import Recordings, Size, StaticBatch, any_has, canvas_of, common_type
from .matcher import PaddedTargets, Target, pad_targets
from .padding import padding_mask
from .step_weights import ready_weights

logger = logging.getLogger(__name__)

# Kinds whose recordings are kept: each adds its pixels, its predictions and their gradients, 24 MB for two images of
# 800 x 1333. Two images of the recipe's sizes, on canvases of multiples of 128, are of 49 kinds.
MAX_RECORDINGS = 64


class Kind(NamedTuple):
    """What batches have in common that one recording serves.

    Attributes:
        objects: of the image that has most, where the model makes queries of them; else None.
    """

    images: int
    channels: int
    canvas: Size
    pixels: torch.dtype
    autocast: torch.dtype | None
    objects: int | None


class Batch(NamedTuple):
    """A batch that has come; ``targets`` are None for a model that makes no queries of them."""

    kind: Kind
    images: Sequence[Tensor]
    sizes: Sequence[Size]
    targets: PaddedTargets | None

    @classmethod
    def of(cls, model: nn.Module, images: Sequence[Tensor], targets: Sequence[Target]) -> Batch:
        sizes = [tuple(image.shape[-2:]) for image in images]
        canvas, autocast = canvas_of(sizes, model.size_divisibility), autocast_dtype(model.device.type)
        padded = pad_targets(targets) if model.reads_targets else None
        objects = None if padded is None else padded.labels.shape[1]
        kind = Kind(len(images), images[0].shape[0], canvas, common_type(images), autocast, objects)
        return cls(kind, images, sizes, padded)


class Inputs:
    """What is read of batches of a kind, always at the same addresses."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.images = StaticBatch(*batch.kind[:3], True, batch.kind.pixels, device=device)
        self.targets = batch.targets and PaddedTargets(*map(torch.empty_like, batch.targets))
        self.fill(batch)

    def fill(self, batch: Batch) -> None:
        self.images.fill(batch.images, batch.sizes)
        for kept, given in zip(self.targets or (), batch.targets or (), strict=True):
            kept.copy_(given)


@dataclass
class _Shared:
    """What all recordings of a model share, which never run at the same time.

    Attributes:
        parameters: those that are trained.
        gradients: of these, where every backward graph leaves them.
        stream: on which is recorded: libraries keep a workspace for each.
        pool: of memory, as large as the largest canvas needs.
        turn: of the last forward graph. A backward graph must follow its own, which wrote what it reads.
    """

    parameters: list[nn.Parameter]
    gradients: list[Tensor]
    stream: torch.cuda.Stream
    pool: tuple[int, int]
    turn: int = 0

    def let_go(self) -> None:
        """Give parameters a copy of the gradient that they have of the last backward graph: accumulation adds to it."""
        pairs = zip(self.parameters, self.gradients, strict=True)
        held = [p for p, gradient in pairs if p.grad is not None and p.grad.data_ptr() == gradient.data_ptr()]
        copies = torch._foreach_mul([parameter.grad for parameter in held], 1.0) if held else ()
        for parameter, copy in zip(held, copies, strict=True):
            parameter.grad = copy


class TrainingGraphs:
    """Predicts for training; from the second batch of a kind on by replaying CUDA graphs.

    The first batch of a kind runs eagerly, the second one is recorded; the least recently used recordings are dropped.
    Predictions, and gradients up to the order in which the device adds, are those of the model as it is written, random
    numbers of dropout included. Neither a copy nor a pickle of the model has recordings.

    - Predictions are valid until the next batch, and so is their backward pass, which runs once.
    - Its gradients are written to the same place every time: what a parameter has of an earlier pass is copied before.
    - Hooks are not replayed: while any module has one, the model runs as it is written.
    - Of several processes (DistributedDataParallel) each records for itself. Gradients are exchanged after the
      backward graph, not during it.
    - What is set besides the model, such as TF32 or deterministic algorithms, is as it was when a kind was recorded.

    Args:
        model: a :class:`SetPredictionDetector` on CUDA.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._modules = list(model.modules())
        self._with_buffers = [module for module in self._modules if list(module.buffers(recurse=False))]
        self._state: list[tuple] = []
        self._recordings: Recordings[_Recording] = Recordings()
        self._shared: _Shared | None = None
        self._made = 0

    def __len__(self) -> int:
        return len(self._recordings)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # In a copy or a pickle of the model None stands in its place.

    @property
    def can_run(self) -> bool:
        """Whether gradients are wanted, and no module has a hook."""
        return torch.is_grad_enabled() and not any(map(has_hooks, self._modules))

    def clear(self) -> None:
        """Forget all recordings."""
        self._recordings.clear()
        self._shared, self._made = None, 0

    def __call__(self, model: nn.Module, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Predict for images (3, h, w), range 0-255, as the model's ``predict_for_training``.

        Raises:
            RuntimeError: if the model cannot be recorded.
        """
        state = self._current_state()
        if state != self._state:
            self.clear()
            self._state = state
        batch = Batch.of(model, images, targets)
        recording = self._recordings.find(batch.kind, partial(self._record, model, batch), limit=MAX_RECORDINGS)
        if recording is None:
            return _predict(model, Inputs(batch, model.device))
        return recording.replay(batch)

    def _record(self, model: nn.Module, batch: Batch) -> _Recording:
        self._made += 1
        if self._made == 2 * MAX_RECORDINGS:
            logger.warning(
                f"{self._made} recordings of training steps were made, and {MAX_RECORDINGS} are kept: batches are of "
                f"so many kinds that recording may take longer than it saves. With a larger size_divisibility "
                f"(MODEL.DEFORMABLE_DETR.SIZE_DIVISIBILITY) there are fewer, and with INPUT.LSJ.SIZE one canvas"
            )
        if self._shared is None:
            self._shared = self._make_shared(model.device)
        return _Recording(model, batch, self._shared)

    def _make_shared(self, device: torch.device) -> _Shared:
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        gradients = [torch.empty_like(parameter) for parameter in trained]
        return _Shared(trained, gradients, torch.cuda.Stream(device), torch.cuda.graph_pool_handle())

    def _current_state(self) -> list[tuple]:
        """Return what recordings hold on to: where tensors lie, and the version of those that products are kept of."""
        state = [(p.data_ptr(), p.requires_grad, p.requires_grad or p._version) for p in self._parameters]
        for module in self._with_buffers:
            frozen = isinstance(module, FrozenBatchNorm2d)
            state += [(buffer.data_ptr(), frozen and buffer._version) for buffer in module.buffers(recurse=False)]
        return state


@dataclass(eq=False)
class _Pass:
    """Forward and backward pass of one kind of batch as they are written, for being recorded.

    In place of parameters it has tensors at the same addresses: autograd ties a parameter to the stream in which it is
    first used, which must not be another one than that of the recording.
    """

    model: nn.Module
    inputs: Inputs
    autocast: torch.dtype | None
    weights: dict[nn.Parameter, Tensor]

    def predict(self) -> dict[str, Tensor]:
        on, device = self.autocast is not None, self.model.device.type
        # Without its cache, in which conversions would be found that were not recorded.
        autocast = torch.autocast(device, self.autocast, enabled=on, cache_enabled=False)
        with autocast, _replaced(self.model, self.weights):
            return _predict(self.model, self.inputs)

    def differentiate(self, outputs: dict[str, Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        with torch.autocast(self.model.device.type, enabled=False):
            return torch.autograd.grad(_trained(outputs), list(self.weights.values()), gradients, allow_unused=True)

    def warm_up(self, stream: torch.cuda.Stream) -> list[Tensor]:
        """Run unnoticed; return what it reads that is kept between calls."""
        with _unnoticed(self.model, stream):
            # Apart from what is recorded: PyTorch may choose other kernels while somebody notes what they read.
            with _Reads() as reads:
                self.predict()
            outputs = self.predict()
            self.differentiate(outputs, [torch.zeros_like(output) for output in _trained(outputs)])
            del outputs
        return reads.still_there()


class _Recording:
    """Forward and backward graph of one kind of batch."""

    def __init__(self, model: nn.Module, batch: Batch, shared: _Shared) -> None:
        self._inputs, self._shared = Inputs(batch, model.device), shared
        weights = {parameter: parameter.detach().requires_grad_() for parameter in shared.parameters}
        written = _Pass(model, self._inputs, batch.kind.autocast, weights)
        self._read = written.warm_up(shared.stream)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        try:
            self._record(written)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "this model cannot be recorded as CUDA graphs for training: something in it waits for the device or "
                "copies from the host. Train it without MODEL.DEFORMABLE_DETR.CUDA_GRAPHS (train.cuda_graphs)"
            ) from error

    def _record(self, written: _Pass) -> None:
        # Other threads, such as those of a data loader, may go on using CUDA meanwhile.
        options = {"pool": self._shared.pool, "stream": self._shared.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self._forward, **options):
            outputs = written.predict()
        self._outputs = {name: output.detach() for name, output in outputs.items()}
        self._is_trained = [output.requires_grad for output in outputs.values()]
        self._output_gradients = [torch.zeros_like(output) for output in _trained(outputs)]
        with torch.cuda.graph(self._backward, **options):
            gradients = written.differentiate(outputs, self._output_gradients)
            self._has_gradient = [gradient is not None for gradient in gradients]
            found = [gradient for gradient in gradients if gradient is not None]
            torch._foreach_copy_(list(compress(self._shared.gradients, self._has_gradient)), found)

    def replay(self, batch: Batch) -> dict[str, Tensor]:
        """Predict. The result is valid until the next call of any recording, and has a backward pass."""
        self._inputs.fill(batch)
        outputs = _Replay.apply(self, *self._shared.parameters)
        return dict(zip(self._outputs, outputs, strict=True))

    def forward(self) -> tuple[int, list[Tensor], list[Tensor]]:
        """Return the turn, all outputs, and those that have no gradient."""
        self._shared.turn += 1
        self._forward.replay()
        outputs = [output.detach() for output in self._outputs.values()]
        untrained = [output for output, trained in zip(outputs, self._is_trained, strict=True) if not trained]
        return self._shared.turn, outputs, untrained

    def backward(self, turn: int, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of the parameters, of those of the outputs."""
        if turn != self._shared.turn:
            raise RuntimeError(
                "with CUDA graphs a backward pass runs once, and before the model sees another batch: its activations "
                "are gone"
            )
        self._shared.turn += 1
        self._shared.let_go()
        torch._foreach_copy_(self._output_gradients, list(compress(gradients, self._is_trained)))
        self._backward.replay()
        pairs = zip(self._shared.gradients, self._has_gradient, strict=True)
        # Not the tensor itself: of one that nobody else has autograd makes no copy.
        return [gradient.detach() if has_gradient else None for gradient, has_gradient in pairs]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.recording = recording
        ctx.turn, outputs, untrained = recording.forward()
        ctx.mark_non_differentiable(*untrained)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *ctx.recording.backward(ctx.turn, gradients)


class _Reads(TorchDispatchMode):
    """Notes the tensors that operations read."""

    def __init__(self) -> None:
        super().__init__()
        self._read: dict[int, ref[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._read.update((id(tensor), ref(tensor)) for tensor in tensors)
        return func(*args, **(kwargs or {}))

    def still_there(self) -> list[Tensor]:
        """Return those that somebody has kept between calls: a graph needs them as long as it lives."""
        return [tensor for reference in self._read.values() if (tensor := reference()) is not None]


def _trained(outputs: dict[str, Tensor]) -> list[Tensor]:
    return [output for output in outputs.values() if output.requires_grad]


@contextmanager
def _replaced(model: nn.Module, weights: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Put tensors in the places of parameters, also where modules share them.

    Not by functional_call, which leaves them there in modules that a model has twice.
    """
    with ExitStack() as stack:
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter in weights:
                    module._parameters[name] = weights[parameter]
                    stack.callback(module._parameters.__setitem__, name, parameter)
        yield


@contextmanager
def _unnoticed(model: nn.Module, stream: torch.cuda.Stream) -> Iterator[None]:
    """Run on a stream, once before it is recorded there, and leave random numbers and batch statistics as they were.

    This fills what layers keep between calls, and what libraries need on that stream.
    """
    random, current = torch.cuda.get_rng_state(model.device), torch.cuda.current_stream(model.device)
    statistics = [(buffer, buffer.clone()) for norm in get_bn_modules(model) for buffer in norm.buffers()]
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
        for buffer, before in statistics:
            buffer.copy_(before)
    current.wait_stream(stream)
    torch.cuda.set_rng_state(random, model.device)


def check_recordable(model: nn.Module) -> None:
    """Refuse a model whose training cannot be recorded.

    Raises:
        ValueError: naming what stands against it.
    """
    against = {
        "compile_for_training (MODEL.DEFORMABLE_DETR.COMPILE, train.compile)": model.is_compiled,
        "padding_invariant (MODEL.DEFORMABLE_DETR.PADDING_INVARIANT)": model.padding_invariant,
        "activation_checkpoint (MODEL.DEFORMABLE_DETR.ACTIVATION_CHECKPOINT)": any_has(model, "activation_checkpoint"),
        "a ViT of relative positions (use_rel_pos)": any_has(model, "use_rel_pos"),
        "a module with hooks, which are not replayed,": any(map(has_hooks, model.modules())),
        # Of several processes one may record while another does not, and so wait for it in vain.
        "a batch norm that exchanges statistics with other processes": any(map(_is_synchronised, model.modules())),
    }
    for what, present in against.items():
        if present:
            raise ValueError(f"{what} does not go with CUDA graphs for training")
    if model.device.type != "cuda":
        raise ValueError(f"CUDA graphs for training need a model on CUDA, this one is on {model.device}")


def _is_synchronised(module: nn.Module) -> bool:
    return comm.get_world_size() > 1 and isinstance(module, nn.SyncBatchNorm | NaiveSyncBatchNorm)


def has_hooks(m: nn.Module) -> bool:
    """Whether something watches a module, or takes part in it from outside."""
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def _predict(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Predict for pixels as they come. What stands at the padding does not matter."""
    images, sizes = model.normalise(inputs.images.pixels), inputs.images.image_sizes
    images = images.masked_fill(padding_mask(images.shape[-2:], sizes)[:, None], 0.0)
    with ready_weights(model):
        # Rows of a tensor for sizes: nothing is read from the device.
        return model.predict_for_training(ImageList(images, list(sizes)), inputs.targets)
