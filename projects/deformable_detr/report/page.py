"""The page around the figures: one file, nothing loaded from elsewhere, no scripts.

Sections hold data, of the classes below; ``page.html`` says how each of them looks.
"""

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from PIL import Image

from .gallery import PAIR


@dataclass(frozen=True)
class Text:
    """A paragraph; ``missing`` where it stands in place of something that has no data."""

    text: str
    missing: bool = False


@dataclass(frozen=True)
class Heading:
    """A title within a section."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; numbers stand right."""

    rows: Sequence[Sequence[object]]
    header: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """A drawing with the words that replace it for those who cannot see it."""

    figure: Figure
    alt: str
    caption: str


@dataclass(frozen=True)
class Pair:
    """Ground truth and detections of an image, two RGB pictures (H, W, 3) uint8."""

    pictures: tuple[np.ndarray, np.ndarray]
    caption: str
    sides: ClassVar[tuple[str, str]] = PAIR


@dataclass(frozen=True)
class Grid:
    """Charts and pairs side by side, as many as fit."""

    parts: Sequence["Part"]
    small: bool = False


@dataclass(frozen=True)
class Verbatim:
    """Text as it is, behind a line that opens it."""

    summary: str
    text: str


Part = Text | Heading | Table | Chart | Pair | Grid | Verbatim


@dataclass(frozen=True)
class Section:
    """A part of the page with a title, which its anchor is made of."""

    title: str
    parts: Sequence[Part]

    @property
    def anchor(self) -> str:
        """Name of the section in links."""
        return self.title.lower().replace(" ", "-")


def render(title: str, state: str, sections: Sequence[Section]) -> str:
    """Return the whole document; every text in it is escaped."""
    environment = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"svg": _svg, "jpeg": _jpeg, "kind": lambda value: type(value).__name__}
    page = environment.get_template("page.html").render(title=title, state=state, sections=sections)
    # Names of files may hold what is no text, which has no UTF-8.
    return page.encode(errors="replace").decode()


def _svg(figure: Figure) -> str:
    """Return the address of a drawing, its letters left to the reader's own fonts, so that every script can be read."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _address(buffer.getvalue(), "svg+xml")


def _jpeg(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=82)
    return _address(buffer.getvalue(), "jpeg")


def _address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
