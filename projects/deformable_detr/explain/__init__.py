"""Where a model looks: samples or attention maps, boxes by layer and matched ground truth, as picture and page."""

from .drawing import draw_explanation
from .explanation import Explanation, explain
from .page import write_page
from .recorder import AttentionMap, Recording, Sampling, record
from .selection import Detection
from .truth import Truth

__all__ = [
    "AttentionMap",
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
