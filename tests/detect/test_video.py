"""Videos are read and written as RGB; what OpenCV cannot do is named."""

import cv2
import numpy as np
import pytest

from deformable_detr.detect.video import CODECS, VideoError, VideoReader, VideoWriter

RED, BLUE = (np.full((48, 64, 3), colour, np.uint8) for colour in ((250, 10, 10), (10, 10, 250)))


def test_what_is_written_is_read_again(tmp_path):
    writer = VideoWriter(tmp_path / "new" / "a.mp4", 12.5)
    for frame in (RED, RED, BLUE):
        writer.write(frame)
    writer.close()
    assert writer.path == tmp_path / "new" / "a.mp4"
    video = VideoReader(str(writer.path))
    assert (video.fps, video.num_frames) == (12.5, 3)
    frames = np.stack(list(video)).astype(int)
    # The codec loses some; red and blue exchanged would be off by 240.
    assert np.abs(frames - np.stack([RED, RED, BLUE])).max() < 30


def test_without_mp4v_motion_jpeg_is_written(tmp_path, monkeypatch):
    _refuse(monkeypatch, "mp4v")
    writer = VideoWriter(tmp_path / "a.mp4", 10)
    writer.write(RED)
    writer.close()
    assert (writer.path, writer.codec) == (tmp_path / "a.avi", "MJPG")
    assert len(list(VideoReader(str(writer.path)))) == 1


def test_without_any_codec_the_file_and_the_codecs_are_named(tmp_path, monkeypatch):
    _refuse(monkeypatch, *(codec for codec, _ in CODECS))
    with pytest.raises(VideoError, match="a.mp4: .* none of the codecs mp4v in .mp4, MJPG in .avi"):
        VideoWriter(tmp_path / "a.mp4", 10).write(RED)


def test_a_frame_of_another_size_is_not_lost_silently(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 10)
    writer.write(RED)
    with pytest.raises(VideoError, match=r"\(64, 40\) pixels large, the first was \(64, 48\)"):
        writer.write(RED[:40])
    writer.close()


def test_a_file_that_stays_empty_is_named(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 10)
    writer.write(RED)
    writer._writer.release()
    writer.path.unlink()
    with pytest.raises(VideoError, match="a.mp4 with codec mp4v: the file stayed empty"):
        writer.close()


@pytest.mark.parametrize("name, message", [("none.mp4", "no such file"), ("text.mp4", "no codec")])
def test_what_is_no_video_is_refused(tmp_path, name, message):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match=message):
        VideoReader(str(tmp_path / name))


def test_a_video_without_a_frame_is_refused(tmp_path):
    cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48)).release()
    with pytest.raises(VideoError, match="not one frame"):
        list(VideoReader(str(tmp_path / "a.avi")))


def test_a_name_that_opencv_cannot_take_is_refused(tmp_path):
    path = str(tmp_path) + "/\udcff.mp4"
    with open(path, "wb"), pytest.raises(VideoError, match="UTF-8"):
        VideoReader(path)


def _refuse(monkeypatch, *codecs: str) -> None:
    """Make OpenCV's writer fail for these codecs, as where its build lacks them."""
    refused = {cv2.VideoWriter_fourcc(*codec) for codec in codecs}
    original = cv2.VideoWriter

    def open_writer(path, fourcc, fps, size):
        return original() if fourcc in refused else original(path, fourcc, fps, size)

    open_writer.fourcc = original.fourcc
    monkeypatch.setattr(cv2, "VideoWriter", open_writer)
