"""A sheet of the first training images as the model takes them, drawn before the first step."""

import logging
import os
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from torch import nn

from ..data.loader import TrainLoader
from ..files import replacing_file
from .loop import TrainingLoop
from .step import Step, unwrap

logger = logging.getLogger(__name__)

FILE = "training_data.jpg"
_IMAGES = 16
_COLUMNS = 4
_TILE = 480  # px, of the longer side


class DataSheet(HookBase):
    """Draw the images with which the run begins, with their labels, into the output folder.

    They are what the model gets: augmented, normalised and padded to the canvas of their part of the batch, and for the
    eye without the normalisation. Padding, which is masked, appears in the colour of the mean.

    Args:
        loop: with a :class:`TrainLoader`, whose batches it does not use up, and a model with ``preprocess_image``.
        class_names: of the labels; None for their numbers.

    Raises:
        TypeError: if the loop has another loader or another model.
    """

    def __init__(self, loop: TrainingLoop, class_names: list[str] | None) -> None:
        key = loop.settings.keys["show_data"]
        if not isinstance(loop.data_loader, TrainLoader):
            raise TypeError(f"{key} needs a TrainLoader, got {type(loop.data_loader).__name__}")
        if not hasattr(unwrap(loop.model), "preprocess_image"):
            raise TypeError(f"{key} needs a model with preprocess_image, got {type(unwrap(loop.model)).__name__}")
        self._loop = loop
        self._class_names = class_names

    def before_train(self) -> None:
        if comm.is_main_process():
            path = os.path.join(self._loop.settings.output_dir, FILE)
            with replacing_file(path) as unfinished:
                self.draw().save(unfinished, quality=90)
            logger.info(f"The first training images, as the model takes them, are drawn in {path}")

    def draw(self) -> Image.Image:
        """Return the sheet."""
        tiles: list[Image.Image] = []
        for part in self._parts():
            canvases = denormalised(unwrap(self._loop.model), part)
            tiles += [self._tile(canvas, sample) for canvas, sample in zip(canvases, part, strict=True)]
        tiles = tiles[:_IMAGES]
        columns = min(_COLUMNS, len(tiles))
        width, height = (max(sizes) for sizes in zip(*(tile.size for tile in tiles), strict=True))
        sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
        for index, tile in enumerate(tiles):
            sheet.paste(tile, (index % columns * width, index // columns * height))
        return sheet

    def _parts(self) -> list[list[dict[str, Any]]]:
        """Return the first parts of batches, as they go through the model together, with enough images for a sheet."""
        loop = self._loop
        start = loop.images_seen // loop.data_loader.total_batch_size
        parts: list[list[dict[str, Any]]] = []
        # Closing the batches ends the loading processes.
        with closing(loop.data_loader.batches(seed=loop.seed, start=start)) as batches:
            for batch in islice(batches, _IMAGES):
                parts += Step(batch, 0, 0, accumulation_steps=loop.settings.accumulation_steps).micro_batches()
                if sum(map(len, parts)) >= _IMAGES:
                    break
        return parts

    def _tile(self, canvas: np.ndarray, sample: dict[str, Any]) -> Image.Image:
        instances = sample["instances"]
        names = self._class_names
        labels = [names[index] if names else str(index) for index in instances.gt_classes.tolist()]
        # Between two dollar signs matplotlib reads a formula, unless told not to.
        labels = [label.replace("$", r"\$") for label in labels]
        drawing = Visualizer(canvas, Metadata()).overlay_instances(boxes=instances.gt_boxes, labels=labels)
        image = Image.fromarray(np.ascontiguousarray(drawing.get_image()))
        image.thumbnail((_TILE, _TILE))
        return image


def denormalised(model: nn.Module, samples: list[dict[str, Any]]) -> list[np.ndarray]:
    """Return what the model makes of its inputs, padding included, as uint8 RGB images (H, W, 3) of one size."""
    with torch.no_grad():
        images = model.preprocess_image(samples).tensor
        pixels = (images * model.pixel_std + model.pixel_mean).round().clamp(0, 255).byte().cpu()
    rgb = pixels if model.input_format == "RGB" else pixels.flip(1)
    return [np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in rgb]
