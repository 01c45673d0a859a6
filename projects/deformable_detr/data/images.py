"""Images of every kind as the model takes them: one reader for training, evaluation and every tool."""

import os
import warnings

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

# Channel orders that every part of this project knows; gray images become three equal channels.
FORMATS = ("RGB", "BGR")
# What every image of these modes becomes is known without looking at its pixels; see docs/detect.md.
_SIMPLE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "I;16L", "I;16B")
# Files of these formats hold 16 bits where Pillow gives them 32.
_16_BIT_FORMATS = ("PNG", "PPM")
# Formats whose header has the EXIF data; Pillow may have to decode others before it finds them.
_FORMATS_WITH_EXIF = ("JPEG", "MPO", "WEBP", "TIFF")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(OSError):
    """An image that cannot be read; the message says why."""


def read_file(path: str | os.PathLike) -> np.ndarray:
    """Read an image file to uint8 RGB (H, W, 3), upright as its EXIF orientation says.

    Args:
        path: whatever Detectron2's PathManager opens.

    Raises:
        ImageError: if the file is missing, unreadable or truncated; its message is the reason, without the path.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns from half of its limit of pixels on, and about tags that nobody here reads.
            warnings.simplefilter("ignore")
            with PathManager.open(os.fspath(path), "rb") as stream, Image.open(stream) as image:
                return pillow_to_rgb(image)
    # Pillow's decoders let all kinds of exceptions out of broken files: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ImageError(describe_failure(error)) from error


def pillow_to_rgb(image: Image.Image) -> np.ndarray:
    """Convert an image of any mode of Pillow's to uint8 RGB (H, W, 3), upright as its EXIF orientation says.

    Raises:
        ValueError: if its pixels are numbers whose range nobody knows, or Pillow has no way from its mode to RGB.
    """
    # Before the EXIF data are read: Pillow turns a TIFF here, and removes its orientation. And errors of broken pixels
    # come from here, while reading the EXIF data, which may decode as well, forgives everything.
    image.load()
    turn = _TURNS.get(_orientation(image))
    image = _to_rgb(image)
    return np.asarray(image if turn is None else image.transpose(turn))


def array_to_rgb(array: np.ndarray, input_format: str) -> np.ndarray:
    """Convert an array to uint8 RGB (H, W, 3).

    Args:
        array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or uint16.
        input_format: "RGB" or "BGR", with the transparency behind either.

    Raises:
        ValueError: on an array of another kind.
    """
    check_format(input_format, "input_format")
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        raise ValueError(f"an image must be an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}")
    if array.dtype == np.uint16:
        array = _from_16_bit(array)
    if array.dtype != np.uint8:
        raise ValueError(f"the pixels of an array must be uint8 in [0, 255] or uint16, got {array.dtype}")
    if channels == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    if input_format == "BGR":
        array = array[:, :, [2, 1, 0, 3][:channels]]
    return array if channels == 3 else pillow_to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def from_rgb(rgb: np.ndarray, image_format: str) -> np.ndarray:
    """Give an RGB image (H, W, 3) the channel order of ``image_format``."""
    return rgb if image_format == "RGB" else rgb[:, :, ::-1]


def check_format(image_format: str, name: str) -> None:
    """Raise a ValueError, with the ``name`` of the setting, on another channel order than RGB and BGR."""
    if image_format not in FORMATS:
        raise ValueError(
            f'{name} must be "RGB" or "BGR", got {image_format!r}. Gray images are read as three equal channels'
        )


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) that an image has once it is read, from its header."""
    width, height = image.size
    if image.format == "TIFF":
        # Pillow turns these itself, newer versions in the announced size as well: the tags say how it is stored.
        width, height = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
    in_header = image.format in _FORMATS_WITH_EXIF or "exif" in image.info
    return (height, width) if in_header and _orientation(image) in (5, 6, 7, 8) else (width, height)


def check_readable(image: Image.Image) -> None:
    """Raise what reading an opened image would raise because of its mode; of common modes no pixel is decoded."""
    if image.mode not in _SIMPLE_MODES:
        pillow_to_rgb(image)


def describe_failure(error: Exception) -> str:
    """Why an image cannot be read, in a few words without its name."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image of a format that Pillow knows"
    # The name of an OSError would be given twice.
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_numbers_to_8_bit(image)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image.convert("RGBA"))
        image = paper
    # Pillow would copy an image that is RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")


def _numbers_to_8_bit(image: Image.Image) -> np.ndarray:
    """uint8 (H, W) of gray pixels that are wider than 8 bits. Pillow's own conversion would clip them at 255.

    The scale never depends on what the image shows: a dark one stays dark.
    """
    values = np.asarray(image)
    if image.mode.startswith("I;16") or image.format in _16_BIT_FORMATS:
        return _from_16_bit(values)
    low, high = values.min(), values.max()
    is_float = image.mode == "F"
    highest = 1 if is_float else 255
    # The negation is true for NaN as well.
    if not (low >= 0 and high <= highest):
        kind = "floating-point" if is_float else "32-bit"
        raise ValueError(
            f"its {kind} pixels must be in [0, {highest}], got values from {low} to {high}, whose range nobody knows; "
            "save it with 8 or 16 bits"
        )
    return np.rint(values * 255).astype(np.uint8) if is_float else values.astype(np.uint8)


def _from_16_bit(values: np.ndarray) -> np.ndarray:
    """[0, 65535] -> [0, 255], rounded."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """How EXIF data say that an image is to be turned; broken ones say nothing, as in Detectron2."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    # Pillow parses these data when they are asked for, and documents no class of error.
    except Exception:
        return 1
