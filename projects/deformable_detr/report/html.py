"""The page around the figures: one file, nothing loaded from elsewhere, no scripts."""

import base64
import io
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .gallery import PAIR

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: #fff; color: #1c1c1c;
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; border-top: 1px solid #ddd;
       padding-top: 1rem; }
p { margin: .4rem 0; } .state { color: #444; } .none { color: #666; font-style: italic; }
nav a { margin-right: .9rem; white-space: nowrap; } a { color: #1d5c96; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.small { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
figure { margin: 0; min-width: 0; } figure img { max-width: 100%; height: auto; }
.grid figure img { width: 100%; }
figcaption { font-size: .88rem; color: #444; } .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
table { border-collapse: collapse; margin: .5rem 0; } th, td { text-align: left; vertical-align: top;
       padding: .15rem .9rem .15rem 0; border-bottom: 1px solid #eee; } td.number { text-align: right; }
pre { overflow-x: auto; background: #f6f6f6; padding: .6rem; font-size: .8rem; line-height: 1.35;
       overflow-wrap: normal; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: plain text; the anchor is made of it.
        parts: HTML.
    """

    title: str
    parts: Sequence[str]

    @property
    def anchor(self) -> str:
        """Name of the section in links."""
        return self.title.lower().replace(" ", "-")


def page(title: str, state: str, sections: Iterable[Section]) -> str:
    """The whole document.

    Args:
        title, state: plain text.
    """
    sections = list(sections)
    links = "\n".join(f'<a href="#{escape(part.anchor)}">{escape(part.title)}</a>' for part in sections)
    body = "\n".join(
        f'<section id="{escape(part.anchor)}">\n<h2>{escape(part.title)}</h2>\n'
        + "\n".join(part.parts)
        + "\n</section>"
        for part in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="state">{escape(state)}</p>
<nav>{links}</nav>
{body}
</body>
</html>
"""


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def nothing(reason: str) -> str:
    """What stands in place of a figure that has no data."""
    return f'<p class="none">{escape(reason)}</p>'


def figure(drawing: Figure, *, alt: str, caption: str = "") -> str:
    """A drawing as SVG, its letters left to the reader's own fonts, so that every script can be read."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    return _captioned(_img(buffer.getvalue(), "svg+xml", alt), caption)


def picture_pair(left: np.ndarray, right: np.ndarray, *, alt: str, caption: str) -> str:
    """Two RGB pictures (H, W, 3) uint8 side by side.

    Args:
        alt: said of both; "left" and "right" are added.
    """
    images = (_img(_jpeg(pixels), "jpeg", f"{alt}: {side}") for pixels, side in zip((left, right), PAIR, strict=True))
    return _captioned(f'<div class="pair">{"".join(images)}</div>', caption)


def grid(figures: Iterable[str], *, small: bool = False) -> str:
    """Figures side by side, as many as fit."""
    return f'<div class="grid{" small" if small else ""}">\n' + "\n".join(figures) + "\n</div>"


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Cells of plain text; numbers stand right."""
    head = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr>" if header else ""
    body = ("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return "<table>" + head + "\n".join(body) + "</table>"


def preformatted(summary: str, text: str) -> str:
    """Text as it is, behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def _cell(value: object) -> str:
    style = ' class="number"' if isinstance(value, int | float) else ""
    return f"<td{style}>{escape(str(value))}</td>"


def _captioned(content: str, caption: str) -> str:
    return f"<figure>{content}" + (f"<figcaption>{escape(caption)}</figcaption>" if caption else "") + "</figure>"


def _img(data: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=82)
    return buffer.getvalue()
