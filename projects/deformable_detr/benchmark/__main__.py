"""Command line of the benchmarks."""

import importlib
import sys
from collections.abc import Sequence

from ..cli import choose_command, make_parser, run
from ..startup.processors import share_processors

# name: (module, what it measures); only the module that is asked for is imported, as the op needs PyTorch alone.
COMMANDS = {
    "model": ("inference", "latency, memory and FLOPs of whole models"),
    "op": ("op", "the time of ms_deform_attn"),
    "train": ("train", "time and peak memory of a training step"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("benchmark", description="Times and memory, beside other implementations that are installed.")
    name, arguments = choose_command(parser, {name: what for name, (_, what) in COMMANDS.items()}, argv)
    module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    parser = make_parser(f"benchmark {name}", description=module.__doc__)
    module.add_arguments(parser)
    args = parser.parse_args(arguments)
    args.run(args)


if __name__ == "__main__":
    share_processors(long_running=False)
    sys.exit(run(main))
