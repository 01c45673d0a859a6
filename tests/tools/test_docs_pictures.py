"""What the documentation's pictures are put together with; a browser is needed for the rest."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    """The module, which imports its neighbour as a script does."""
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.delitem(sys.modules, "demo", raising=False)
    spec = importlib.util.spec_from_file_location("docs_pictures", TOOLS / "docs_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "demo")
    return module


def test_pictures_in_a_row_are_equally_high_and_fill_it(tool):
    red, blue = Image.new("RGB", (300, 100), "red"), Image.new("RGB", (50, 100), "blue")
    sheet = tool.grid([[red, blue], [red]])
    # (1280 - 6) / (3 + 0.5) = 364; then 6 of white, and 1280 / 3 = 426.7.
    assert sheet.size == (1280, 364 + 6 + 427)
    colours = [sheet.getpixel(place) for place in ((0, 363), (1091, 363), (1095, 363), (1098, 0), (1279, 363))]
    assert colours == [(255, 0, 0), (255, 0, 0), (255, 255, 255), (0, 0, 255), (0, 0, 255)]
    assert sheet.getpixel((600, 367)) == (255, 255, 255) and sheet.getpixel((600, 371)) == (255, 0, 0)


def test_photos_of_the_grid_are_ones_that_the_demo_has(tool):
    images = tool.ROOT / tool.PHOTOS / "images"
    names = [f"{photo:012}.jpg" for row in tool.ROWS for photo in row] + [tool.DETECTED, tool.EXPLAINED]
    assert all((images / name).is_file() for name in names)


def test_a_missing_browser_or_page_is_named(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="none of chromium, .*chrome"):
        tool.photograph(tmp_path / "a.html", 10, 10)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    with pytest.raises(FileNotFoundError, match="a.html: run make demo first"):
        tool.photograph(tmp_path / "a.html", 10, 10)
    (tmp_path / "a.html").write_text("<p>")
    with pytest.raises(RuntimeError, match="took no picture of .*a.html"):
        tool.photograph(tmp_path / "a.html", 10, 10)
