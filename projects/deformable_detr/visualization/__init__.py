"""Pictures of a training run: its curves, and its detections beside the ground truth."""

from .gallery import draw_gallery, load_coco_predictions
from .training_curves import plot_training_curves, read_metrics

__all__ = ["draw_gallery", "load_coco_predictions", "plot_training_curves", "read_metrics"]
