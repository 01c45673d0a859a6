"""Command line of the benchmarks."""

import argparse

from . import inference, op, train

COMMANDS = {"model": inference, "op": op, "train": train}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deformable_detr.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.__doc__, description=module.__doc__))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
