"""Prints the published models, or writes MODEL_ZOO.md: ``python -m deformable_detr.model_zoo [--write [FILE]]``."""

import sys
from collections.abc import Sequence

from ..cli import make_parser, run
from ..files import write_text
from .table import render_list, render_page


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("model_zoo", description="Prints the published models as a table.")
    parser.add_argument("--write", nargs="?", const="MODEL_ZOO.md", metavar="FILE", help="write MODEL_ZOO.md instead")
    file = parser.parse_args(argv).write
    if file is None:
        print(
            render_list(),
            "\nMODEL_ZOO.md has the addresses of the weights. A name is what --model and --config-file take.",
            sep="\n",
        )
    else:
        write_text(file, render_page())


if __name__ == "__main__":
    sys.exit(run(main))
