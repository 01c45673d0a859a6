"""How messages are worded."""

import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# What PyTorch puts around an error of a process that loads data; the error's own words stand behind its stack.
_OF_A_WORKER = re.compile(r"Caught \w+ in DataLoader worker process .*\n +[^\n]*\n[\w.]+: (.*)", re.DOTALL)


def message_of(error: BaseException) -> str:
    """Return what an error says, for one line on a command line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        # Of a rename, the file that was to be.
        return f"{error.filename2 or error.filename}: {error.strerror}"
    # A KeyError's own text would be in quotes.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    of_a_worker = _OF_A_WORKER.match(text)
    return (of_a_worker[1] if of_a_worker else text).strip() or type(error).__name__


def name_first(names: Sequence[str], *, limit: int = 5) -> str:
    """Return the first names and how many there are beyond; "none" where there are none."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "") if names else "none"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, whose plural ends in "s": "1 image", "2 images", "0 images"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def suggest(name: str, known: Sequence[str], *, cutoff: float = 0.5) -> str:
    """Return the known name that a misspelt one is nearest to, as the end of a sentence; empty where none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def explain_missing_c(text: str) -> str:
    """Return Detectron2's report of the environment with what it means that its extension is not there.

    ``tools/install_detectron2.py`` leaves it out on purpose. One that cannot be loaded is reported as it is.
    """
    missing = "not built correctly: No module named 'detectron2._C'"
    return text.replace(missing, "not built, and not needed here")


@contextmanager
def ignoring_records(logger_name: str, *beginnings: str) -> Iterator[None]:
    """Drop a library's messages that mean nothing to a user of this project, while the block runs.

    Args:
        logger_name: of the very logger that they are given to.
        beginnings: of the messages, without white space before them.
    """

    def means_something(record: logging.LogRecord) -> bool:
        return not record.getMessage().lstrip().startswith(beginnings)

    logger = logging.getLogger(logger_name)
    logger.addFilter(means_something)
    try:
        yield
    finally:
        logger.removeFilter(means_something)
