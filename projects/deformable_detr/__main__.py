"""All commands behind one name: ``deformable-detr COMMAND ...`` or ``python -m deformable_detr COMMAND ...``."""

import importlib
import sys
from collections.abc import Sequence

from .cli import choose_command, make_parser, run
from .startup.processors import share_processors

# name: (module, function of the other arguments, what it does); only the module that is asked for is imported.
COMMANDS = {
    "train": ("engine", "train_net", "train, fine-tune or evaluate, as train_net.py does"),
    "detect": ("detect.__main__", "main", "detect in images, folders, videos and addresses"),
    "explain": ("explain.__main__", "main", "show where a model looks"),
    "report": ("report.__main__", "main", "make one page of a finished or running training"),
    "export": ("export.__main__", "main", "write a model as ONNX, torch.export or TorchScript"),
    "benchmark": ("benchmark.__main__", "main", "measure whole models, training steps and the op"),
    "study": ("study.__main__", "main", "compare variants on generated data, with numbers"),
    "convert": ("checkpoint.__main__", "main", "convert weights of other projects, and back"),
    "models": ("model_zoo.__main__", "main", "list the published models"),
    "env": ("collect_env", "main", "say what is installed and what was built"),
}


def main() -> int:
    """Run the command that the first argument names; without one, list them."""
    share_processors(long_running=sys.argv[1:2] in (["train"], ["study"]))
    return run(_run_command)


def _run_command(argv: Sequence[str] | None) -> int | None:
    parser = make_parser("", description="Deformable DETR for Detectron2.")
    if not (sys.argv[1:] if argv is None else argv):
        argv = ["--help"]
    name, arguments = choose_command(parser, {name: what for name, (*_, what) in COMMANDS.items()}, argv)
    module, function, _ = COMMANDS[name]
    return getattr(importlib.import_module(f".{module}", __package__), function)(arguments)


if __name__ == "__main__":
    sys.exit(main())
