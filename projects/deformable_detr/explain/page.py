"""The page of an explanation: one HTML file with image, data and script, to be opened without network."""

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.colors import to_hex
from PIL import Image

from ..files import write_text
from .drawing import WEIGHT_COLOURS, check_layer
from .explanation import Explanation
from .recorder import AttentionMap, Recording, Sampling

Layers = list[Sampling] | list[AttentionMap]

# Together the parts stay below 3 MB, a mail attachment: the image, the queries, and the grid of encoder pixels.
IMAGE_BYTES = 500_000
QUERY_BYTES = 900_000
ENCODER_BYTES = 1_000_000
_IMAGE_SIDE = 1280  # px
# Locations are stored in 16 bits over this range of the image's width or height: 0.06 pixels of a 1333 pixel image.
_RANGE = (-1.0, 2.0)


def write_page(
    explanation: Explanation, path: str | Path, *, layer: int | None = None, encoder_layer: int | None = None
) -> Path:
    """Write the page of an explanation.

    It shows every detection that fits, best first but the chosen ones in any case, and the encoder for a grid of
    pixels. What it shows is written to its address (``#detection=1&layer=3&head=0,5``), to be shared.

    Args:
        path: the .html file to write.
        layer, encoder_layer: shown first, counted from 1; the last by default.

    Returns:
        ``path`` as a ``Path``.

    Raises:
        ValueError: there is no such layer.
    """
    recording = explanation.recording
    data = page_data(explanation)
    data["layer"] = check_layer(layer, len(recording.decoder), "decoder")
    if recording.encoder:
        data["encoder"]["layer"] = check_layer(encoder_layer, len(recording.encoder), "encoder")
    environment = Environment(loader=PackageLoader(__package__, ""), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    write_text(path, environment.get_template("page.html").render(data=data, why=_say_why(explanation)))
    return Path(path)


def page_data(explanation: Explanation) -> dict[str, Any]:
    """Everything that the page shows; coordinates in pixels of the image, samples as :func:`pack` has them."""
    recording = explanation.recording
    shown = _shown(explanation)
    queries = [explanation.detections[index].query for index in shown]
    return {
        "name": explanation.name,
        "is_dense": recording.is_dense,
        "image": _encode_image(explanation.image),
        "width": recording.width,
        "height": recording.height,
        "range": _RANGE,
        "colours": [to_hex(colour) for colour in WEIGHT_COLOURS[::8]],
        "sizes": [list(shape) for shape in recording.spatial_shapes],
        "detections": [_describe(explanation, index) for index in shown],
        "left_out": len(explanation.detections) - len(shown),
        "chosen": [shown.index(index) for index in explanation.chosen],
        "truths": [
            {
                "label": explanation.class_names[truth.label],
                "box": _rounded(truth.box),
                "query": truth.query,
                "iou": round(truth.iou, 3),
            }
            for truth in explanation.truths
        ],
        "decoder": _pack_layers(recording.decoder, [[query] for query in queries], recording),
        "encoder": _encoder(explanation) if recording.encoder else None,
    }


def pack(locations: np.ndarray, weights: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(..., 2) pixels and (...) weights -> (..., 3) uint16: x, y over three times the image, weight over [0, 1].

    Locations further away than one image are moved to that limit; the page shows nothing outside of the image.

    Args:
        size: (width, height) in pixels.
    """
    low, high = _RANGE
    x_and_y = (locations / np.array(size) - low) / (high - low)
    numbers = np.concatenate([x_and_y, weights[..., None]], axis=-1)
    return np.rint(np.nan_to_num(numbers).clip(0, 1) * 65535).astype("<u2")


def _shown(explanation: Explanation) -> list[int]:
    """Return detections that fit into the page, in their order."""
    fit = QUERY_BYTES // _bytes_per_query(explanation.recording.decoder)
    chosen = set(explanation.chosen)
    others = [index for index in range(len(explanation.detections)) if index not in chosen]
    return sorted(explanation.chosen + others[: max(fit - len(chosen), 0)])


def _say_why(explanation: Explanation) -> str:
    """Why the page lists more detections than were asked for; empty where it does not."""
    others = [explanation.detections[index] for index in _shown(explanation) if index not in explanation.chosen]
    above = sum(detection.score >= explanation.score for detection in others)
    reasons = []
    if above:
        reasons.append(f"{above} more, as they have a score of at least {explanation.score:g}")
    if len(others) > above:
        reasons.append(f"{len(others) - above} below that, as true objects are matched with them")
    asked = f"{len(explanation.chosen)} asked for (bold)"
    return f"{', '.join([asked, *reasons])}." if reasons else ""


def _bytes_per_query(layers: Layers) -> int:
    bytes_per_weight = 1 if isinstance(layers[0], AttentionMap) else 3 * 2
    return math.ceil(sum(layer.weights[0].numel() for layer in layers) * bytes_per_weight * 4 / 3)


def _describe(explanation: Explanation, index: int) -> dict[str, Any]:
    recording, detection = explanation.recording, explanation.detections[index]
    return {
        "label": explanation.class_names[detection.label],
        "score": round(detection.score, 4),
        "query": detection.query,
        "boxes": [_rounded(box) for box in recording.boxes[:, detection.query].tolist()],
        "references": [
            None if recording.is_dense else _rounded(layer.reference[detection.query].tolist())
            for layer in recording.decoder
        ],
    }


def _encoder(explanation: Explanation) -> dict[str, Any]:
    recording = explanation.recording
    pixels = _pixel_grid(recording)
    if explanation.pixel is not None:
        pixels = [explanation.pixel, *pixels]
    cells = [recording.cells_at(x, y) for x, y in pixels]
    if recording.is_dense:
        references = [[_rounded(pixel)] for pixel in pixels]
    else:
        centres = recording.encoder[0].reference
        references = [[_rounded(centres[cell].tolist()) for cell in row] for row in cells]
    return {
        "pixels": [_rounded(pixel) for pixel in pixels],
        "references": references,
        **_pack_layers(recording.encoder, cells, recording),
    }


def _pixel_grid(recording: Recording) -> list[tuple[float, float]]:
    """Centres of about square tiles of the image, as many as the page has room for."""
    per_pixel = _bytes_per_query(recording.encoder) * len(recording.spatial_shapes)
    finest = recording.spatial_shapes[0]
    number = max(ENCODER_BYTES // per_pixel, 1)
    columns = max(round(math.sqrt(number * recording.width / recording.height)), 1)
    columns, rows = min(columns, number, finest[1]), min(max(number // columns, 1), finest[0])
    return [
        ((column + 0.5) * recording.width / columns, (row + 0.5) * recording.height / rows)
        for row in range(rows)
        for column in range(columns)
    ]


def _pack_layers(layers: Layers, queries: list[list[int]], recording: Recording) -> dict[str, Any]:
    """Return what groups of queries look at in all layers, as base64.

    These are samples (groups, queries, layers, M, L, P, 3) or, of dense attention, weights (groups, queries, layers,
    M, H, W) as bytes of the highest of a group's query and layer, which "highest" (groups, queries, layers) has.
    """
    index = np.array(queries)
    if recording.is_dense:
        weights = np.stack([layer.weights.numpy()[index] for layer in layers], axis=2)
        highest = weights.max(axis=(3, 4, 5))
        shares = np.rint(weights / highest[..., None, None, None] * 255).astype(np.uint8)
        return {
            "shape": shares.shape,
            "highest": highest.astype(float).round(6).tolist(),
            "samples": base64.b64encode(shares.tobytes()).decode(),
        }
    locations = np.stack([layer.locations.numpy()[index] for layer in layers], axis=2)
    weights = np.stack([layer.weights.numpy()[index] for layer in layers], axis=2)
    samples = pack(locations, weights, (recording.width, recording.height))
    return {"shape": samples.shape, "samples": base64.b64encode(samples.tobytes()).decode()}


def _encode_image(image: np.ndarray) -> str:
    """RGB -> the address of a JPEG of at most ``IMAGE_BYTES``, reduced where it has to be."""
    picture, side = Image.fromarray(image), _IMAGE_SIDE
    while True:
        picture.thumbnail((side, side))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        if buffer.tell() <= IMAGE_BYTES:
            return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        side = int(max(picture.size) * 0.8)


def _rounded(numbers) -> list[float]:
    return [round(float(number), 2) for number in numbers]
