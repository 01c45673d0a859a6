"""YOLO's lines and crops, by hand."""

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from deformable_detr.detect.outputs import SideFiles, cut_out, yolo_lines


def found(*boxes, size=(40, 80)):
    return Instances(
        size,
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.linspace(0.5, 0.25, len(boxes)),
        pred_classes=torch.arange(len(boxes)),
    )


def test_a_line_has_label_centre_size_and_score_as_shares_of_the_image():
    lines = yolo_lines(found((0, 0, 80, 40), (20, 10, 40, 30)))
    assert lines == [
        "0 0.500000 0.500000 1.000000 1.000000 0.500000",
        "1 0.375000 0.500000 0.250000 0.500000 0.250000",
    ]


def test_a_crop_has_every_pixel_that_the_box_touches_and_at_least_one():
    rgb = np.arange(40 * 80 * 3).reshape(40, 80, 3)
    touched, at_corner = cut_out(rgb, found((10.5, 20.0, 12.1, 21.5), (80, 40, 80, 40)))
    assert np.array_equal(touched, rgb[20:22, 10:13])
    assert np.array_equal(at_corner, rgb[39:, 79:])


def test_frames_do_not_overwrite_what_an_image_in_a_folder_of_that_name_got(tmp_path):
    files = SideFiles(tmp_path, ["a"], crops=True, txt=True)
    rgb = np.zeros((40, 80, 3), np.uint8)
    files.write(tmp_path / "Clip" / "000000.jpg", rgb, found())
    for frame in range(2):
        files.write(tmp_path / "clip.mp4", rgb, found((0, 0, 9, 9)), frame=frame)
    written = sorted(str(path.relative_to(tmp_path / "labels")) for path in tmp_path.glob("labels/*/*"))
    assert written == ["Clip/000000.txt", "clip_2/000000.txt", "clip_2/000001.txt"]
    assert (tmp_path / "labels" / "Clip" / "000000.txt").read_text() == ""
    assert (tmp_path / "crops" / "a" / "clip_2" / "000000_1.jpg").is_file()


def test_an_image_without_detections_gets_an_empty_text_and_class_names_make_folders(tmp_path):
    files = SideFiles(tmp_path, ["a/b: c", "../"], crops=True, txt=True)
    rgb = np.zeros((40, 80, 3), np.uint8)
    files.write(tmp_path / "x.png", rgb, found())
    files.write(tmp_path / "y.jpg", rgb, found((0, 0, 9, 9), (0, 0, 9, 9)))
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert written == ["classes.txt", "crops/___/y_2.jpg", "crops/a_b_ c/y_1.jpg", "labels/x.txt", "labels/y.txt"]
    assert (tmp_path / "labels" / "x.txt").read_text() == ""
