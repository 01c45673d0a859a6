"""The table of what is studied, ``study.yaml``, as data with checks."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..data.shapes import Scene
from ..wording import suggest

FILE = Path(__file__).with_name("study.yaml")


@dataclass(frozen=True)
class Study:
    """A question and the variants whose comparison answers it, in the order in which they are shown."""

    question: str
    variants: Sequence[str]


@dataclass(frozen=True)
class Variant:
    """A model that is trained.

    Attributes:
        label: what it is called on the page.
        model: of the model zoo, whose LazyConfig is the base.
        settings: overrides of it, key -> value; of a size they go before these.
        encoder, decoder: arguments of :func:`parts.encoder_layer` and :func:`parts.decoder_layer`; empty: as it is.
        lr_factor: of the size's learning rate.
        test_queries: numbers of queries to evaluate with after training.
        cost: about how long a cell takes, as a multiple of the others; longer ones go first.
    """

    label: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    encoder: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)
    lr_factor: float = 1.0
    test_queries: Sequence[int] = ()
    cost: float = 1.0


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        device: "cpu" or "cuda".
        images: "train" and "val" -> how many are drawn.
        scene: what they are like.
        iterations, eval_period: length of every training, and how often it is evaluated.
        lr: learning rate.
        levels: feature levels of multi-scale variants.
        backbone: arguments of :func:`parts.bottleneck_resnet`.
        rounds: of the timing.
        settings: overrides for all variants.
    """

    device: str
    images: dict[str, int]
    scene: Scene
    iterations: int
    eval_period: int
    lr: float
    levels: int
    backbone: dict[str, Any]
    rounds: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One training of the table."""

    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant}-{self.seed}"


@dataclass(frozen=True)
class Table:
    """All of ``study.yaml``."""

    studies: dict[str, Study]
    variants: dict[str, Variant]
    sizes: dict[str, Size]
    common: dict[str, Any]

    def cells(self, studies: Sequence[str], *, seeds: int) -> list[Cell]:
        """Return the cells of some studies, each once: all variants with the first seed before any with the second."""
        if seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {seeds}")
        names = dict.fromkeys(name for study in studies for name in self.studies[study].variants)
        return [Cell(name, seed) for seed in range(1, seeds + 1) for name in names]

    def longest_first(self, cells: Iterable[Cell]) -> list[Cell]:
        """Return cells in the order in which places side by side stay filled: within each seed the longest first."""
        return sorted(cells, key=lambda cell: (cell.seed, -self.variants[cell.variant].cost))

    def only(self, variants: Sequence[str]) -> "Table":
        """Return the table with some variants alone, and the studies that have one of them."""
        kept = {name: [v for v in study.variants if v in variants] for name, study in self.studies.items()}
        studies = {name: replace(self.studies[name], variants=names) for name, names in kept.items() if names}
        return replace(self, studies=studies)

    def settings(self, size: str, variant: str) -> dict[str, Any]:
        """Return overrides of a variant's LazyConfig, the more special ones over the more general."""
        return {**self.common, **self.sizes[size].settings, **self.variants[variant].settings}

    def fingerprint(self, size: str, cell: Cell) -> dict[str, Any]:
        """Return all that decides a cell's result, as JSON holds it."""
        chosen = asdict(self.sizes[size])
        # How often something is timed, labels, and what goes first decide nothing.
        del chosen["rounds"]
        variant = asdict(self.variants[cell.variant])
        del variant["label"], variant["cost"]
        return {"size": chosen, "common": self.common, "variant": variant, "seed": cell.seed}


@cache
def read_table() -> Table:
    """Read ``study.yaml``.

    Raises:
        ValueError: if a study names a variant that there is not.
    """
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    table = Table(
        studies={name: Study(**entry) for name, entry in content["studies"].items()},
        variants={name: Variant(**entry) for name, entry in content["variants"].items()},
        sizes={name: _read_size(entry) for name, entry in content["sizes"].items()},
        common=content["common"],
    )
    for name, study in table.studies.items():
        for variant in study.variants:
            if variant not in table.variants:
                raise ValueError(f"study {name} has no variant {variant}{suggest(variant, list(table.variants))}")
    return table


def _read_size(entry: dict[str, Any]) -> Size:
    scene = {name: tuple(value) if isinstance(value, list) else value for name, value in entry["scene"].items()}
    return Size(**{**entry, "scene": Scene(**scene)})
