"""From any image, in a file or in memory, to what the model takes."""

import os
import tempfile
import warnings
from pathlib import Path

import detectron2.data.transforms as T
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from ..loading import LoadedModel
from .inputs import local_file

# What the images of a Predictor may be: a path or address, an image of Pillow's, or an array (H, W, 3).
ImageSource = str | os.PathLike | Image.Image | np.ndarray


class ImageError(OSError):
    """An image that cannot be read; the message names it and says why."""


def read_image(source: ImageSource, *, input_format: str = "RGB") -> np.ndarray:
    """Read or convert one image to uint8 RGB (H, W, 3), upright as its EXIF orientation says.

    Gray, palette and CMYK images become RGB; transparent pixels are laid on white; 16-bit gray is scaled to 8 bit by
    the range of the format, 65535 to 255. Of several frames or pages the first is taken. A file may have as many
    pixels as Pillow decodes, twice ``PIL.Image.MAX_IMAGE_PIXELS``: 178,956,970 unless you change it.

    Args:
        source: a path, an address, a Pillow image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or
            uint16.
        input_format: channel order of arrays, "RGB" (as Pillow's) or "BGR" (as OpenCV's); files know their own.

    Raises:
        ImageError: if a file is missing, unreadable or truncated, or an address cannot be fetched.
        ValueError: on an array or Pillow image of another kind.
    """
    if isinstance(source, np.ndarray):
        return _array_to_rgb(source, input_format)
    if isinstance(source, Image.Image):
        return _pillow_to_rgb(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"an image must be a path, a Pillow image or a NumPy array, got {type(source).__name__}")
    try:
        with local_file(source) as path, warnings.catch_warnings():
            # Pillow warns from half of its limit on, and about tags that nobody here reads.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return _pillow_to_rgb(image)
    # Pillow's decoders let all kinds of exceptions out of broken files: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ImageError(f"cannot read image {show(source)}: {_reason(error)}") from error


def prepare_image(loaded: LoadedModel, rgb: np.ndarray) -> dict:
    """Resize an image as for evaluation and lay it out as Detectron2's models take it.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        "image": uint8 tensor (3, h, w) in the model's channel order; "height" and "width": H and W, in which the model
        returns boxes.
    """
    resized = T.AugInput(rgb if loaded.model.input_format == "RGB" else rgb[:, :, ::-1])
    loaded.resize(resized)
    tensor = torch.from_numpy(np.array(resized.image.transpose(2, 0, 1), order="C"))
    return {"image": tensor, "height": rgb.shape[0], "width": rgb.shape[1]}


def show(path: str | os.PathLike) -> str:
    """A path as text that any terminal can print, also where its bytes are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def shrink(rgb: np.ndarray, longest_side: int) -> np.ndarray:
    """Reduce an image (H, W, 3) to at most so many pixels on its longer side; smaller ones are returned as they are."""
    if max(rgb.shape[:2]) <= longest_side:
        return rgb
    image = Image.fromarray(rgb)
    image.thumbnail((longest_side, longest_side))
    return np.asarray(image)


def make_folder(path: Path) -> None:
    """Create a folder for results where it is missing, and try to write there: better known before the work.

    Raises:
        OSError: naming the folder and the reason.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"cannot write to output folder {show(path)}: {error.strerror or error}") from error


def save_image(rgb: np.ndarray, path: Path) -> None:
    """Write uint8 RGB (H, W, 3), creating the folder; ``.jpg`` in a quality that keeps thin lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(path, quality=90)


def _pillow_to_rgb(image: Image.Image) -> np.ndarray:
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return _gray_to_rgb(_scale_to_8_bit(np.asarray(image)))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range nobody knows; save it with 8 or 16 bits")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image.convert("RGBA"))
        image = paper
    # Pillow would copy an image that is RGB already.
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _array_to_rgb(array: np.ndarray, input_format: str) -> np.ndarray:
    if input_format not in ("RGB", "BGR"):
        raise ValueError(f'input_format must be "RGB" or "BGR", got {input_format!r}')
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        raise ValueError(f"an image must be an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}")
    if array.dtype == np.uint16:
        array = _scale_to_8_bit(array)
    if array.dtype != np.uint8:
        raise ValueError(f"the pixels of an array must be uint8 in [0, 255] or uint16, got {array.dtype}")
    if channels == 1:
        return _gray_to_rgb(array.reshape(array.shape[:2]))
    if input_format == "BGR":
        array = array[:, :, [2, 1, 0, 3][:channels]]
    return array if channels == 3 else _pillow_to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def _gray_to_rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[:, :, None], 3, axis=2)


def _scale_to_8_bit(values: np.ndarray) -> np.ndarray:
    """[0, 65535] -> [0, 255], rounded; Pillow's own conversion would clip at 255."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"its pixels must be 8 or 16 bits wide, in [0, 65535], got values from {low} to {high}")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image of a format that Pillow knows"
    # The name of an OSError would be given twice.
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__
