"""A run's output folder as one HTML page: ``python -m deformable_detr.report OUTPUT_DIR``."""

from .write import write_report

__all__ = ["write_report"]
