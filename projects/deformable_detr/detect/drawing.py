"""Detections drawn by Detectron2's visualisers, in one colour per class."""

from collections.abc import Sequence

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from matplotlib import colormaps

# Longer side of a picture in pixels: labels are legible from the first on, and drawing more than the second takes
# gigabytes.
SMALLEST_PICTURE = 640
LARGEST_PICTURE = 4096


def draw_detections(picture: np.ndarray, instances: Instances, class_names: Sequence[str]) -> np.ndarray:
    """Draw boxes and labels on an image, enlarged to ``SMALLEST_PICTURE`` where it is smaller.

    Args:
        picture: uint8 RGB (h, w, 3), perhaps a reduced copy of the image that the boxes are for.
        instances: ``pred_boxes`` xyxy in pixels of ``image_size``, ``scores``, ``pred_classes``.

    Returns:
        uint8 RGB.
    """
    height, width = picture.shape[:2]
    boxes = Boxes(instances.pred_boxes.tensor.clone())
    boxes.scale(width / instances.image_size[1], height / instances.image_size[0])
    classes = instances.pred_classes.tolist()
    scores = instances.scores.tolist()
    visualizer = Visualizer(picture, scale=max(1.0, SMALLEST_PICTURE / max(height, width)))
    visualizer.overlay_instances(
        boxes=boxes,
        labels=[f"{class_names[label]} {score:.0%}" for label, score in zip(classes, scores, strict=True)],
        assigned_colors=[_colour(label) for label in classes],
    )
    return visualizer.get_output().get_image()


class VideoDrawer:
    """Draws frame after frame; an object keeps its colour from one frame to the next."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self._visualizer = VideoVisualizer(Metadata(thing_classes=list(class_names)))

    def __call__(self, frame: np.ndarray, instances: Instances) -> np.ndarray:
        """frame: uint8 RGB (H, W, 3), returned with boxes and labels, as large as it was."""
        return self._visualizer.draw_instance_predictions(frame, instances).get_image()


def _colour(label: int) -> tuple[float, float, float]:
    return colormaps["tab10"](label % 10)[:3]
