"""Colours, letters and labelled boxes: what every picture of detections and ground truth is drawn with."""

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
from detectron2.structures import Instances
from matplotlib import font_manager, rc_context
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

# Longer side of a picture in pixels: labels are legible from the first on, and drawing more than the second takes
# gigabytes.
SMALLEST_PICTURE = 640
LARGEST_PICTURE = 4096

# Shares of the mean side of a picture, with their smallest values in pixels.
_LINE_WIDTH, _MIN_LINE_WIDTH = 0.0035, 2
_LETTER_HEIGHT, _MIN_LETTER_HEIGHT = 0.02, 12
_PADDING = 3  # px left and right of a label's text
# Linear RGB -> cone responses -> OKLab (B. Ottosson, 2020), in which distances are differences that people see.
_TO_CONES = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
_TO_OKLAB = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])

logger = logging.getLogger(__name__)


def class_colour(index: int) -> tuple[int, int, int]:
    """Return the RGB colour of a class; those of the first hundreds of classes are all different."""
    return _palette(64 * (index // 64 + 1))[index]


@cache
def _palette(count: int) -> list[tuple[int, int, int]]:
    """Blue, and then always the colour that differs most from all before: more colours leave the first as they are."""
    levels = np.linspace(0, 255, 16).round()
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    oklab = np.cbrt(_linear(colours) @ _TO_CONES.T) @ _TO_OKLAB.T
    # Neither as dark as shadows nor as pale as the sky, nor gray.
    vivid = (oklab[:, 0] > 0.4) & (oklab[:, 0] < 0.93) & (np.hypot(oklab[:, 1], oklab[:, 2]) > 0.07)
    colours, oklab = colours[vivid], oklab[vivid]
    chosen = [int(np.square(colours - (34, 119, 238)).sum(axis=1).argmin())]
    distance = np.full(len(colours), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.square(oklab - oklab[chosen[-1]]).sum(axis=1))
        chosen.append(int(distance.argmax()))
    return [tuple(colour) for colour in colours[chosen].astype(int).tolist()]


def _linear(colours: np.ndarray) -> np.ndarray:
    """sRGB in [0, 255] -> linear in [0, 1]."""
    return ((np.asarray(colours) / 255 + 0.055) / 1.055) ** 2.4


def _ink_on(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever has more contrast with a colour."""
    return "black" if _linear(colour) @ (0.2126, 0.7152, 0.0722) > 0.18 else "white"


def as_text(name: str) -> str:
    """Return a name as matplotlib must be given it: between two dollar signs it would read a formula."""
    return name.replace("$", r"\$")


@cache
def _font_files() -> list[str]:
    """matplotlib's own font first, then those of this machine, plain ones before bold and italic ones."""
    installed = sorted(font_manager.findSystemFonts())
    styles = ("Serif", "Mono", "Bold", "Black", "Light", "Thin", "Italic", "Oblique")
    return [font_manager.findfont("DejaVu Sans"), *sorted(installed, key=lambda p: sum(style in p for style in styles))]


@cache
def _has_letters(file: str, letters: frozenset[str]) -> bool:
    try:
        font = FT2Font(file)
    except RuntimeError:  # a file that FreeType cannot read
        return False
    # Fonts of fixed sizes, such as those of emoji, cannot be drawn in the size that is wanted.
    return not font.num_fixed_sizes and all(font.get_char_index(ord(letter)) for letter in letters)


@cache
def _font_with(letters: frozenset[str]) -> str | None:
    """Return the first font that has all letters."""
    return next((file for file in _font_files() if _has_letters(file, letters)), None)


def missing_letters(texts: Iterable[str]) -> str:
    """Letters that no font on this machine has, so that pictures show boxes in their place."""
    letters = sorted({letter for text in texts for letter in text if not letter.isspace()})
    return "".join(letter for letter in letters if _font_with(frozenset(letter)) is None)


@cache
def _warn_of_missing(names: tuple[str, ...]) -> None:
    if missing := missing_letters(names):
        logger.warning("no font on this machine has the letters %s: pictures show boxes in their place", missing)


def _split_by_font(text: str) -> list[tuple[str, str]]:
    """Return a text as a whole, or word by word where no font has all of its letters, with files of fonts."""
    words = [text] if _font_with(frozenset(text) - {" "}) else re.split(r"(?<= )", text)
    return [(word, _font_with(frozenset(word) - {" "}) or _font_files()[0]) for word in words]


@contextmanager
def matplotlib_letters(names: Iterable[str]) -> Iterator[None]:
    """Let matplotlib take letters from every font that is needed for names; of those that none has a warning tells."""
    names = tuple(names)
    _warn_of_missing(names)
    files = {file: None for name in ("", *names) for _, file in _split_by_font(name)}
    for file in files:
        font_manager.fontManager.addfont(file)
    families = [FT2Font(file).family_name for file in files]
    with rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


class Line:
    """A line of text with letters of a height in pixels, from whatever fonts have them.

    Attributes:
        width, height: of the whole, in pixels.
    """

    def __init__(self, text: str, letter_height: int) -> None:
        self._parts = [(part, _load_font(file, letter_height)) for part, file in _split_by_font(text)]
        self._ascent = max(font.getmetrics()[0] for _, font in self._parts)
        self.width = round(sum(font.getlength(part) for part, font in self._parts))
        self.height = self._ascent + max(font.getmetrics()[1] for _, font in self._parts)

    def draw(self, draw: ImageDraw.ImageDraw, left: float, top: float, colour: str) -> None:
        for part, font in self._parts:
            draw.text((left, top + self._ascent), part, fill=colour, font=font, anchor="ls")
            left += font.getlength(part)


@cache
def _load_font(file: str, height: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, height)


def draw_boxes(
    picture: np.ndarray, boxes: Sequence[Sequence[float]], classes: Sequence[int], texts: Sequence[str]
) -> np.ndarray:
    """Draw labelled boxes, in lines and letters of sizes that follow the picture.

    The first box lies on top. No label covers another: it stands at its box where there is room, else at the nearest
    free place with a line to its box; where nothing is free, those of the last boxes are left out.

    Args:
        picture: uint8 RGB (H, W, 3), which stays as it is.
        boxes: xyxy in pixels of the picture, the most important first; parts beyond the border are not drawn.
        classes: their indices, which give the colours.
        texts: their labels.

    Returns:
        uint8 RGB (H, W, 3).
    """
    height, width = picture.shape[:2]
    thickness = max(_MIN_LINE_WIDTH, round(_LINE_WIDTH * (height + width) / 2))
    letters = max(_MIN_LETTER_HEIGHT, round(_LETTER_HEIGHT * (height + width) / 2))
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4).clip(0, [width - 1, height - 1] * 2)
    colours = [class_colour(index) for index in classes]
    for box, colour in reversed(list(zip(boxes.tolist(), colours, strict=True))):
        draw.rectangle(box, outline=colour, width=thickness)
    lines = [_fitting_line(text, letters, width - 2 * _PADDING) for text in texts]
    sizes = [(line.width + 2 * _PADDING, line.height) for line in lines]
    places = place_labels(boxes.tolist(), sizes, (width, height))
    labels = [label for label in zip(places, boxes.tolist(), colours, lines, strict=True) if label[0]]
    for (left, top, right, bottom), (x0, y0, x1, y1), colour, _ in labels:
        nearest = min(max(left, x0), x1), min(max(top, y0), y1)
        draw.line([((left + right) / 2, (top + bottom) / 2), nearest], fill=colour, width=max(1, thickness // 2))
    for (left, top, right, bottom), _, colour, line in labels:
        draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
        line.draw(draw, left + _PADDING, top, _ink_on(colour))
    return np.asarray(image)


def _fitting_line(text: str, height: int, width: int) -> Line:
    """Return a line that is smaller than wanted where it would be wider than there is room."""
    line = Line(text, height)
    return line if line.width <= width else Line(text, max(1, height * width // line.width))


def place_labels(
    boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]], picture_size: tuple[int, int]
) -> list[tuple[int, int, int, int] | None]:
    """Find a place for every label, inside of the picture and apart from the others; the first ones choose first.

    Args:
        boxes: xyxy.
        sizes: (w, h) of their labels.
        picture_size: (W, H).

    Returns:
        The xyxy of each label, the lower ends exclusive; None where nothing is free any more.
    """
    taken = np.empty((0, 4))
    places: list[tuple[int, int, int, int] | None] = []
    for (x0, y0, x1, y1), size in zip(boxes, sizes, strict=True):
        w, h = size
        room = np.maximum(np.subtract(picture_size, size), 0)
        at_box = np.array([(x, y) for x in (x0, x1 - w) for y in (y0 - h, y0, y1, y1 - h)]).clip(0, room).round()
        free = _free_places(at_box, size, taken)
        if not len(free):
            steps = np.meshgrid(np.arange(0, room[0] + 1, max(w // 4, 1)), np.arange(0, room[1] + 1, h))
            free = _free_places(np.stack(steps, axis=-1).reshape(-1, 2), size, taken)
            free = free[np.square(free[:, :2] - (x0, y0 - h)).sum(axis=1).argsort(kind="stable")]
        taken = np.concatenate([taken, free[:1]])
        places.append(tuple(free[0].astype(int).tolist()) if len(free) else None)
    return places


def _free_places(corners: np.ndarray, size: tuple[int, int], taken: np.ndarray) -> np.ndarray:
    """Those (n, 4) of the places of a size at left upper corners (m, 2) that share no pixel with one that is taken."""
    places = np.concatenate([corners, corners + size], axis=1)
    low = np.maximum(places[:, None, :2], taken[None, :, :2])
    high = np.minimum(places[:, None, 2:], taken[None, :, 2:])
    return places[~(low < high).all(axis=2).any(axis=1)]


def draw_detections(picture: np.ndarray, instances: Instances, class_names: Sequence[str]) -> np.ndarray:
    """Draw boxes and labels on an image, enlarged to ``SMALLEST_PICTURE`` where it is smaller.

    Args:
        picture: uint8 RGB (h, w, 3), perhaps a reduced copy of the image that the boxes are for.
        instances: ``pred_boxes`` xyxy in pixels of ``image_size``, ``scores``, ``pred_classes``.

    Returns:
        uint8 RGB.
    """
    scale = max(1.0, SMALLEST_PICTURE / max(picture.shape[:2]))
    if scale > 1:
        height, width = picture.shape[:2]
        picture = np.asarray(Image.fromarray(picture).resize((int(width * scale), int(height * scale))))
    return draw_frame(picture, instances, class_names)


def draw_frame(picture: np.ndarray, instances: Instances, class_names: Sequence[str]) -> np.ndarray:
    """:func:`draw_detections` without enlarging: a frame of a video stays as large as it is."""
    _warn_of_missing(tuple(class_names))
    height, width = picture.shape[:2]
    instances = instances[instances.scores.argsort(descending=True, stable=True)]
    boxes = instances.pred_boxes.clone()
    boxes.scale(width / instances.image_size[1], height / instances.image_size[0])
    classes, scores = instances.pred_classes.tolist(), instances.scores.tolist()
    texts = [f"{class_names[label]} {score:.0%}" for label, score in zip(classes, scores, strict=True)]
    return draw_boxes(picture, boxes.tensor.tolist(), classes, texts)
