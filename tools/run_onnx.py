"""Detects with a file of ``python -m deformable_detr.export --format onnx``, and draws what it finds.

Needs onnxruntime, NumPy and Pillow only; copy it into your own program.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

# What onnxruntime says of a file that is no model; it has these names nowhere else.
_ERRORS = onnxruntime.capi.onnxruntime_pybind11_state
UNREADABLE = (_ERRORS.InvalidArgument, _ERRORS.InvalidGraph, _ERRORS.InvalidProtobuf)


class Detection(NamedTuple):
    """One object: its class, score and box (x0, y0, x1, y1) in pixels of the original image."""

    name: str
    score: float
    box: tuple[float, ...]


def read(path: Path) -> Image.Image:
    """An image of 8 bits in RGB, upright; what is transparent lies on white, as it does in the model's training.

    Raises:
        ValueError: if its pixels are wider: Pillow would clip them.
    """
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{path} has pixels of mode {image.mode}; save it with 8 bits per channel")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def resized_size(width: int, height: int, *, min_size: int, max_size: int) -> tuple[int, int]:
    """(width, height) with a short side of ``min_size``, or a long side of ``max_size`` where that is smaller.

    Rounded as in the evaluation of the model. ``min_size`` 0 keeps the size.
    """
    if min_size == 0:
        return width, height
    short, long = sorted((width, height))
    if long / short * min_size > max_size:
        min_size = round(max_size * short / long)
    # Of an image that is one line, the short side is rounded to nothing.
    short, long = (min_size, int(min_size * long / short)) if min_size else (1, max_size)
    return (short, long) if width <= height else (long, short)


def prepare(image: Image.Image, canvas: list[int | str], metadata: dict) -> tuple[np.ndarray, np.ndarray]:
    """Resize, and pad to the model's canvas: a fixed one, or multiples of its "size_divisibility".

    Args:
        image: RGB.
        canvas: shape of the model's input "images", (N, 3, H, W); names stand for dynamic sizes.
        metadata: "min_size", "max_size" and, in files since 0.1, "size_divisibility" in pixels.

    Returns:
        images (1, 3, H, W) uint8 and image_sizes (1, 2) int64.
    """
    width, height = resized_size(*image.size, min_size=metadata["min_size"], max_size=metadata["max_size"])
    multiple = max(1, metadata.get("size_divisibility", 0))
    rows, columns = (
        -(-own // multiple) * multiple if isinstance(size, str) else size
        for own, size in zip((height, width), canvas[2:], strict=True)
    )
    scale = min(1.0, rows / height, columns / width)
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    images = np.zeros((1, 3, rows, columns), dtype=np.uint8)
    images[0, :, :height, :width] = pixels.transpose(2, 0, 1)
    return images, np.array([[height, width]])


def detect(session: onnxruntime.InferenceSession, image: Image.Image, *, min_score: float) -> list[Detection]:
    """Objects in an RGB image, best first.

    Raises:
        ValueError: if the model takes batches of a fixed size above 1.
    """
    stored = session.get_modelmeta().custom_metadata_map
    if "class_names" not in stored:
        raise ValueError("the model was not written by deformable_detr.export: it names no classes")
    metadata = {key: json.loads(value) for key, value in stored.items()}
    shape = session.get_inputs()[0].shape
    if shape[0] not in (1, "batch"):
        raise ValueError(f"the model takes {shape[0]} images at a time, this program one: export it with --batch 1")
    images, image_sizes = prepare(image, shape, metadata)
    boxes, scores, labels = session.run(None, {"images": images, "image_sizes": image_sizes})
    # Boxes are relative to the image, and may reach beyond it: times its original size they are pixels of it.
    boxes = boxes[0].clip(0, 1) * np.array([image.width, image.height] * 2)
    found = zip(labels[0], scores[0], boxes, strict=True)
    names = metadata["class_names"]
    return [
        Detection(names[label], float(score), tuple(box.tolist())) for label, score, box in found if score >= min_score
    ]


def draw(image: Image.Image, detections: list[Detection]) -> Image.Image:
    """A copy of the image with boxes, names and scores."""
    image = image.copy()
    canvas = ImageDraw.Draw(image)
    for name, score, (x0, y0, x1, y1) in reversed(detections):
        canvas.rectangle((x0, y0, x1, y1), outline=(255, 64, 0), width=2)
        text = f"{name} {score:.2f}"
        canvas.rectangle(canvas.textbbox((x0, y0), text), fill=(255, 64, 0))
        canvas.text((x0, y0), text, fill=(255, 255, 255))
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--score", type=float, default=0.3, help="lowest score to show (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("detections.jpg"), help="default: %(default)s")
    args = parser.parse_args()
    for path in (args.image, args.model):
        if not path.is_file():
            parser.exit(2, f"error: there is no file {path}\n")
    try:
        session = onnxruntime.InferenceSession(args.model, providers=onnxruntime.get_available_providers())
        image = read(args.image)
        detections = detect(session, image, min_score=args.score)
        for name, score, box in detections:
            print(f"{score:.3f} {name:20} " + " ".join(f"{value:7.1f}" for value in box))
        draw(image, detections).save(args.output)
    except (OSError, ValueError, *UNREADABLE) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{len(detections)} detections with a score of at least {args.score:g}: {args.output}")


if __name__ == "__main__":
    main()
