"""From a loaded model to a checked file."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.export import ExportedProgram

from ..files import check_writable, replacing_file
from ..loading import LoadedModel
from ..modeling.cuda_graphs import canvas_of
from .agreement import Difference, Runner, check_agreement, draw_pictures, prepare_images
from .onnx_format import DEFAULT_OPSET, NEWEST_OPSET, OLDEST_OPSET, check_requirements, load_onnx, write_onnx
from .program import DetectionProgram, InputShape, capture, coarsest_stride
from .torch_formats import load_torch_export, load_torchscript, write_torch_export, write_torchscript

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """How a file format is written, read and named.

    Attributes:
        suffix: of its files.
        write: (program, path, metadata=...) writes a file.
        load: (path) gives what runs it.
        dynamic: whether sizes of its input may be left open.
    """

    suffix: str
    write: Callable[..., None]
    load: Callable[[Path], Runner]
    dynamic: bool = True


FORMATS = {
    "onnx": Format(".onnx", write_onnx, load_onnx),
    "torch_export": Format(".pt2", write_torch_export, load_torch_export),
    "torchscript": Format(".pt", write_torchscript, load_torchscript, dynamic=False),
}


def export_model(
    loaded: LoadedModel,
    path: Path,
    *,
    format_name: str,
    shape: InputShape | None = None,
    decompose: bool = True,
    opset: int | None = None,
    pictures: Sequence[np.ndarray] = (),
) -> list[Difference]:
    """Write a program, run it, compare it with the model, and only then give it its name.

    Args:
        loaded: the model, its class names and its resize, which are stored in the file.
        path: of the file, with the suffix of the format.
        format_name: a key of ``FORMATS``.
        shape: constant sizes of the input (default: none). Where the format has no dynamic sizes, those that are not
            given are one image and the short and long side that the configuration tests with, as height and width,
            rounded up to multiples of the model's ``size_divisibility``.
        decompose: see :func:`capture`.
        opset: of ONNX.
        pictures: (H, W, 3) uint8 RGB to compare on; without any, two are drawn.

    Returns:
        The difference of each batch that was compared, none above ``TOLERANCE``.

    Raises:
        ValueError: if the arguments do not fit together, or images are resized in a way that no file can tell of.
        ModuleNotFoundError: if a package for the format is missing.
        OSError: if the file cannot be written.
        DisagreementError: if the file does not compute what the model computes. It is deleted.
    """
    kind = FORMATS[format_name]
    shape = _complete(shape or InputShape(), kind, loaded)
    options = _check_arguments(kind, path, loaded, shape=shape, opset=opset)
    metadata = _metadata(loaded)
    check_writable(path)
    with replacing_file(path) as unfinished:
        program = DetectionProgram(loaded.model.eval())
        logger.info("capturing the model with images %s", shape)
        captured: ExportedProgram = capture(program, shape, decompose=decompose)
        logger.info("writing %s", path)
        kind.write(captured, unfinished, metadata=metadata, **options)
        images = prepare_images(pictures or draw_pictures(), loaded.resize, shape.size)
        differences = []
        for description, difference in check_agreement(program, kind.load(unfinished), images, shape):
            logger.info("%s: %s", description, difference)
            differences.append(difference)
    return differences


def _check_arguments(
    kind: Format, path: Path, loaded: LoadedModel, *, shape: InputShape, opset: int | None
) -> dict[str, int]:
    """Refuse what cannot work; return the options of ``kind.write``."""
    if path.suffix != kind.suffix:
        raise ValueError(f"the output must end in {kind.suffix}, got {path}")
    if shape.batch is not None and shape.batch < 1:
        raise ValueError(f"batch must be at least 1, got {shape.batch}")
    least = coarsest_stride(loaded.model)
    if shape.size is not None and min(shape.size) < least:
        height, width = shape.size
        raise ValueError(
            f"height and width must be at least {least} pixels, the stride of the coarsest level, got {height} {width}"
        )
    if shape.size is not None and (canvas := _canvas(loaded, shape.size)) != shape.size:
        raise ValueError(
            f"height and width must be multiples of {loaded.model.size_divisibility} pixels, to which this model pads "
            f"its images, got {shape.size[0]} {shape.size[1]}: give {canvas[0]} {canvas[1]}"
        )
    if kind.write is not write_onnx:
        if opset is not None:
            raise ValueError(f"opset {opset} was given, but only ONNX has opsets")
        return {}
    opset = DEFAULT_OPSET if opset is None else opset
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ValueError(f"opset must be from {OLDEST_OPSET} to {NEWEST_OPSET}, got {opset}")
    check_requirements()
    return {"opset": opset}


def _complete(shape: InputShape, kind: Format, loaded: LoadedModel) -> InputShape:
    """Set what the format cannot leave open."""
    if kind.dynamic:
        return shape
    batch = 1 if shape.batch is None else shape.batch
    return InputShape(batch, shape.size or _canvas(loaded, _test_sizes(loaded)))


def _canvas(loaded: LoadedModel, size: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest canvas that an image of a size (height, width) gets from the model."""
    return canvas_of([size], loaded.model.size_divisibility)


def _test_sizes(loaded: LoadedModel) -> tuple[int, int]:
    """Short and longest long side in pixels to which images are resized; 0, 0 where they are not.

    Raises:
        ValueError: if something else is done to them.
    """
    augmentations = getattr(loaded.resize, "augs", [loaded.resize])
    if not augmentations:
        return 0, 0
    if len(augmentations) > 1 or not hasattr(augmentations[0], "short_edge_length"):
        raise ValueError(
            "the augmentations of the evaluation (dataloader.test.mapper.augmentations) must be one ResizeShortestEdge "
            f"or none, as an exported file names no other, got {augmentations}"
        )
    return int(min(augmentations[0].short_edge_length)), int(augmentations[0].max_size)


def _metadata(loaded: LoadedModel) -> dict[str, str]:
    """Return what a program without this package needs to know, as JSON values."""
    short, long = _test_sizes(loaded)
    values = {
        "class_names": loaded.class_names,
        "min_size": short,
        "max_size": long,
        "size_divisibility": loaded.model.size_divisibility,
    }
    return {key: json.dumps(value) for key, value in values.items()}
