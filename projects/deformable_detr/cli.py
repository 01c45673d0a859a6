"""The desk of every command line: one way to name a model, one form of overrides, one end for a user's mistake."""

import argparse
import dis
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from .wording import counted, message_of

PROGRAM = "deformable-detr"
MODEL_HELP = "a name of the model zoo, a config file (.yaml, .py), or the OUTPUT_DIR of train_net.py"
OPTS_HELP = "overrides of the config, which must come last: KEY VALUE ... (yaml) or key=value ... (LazyConfig)"
# As argparse gives it.
MISTAKE = 2
# Seconds: long enough for the main process to end and a launcher to end those beside it, on a busy machine too.
_MAIN_PROCESS_FIRST = 20.0
_INSTALL = {"detectron2": "python tools/install_detectron2.py", "cv2": "pip install opencv-python"}


def make_parser(command: str, **options: Any) -> argparse.ArgumentParser:
    """Return a parser named as it was called: ``deformable-detr detect`` or ``python -m deformable_detr.detect``.

    Args:
        command: name of the module below this package; empty for the package itself.
        options: as for ArgumentParser; texts keep their line breaks.
    """
    called = f"python -m {__package__}" + (f".{command}" if command else "")
    if sys.argv[0].startswith((f"{PROGRAM} ", "python -m ")):
        # As choose_command has left it.
        called = sys.argv[0]
    elif os.path.basename(sys.argv[0]).startswith(PROGRAM):
        called = PROGRAM
    return argparse.ArgumentParser(prog=called, formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def add_model(parser: argparse.ArgumentParser, *spellings: str, dest: str = "model", **options: Any) -> None:
    """Add the argument that names a model, or several: ``--model``, with ``--config-file`` as another spelling.

    Args:
        spellings: further ones.
        options: as for ``add_argument``.
    """
    help = f"{MODEL_HELP} {options.pop('help', '')}".rstrip()
    parser.add_argument("--model", "--config-file", *spellings, dest=dest, metavar="MODEL", help=help, **options)


def add_overrides(parser: argparse.ArgumentParser, *, nargs: str = argparse.REMAINDER) -> None:
    """Add ``--opts``, behind which all else is overrides of the configuration."""
    parser.add_argument("--opts", nargs=nargs, default=[], metavar="KEY VALUE", help=OPTS_HELP)


def add_overrides_word(parser: argparse.ArgumentParser) -> None:
    """Let ``--opts`` stand before overrides that a parser also takes without it, as its last positional arguments."""
    parser.add_argument("--opts", action=_Word, help=OPTS_HELP)


class _Word(argparse.Action):
    """A word that says nothing by itself."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, *_: Any) -> None:
        pass


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that ``loading.load_model`` takes: ``--model --weights --device --opts``."""
    add_model(parser, required=True)
    parser.add_argument(
        "--weights", help='in place of those of the name, config or folder; "" keeps the random initialisation'
    )
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    add_overrides(parser)


def default_device() -> str:
    """Return the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def positive_int(text: str) -> int:
    """Read a number of things of which there must be one at least: the ``type`` of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def check_device(device: str | torch.device) -> None:
    """Refuse a device that PyTorch does not know, or has not got here, with a ValueError."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f'device must be one of PyTorch\'s, such as "cpu", "cuda" or "cuda:1", got {device!r}'
        ) from error
    if wanted.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"device {device} needs a GPU, and PyTorch {torch.__version__} sees none here")
    count = torch.cuda.device_count()
    if (wanted.index or 0) >= count:
        raise ValueError(f"device {device} is not here: PyTorch sees {counted(count, 'GPU')}, counted from cuda:0")


def run(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Call the ``main`` of a command line, and return its exit status; see :func:`user_errors`."""
    with user_errors():
        return main(argv) or 0


def choose_command(
    parser: argparse.ArgumentParser, commands: Mapping[str, str], argv: Sequence[str] | None
) -> tuple[str, list[str]]:
    """Read which of several commands the first argument names, and the arguments that are left for it.

    Args:
        parser: of the program; its help gets a list of the commands.
        commands: name -> what it does.
    """
    width = max(map(len, commands)) + 2
    listing = "\n".join(f"  {name:{width}}{what}" for name, what in commands.items())
    parser.epilog = f"commands:\n{listing}\n\n{parser.prog} COMMAND --help tells of the arguments of each."
    parser.add_argument("command", choices=commands, metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own")
    args = parser.parse_args(argv)
    # What the command's parser calls itself.
    sys.argv[0] = f"{parser.prog} {args.command}"
    return args.command, args.arguments


@contextmanager
def user_errors() -> Iterator[None]:
    """End a user's mistake with its message on stderr and exit status 2; any other error keeps its traceback.

    Of several processes that fail alike the main one tells. ``python -X dev`` shows the traceback of mistakes too.

    Raises:
        SystemExit: in place of an error whose message was written for the user, with status 2.
    """
    try:
        yield
    except ProcessExitedException as error:
        if error.exit_code != MISTAKE:
            raise
        # A process of Detectron2's launcher, which has told already.
        raise SystemExit(MISTAKE) from error
    except Exception as error:
        if sys.flags.dev_mode or not is_mistake(error):
            raise
        rank = _rank()
        if rank:
            # Most mistakes are found by all processes. As soon as the main one ends, the launcher ends the others.
            time.sleep(_MAIN_PROCESS_FIRST)
        place = f" in process {rank}" if rank else ""
        print(f"error{place}: {_advise(error)}", file=sys.stderr, flush=True)
        raise SystemExit(MISTAKE) from error


def is_mistake(error: Exception) -> bool:
    """Whether an error is to be told to the user in its own words, without the way that led to it.

    That is what a ``raise`` of this project says, as its messages name the thing, the rule and the value; what the
    operating system says about a file; and a package that is not installed. Whatever else arises is a bug.
    """
    if isinstance(error, OSError):
        return True
    if isinstance(error, ModuleNotFoundError):
        return error.name is None or error.name.partition(".")[0] != __package__
    return not isinstance(error, AssertionError) and _is_raised_here(error)


def keep_stacks_in_files(logger: logging.Logger) -> None:
    """Leave the stacks of mistakes, which Detectron2's trainer logs, out of the terminal; log.txt has them."""
    for handler in logger.handlers:
        # The same class writes to files, too.
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr):
            handler.addFilter(_is_no_mistake)


def _is_no_mistake(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return sys.flags.dev_mode or not isinstance(error, Exception) or not is_mistake(error)


def _is_raised_here(error: Exception) -> bool:
    """Whether a ``raise`` statement of this package or of the script that was called has made the error."""
    traceback = error.__traceback__
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    module = frame.f_globals.get("__name__", "")
    # A KeyError of d["x"], say, comes from another instruction.
    is_raise = dis.opname[frame.f_code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"
    return is_raise and module.partition(".")[0] in (__package__, "__main__")


def _advise(error: Exception) -> str:
    """Return the message of an error, with what to type where a package is missing."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return message_of(error)
    package = error.name.partition(".")[0]
    return f"the package {package} is missing: {_INSTALL.get(package, f'pip install {package}')}"


def _rank() -> int:
    """Return the number of this process among those that run the same command."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0))
