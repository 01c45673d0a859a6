"""Batches of images that have been seen before, as CUDA graphs: one launch in place of hundreds.

Shapes: N images on a canvas of (H, W) pixels.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

# Graphs that are kept, the least recently used being dropped. They share one pool of memory, as they never run at the
# same time, and one stream, without which PyTorch would share nothing; each adds its input and what it holds of the
# canvas.
MAX_GRAPHS = 16
# Kinds of batches that are remembered to have been seen.
MAX_SEEN = 256

Detect = Callable[[Tensor, Tensor | None], tuple[Tensor, object]]
Size = tuple[int, int]
R = TypeVar("R")


class GraphCache:
    """Runs a function of a batch, and from the second batch of a kind on replays it as a CUDA graph.

    A kind is: number of images, canvas, whether there is padding, dtype of the pixels. The first batch of a kind runs
    eagerly, which also lets libraries choose their kernels; the second one is recorded. Nothing else runs eagerly: what
    cannot be recorded raises. A copy or a pickle has no graphs yet.

    Args:
        detect: (N, 3, H, W) pixels and (N, 2) int64 sizes, or None for images that fill the canvas, to a tensor, and
            to what it read that is kept between calls: graphs need that as long as they live. It must not wait for the
            device, nor copy from the host, once it has run for a kind.
    """

    def __init__(self, detect: Detect) -> None:
        self._detect = detect
        self._graphs: Recordings[_Graph] = Recordings()
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_graphs": Recordings(), "_pool": None, "_stream": None}

    def clear(self) -> None:
        """Forget all graphs."""
        self._graphs.clear()
        self._pool = self._stream = None

    def __call__(self, images: Sequence[Tensor], sizes: Sequence[Size], canvas: Size, device: torch.device) -> Tensor:
        """Run for images (3, h, w) of ``sizes``. The result is valid until the next call."""
        padded = any(size != canvas for size in sizes)
        kind = (len(images), images[0].shape[0], canvas, padded, common_type(images))
        graph = self._graphs.find(kind, partial(self._record, kind, images, sizes, device), limit=MAX_GRAPHS)
        if graph is None:
            return StaticBatch(*kind, device=device).fill(images, sizes).run(self._detect)[0]
        return graph.replay(images, sizes)

    def _record(self, kind: tuple, images: Sequence[Tensor], sizes: Sequence[Size], device: torch.device) -> "_Graph":
        if self._pool is None:
            # A stream of that device: on one of another device nothing would be recorded.
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        return _Graph(self._detect, StaticBatch(*kind, device=device).fill(images, sizes), self._pool, self._stream)


class Recordings(Generic[R]):
    """Recordings by kind of batch, made when a kind comes for the second time; the least recently used are dropped."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, R] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._kept)

    def clear(self) -> None:
        """Forget all, also which kinds have been seen."""
        self._kept.clear()
        self._seen.clear()

    def find(self, kind: Hashable, record: Callable[[], R], *, limit: int) -> R | None:
        """Return the recording of a kind, made by ``record`` if need be; None when the kind comes for the first time.

        Args:
            limit: recordings that are kept.
        """
        if kind in self._kept:
            self._kept.move_to_end(kind)
        elif kind in self._seen:
            _remember(self._kept, kind, record(), limit)
        else:
            _remember(self._seen, kind, None, MAX_SEEN)
        return self._kept.get(kind)


class StaticBatch:
    """Pixels and sizes of a batch, always at the same addresses."""

    def __init__(
        self, number: int, channels: int, canvas: Size, padded: bool, dtype: torch.dtype, *, device: torch.device
    ) -> None:
        with torch.inference_mode(False):  # An inference tensor could not be filled outside of that mode.
            self.pixels = torch.zeros(number, channels, *canvas, dtype=dtype, device=device)
            self.image_sizes = torch.zeros(number, 2, dtype=torch.int64, device=device) if padded else None

    def fill(self, images: Sequence[Tensor], sizes: Sequence[Size]) -> "StaticBatch":
        """What earlier images leave at the padding stays there: it counts for nothing."""
        for target, image, (height, width) in zip(self.pixels, images, sizes, strict=True):
            target[:, :height, :width].copy_(image, non_blocking=True)
        if self.image_sizes is not None:
            self.image_sizes.copy_(torch.tensor(sizes), non_blocking=True)
        return self

    def run(self, detect: Detect) -> tuple[Tensor, object]:
        return detect(self.pixels, self.image_sizes)


class _Graph:
    def __init__(self, detect: Detect, batch: StaticBatch, pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
        self.batch = batch
        # Once more before it is recorded, on the stream of recordings: this fills what ``detect`` keeps between calls,
        # and the workspaces of that stream.
        current = torch.cuda.current_stream(batch.pixels.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            batch.run(detect)
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as those of a data loader, may go on using CUDA meanwhile.
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.result, self._read = batch.run(detect)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "this model cannot be recorded as a CUDA graph: something in it waits for the device or copies from "
                "the host. Prepare it with cuda_graphs=False"
            ) from error

    def replay(self, images: Sequence[Tensor], sizes: Sequence[Size]) -> Tensor:
        self.batch.fill(images, sizes)
        self.graph.replay()
        return self.result


def any_has(model: nn.Module, name: str) -> bool:
    """Whether any module has an attribute of that name that is on, such as the ``use_rel_pos`` of Detectron2's ViT."""
    return any(getattr(module, name, False) for module in model.modules())


def canvas_of(sizes: Sequence[Size], divisor: int) -> Size:
    """Height and width of the canvas that Detectron2's ImageList gives to images of these sizes."""
    sides = (max(side) for side in zip(*sizes, strict=True))
    return tuple(-(-side // divisor) * divisor if divisor > 1 else side for side in sides)


def common_type(images: Sequence[Tensor]) -> torch.dtype:
    """Type that holds the pixels of all images."""
    return reduce(torch.promote_types, (image.dtype for image in images))


def _remember(cache: OrderedDict, key: Hashable, value: object, limit: int) -> None:
    cache[key] = value
    if len(cache) > limit:
        cache.popitem(last=False)
