"""``python -m deformable_detr.detect``, in process."""

import csv
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from deformable_detr.cli import run
from deformable_detr.detect import __main__ as command
from deformable_detr.detect import job
from deformable_detr.detect import predictor as predictor_module
from deformable_detr.detect.video import VideoError, VideoReader, VideoWriter

from .conftest import gray, serve_folder, write_video


@pytest.fixture
def photos(tmp_path, pixels):
    """A folder with two images of equal name in different folders, and one beside them."""
    for name in ("photos/a/x.png", "photos/b/x.png", "photos/y.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "photos"


def test_a_folder_gives_annotated_pictures_in_equal_folders_and_one_json(detect, photos, tmp_path, capsys):
    assert detect(photos, "--json", "--score", "0") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "300 detections in 3 images"
    out = tmp_path / "out"
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert written == ["a/x.png", "b/x.png", "detections.json", "y.jpg"]
    coco = COCO(str(out / "detections.json"))
    assert [image["file_name"] for image in coco.imgs.values()] == [
        str(photos / name) for name in ("y.jpg", "a/x.png", "b/x.png")
    ]
    assert all(image["width"] == 60 and image["height"] == 40 for image in coco.imgs.values())
    assert len(coco.anns) == 300
    x, y, width, height = coco.anns[1]["bbox"]
    assert 0 <= x < x + width <= 60 and 0 <= y < y + height <= 40


def test_files_of_equal_name_do_not_overwrite_each_other(detect, photos, tmp_path):
    assert detect(photos / "a" / "x.png", photos / "b" / "x.png") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.png", "x_2.png"]


def test_boxes_are_drawn_and_small_images_enlarged_for_it(detect, photos, tmp_path, pixels):
    assert detect(photos / "a" / "x.png", "--score", "0") == 0
    drawn = Image.open(tmp_path / "out" / "x.png")
    assert drawn.size == (640, 426)
    plain = Image.fromarray(pixels).resize(drawn.size, Image.Resampling.NEAREST)
    changed = np.abs(np.asarray(drawn).astype(int) - np.asarray(plain)).max(axis=2) > 60
    assert 0.01 < changed.mean() < 0.9


def test_images_that_cannot_be_read_are_named_and_the_others_go_on(detect, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes((photos / "y.jpg").read_bytes()[:-100])
    assert detect(photos, "missing.png", "--json", "--batch-size", "2") == 1
    captured = capsys.readouterr()
    assert "broken.jpg: image file is truncated" in captured.err
    assert "missing.png: there is no such file" in captured.err
    assert captured.out.splitlines()[-1] == "0 detections in 3 images, 2 failures"
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())["images"]) == 3


