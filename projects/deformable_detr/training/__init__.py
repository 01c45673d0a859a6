"""The training loop of both configuration systems: mixed precision, accumulation, exact resume, explained failures."""
