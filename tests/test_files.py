"""Files that are whole or not there, also where a disk cannot do what Linux' own can."""

import errno
import json
import os
import stat

import pytest

from deformable_detr.files import check_writable, replacing, replacing_file, write_json, write_text


def test_a_folder_that_cannot_be_flushed_does_not_lose_the_file(shared_folders, tmp_path):
    write_text(tmp_path / "last_checkpoint", "model_0000001.pth")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert os.listdir(tmp_path) == ["last_checkpoint"]


def test_a_file_that_cannot_be_flushed_is_an_error_and_the_old_one_stays(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "a.json", {"new": 1})
    assert (tmp_path / "a.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, [1])
    with pytest.raises(KeyboardInterrupt), replacing(path) as stream:
        stream.write(b"[2")
        assert json.loads(path.read_text()) == [1]
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == [1]
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_unfinished_file_keeps_the_suffix_and_is_hidden(tmp_path):
    with replacing_file(tmp_path / "a.safetensors") as unfinished:
        assert unfinished.suffix == ".safetensors" and unfinished.name[0] == "." and unfinished.parent == tmp_path


def test_a_link_keeps_pointing_to_the_file_that_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"


def test_a_device_stays_a_device():
    write_text(os.devnull, "text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.parametrize(
    "name, message", [("folder", "must be a file, .*folder is a folder"), ("no/a.txt", "there is no folder .*no")]
)
def test_a_place_that_cannot_be_written_is_named_before_the_work(name, message, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=message):
        check_writable(tmp_path / name)
    with pytest.raises(OSError, match="Is a directory|there is no folder"):
        write_text(tmp_path / name, "")
    assert os.listdir(tmp_path) == ["folder"]


def test_asking_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "a.txt")
    assert os.listdir(tmp_path) == []