def test_an_empty_folder_is_an_error_and_the_others_go_on(detect, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert detect(tmp_path / "empty") == 1
    assert detect(tmp_path / "empty", photos) == 1
    captured = capsys.readouterr()
    assert captured.err.count(f"folder {tmp_path}/empty holds no image and no video; looked for .avif") == 2
    assert "in 3 images, 1 failure" in captured.out


def test_an_output_folder_that_cannot_be_written_is_named_before_a_model_is_loaded(
    detect, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(predictor_module, "load_model", lambda *_, **__: pytest.fail("loaded a model"))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit) as caught:
        detect(photos)
    assert caught.value.code == 2
    assert f"cannot write to output folder {tmp_path}/out: " in capsys.readouterr().err


def test_no_input_is_written_over(detect, photos, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (photos / "y.jpg").rename(tmp_path / "out" / "y.jpg")
    before = (tmp_path / "out" / "y.jpg").read_bytes()
    with pytest.raises(SystemExit):
        detect(tmp_path / "out" / "y.jpg")
    assert "would be written over an input" in capsys.readouterr().err
    assert (tmp_path / "out" / "y.jpg").read_bytes() == before


def test_a_picture_that_cannot_be_written_is_counted(detect, photos, tmp_path, capsys):
    (tmp_path / "out" / "y.jpg").mkdir(parents=True)
    assert detect(photos) == 1
    captured = capsys.readouterr()
    assert f"cannot write {tmp_path}/out/y.jpg: Is a directory" in captured.err
    assert captured.out.splitlines()[-1] == "0 detections in 3 images, 1 failure"


def test_images_at_addresses_are_fetched_and_missing_ones_named(detect, photos, tmp_path, capsys):
    with serve_folder(photos) as address:
        assert detect(f"{address}/y.jpg", f"{address}/none.jpg", (photos / "a" / "x.png").as_uri()) == 1
    assert f"cannot read image {address}/none.jpg: HTTP Error 404" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.png", "y.jpg"]


def test_results_can_be_compared_with_annotations(detect, write_coco, tmp_path):
    truth = write_coco(sizes=((80, 60), (60, 90)))
    categories = [{"id": 7 + i, "name": name} for i, name in enumerate(predictor_module.COCO_CLASSES_BY_ID) if name]
    truth.content["categories"] = categories
    for annotation in truth.content["annotations"]:
        annotation["category_id"] = 8
    truth.save()
    assert detect(truth.images, "--json", "--ids-from", truth.json, "--score", "0") == 0
    found = COCO(truth.json).loadRes(json.loads((tmp_path / "out" / "detections.json").read_text())["annotations"])
    assert found.getImgIds() == [10, 11]
    assert {annotation["category_id"] for annotation in found.anns.values()} <= {c["id"] for c in categories}
    # Of the classes that are shown alone the file needs no others.
    truth.content["categories"] = categories[:2]
    truth.save()
    shown = [category["name"] for category in categories[:2]]
    assert detect(truth.images, "--json", "--ids-from", truth.json, "--score", "0", "--classes", *shown) == 0


def test_ids_without_json_are_refused(detect, photos, capsys):
    with pytest.raises(SystemExit):
        detect(photos, "--ids-from", "instances.json")
    assert "give --json as well" in capsys.readouterr().err


def test_a_video_is_annotated_frame_by_frame(detect, pixels, tmp_path, capsys):
    write_video(tmp_path / "clip.mp4", [pixels] * 3)
    assert detect(tmp_path / "clip.mp4", "--json", "--score", "0", "--batch-size", "2") == 0
    video = VideoReader(str(tmp_path / "out" / "clip.mp4"))
    frames = list(video)
    assert len(frames) == 3 and video.fps == 12.5
    assert np.abs(frames[0].astype(int) - pixels).max() > 60
    images = json.loads((tmp_path / "out" / "detections.json").read_text())["images"]
    assert [image["frame_index"] for image in images] == [0, 1, 2]
    assert capsys.readouterr().out.splitlines()[-1] == "300 detections in 0 images, 3 video frames"


def test_videos_that_cannot_be_opened_are_named_and_the_others_go_on(detect, pixels, tmp_path, capsys):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "text.mp4").write_text("no video")
    write_video(folder / "whole.avi", [pixels] * 2, codec="MJPG")
    assert detect(folder, "missing.mp4") == 1
    captured = capsys.readouterr()
    assert f"video {folder}/text.mp4: no codec of this OpenCV opens it" in captured.err
    assert "video missing.mp4: there is no such file" in captured.err
    assert captured.out.splitlines()[-1] == "0 detections in 0 images, 2 video frames, 2 failures"
    assert (tmp_path / "out" / "whole.mp4").is_file()


def test_a_video_that_breaks_off_is_named_and_annotated_up_to_there(detect, pixels, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (10, *pixels.shape), dtype=np.uint8)
    write_video(tmp_path / "clip.avi", list(noise), codec="MJPG")
    content = (tmp_path / "clip.avi").read_bytes()
    (tmp_path / "clip.avi").write_bytes(content[: len(content) // 2])
    assert detect(tmp_path / "clip.avi") == 1
    captured = capsys.readouterr()
    assert "clip.avi: it breaks off after" in captured.err and "of the 10 frames" in captured.err
    assert 1 <= len(list(VideoReader(str(tmp_path / "out" / "clip.mp4")))) < 10


def test_another_codec_than_usual_is_announced(detect, pixels, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("deformable_detr.detect.video.CODECS", (("none", ".mp4"), ("MJPG", ".avi")))
    write_video(tmp_path / "clip.mp4", [pixels])
    assert detect(tmp_path / "clip.mp4") == 0
    assert f"wrote MJPG to {tmp_path}/out/clip.avi" in capsys.readouterr().err


def test_no_input_is_written_over_by_another_codec_either(detect, pixels, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("deformable_detr.detect.video.CODECS", (("none", ".mp4"), ("MJPG", ".avi")))
    clip = tmp_path / "out" / "clip.avi"
    clip.parent.mkdir()
    write_video(clip, [pixels], codec="MJPG")
    before = clip.read_bytes()
    assert detect(clip) == 1
    assert f"video {clip}: {clip} would be written over an input; choose another" in capsys.readouterr().err
    assert clip.read_bytes() == before


def test_a_video_that_cannot_be_written_is_named(detect, pixels, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("deformable_detr.detect.video.CODECS", ())
    write_video(tmp_path / "clip.mp4", [pixels])
    assert detect(tmp_path / "clip.mp4") == 1
    assert f"cannot write {tmp_path}/out/clip.mp4: this OpenCV writes none" in capsys.readouterr().err


def test_crops_texts_and_a_table_stand_beside_the_pictures(detect, photos, tmp_path, pixels):
    Image.fromarray(pixels).save(photos / "y.png")
    inputs = [photos / "y.jpg", photos / "y.png"]
    assert detect(*inputs, "--crops", "--txt", "--csv", "--json", "--score", "0", "--batch-size", "2") == 0
    out = tmp_path / "out"
    found = json.loads((out / "detections.json").read_text())
    names = {category["id"]: category["name"] for category in found["categories"]}
    assert (out / "classes.txt").read_text().splitlines() == list(names.values())
    labels = sorted(str(path.relative_to(out / "labels")) for path in (out / "labels").rglob("*.txt"))
    assert labels == ["y.txt", "y_2.txt"]
    with (out / "detections.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    best = found["annotations"][0]
    assert len(rows) == len(found["annotations"]) == 200
    assert (rows[0]["file_name"], rows[0]["frame_index"]) == (str(photos / "y.jpg"), "")
    assert rows[0]["category"] == names[best["category_id"]]
    assert [float(rows[0][key]) for key in ("score", "x", "y", "width", "height")] == [best["score"], *best["bbox"]]
    label, *box, score = (out / "labels" / "y.txt").read_text().splitlines()[0].split()
    assert list(names.values())[int(label)] == rows[0]["category"] and float(score) == best["score"]
    x, y, width, height = best["bbox"]
    centre = [(x + width / 2) / 60, (y + height / 2) / 40, width / 60, height / 40]
    assert list(map(float, box)) == pytest.approx(centre, abs=1e-4)
    crops = list((out / "crops").rglob("*.*"))
    assert len(crops) == 200 and {path.suffix for path in crops} == {".jpg", ".png"}
    assert (out / "crops" / rows[0]["category"] / "y_1.jpg").is_file()


def test_only_chosen_classes_are_shown_and_a_misspelt_one_gets_the_nearest(detect, photos, tmp_path, capsys):
    chosen = [name for name in predictor_module.COCO_CLASSES_BY_ID if name][:40]
    assert detect(photos / "y.jpg", "--score", "0", "--csv", "--classes", *chosen) == 0
    with (tmp_path / "out" / "detections.csv").open(newline="") as file:
        shown = {row["category"] for row in csv.DictReader(file)}
    assert shown and shown <= set(chosen)
    with pytest.raises(SystemExit) as caught:
        detect(photos / "y.jpg", "--classes", "person", "dining tabel")
    assert caught.value.code == 2
    assert "class 'dining tabel' is not one of the model's 80 classes: did you mean dining table" in (
        capsys.readouterr().err
    )


def test_files_of_frames_are_named_after_the_video_and_the_frame(detect, pixels, tmp_path):
    write_video(tmp_path / "clip.mp4", [pixels] * 2)
    assert detect(tmp_path / "clip.mp4", "--crops", "--txt", "--csv", "--score", "0") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in (out / "labels" / "clip").iterdir()) == ["000000.txt", "000001.txt"]
    assert len(list((out / "crops").glob("*/clip/000001_*.jpg"))) == 100
    with (out / "detections.csv").open(newline="") as file:
        assert [row["frame_index"] for row in csv.DictReader(file)] == ["0"] * 100 + ["1"] * 100


def test_a_bar_shows_how_far_a_video_is_where_somebody_sees_it(detect, pixels, tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "clip.mp4", [pixels] * 2)
    assert detect(tmp_path / "clip.mp4") == 0
    assert "frame" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert detect(tmp_path / "clip.mp4") == 0
    assert re.search(r"clip.mp4: 100%.* 2/2 \[.*frame", capsys.readouterr().err)


class Live:
    """Stands for a camera: frames, and then the end, an error, or Ctrl-C."""

    num_frames = 0
    fps = 10.0

    def __init__(self, end=None):
        self.end = end

    def __iter__(self):
        yield from [gray(50)] * 3
        if self.end:
            raise self.end

    def close(self):
        pass


@pytest.mark.parametrize(("end", "batch_size"), [(None, 1), (KeyboardInterrupt, 4)])
def test_a_camera_is_recorded_until_it_ends_or_somebody_stops_it(
    end, batch_size, detect, tmp_path, monkeypatch, capsys
):
    opened = []
    monkeypatch.setattr(job, "open_live", lambda path: opened.append(path) or Live(end))
    # What is live is never waited for: every frame is looked at and recorded before the next one is taken.
    assert detect("0", "--json", "--score", "0", "--batch-size", batch_size) == 0
    assert opened == ["0"]
    images = json.loads((tmp_path / "out" / "detections.json").read_text())["images"]
    assert [(image["file_name"], image["frame_index"]) for image in images] == [("camera_0", i) for i in range(3)]
    assert len(list(VideoReader(str(tmp_path / "out" / "camera_0.mp4")))) >= 1
    captured = capsys.readouterr()
    assert "camera_0: Ctrl-C ends it" in captured.err
    assert captured.out.splitlines()[-1] == "300 detections in 0 images, 3 video frames"


def test_a_live_source_is_left_after_its_time_and_one_that_fails_is_named(detect, monkeypatch, capsys):
    monkeypatch.setattr(job, "open_live", lambda path: Live(VideoError("it is gone")) if path == "1" else Live())
    clock = iter([0.0, 1.0, 1.9, 2.0])
    monkeypatch.setattr(job, "monotonic", lambda: next(clock))
    assert detect("0", "--seconds", "2") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 detections in 0 images, 2 video frames"
    monkeypatch.setattr(job, "monotonic", lambda: 0.0)
    assert detect("1", "--seconds", "2") == 1
    captured = capsys.readouterr()
    assert "video camera_1: it is gone" in captured.err and "Ctrl-C" not in captured.err
    assert captured.out.splitlines()[-1] == "0 detections in 0 images, 3 video frames, 1 failure"


def test_a_stream_in_the_network_is_annotated(detect, mjpeg_server, tmp_path, capsys):
    assert detect(mjpeg_server([gray(100)] * 4), "--seconds", "60") == 0
    assert (tmp_path / "out" / "video.mp4").is_file()
    assert "video frame" in capsys.readouterr().out


def test_detections_so_far_are_saved_when_somebody_stops_the_run(detect, photos, tmp_path, monkeypatch):
    original = job.save_image

    def stop_at_the_second(rgb, path):
        if path.parent.name == "a":
            raise KeyboardInterrupt
        original(rgb, path)

    monkeypatch.setattr(job, "save_image", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        detect(photos, "--json")
    images = json.loads((tmp_path / "out" / "detections.json").read_text())["images"]
    assert [image["id"] for image in images] == [1, 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "deformable_detr_R_51"], "deformable_detr_R_50_two_stage"),
        (["--model", "nowhere.yaml"], "there is no configuration file 'nowhere.yaml'"),
        (["--model", "deformable_detr_R_50", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--model", "deformable_detr_R_50", "--seconds", "0"], "--seconds must be above 0, got 0"),
    ],
)
def test_arguments_that_cannot_be_obeyed_are_named(photos, tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run(command.main, [str(photos), *arguments, "--output", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_writer_that_never_got_a_frame_leaves_no_file(tmp_path):
    VideoWriter(tmp_path / "a.mp4", 10).close()
    assert not (tmp_path / "a.mp4").exists()
