"""What arguments name, and where results go."""

import functools
import http.server
import os
from pathlib import Path

import pytest

from deformable_detr.detect import inputs
from deformable_detr.detect.inputs import (
    Source,
    SourceError,
    find_sources,
    local_file,
    name_outputs,
    without_repetitions,
)

from .conftest import MjpegHandler, gray, guarded, serve, serve_folder

OUT = Path("out")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def unreachable(*_, **__):
    raise OSError("no network")


def images(*paths: str) -> list[Source]:
    return [Source(path, os.path.basename(path), False) for path in paths]


def test_a_folder_gives_its_images_and_videos_with_those_of_all_folders_below(tmp_path):
    touch(tmp_path, "b.JPG", "a.png", "sub/deep/c.tiff", "sub/d.mp4", "notes.txt", ".hidden.jpg", ".cache/e.jpg")
    found = find_sources(str(tmp_path), output=OUT)
    assert [(source.name, source.is_video) for source in found] == [
        ("a.png", False),
        ("b.JPG", False),
        ("sub/d.mp4", True),
        ("sub/deep/c.tiff", False),
    ]
    assert found[0].path == str(tmp_path / "a.png")


def test_links_to_folders_are_followed_and_each_folder_is_searched_once(tmp_path):
    touch(tmp_path / "in", "a.png", "sub/b.png", "out/a.png")
    touch(tmp_path / "disk", "c.png", "deep/d.png")
    # To a folder outside, to one that is searched anyway, back to the top, into the folder outside, to the output.
    links = {"0": "disk", "1": "in/sub", "sub/up": "in", "z": "disk/deep", "last": "in/out"}
    for link, target in links.items():
        (tmp_path / "in" / link).symlink_to(tmp_path / target)
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "in")
    found = find_sources(str(tmp_path / "in"), output=tmp_path / "in" / "out")
    assert [source.name for source in found] == ["a.png", "sub/b.png", "0/c.png", "0/deep/d.png"]


def test_annotated_pictures_of_the_last_run_are_not_looked_at_again(tmp_path):
    touch(tmp_path, "a.png", "out/a.png")
    assert [source.name for source in find_sources(str(tmp_path), output=tmp_path / "out")] == ["a.png"]


def test_a_folder_without_images_is_named_with_what_was_looked_for(tmp_path):
    touch(tmp_path, "notes.txt")
    with pytest.raises(SourceError, match=rf"{tmp_path} holds no image .* \.jpg .* \.mp4"):
        find_sources(str(tmp_path), output=OUT)


@pytest.mark.parametrize(
    "argument, name, is_video",
    [
        ("a/b/photo", "photo", False),
        ("a/b/CLIP.MOV", "CLIP.MOV", True),
        ("http://host/a/my%20clip.mp4?size=large#t=1", "my clip.mp4", True),
        ("http://host/", "image", False),
    ],
)
def test_a_file_is_an_image_unless_it_has_the_suffix_of_a_video(argument, name, is_video, monkeypatch):
    monkeypatch.setattr(inputs, "urlopen", unreachable)
    assert find_sources(argument, output=OUT) == [Source(argument, name, is_video)]


@pytest.mark.parametrize(
    "argument, name",
    [
        ("0", "camera_0"),
        ("12", "camera_12"),
        ("screen", "screen"),
        ("rtsp://host:554/stream1?x=1", "stream1"),
        ("RTSP://host", "host"),
        ("udp://@:5000", "stream"),
        ("http://host/live/index.m3u8", "index.m3u8"),
        ("https://host/video.mjpg", "video.mjpg"),
    ],
)
def test_cameras_streams_and_the_screen_are_live(argument, name, monkeypatch):
    monkeypatch.setattr(inputs, "urlopen", lambda *_, **__: pytest.fail("asked a server for what the address tells"))
    assert find_sources(argument, output=OUT) == [Source(argument, name, is_video=True, is_live=True)]


def test_a_file_or_folder_with_the_name_of_a_camera_or_the_screen_is_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(touch(tmp_path, "0", "screen/a.png"))
    assert find_sources("0", output=OUT) == [Source("0", "0", False)]
    assert [source.name for source in find_sources("screen", output=OUT)] == ["a.png"]


def test_the_server_says_whether_an_address_without_a_suffix_is_a_stream(mjpeg_server, tmp_path):
    address = mjpeg_server([gray(100)])
    assert find_sources(address, output=OUT) == [Source(address, "video", is_video=True, is_live=True)]
    with serve_folder(touch(tmp_path, "photo")) as server:
        for name in ("photo", "missing"):
            assert find_sources(f"{server}/{name}", output=OUT) == [Source(f"{server}/{name}", name, False)]


