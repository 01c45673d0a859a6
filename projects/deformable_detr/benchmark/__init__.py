"""Benchmarks: `python -m deformable_detr.benchmark {model,op,train} --help`."""
