"""Benchmarks: `python -m deformable_detr.benchmark op --help`."""
