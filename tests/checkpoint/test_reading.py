import argparse
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deformable_detr.checkpoint import CheckpointError, read_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def assert_weights(state_dict):
    assert state_dict.keys() == WEIGHTS.keys()
    assert all(torch.equal(torch.as_tensor(state_dict[key]), WEIGHTS[key]) for key in WEIGHTS)


@pytest.mark.parametrize("content", (WEIGHTS, {"model": WEIGHTS}, {"state_dict": WEIGHTS, "epoch": 3}))
@pytest.mark.parametrize("suffix", (".pth", ".bin"))
def test_torch_files_with_and_without_a_level_above_the_weights(content, suffix, tmp_path):
    torch.save(content, tmp_path / f"x{suffix}")
    checkpoint = read_checkpoint(str(tmp_path / f"x{suffix}"))
    assert_weights(checkpoint.pop("model"))
    assert checkpoint == ({"epoch": 3} if "epoch" in content else {})


def test_safetensors_file(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert_weights(read_checkpoint(str(tmp_path / "model.safetensors"))["model"])


@pytest.mark.parametrize("protocol", (0, 2, 5))
def test_pickle_of_numpy_arrays(protocol, tmp_path):
    arrays = {key: value.numpy() for key, value in WEIGHTS.items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    assert_weights(read_checkpoint(str(tmp_path / "R-50.pkl"))["model"])


def test_official_file_with_its_command_line_and_numpy_numbers(tmp_path):
    args = argparse.Namespace(lr=2e-4, resume="")
    torch.save({"model": WEIGHTS, "args": args, "best": np.float64(46.9)}, tmp_path / "x.pth")
    checkpoint = read_checkpoint(str(tmp_path / "x.pth"))
    assert_weights(checkpoint["model"])
    assert checkpoint["args"] == args and checkpoint["best"] == 46.9


def save_by_numpy_1(content: dict, path) -> None:
    """Save as torch does, in its older format without a checksum, with the names that numpy 1 gives its functions."""
    torch.save(content, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))


def test_files_with_numbers_of_numpy_1(tmp_path):
    save_by_numpy_1({"model": WEIGHTS, "best": np.float64(46.9), "history": np.arange(3)}, tmp_path / "x.pth")
    assert b"cnumpy.core.multiarray" in (tmp_path / "x.pth").read_bytes()
    checkpoint = read_checkpoint(str(tmp_path / "x.pth"))
    assert checkpoint["best"] == 46.9 and checkpoint["history"].tolist() == [0, 1, 2]


@pytest.fixture
def history_buffer(monkeypatch):
    """A class that is pickled as mmengine's log of a number is, methods included."""

    class HistoryBuffer:
        def __init__(self):
            self._log_history = np.array([2.5, 1.5])

        def __getstate__(self):
            return {**self.__dict__, "statistics_methods": {"min": HistoryBuffer.min}}

        def min(self):
            return self._log_history.min()

    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    for part, name in ((HistoryBuffer, "HistoryBuffer"), (HistoryBuffer.min, "HistoryBuffer.min")):
        part.__module__, part.__qualname__ = module.__name__, name
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    return HistoryBuffer


def test_files_of_mmengine_with_the_logs_of_their_training(history_buffer, tmp_path, monkeypatch):
    logs = {"train/loss": history_buffer()}
    content = {"state_dict": WEIGHTS, "meta": {"epoch": 50}, "message_hub": {"log_scalars": logs}}
    save_by_numpy_1(content, tmp_path / "x.pth")
    monkeypatch.delitem(sys.modules, "mmengine")
    checkpoint = read_checkpoint(str(tmp_path / "x.pth"))
    assert_weights(checkpoint["model"])
    assert checkpoint["meta"] == {"epoch": 50}


class NamesAMethod:
    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_methods_of_anything_else_are_still_refused(tmp_path):
    torch.save({"model": WEIGHTS, "code": NamesAMethod(np.ndarray, "tofile")}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"is refused: loading it would run code from the file \(getattr\)"):
        read_checkpoint(str(tmp_path / "x.pth"))


def test_torch_2_4_reads_official_files_too(tmp_path, monkeypatch):
    # It has no safe_globals, only a function that allows names for good.
    monkeypatch.delattr(torch.serialization, "safe_globals")
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(lr=2e-4)}, tmp_path / "x.pth")
    try:
        assert_weights(read_checkpoint(str(tmp_path / "x.pth"))["model"])
    finally:
        torch.serialization.clear_safe_globals()


@pytest.mark.parametrize("suffix", (".pth", ".pkl"))
@pytest.mark.parametrize("zipped", (True, False))
def test_file_that_would_run_code_is_refused_and_does_not_run_it(suffix, zipped, tmp_path):
    marker = tmp_path / "ran"
    content = {"extra": RunsCode(marker)}
    path = tmp_path / f"x{suffix}"
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(CheckpointError, match=rf"x{suffix} is refused.*run code.*\(\w+\.open\).*safetensors"):
        read_checkpoint(str(path))
    assert not marker.exists()


@pytest.mark.parametrize("suffix", (".pth", ".safetensors", ".pkl"))
@pytest.mark.parametrize("kept", (0.5, 0.95))
def test_truncated_file_is_told(suffix, kept, tmp_path):
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save(WEIGHTS, path)
    elif suffix == ".pkl":
        path.write_bytes(pickle.dumps({key: value.numpy() for key, value in WEIGHTS.items()}))
    else:
        save_file(WEIGHTS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=f"x{suffix} is truncated or not a checkpoint, fetch it again"):
        read_checkpoint(str(path))


@pytest.mark.parametrize(
    ("content", "cause"),
    (
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html><body>Quota exceeded</body></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"some text", "is truncated or not a checkpoint"),
    ),
)
@pytest.mark.parametrize("suffix", (".pth", ".safetensors", ".pkl"))
def test_file_that_is_no_checkpoint_is_told_in_one_line(content, cause, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x{suffix} {cause}") as error:
        read_checkpoint(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ([1, 2], {}, torch.ones(1)))
def test_file_without_parameters_is_told(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=f"holds .*{type(content).__name__}, not a dict of parameters"):
        read_checkpoint(str(tmp_path / "x.pth"))


def test_missing_file_and_folder_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file .*nowhere.pth"):
        read_checkpoint(str(tmp_path / "nowhere.pth"))
    with pytest.raises(CheckpointError, match="is a folder; name the weights file inside it"):
        read_checkpoint(str(tmp_path))
