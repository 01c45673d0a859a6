"""Where a model looks: sampling points, boxes through the layers and matched ground truth, as picture and page."""

from .drawing import draw_explanation
from .explanation import Explanation, explain
from .page import write_page
from .recorder import Recording, Sampling, record
from .selection import Detection
from .truth import Truth

__all__ = [
    "Detection",
    "Explanation",
    "Recording",
    "Sampling",
    "Truth",
    "draw_explanation",
    "explain",
    "record",
    "write_page",
]
