"""Command line of the benchmarks."""

import argparse

from . import model, op, train


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deformable_detr.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (model, op, train):
        name = module.__name__.rpartition(".")[2]
        module.add_arguments(commands.add_parser(name, help=module.__doc__, description=module.__doc__))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
