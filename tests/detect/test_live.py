"""Cameras, streams and the screen: the newest frame counts, and what cannot be opened is named."""

import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageGrab

from deformable_detr.detect.inputs import find_sources
from deformable_detr.detect.live import LiveReader, RealTimeWriter, ScreenReader, open_live
from deformable_detr.detect.video import VideoError, VideoReader

from .conftest import MjpegHandler, gray, guarded, serve, serve_folder


class Camera:
    """Stands for a VideoReader: gives one frame per permission, and then ends."""

    fps = 10.0

    def __init__(self, num_frames):
        self.frames = iter([gray(i) for i in range(num_frames)])
        self.permissions = threading.Semaphore(0)
        self.asked_for = 0
        self.closed = threading.Event()

    def read(self):
        self.asked_for += 1
        self.permissions.acquire()
        return next(self.frames, None)

    def close(self):
        self.closed.set()

    def give(self, count):
        """Let it hand out frames, and wait until the reader has come for the next one."""
        target = self.asked_for + count
        self.permissions.release(count)
        while self.asked_for < target:
            time.sleep(0.001)


def test_the_newest_frame_is_seen_and_those_missed_are_left_out():
    camera = Camera(6)
    frames = iter(LiveReader(camera))
    while not camera.asked_for:
        time.sleep(0.001)
    camera.give(1)
    assert next(frames)[0, 0, 0] == 0
    camera.give(4)
    assert next(frames)[0, 0, 0] == 4
    camera.permissions.release(2)
    assert [frame[0, 0, 0] for frame in frames] == [5]
    assert camera.closed.is_set()


def test_a_source_is_released_when_nobody_looks_any_more(monkeypatch):
    camera = Camera(0)
    monkeypatch.setattr(camera, "read", lambda: gray(0))
    reader = LiveReader(camera)
    next(iter(reader))
    reader.close()
    assert camera.closed.is_set()


def test_a_source_without_a_frame_and_one_that_breaks_are_errors(monkeypatch):
    camera = Camera(0)
    camera.permissions.release(1)
    with pytest.raises(VideoError, match="not one frame"):
        list(LiveReader(camera))
    # The thread ends with an error of OpenCV's; who waits for it must not wait for ever.
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    camera = Camera(0)
    camera.permissions.release(1)
    camera.frames = None
    with pytest.raises(VideoError, match="not one frame"):
        list(LiveReader(camera))


@pytest.mark.parametrize(
    "path, message",
    [
        ("93", "no camera of this number; .* /dev/video93"),
        ("rtsp://127.0.0.1:1/a", "no stream there: nothing answers"),
        ("http://127.0.0.1:1/a", "no stream there: nothing answers"),
    ],
)
def test_what_cannot_be_opened_is_named(path, message):
    with pytest.raises(VideoError, match=message):
        open_live(path)


def test_pictures_of_the_screen_are_rgb_and_their_absence_names_what_is_needed(monkeypatch):
    picture = Image.new("RGBA", (8, 6), (250, 10, 20, 255))
    monkeypatch.setattr(ImageGrab, "grab", lambda: picture)
    screen = open_live("screen")
    assert isinstance(screen, ScreenReader)
    frame = next(iter(screen))
    assert frame.shape == (6, 8, 3) and frame[0, 0].tolist() == [250, 10, 20]

    def refuse():
        raise OSError("X connection failed: error 5")

    monkeypatch.setattr(ImageGrab, "grab", refuse)
    with pytest.raises(VideoError, match="error 5.*DISPLAY.*gnome-screenshot"):
        next(iter(screen))


def test_a_stream_over_http_is_decoded_as_it_comes(mjpeg_server):
    reader = open_live(mjpeg_server([gray(200)] * 3))
    assert isinstance(reader, LiveReader) and 0 < reader.fps < 1000
    frame = next(iter(reader))
    reader.close()
    assert frame.shape == (48, 64, 3) and abs(int(frame[0, 0, 0]) - 200) < 5


def test_a_camera_behind_a_password_is_found_and_seen():
    with serve(guarded(type("Camera", (MjpegHandler,), {"frames": [gray(200)] * 3}), 'Basic realm="camera"')) as server:
        [source] = find_sources(f"{server.replace('//', '//me:secret@')}/video", output=Path("out"))
        assert source.is_live and source.title == f"{server}/video"
        reader = open_live(source.path)
        assert next(iter(reader)).shape == (48, 64, 3)
        reader.close()


def test_a_recording_that_is_sent_as_a_stream_is_read_frame_by_frame(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "a.ts"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no MPEG-TS")
    for level in (0, 60, 120, 180):
        writer.write(gray(level))
    writer.release()
    playlist = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.4,\na.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.m3u8").write_text(playlist)
    with serve_folder(tmp_path) as address:
        reader = open_live(f"{address}/a.m3u8")
        assert isinstance(reader, VideoReader)
        levels = [int(frame.mean()) for frame in reader]
        reader.close()
    assert np.abs(np.subtract(levels, [0, 60, 120, 180])).max() < 8


def test_a_video_lasts_as_long_as_the_recording(tmp_path):
    times = iter([5.0, 5.1, 5.4, 5.41, 5.6])
    writer = RealTimeWriter(tmp_path / "a.mp4", 10, clock=lambda: next(times))
    for level in (0, 60, 120, 180, 240):
        writer.write(gray(level))
    writer.close()
    levels = [round(frame.mean() / 60) for frame in VideoReader(str(tmp_path / "a.mp4"))]
    # 0.1 s of the first, 0.3 s of the second; the third lasts 0.01 s, less than a frame; the last one is there.
    assert levels == [0, 1, 1, 1, 3, 3, 4]
