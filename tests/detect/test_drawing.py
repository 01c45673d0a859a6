"""Pictures as people see them: colours, lines, labels, letters."""

import itertools
import logging

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from matplotlib import font_manager, rcParams

from deformable_detr.detect import drawing
from deformable_detr.detect.drawing import class_colour, draw_boxes, draw_detections, draw_frame, place_labels

GRAY = 128


def gray(height, width):
    return np.full((height, width, 3), GRAY, dtype=np.uint8)


def instances_of(size, *rows):
    """Rows are (xyxy, score, class)."""
    boxes, scores, classes = zip(*rows, strict=True)
    found = Instances(size)
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes)
    return found


def test_80_classes_have_80_colours_that_can_be_told_apart():
    colours = np.array([class_colour(index) for index in range(80)])
    apart = [np.linalg.norm(one - other) for one, other in itertools.combinations(colours, 2)]
    assert min(apart) > 30  # of 441 between black and white
    assert np.linalg.norm(colours[0] - colours[60]) > 100  # person and dining table


def test_every_colour_is_another_one_than_gray_and_stays_when_there_are_more_classes():
    first = [class_colour(index) for index in range(64)]
    assert len({class_colour(index) for index in range(1203)}) == 1203
    assert [class_colour(index) for index in range(64)] == first
    assert min(max(colour) - min(colour) for colour in first) > 30


@pytest.mark.parametrize("height, width, line", [(480, 640, 2), (1920, 2560, 8)])
def test_lines_are_solid_and_of_a_width_that_follows_the_image(height, width, line):
    box = (width // 4, height // 2, width // 2, height * 3 // 4)
    drawn = draw_boxes(gray(height, width), [box], [0], ["x"])
    column = drawn[height // 2 + height // 8 :, width * 3 // 8]  # down from the middle of the box
    assert (column == class_colour(0)).all(axis=1).sum() == line
    assert ((column == class_colour(0)).all(axis=1) | (column == GRAY).all(axis=1)).all()


def test_the_first_box_lies_on_top():
    box = (20, 50, 180, 150)
    drawn = draw_boxes(gray(200, 200), [box, box], [3, 4], ["a", "b"])
    assert tuple(drawn[149, 100]) == class_colour(3)
    rows = [(box, 0.5, 4), (box, 0.9, 3)]
    assert tuple(draw_frame(gray(200, 200), instances_of((200, 200), *rows), "abcde")[149, 100]) == class_colour(3)


def test_labels_stay_inside_and_apart_and_the_first_at_its_box():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 300, (60, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 100, (60, 2))], axis=1).clip(0, 319)
    sizes = [(int(width), 14) for width in rng.integers(20, 90, 60)]
    places = place_labels(boxes, sizes, (320, 320))
    kept = [place for place in places if place]
    assert len(kept) == 60
    assert all(0 <= x0 < x1 <= 320 and 0 <= y0 < y1 <= 320 for x0, y0, x1, y1 in kept)
    for one, other in itertools.combinations(kept, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert places[0][:2] == (round(boxes[0, 0]), round(boxes[0, 1]) - 14)


def test_labels_of_equal_boxes_go_above_and_into_the_box_before_they_go_away():
    box = (100, 100, 200, 200)
    places = place_labels([box] * 5, [(60, 10)] * 5, (300, 300))
    assert [place[:2] for place in places[:4]] == [(100, 90), (100, 100), (100, 200), (100, 190)]
    assert places[4] is not None


def test_labels_without_room_are_left_out_from_the_last_on():
    assert place_labels([(0, 0, 99, 49)] * 3, [(60, 50)] * 3, (100, 50)) == [(0, 0, 60, 50), None, None]


def test_a_name_that_is_wider_than_the_image_is_written_smaller():
    text = "a class with a very long name 100%"
    assert 180 < drawing._fitting_line(text, 20, 200).width <= 200
    assert drawing._fitting_line("cat", 20, 200).width == drawing.Line("cat", 20).width


def test_parts_of_a_box_beyond_the_border_are_drawn_at_the_border():
    drawn = draw_boxes(gray(100, 100), [(-50, -50, 500, 500)], [0], [""])
    assert all((drawn[edge] == class_colour(0)).all() for edge in (np.s_[-1, :], np.s_[:, -1]))


def test_boxes_follow_a_picture_that_is_reduced_or_enlarged():
    found = instances_of((1000, 2000), ((1000.0, 500.0, 2000.0, 1000.0), 0.9, 0))
    drawn = draw_detections(gray(100, 200), found, ["x"])
    assert drawn.shape == (320, 640, 3)
    rows, columns = np.nonzero((drawn == class_colour(0)).all(axis=2)[160:])
    assert (columns.min(), columns.max(), rows.max()) == (320, 639, 159)
    assert draw_frame(gray(100, 200), found, ["x"]).shape == (100, 200, 3)


CACHES = (drawing._font_files, drawing._font_with, drawing._has_letters, drawing._warn_of_missing)


@pytest.fixture
def install(monkeypatch):
    """A function (letters -> file) that lets a machine have these fonts beside matplotlib's own, and no others."""

    def install(fonts=None):
        for function in CACHES:
            function.cache_clear()
        own = font_manager.findfont("DejaVu Sans")
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(fonts or {}))
        has = drawing._has_letters.__wrapped__
        known = {
            own: lambda letters: has(own, letters),
            **{file: set(own).issuperset for file, own in (fonts or {}).items()},
        }
        monkeypatch.setattr(drawing, "_has_letters", lambda file, letters: known[file](letters))

    yield install
    for function in CACHES:
        function.cache_clear()


def test_letters_that_no_font_has_are_named_once(install, caplog):
    install()
    names = ["cat", "猫 a", "कुत्ता"]
    assert drawing.missing_letters(names) == "".join(sorted(set("猫कुत्ता")))
    with caplog.at_level(logging.WARNING):
        for score in (0.5, 0.6):
            draw_frame(gray(50, 90), instances_of((50, 90), ((5, 20, 60, 45), score, 1)), names)
    assert [record.args for record in caplog.records] == [(drawing.missing_letters(names),)]


def test_words_are_taken_from_the_fonts_that_have_them(install):
    """A font of one script often has neither digits nor Latin letters."""
    install({"sans.ttf": "แมว", "both.ttf": "猫0123456789%"})
    assert drawing._split_by_font("猫 90%") == [("猫 90%", "both.ttf")]
    own = font_manager.findfont("DejaVu Sans")
    assert drawing._split_by_font("แมว 90%") == [("แมว ", "sans.ttf"), ("90%", own)]
    assert drawing._split_by_font("cat 90%") == [("cat 90%", own)]


def test_letters_are_taken_from_an_installed_font_that_has_them(caplog):
    if drawing.missing_letters("猫"):
        pytest.skip("no font with Chinese letters is installed")
    cat, dog = (draw_boxes(gray(50, 90), [(5, 20, 60, 45)], [0], [text]) for text in ("猫", "狗"))
    assert (cat != dog).any()  # the same box stands for every letter that is missing
    with drawing.matplotlib_letters(["cat", "猫"]):
        assert len(rcParams["font.family"]) == 2
    assert not caplog.records
