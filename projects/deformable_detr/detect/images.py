"""From any image, in a file or in memory, to what the model takes."""

import os
from pathlib import Path

import detectron2.data.transforms as T
import numpy as np
import torch
from PIL import Image

from ..data.images import ImageError, array_to_rgb, describe_failure, from_rgb, pillow_to_rgb, read_file
from ..files import replacing_file, show
from ..loading import LoadedModel
from .inputs import local_file, without_password

# What the images of a Predictor may be: a path or address, an image of Pillow's, or an array (H, W, 3).
ImageSource = str | os.PathLike | Image.Image | np.ndarray


def read_image(source: ImageSource, *, input_format: str = "RGB") -> np.ndarray:
    """Read or convert one image to uint8 RGB (H, W, 3), upright as its EXIF orientation says.

    Training and evaluation read alike; docs/detect.md lists what becomes of every kind of image. Of several frames or
    pages the first is taken. A file may have as many pixels as Pillow decodes, twice ``PIL.Image.MAX_IMAGE_PIXELS``:
    178,956,970 unless you change it.

    Args:
        source: a path, an address, a Pillow image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or
            uint16.
        input_format: channel order of arrays, "RGB" (as Pillow's) or "BGR" (as OpenCV's); files know their own.

    Raises:
        ImageError: if a file is missing, unreadable or truncated, or an address cannot be fetched.
        ValueError: on an array or Pillow image of another kind.
    """
    if isinstance(source, np.ndarray):
        return array_to_rgb(source, input_format)
    if isinstance(source, Image.Image):
        return pillow_to_rgb(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"an image must be a path, a Pillow image or a NumPy array, got {type(source).__name__}")
    try:
        with local_file(source) as path:
            return read_file(path)
    # The latter of an address that is none.
    except (OSError, ValueError) as error:
        name = show(without_password(os.fsdecode(source)))
        raise ImageError(f"cannot read image {name}: {describe_failure(error)}") from error


def prepare_image(loaded: LoadedModel, rgb: np.ndarray) -> dict:
    """Resize an image as for evaluation and lay it out as Detectron2's models take it.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        "image": uint8 tensor (3, h, w) in the model's channel order; "height" and "width": H and W, in which the model
        returns boxes.
    """
    resized = T.AugInput(from_rgb(rgb, loaded.model.input_format))
    loaded.resize(resized)
    tensor = torch.from_numpy(np.array(resized.image.transpose(2, 0, 1), order="C"))
    return {"image": tensor, "height": rgb.shape[0], "width": rgb.shape[1]}


def shrink(rgb: np.ndarray, longest_side: int) -> np.ndarray:
    """Reduce an image (H, W, 3) to at most so many pixels on its longer side; smaller ones are returned as they are."""
    if max(rgb.shape[:2]) <= longest_side:
        return rgb
    image = Image.fromarray(rgb)
    image.thumbnail((longest_side, longest_side))
    return np.asarray(image)


def save_image(rgb: np.ndarray, path: Path) -> None:
    """Write uint8 RGB (H, W, 3), creating the folder; ``.jpg`` in a quality that keeps thin lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as file:
        Image.fromarray(rgb).save(file, quality=90)
