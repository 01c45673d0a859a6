import numpy as np
import pytest
from detectron2.data import Metadata
from detectron2.structures import BoxMode
from PIL import Image

from deformable_detr.detect.drawing import class_colour
from deformable_detr.report.gallery import PANEL_SIZE, draw_pair, draw_sheet, group_coco_detections

GRAY = (90, 90, 90)


@pytest.fixture
def metadata():
    return Metadata(name="two_classes", thing_classes=["cat", "dog"], thing_dataset_id_to_contiguous_id={3: 0, 7: 1})


@pytest.fixture
def dataset_dicts(tmp_path):
    """Three gray images of 100 x 50 pixels, each with one object and one crowd region."""
    dicts = []
    for image_id in (11, 12, 13):
        path = tmp_path / f"{image_id}.png"
        Image.new("RGB", (100, 50), GRAY).save(path)
        object_ = {"bbox": [10, 10, 30, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0}
        crowd = {**object_, "bbox": [60, 25, 30, 20], "iscrowd": 1}
        image = {"file_name": str(path), "image_id": image_id, "height": 50, "width": 100}
        dicts.append({**image, "annotations": [object_, crowd]})
    return dicts


def detection(*box, score=0.9):
    """A detection in the COCO results format with a box given as xyxy; category 7 is class 1."""
    x1, y1, x2, y2 = box
    return {"image_id": 11, "category_id": 7, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}


def pixels_of(png):
    with Image.open(png) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_coco_results_become_instances_with_contiguous_classes(dataset_dicts, metadata):
    found = [
        {"image_id": 12, "category_id": 7, "bbox": [10.0, 20.0, 30.0, 5.0], "score": 0.5},
        {"image_id": 12, "category_id": 3, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.25},
    ]
    predictions = group_coco_detections(found, dataset_dicts, metadata)
    assert [len(predictions[image_id]) for image_id in (11, 12, 13)] == [0, 2, 0]
    assert predictions[12].pred_boxes.tensor[0].tolist() == [10, 20, 40, 25]
    assert predictions[12].pred_classes.tolist() == [1, 0]
    assert predictions[12].scores.tolist() == [0.5, 0.25]


def test_boxes_are_drawn_where_they_are(dataset_dicts, metadata, tmp_path):
    """The true box shows on the left only, the detected one on the right only, the crowd region nowhere."""
    detected = [detection(60, 25, 90, 45)]
    pixels = pixels_of(draw_sheet(dataset_dicts[:1], metadata, detected, tmp_path / "sheet.png"))
    is_panel_row = (np.abs(pixels - 255).max(axis=2) > 0).mean(axis=1) > 0.9
    truth, found = np.split(pixels[is_panel_row], 2, axis=1)
    assert is_panel_row.sum() == PANEL_SIZE // 2  # the image is twice as wide as high

    def drawn_span(panel):
        coloured = np.ptp(panel, axis=2) > 60
        columns = np.flatnonzero(coloured.sum(axis=0) > 50)  # the upright sides of a box
        return columns.min() / PANEL_SIZE, columns.max() / PANEL_SIZE

    gap = 12 / PANEL_SIZE
    assert drawn_span(truth) == pytest.approx((0.1 + gap, 0.4 + gap), abs=0.02)
    assert drawn_span(found) == pytest.approx((0.6, 0.9), abs=0.03)


def test_detections_below_the_threshold_are_not_drawn(dataset_dicts, metadata, tmp_path):
    weak = [detection(60, 25, 90, 45, score=0.2)]
    with_weak = draw_sheet(dataset_dicts[:1], metadata, weak, tmp_path / "weak.png", score_threshold=0.3)
    without = draw_sheet(dataset_dicts[:1], metadata, [], tmp_path / "none.png")
    assert np.array_equal(pixels_of(with_weak), pixels_of(without))


@pytest.mark.parametrize("num_images, columns, rows", [(1, 2, 1), (2, 4, 1), (3, 4, 2), (9, 4, 2)])
def test_sheet_grows_with_the_number_of_images(dataset_dicts, metadata, tmp_path, num_images, columns, rows):
    png = draw_sheet(dataset_dicts, metadata, [], tmp_path / "sheet.png", num_images=num_images)
    with Image.open(png) as picture:
        assert picture.size == (columns * (PANEL_SIZE + 12) + 12, 96 + rows * (PANEL_SIZE // 2 + 12))


def test_nothing_to_draw_is_an_error(metadata, tmp_path):
    with pytest.raises(ValueError, match="the dataset two_classes is empty"):
        draw_sheet([], metadata, [], tmp_path / "sheet.png")


def test_dollar_signs_in_a_name_are_letters_and_not_a_formula(dataset_dicts, metadata, tmp_path):
    metadata = Metadata(**{**metadata.as_dict(), "thing_classes": ["cat", r"$\nothing$"]})
    png = draw_sheet(dataset_dicts[:1], metadata, [detection(60, 25, 90, 45)], tmp_path / "sheet.png")
    assert png.is_file()


def test_pair_has_two_pictures_of_the_image_that_differ_by_their_boxes_only(dataset_dicts, metadata):
    truth, found = draw_pair(dataset_dicts[0], metadata, group_coco_detections([], dataset_dicts, metadata)[11])
    assert truth.shape == found.shape == (PANEL_SIZE // 2, PANEL_SIZE, 3)
    assert (found == GRAY[0]).all()
    assert (truth != GRAY[0]).any()


def test_image_of_which_hardly_a_row_would_be_left_is_drawn(dataset_dicts, metadata):
    """4000 x 2 pixels are a fifth of a row as high."""
    Image.new("RGB", (4000, 2), GRAY).save(dataset_dicts[0]["file_name"])
    truth, found = draw_pair(dataset_dicts[0], metadata, group_coco_detections([], dataset_dicts, metadata)[11])
    assert truth.shape == found.shape == (1, PANEL_SIZE, 3)


def test_label_of_a_box_that_begins_outside_is_whole(dataset_dicts, metadata):
    """Wherever it begins, the left end of its label is at the border."""
    labels = []
    for left in (0, -8):
        found = group_coco_detections([detection(left, 25, 30, 45)], dataset_dicts, metadata)[11]
        _, panel = draw_pair(dataset_dicts[0], metadata, found)
        labels.append((panel == class_colour(1)).all(axis=2)[: PANEL_SIZE // 4 - 5])  # above the box
    assert labels[0].sum() > 100
    assert (labels[0] == labels[1]).all()
