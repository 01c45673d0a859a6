"""Prints the published models, or writes MODEL_ZOO.md: ``python -m deformable_detr.model_zoo [--write [FILE]]``."""

import argparse
from pathlib import Path

from .table import render_page, render_table


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deformable_detr.model_zoo", description="Prints the published models as a table."
    )
    parser.add_argument("--write", nargs="?", const="MODEL_ZOO.md", metavar="FILE", help="write MODEL_ZOO.md instead")
    file = parser.parse_args(args).write
    if file is None:
        print(render_table())
    else:
        Path(file).write_text(render_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
