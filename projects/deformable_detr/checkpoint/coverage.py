"""What happened to every parameter when a checkpoint was converted."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

# What our names of parameters begin with, or end with, that no detection depends on.
TRAINING_ONLY = "denoising."
COUNTER = ".num_batches_tracked"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model; the message says why and what to do."""


@dataclass
class ConversionReport:
    """Where each parameter of a converted checkpoint went.

    Attributes:
        source: the naming scheme that was found.
        used: our name -> the names in the checkpoint that it was made from.
        mapped: our name -> what was done to the tensor beyond renaming it.
        dropped: name in the checkpoint -> why it was not used.
        missing: our name -> why the model keeps its own initial value.
        class_names: of the rows of the converted class heads; None where they are not known.
        note: how the other project computes otherwise with the same weights; may be empty.
        mismatch: how many classes the file and the configuration have, where these differ and the rows could not be
            found by name; may be empty.
        class_note: which class came from which row, where that is not simply the same order; may be empty.
    """

    source: str
    used: dict[str, tuple[str, ...]] = field(default_factory=dict)
    mapped: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    class_names: Sequence[str | None] | None = None
    note: str = ""
    mismatch: str = ""
    class_note: str = ""

    @property
    def exact(self) -> bool:
        """Whether the checkpoint holds this very model: every parameter used as it is, none missing or dropped."""
        return not (self.mapped or self.dropped or self.missing)

    @property
    def undetermined(self) -> list[str]:
        """Our names of the missing parameters that detections depend on."""
        return [key for key in self.missing if not (key.startswith(TRAINING_ONLY) or key.endswith(COUNTER))]

    def __str__(self) -> str:
        rows = [("used", len(self.used), "", _first(self.used))]
        for outcome in ("mapped", "dropped", "missing"):
            rows += [(outcome, *row) for row in _group_by_reason(getattr(self, outcome))]
        table = tabulate(rows, headers=("outcome", "keys", "detail", "for example"), tablefmt="pipe")
        heading = ". ".join(filter(None, (f"Checkpoint with {self.source} names", self.mismatch)))
        return "\n".join(filter(None, (f"{heading}:", table, self.note, self.class_note)))


def _first(keys: Iterable[str]) -> str:
    return next(iter(keys), "")


def _group_by_reason(reasons: Mapping[str, str]) -> list[tuple[int, str, str]]:
    """Return (number of keys, reason, first key) for every distinct reason."""
    groups = defaultdict(list)
    for key, reason in reasons.items():
        groups[reason].append(key)
    return [(len(keys), reason, _first(keys)) for reason, keys in groups.items()]
