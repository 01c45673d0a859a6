"""Makes the pictures of the README and of ``docs/`` from what ``make demo`` has left in ``output/demo``::

    python tools/docs_pictures.py            # all of them
    python tools/docs_pictures.py photos     # those of the demo's second part alone; "shapes" for the first

Pages are photographed by Chromium or Chrome, which must be installed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from demo import PHOTOS, ROOT, photos_folder
from demo import run as run_command
from PIL import Image

from deformable_detr import cli

DEMO = Path("output/demo")
DOCS = ROOT / "docs"
# Six of the ten photos, in two rows that come out equally high.
ROWS = ((423617, 377575, 599), (160012, 72, 214753))
DETECTED = "000000160012.jpg"
EXPLAINED = "000000214753.jpg"
# Sections of the report, in three columns.
COLUMNS = (("average-precision", "precision-and-recall"), ("confusion", "scores"), ("most-wrong-images", "test-images"))
WIDTH = 1280  # px
_GAP = 6  # px
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def make_photos() -> None:
    """Detections in photos, the sampling points of two detections, and the page that shows those."""
    detections = ROOT / photos_folder(DEMO) / "detections"
    save(grid([[Image.open(detections / f"{photo:012}.jpg") for photo in row] for row in ROWS]), "photos")
    save(Image.open(detections / DETECTED), "detect")
    with tempfile.TemporaryDirectory() as folder:
        data = [str(PHOTOS / "images" / EXPLAINED), "--model", str(photos_folder(DEMO))]
        truth = ["--ground-truth", str(PHOTOS / "instances.json")]
        run_command(["-m", "deformable_detr.explain", *data, "--detections", "2", *truth, "--output", folder])
        page = Path(folder, f"{Path(EXPLAINED).stem}_explained.html")
        save(Image.open(page.with_suffix(".png")), "explain")
        save(photograph(page, 1100, 870), "explain_page")


def make_shapes() -> None:
    """Detections beside the ground truth, and the report."""
    save(Image.open(ROOT / DEMO / "detections.png"), "demo_detections")
    page = ROOT / DEMO / "report.html"
    save(grid([[photograph_sections(page, sections, 1000, 1200) for sections in COLUMNS]]), "report")


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Lay out pictures in rows of ``WIDTH``, in each of which all are equally high."""
    scaled = []
    for row in rows:
        height = (WIDTH - _GAP * (len(row) - 1)) / sum(picture.width / picture.height for picture in row)
        sizes = [(round(height * picture.width / picture.height), round(height)) for picture in row]
        scaled.append([picture.convert("RGB").resize(size) for picture, size in zip(row, sizes, strict=True)])
    sheet = Image.new("RGB", (WIDTH, sum(row[0].height + _GAP for row in scaled) - _GAP), "white")
    top = 0
    for row in scaled:
        left = 0
        for picture in row:
            sheet.paste(picture, (left, top))
            left += picture.width + _GAP
        top += row[0].height + _GAP
    return sheet


def photograph(page: Path, width: int, height: int) -> Image.Image:
    """Return what a browser shows of a page in a window of so many pixels.

    Raises:
        FileNotFoundError: there is no page, or no browser.
        RuntimeError: the browser took no picture.
    """
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError(f"pages are photographed by a browser, and there is none of {', '.join(_BROWSERS)}")
    if not page.is_file():
        raise FileNotFoundError(f"there is no {page}: run make demo first")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "page.png")
        # As root Chromium runs without its sandbox or not at all.
        flags = ["--headless", "--hide-scrollbars", *["--no-sandbox"] * (os.name == "posix" and os.geteuid() == 0)]
        flags += [f"--user-data-dir={folder}/profile", f"--window-size={width},{height}", f"--screenshot={picture}"]
        ended = subprocess.run([browser, *flags, page.resolve().as_uri()], capture_output=True, text=True, check=False)
        if not picture.is_file():
            raise RuntimeError(f"{browser} took no picture of {page}: {ended.stderr.strip()[-500:]}")
        return Image.open(picture).convert("RGB")


def photograph_sections(page: Path, sections: Sequence[str], width: int, height: int) -> Image.Image:
    """As :func:`photograph`, of a copy of the page that has these sections alone."""
    shown = ", ".join(f"#{section}" for section in sections)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, page.name)
        style = f"<style>body > * {{ display: none }} {shown} {{ display: block }}</style>"
        copy.write_text(page.read_text(encoding="utf-8") + style, encoding="utf-8")
        return photograph(copy, width, height)


def save(picture: Image.Image, name: str) -> None:
    """Write a picture of at most ``WIDTH`` pixels below docs/."""
    picture = picture.convert("RGB")
    if picture.width > WIDTH:
        picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)))
    path = DOCS / f"{name}.jpg"
    picture.save(path, quality=80, optimize=True)
    print(f"{path.relative_to(ROOT)}: {picture.width}x{picture.height}, {path.stat().st_size // 1000} KB")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    makers = {"photos": make_photos, "shapes": make_shapes}
    parser.add_argument("parts", nargs="*", metavar="PART", help="photos or shapes (default: both)")
    parts = parser.parse_args(argv).parts
    if unknown := set(parts) - makers.keys():
        parser.error(f"PART must be photos or shapes, got {', '.join(sorted(unknown))}")
    for part in parts or makers:
        makers[part]()


if __name__ == "__main__":
    sys.exit(cli.run(main))
