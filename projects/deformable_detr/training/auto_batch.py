"""Find out how many images go through the model at a time on this GPU."""

import gc
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from .loop import TrainingLoop
from .step import Step, can_be_alone, exchanges_statistics, unwrap

logger = logging.getLogger(__name__)

# Images of COCO have up to 93 objects.
_OBJECTS = 100
# Of the memory: sizes vary from step to step, and what was freed in other pieces is not always of use.
_LARGEST_SHARE = 0.9
# CUDA's, cuBLAS' and cuDNN's words; cuDNN finds no engine where none has room for its workspace.
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "nable to find an engine", "nable to find a valid cuDNN")


class AutoBatch(HookBase):
    """Set the accumulation steps so that the parts of a batch are as large as the GPU's memory allows.

    The batch of a step stays what it is, and with it the learning rate and the result. Before the first step, parts of
    1, 2, 4, ... of the largest images go forward and backward, until memory runs out or is nearly used up. What the
    optimiser and the exchange of gradients will take is reserved meanwhile. Weights and statistics stay as they are. Of
    several processes each tries for itself, and all go by the smallest part.

    Not yet run on a GPU: tested with errors that a test raises.

    Args:
        size: (height, width) in pixels of the largest training image.
        sizes_key: of what limits the images in the user's configuration, for the error text.

    Raises:
        TypeError: if the loader does not say how large a batch is.
        ValueError: of several processes, if the model cannot try without the others.
    """

    def __init__(self, loop: TrainingLoop, size: tuple[int, int], *, sizes_key: str) -> None:
        if not hasattr(loop.data_loader, "total_batch_size"):
            key, loader = loop.settings.keys["auto_batch"], type(loop.data_loader).__name__
            raise TypeError(f"{key} needs a TrainLoader, or another one with total_batch_size, got {loader}")
        self._loop = loop
        self._size = size
        self._sizes_key = sizes_key
        if comm.get_world_size() > 1:
            _check_it_can_be_alone(unwrap(loop.model), loop.settings.keys["auto_batch"])

    def before_train(self) -> None:
        loop = self._loop
        batch = loop.data_loader.total_batch_size // comm.get_world_size()
        # Other GPUs may have less left: all processes go by the smallest part.
        part = min(comm.all_gather(largest_part(self._fits, batch)))
        height, width = self._size
        if part < 1:
            raise RuntimeError(
                f"not even one training image of {height}x{width} fits into the GPU's memory: lower {self._sizes_key}"
            )
        steps = math.ceil(batch / part)
        loop.settings = replace(loop.settings, accumulation_steps=steps)
        key = loop.settings.keys["accumulation_steps"]
        logger.info(
            f"{part} of the largest images ({height}x{width}) fit at a time: {key} is {steps}, the batch {batch}"
        )

    def _fits(self, count: int) -> bool:
        """Whether a part of so many images can be computed."""
        fits = True
        try:
            self._try(count)
        except RuntimeError as error:
            # Where one image went through, the same in larger numbers fails for want of memory alone.
            if not isinstance(error, torch.cuda.OutOfMemoryError) and (count == 1 or not _tells_of_memory(error)):
                raise
            fits = False
        # Behind the handler, whose traceback would keep the tensors of the failed attempt.
        self._loop.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        return fits and used_share(next(unwrap(self._loop.model).parameters()).device) <= _LARGEST_SHARE

    def _try(self, count: int) -> None:
        loop, model = self._loop, unwrap(self._loop.model)
        device = next(model.parameters()).device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        statistics = [(buffer, buffer.clone()) for norm in get_bn_modules(model) for buffer in norm.buffers()]
        # Two moments of the optimiser, and the buckets in which processes exchange gradients.
        reserved = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(3)]
        step = Step(largest_images(count, self._size), 0, 0)
        try:
            # Alone and without the wrapper: a process that runs out of memory would leave the others waiting.
            with model.criterion.alone() if comm.get_world_size() > 1 else nullcontext():
                step.backward(model, loop.precision, loop.scaler)
        finally:
            for buffer, before in statistics:
                buffer.copy_(before)
            del reserved


def largest_part(fits: Callable[[int], bool], limit: int) -> int:
    """Return the last of 1, 2, 4, ..., ``limit`` before the first that does not fit; 0 where 1 does not."""
    part, largest = 1, 0
    while part <= limit and fits(part):
        largest = part
        if part == limit:
            break
        part = min(2 * part, limit)
    return largest


def largest_images(count: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Return inputs of noise with many objects, lying and standing in turns: they make the largest canvas together."""
    samples = []
    for index in range(count):
        height, width = size if index % 2 == 0 else size[::-1]
        corners = torch.rand(_OBJECTS, 2, 2).sort(dim=1).values * torch.tensor([width, height])
        corners[:, 1] += 1
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(corners.flatten(1))
        instances.gt_classes = torch.zeros(_OBJECTS, dtype=torch.long)
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        samples.append({"image": image, "instances": instances, "file_name": f"noise {index}"})
    return samples


def used_share(device: torch.device) -> float:
    """Share of a GPU's memory that was in use at the peak; 0 of another device."""
    if device.type != "cuda":
        return 0.0
    return torch.cuda.max_memory_reserved(device) / torch.cuda.get_device_properties(device).total_memory


def _tells_of_memory(error: RuntimeError) -> bool:
    """Whether a library says that memory ran out: PyTorch's own error is not what cuDNN and cuBLAS end in."""
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def _check_it_can_be_alone(model: nn.Module, key: str) -> None:
    if exchanges_statistics(model):
        raise ValueError(f"{key} does not go with a batch norm that exchanges statistics with other processes")
    if not can_be_alone(model):
        raise ValueError(
            f"{key} needs, of several processes, a model whose criterion can count objects alone; "
            f"{type(model).__name__} has none"
        )
