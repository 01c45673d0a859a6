"""What the terminal shows of a run: its course. All that is logged is in the output folder's log.txt."""

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ..cli import keep_stacks_in_files
from ..config import RunConfig
from ..training.precision import Precision
from ..training.settings import TrainingSettings
from ..wording import explain_missing_c, ignoring_records
from .processors import describe_load
from .schedule import drops_of

logger = logging.getLogger(__name__)

# Beginnings of records that fill screens, by the logger that Detectron2 gives them to: for the file alone.
_FILE_ONLY = {
    "detectron2": (
        "Environment info:",
        "Command line arguments:",
        "Contents of args.config_file=",
        "Running with full config:",
        "Model:\n",
    ),
    "detectron2.engine.defaults": ("Model:\n",),
}
_LOGGERS = ("deformable_detr", "fvcore", "detectron2")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def set_up_console(output_dir: str | None) -> None:
    """Start logging to the terminal and into the output folder, before ``default_setup`` does.

    The terminal gets what tells of the run's course. Files and pipes get no colours; the variable FORCE_COLOR, which
    other programs know too, asks for them in pipes.
    """
    _set_up(_LOGGERS, output_dir)
    # check_before_start tells of it, by the key that sets it.
    warnings.filterwarnings("ignore", message="This DataLoader will create")


def set_up_missing_loggers(output_dir: str | None) -> None:
    """Start the logging that a script has not started: what it has set up, or given a level, is left alone.

    Detectron2's ``default_setup`` leaves out this project's logger, and without it nothing is shown at all.
    """
    loggers = map(logging.getLogger, _LOGGERS)
    missing = [x.name for x in loggers if x.level == logging.NOTSET and not x.isEnabledFor(logging.INFO)]
    _set_up(missing, output_dir)


def _set_up(names: Sequence[str], output_dir: str | None) -> None:
    for name in names:
        # Called as default_setup calls it, which gets these same loggers then, and no second handler.
        named = {} if name == "detectron2" else {"name": name}
        setup_logger(output_dir, distributed_rank=comm.get_rank(), **named)
        keep_stacks_in_files(logging.getLogger(name))
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                _tidy(handler)


@contextmanager
def describing_environment() -> Iterator[None]:
    """Leave out of Detectron2's report of the environment, while the block runs, what alarms and means nothing.

    That there is no GPU is an error by then where one is needed.
    """
    detectron2 = logging.getLogger("detectron2")
    detectron2.addFilter(_explain)
    try:
        with ignoring_records("torch.utils.cpp_extension", "No CUDA runtime is found"):
            yield
    finally:
        detectron2.removeFilter(_explain)


def log_load() -> None:
    """Warn of a machine that other programs keep busy, before this one does."""
    told = describe_load() if comm.is_main_process() else None
    if told is not None:
        logger.warning(told)


def log_configuration(args: argparse.Namespace, output_dir: str | None, *, is_saved: bool) -> None:
    """Say in one line what the run was started with, and where all of it is.

    Args:
        is_saved: whether config.yaml is this run's, and not that of a training before it.
    """
    overrides = " ".join(map(str, args.opts or ())) or "nothing"
    state = "has it as a whole" if is_saved else "stays as it is, as nothing is trained"
    logger.info(
        f"Configuration: {args.config_file}, overridden: {overrides}. {output_dir}/config.yaml {state}; log.txt beside "
        "it has the environment and the model"
    )


def log_start(run: RunConfig, model: nn.Module, *, num_images: int | None) -> None:
    """Say in two lines what is trained, and for how long, as it will happen.

    Args:
        run: the configuration as it is used.
        num_images: training images; None where the loader does not say.
    """
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    settings = TrainingSettings.from_config(run.cfg)
    precision = str(Precision.of(settings, model).dtype or "float32").removeprefix("torch.")
    classes = run.get("num_classes")
    logger.info(
        f"Model: {type(model).__name__}, {count / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained"
        + (f", {classes} classes" if classes is not None else "")
        + f"; in {precision} on {run.get('device')}"
    )
    logger.info(f"Training: {_describe_length(run, num_images)}; {_describe_periods(settings)}")


def _describe_length(run: RunConfig, num_images: int | None) -> str:
    max_iter, batch, lr = run.get("max_iter"), run.get("batch"), run.get("lr")
    told = f"{max_iter} iterations"
    if batch is not None:
        told += f" of {batch} images"
        if num_images:
            told += f", {max_iter * batch / num_images:.3g} epochs of {num_images}"
    if lr is not None:
        told += f"; learning rate {lr:g}"
    if drops := drops_of(run):
        told += f", dropped after iteration {' and '.join(map(str, drops))}"
    return told


def _describe_periods(settings: TrainingSettings) -> str:
    evaluation = f"every {settings.eval_period} iterations" if settings.eval_period > 0 else "at the end"
    return f"evaluation {evaluation}, a checkpoint every {settings.checkpoint_period}"


def _tidy(handler: logging.StreamHandler) -> None:
    is_console = handler.stream in (sys.stdout, sys.stderr)
    if is_console:
        handler.addFilter(_is_for_the_terminal)
    wants_colours = is_console and (handler.stream.isatty() or bool(os.environ.get("FORCE_COLOR")))
    if not wants_colours and not isinstance(handler.formatter, _Plain):
        handler.setFormatter(_Plain(handler.formatter))


def _is_for_the_terminal(record: logging.LogRecord) -> bool:
    beginnings = _FILE_ONLY.get(record.name)
    return beginnings is None or not record.getMessage().startswith(beginnings)


def _explain(record: logging.LogRecord) -> bool:
    if isinstance(record.msg, str):
        record.msg = explain_missing_c(record.msg)
    return True


class _Plain(logging.Formatter):
    """Another formatter's text without colours."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return _COLOUR.sub("", self._inner.format(record))
