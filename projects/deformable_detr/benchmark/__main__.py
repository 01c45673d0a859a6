"""Command line of the benchmarks."""

import argparse

from . import op


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deformable_detr.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    op.add_arguments(commands.add_parser("op", help=op.__doc__, description=op.__doc__))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