CHALLENGES = ['Basic realm="camera"', 'Digest realm="camera", nonce="1", qop="auth"']


@pytest.mark.parametrize("challenge", CHALLENGES)
def test_a_server_is_asked_with_the_password_of_its_address(challenge):
    with serve(guarded(MjpegHandler, challenge)) as server:
        address = f"{server.replace('//', '//me:secret@')}/video"
        assert find_sources(address, output=OUT) == [Source(address, "video", is_video=True, is_live=True)]
        assert not find_sources(address.replace("me:", "you:"), output=OUT)[0].is_live


@pytest.mark.parametrize("challenge", CHALLENGES)
def test_a_file_behind_a_password_is_fetched(challenge, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"content")
    handler = functools.partial(
        guarded(http.server.SimpleHTTPRequestHandler, challenge), directory=str(touch(tmp_path))
    )
    with serve(handler) as server, local_file(f"{server.replace('//', '//me:s%65cret@')}/a.jpg") as local:
        assert Path(local).read_bytes() == b"content" and local.endswith(".jpg")


@pytest.mark.parametrize(
    "address, reason",
    [
        ("http://127.0.0.1:1/my clip.mp4", "control characters"),
        ("http://me:secret@host:port/clip.mp4", "nonnumeric port: 'port'"),
        ("s3://bucket/clip.mp4", "cache_dir"),
    ],
)
def test_an_address_that_nothing_can_fetch_is_an_error_like_any_other_input(address, reason):
    with pytest.raises(OSError, match=reason), local_file(address):
        pass


def test_what_is_no_address_is_named():
    with pytest.raises(SourceError, match=r"^http://\[host/clip.mp4 is not an address: Invalid IPv6 URL"):
        find_sources("http://me:secret@[host/clip.mp4", output=OUT)


@pytest.mark.parametrize(
    "path, title",
    [
        ("rtsp://me:secret@host:554/a@b?c=d", "rtsp://host:554/a@b?c=d"),
        ("http://host/a@b.jpg", "http://host/a@b.jpg"),
        ("me@home/a.jpg", "me@home/a.jpg"),
    ],
)
def test_passwords_in_addresses_are_not_told(path, title):
    assert Source(path, "a", False).title == title


def test_a_file_that_is_named_twice_is_looked_at_once(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    a, b, other_path = str(tmp_path / "a.png"), str(tmp_path / "b.png"), f"{tmp_path}/../{tmp_path.name}/a.png"
    assert [source.path for source in without_repetitions(images(b, a, other_path, b))] == [b, a]


def test_outputs_of_equal_names_do_not_overwrite_each_other():
    names = ["a/x.jpg", "b/x.jpg", "a/x.tif", "a/x.png", "c/X.JPG", "a/x_2.png", "y.jpe"]
    expected = ["x.jpg", "x_2.jpg", "x.png", "x_2.png", "X_3.JPG", "x_2_2.png", "y.jpe"]
    assert name_outputs(images(*names), OUT) == [OUT / name for name in expected]


def test_folders_are_kept_and_videos_become_mp4():
    sources = [Source("in/a/x.jpg", "a/x.jpg", False), Source("in/b/x.jpg", "b/x.jpg", False)]
    sources += [Source("in/v.webm", "v.webm", True), Source("in/v.avi", "v.avi", True)]
    expected = ["a/x.jpg", "b/x.jpg", "v.mp4", "v_2.mp4"]
    assert name_outputs(sources, OUT) == [OUT / name for name in expected]


def test_no_input_is_written_over(tmp_path):
    touch(tmp_path, "x.jpg")
    with pytest.raises(SourceError, match="x.jpg would be written over an input"):
        name_outputs(images(str(tmp_path / "x.jpg")), tmp_path)


def test_an_address_of_a_file_is_that_file(tmp_path):
    path = touch(tmp_path, "my photo.jpg") / "my photo.jpg"
    with local_file(path.as_uri()) as local:
        assert "%20" in path.as_uri() and local == str(path)


def test_a_download_is_not_kept(tmp_path):
    with serve_folder(tmp_path) as server:
        address = f"{server}/a.jpg"
        for content in (b"first", b"second"):
            (tmp_path / "a.jpg").write_bytes(content)
            with local_file(address) as local:
                assert Path(local).read_bytes() == content
            assert not os.path.exists(local)
