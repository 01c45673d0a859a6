import dataclasses
import hashlib
import os
import re
import socket

import pytest
from detectron2.utils.file_io import PathManager

import deformable_detr  # noqa: F401  registers the scheme
from deformable_detr.checkpoint import CheckpointError
from deformable_detr.model_zoo import MODELS
from deformable_detr.model_zoo.download import fetch, hub_url

NAME = "deformable_detr_R_50_two_stage"
RECORD = MODELS[NAME]
WEIGHTS = bytes(range(256)) * 1000


def files_in(folder):
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock")) if folder.is_dir() else []


@pytest.fixture
def served(hub):
    hub.files[f"/{RECORD.hub_file}"] = WEIGHTS
    return hub


def test_hub_address_is_that_of_the_authors_repository(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    expected = (
        "https://huggingface.co/SenseTime/deformable-detr-with-box-refine-two-stage/resolve/main/model.safetensors"
    )
    assert hub_url(RECORD) == expected


def test_name_becomes_a_file_that_is_downloaded_once(served, cache):
    for _ in range(2):
        path = PathManager.get_local_path(RECORD.weights)
        assert path == str(cache / f"{NAME}.safetensors")
        assert open(path, "rb").read() == WEIGHTS
    assert len(served.requests) == 1
    assert files_in(cache) == [f"{NAME}.safetensors"]


def test_path_manager_opens_the_file_by_name(served):
    with PathManager.open(RECORD.weights, "rb") as file:
        assert file.read() == WEIGHTS


def test_forced_download_replaces_the_file(served):
    path = PathManager.get_local_path(RECORD.weights)
    served.files[f"/{RECORD.hub_file}"] = b"another version"
    assert PathManager.get_local_path(RECORD.weights, force=True) == path
    assert open(path, "rb").read() == b"another version"


def test_interrupted_download_leaves_nothing_and_the_next_call_starts_again(served, cache):
    served.shortfall = 1000
    with pytest.raises(CheckpointError, match="retrieval incomplete: got only 255000 out of 256000 bytes"):
        fetch(RECORD)
    assert files_in(cache) == []
    served.shortfall = 0
    assert open(fetch(RECORD), "rb").read() == WEIGHTS


def test_what_a_killed_process_left_is_not_taken_for_the_weights(served, cache):
    cache.mkdir(parents=True)
    for suffix in ("unverified", "unverified.tmp"):
        (cache / f"{NAME}.safetensors.{suffix}").write_bytes(b"half")
    assert open(fetch(RECORD), "rb").read() == WEIGHTS
    assert files_in(cache) == [f"{NAME}.safetensors"]


@pytest.mark.parametrize(
    ("field", "wrong", "right"), (("sha256", "0" * 64, hashlib.sha256(WEIGHTS).hexdigest()), ("size", 7, len(WEIGHTS)))
)
def test_file_that_differs_from_the_published_one_is_refused(field, wrong, right, served, cache):
    with pytest.raises(CheckpointError, match=f"another file than was published: its {field} is {right}.* {wrong}"):
        fetch(dataclasses.replace(RECORD, **{field: wrong}))
    assert files_in(cache) == []
    fetch(dataclasses.replace(RECORD, **{field: right}))


def test_absent_file_and_empty_answer_are_told(hub):
    with pytest.raises(CheckpointError, match="answers HTTP Error 404: Not Found"):
        fetch(RECORD)
    hub.files[f"/{RECORD.hub_file}"] = b""
    with pytest.raises(CheckpointError, match="empty file"):
        fetch(RECORD)


def test_without_a_network_the_error_says_what_to_put_where(cache, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(CheckpointError, match="Connection refused") as error:
        PathManager.get_local_path(RECORD.weights)
    told = re.escape(f"save it as {cache / NAME}.safetensors, or download {RECORD.official_file} from ")
    assert re.search(
        f"{told}https://drive.google.com/file/d/{RECORD.drive_id}/view and put it into {cache}", str(error.value)
    )


@pytest.mark.parametrize("name", (f"{NAME}.safetensors", f"{NAME}.pth", RECORD.official_file))
def test_file_put_there_by_hand_is_taken_without_asking_the_network(name, hub, cache):
    cache.mkdir(parents=True)
    (cache / name).write_bytes(WEIGHTS)
    assert fetch(RECORD) == str(cache / name)
    assert hub.requests == []


def test_unknown_name_is_told_with_those_there_are(cache):
    with pytest.raises(
        CheckpointError, match=r"deformable-detr://nothing: there is no model 'nothing'.*R_50_two_stage"
    ):
        PathManager.get_local_path("deformable-detr://nothing")


def test_file_with_a_direct_address_is_downloaded_from_there(hub, cache):
    record = dataclasses.replace(
        RECORD, hub_repository=None, drive_id=None, address=f"{hub.address}/v0.1/theirs_12eps.pth"
    )
    hub.files["/v0.1/theirs_12eps.pth"] = WEIGHTS
    assert fetch(record) == str(cache / f"{NAME}.pth")
    assert open(fetch(record), "rb").read() == WEIGHTS and len(hub.requests) == 1


@pytest.mark.parametrize(
    ("official_file", "told", "name"),
    (
        ("theirs.pth", "theirs.pth from https://folder and put it into {cache}", "theirs.pth"),
        ("", f"the file of 50 epochs from https://folder and put it into {{cache}} as {NAME}.pth", f"{NAME}.pth"),
    ),
)
def test_what_is_in_a_folder_for_people_is_told_and_taken_when_it_is_there(official_file, told, name, hub, cache):
    record = dataclasses.replace(
        RECORD, hub_repository=None, drive_id=None, drive_folder="https://folder", official_file=official_file
    )
    with pytest.raises(CheckpointError, match="by a program: download " + re.escape(told.format(cache=cache))):
        fetch(record)
    cache.mkdir(parents=True)
    (cache / name).write_bytes(WEIGHTS)
    assert fetch(record) == str(cache / name)
    assert hub.requests == []
