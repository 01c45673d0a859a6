"""Flags of the command line that are short for a key of the configuration."""

import argparse

from ..config import RunConfig


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that :func:`flags_as_overrides` reads."""
    parser.add_argument(
        "--show-data",
        action="store_true",
        help="draw the first training images, as the model takes them, in OUTPUT_DIR/training_data.jpg before step 1",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        help="images of a step, over all GPUs; auto keeps that number and finds out how many fit into a GPU at a time",
    )


def flags_as_overrides(args: argparse.Namespace, run: RunConfig) -> list[str]:
    """Return the flags that are given as overrides in the form of the user's system.

    Args:
        run: the configuration with the user's overrides.

    Raises:
        ValueError: on a batch size that is no number, or another one than that of an override.
    """
    values: dict[str, object] = {}
    if args.show_data:
        values["show_data"] = True
    if args.batch_size == "auto":
        values["auto_batch"] = True
    elif args.batch_size is not None:
        values["batch"] = _read_batch_size(args.batch_size)
    for name, value in values.items():
        if run.overridden(name) and run.get(name) != value:
            raise ValueError(
                f"{run.key(name)} is {value!r} by a flag, but {run.get(name)!r} by its override: leave out one of the "
                "two"
            )
    return run.as_overrides(values)


def _read_batch_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--batch-size must be auto, or a number of images of at least 1, got {text!r}")
    return int(text)
