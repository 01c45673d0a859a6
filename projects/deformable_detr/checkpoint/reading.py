"""Reads checkpoint files without running code from them."""

import argparse
import codecs
import collections
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from .coverage import CheckpointError

# The words of torch's own unpickler.
_FORBIDDEN = "Unsupported global: GLOBAL"


def _under_name(function: Callable[..., Any], module: str, name: str) -> Callable[..., Any]:
    """Return a function of this name for torch's unpickler, which knows functions by what they say of themselves."""

    def alias(*args: Any) -> Any:
        return function(*args)

    alias.__module__, alias.__name__, alias.__qualname__ = module, name, name
    return alias


class _HistoryBuffer:
    """Stand in for mmengine's log of a number, which its trainings save beside the weights; keep nothing of it."""

    def __setstate__(self, state: Any) -> None:
        pass


_HistoryBuffer.__module__ = "mmengine.logging.history_buffer"
_HistoryBuffer.__name__ = _HistoryBuffer.__qualname__ = "HistoryBuffer"


def _method_of_log(owner: type, name: str) -> None:
    """Stand in for ``getattr``, by which mmengine's logs name their methods, and only for them."""
    if owner is not _HistoryBuffer:
        raise pickle.UnpicklingError(f"{_FORBIDDEN} getattr")


# What a checkpoint may name besides tensors and plain Python values. None of it can run code: the official files
# hold their command line as a Namespace, and training state may hold numpy numbers.
_NUMPY_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_NUMPY_FROM_BUFFER = np.zeros(0).__reduce_ex__(5)[0]
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_DTYPES = [type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)]
_TORCH_GLOBALS = [argparse.Namespace, codecs.encode, np.ndarray, np.dtype, _HistoryBuffer]
_TORCH_GLOBALS.append(_under_name(_method_of_log, "builtins", "getattr"))
_PICKLE_GLOBALS = {
    ("_codecs", "encode"): codecs.encode,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
# numpy 2 renamed its core, and files name the one that wrote them.
for _core in ("numpy.core", "numpy._core"):
    for _name, _function in (("_reconstruct", _NUMPY_RECONSTRUCT), ("scalar", _NUMPY_SCALAR)):
        _PICKLE_GLOBALS[f"{_core}.multiarray", _name] = _function
        _TORCH_GLOBALS.append(_under_name(_function, f"{_core}.multiarray", _name))
    _PICKLE_GLOBALS[f"{_core}.numeric", "_frombuffer"] = _NUMPY_FROM_BUFFER
_STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict", "model_state")
# Under these detrex, torchvision's, timm's and DINO's trainings keep averaged weights beside the trained ones.
_AVERAGES_KEYS = ("ema_state", "model_ema", "state_dict_ema", "ema_model")
_TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin")


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a ``.pth``, ``.pt``, ``.bin``, ``.pkl`` or ``.safetensors`` file onto the CPU.

    Args:
        path: a local file.

    Returns:
        A dict with the state dict under "model" and, where the file has more (optimizer, iteration, ...), the rest
        beside it. "class_names" are the names of its classes, where it (mmdetection's: its "meta") or a transformers
        config.json beside it has them.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is no checkpoint (a web page, a Git LFS pointer), is truncated, needs code to
            be run for loading, or holds no state dict, or if the config.json beside it is broken.
    """
    check_weights_file(path)
    try:
        content = _load(path)
    # What a broken file raises depends on where it is broken; torch and pickle document no common class for it.
    except (pickle.UnpicklingError, SafetensorError, EOFError, OSError, RuntimeError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path} {_explain(error)}") from error
    checkpoint = _find_state_dict(content, path)
    names = checkpoint.pop("class_names", None) or _class_names_in_meta(checkpoint) or _class_names_beside(path)
    return checkpoint | ({"class_names": names} if _are_names(names) else {})


def split_options(path: str) -> tuple[str, bool]:
    """Split an address as ``file.pth?ema=True`` into the address itself and whether averaged weights are asked for.

    Detectron2's own option, ``?matching_heuristics=True``, is taken off: names are always matched here.
    """
    address, _, query = path.rpartition("?")
    options = dict(parse_qsl(query))
    if not address or not options or options.keys() - {"ema", "matching_heuristics"}:
        return path, False
    return address, options.get("ema", "").casefold() == "true"


def select_weights(
    checkpoint: Mapping[str, Any], *, averaged: bool, own_averages: bool = True
) -> tuple[Mapping[str, Any], str]:
    """Choose between the trained and the averaged weights that are kept in one file.

    Args:
        checkpoint: what :func:`read_checkpoint` returns.
        averaged: whether the averages of another project's file are asked for.
        own_averages: whether to take those of our own files, which were evaluated; a run that is resumed does not.

    Returns:
        The state dict, and a sentence for the report where the file has both.

    Raises:
        CheckpointError: if averaged weights are asked for and there are none.
    """
    weights, own = checkpoint["model"], checkpoint.get("ema")
    if (averaged or own_averages) and isinstance(own, Mapping) and own.keys() >= {"model", "updates"}:
        return own["model"], f"Weights averaged over {own['updates']} updates (ema)"
    found = {name: checkpoint[name] for name in _AVERAGES_KEYS if isinstance(checkpoint.get(name), Mapping)}
    for name, averages in found.items():
        if not averages.keys() & weights.keys():
            # torch's AveragedModel, as in torchvision's trainings.
            averages = {key.removeprefix("module."): value for key, value in averages.items()}
        if averages.keys() & weights.keys():
            if averaged:
                return {key: averages.get(key, value) for key, value in weights.items()}, f"Averaged weights ({name})"
            return weights, f"Not the file's averaged weights ({name}): those are asked for by FILE?ema=True"
    if averaged:
        raise CheckpointError(f"?ema=True asks for averaged weights, and the file has none ({_AVERAGES_KEYS})")
    return weights, ""


def check_weights_file(path: str) -> None:
    """Raise what :func:`read_checkpoint` does for a path at which there is something else than a file of weights."""
    if os.path.isdir(path):
        raise CheckpointError(f"{path} is a folder; name the weights file inside it, e.g. model.safetensors")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no checkpoint file {path}")
    with open(path, "rb") as file:
        start = file.read(256).lstrip().lower()
    if not start:
        raise CheckpointError(f"{path} is empty, fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{path} is a web page, not weights: the download was answered with an error or a confirmation page. "
            "Open the link in a browser and save the file itself"
        )


def _load(path: str) -> Any:
    if path.endswith(".safetensors"):
        return _load_safetensors(path)
    if path.endswith(".pkl") and not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            # latin1 is how arrays pickled by Python 2 are read; the files of older Detectron versions are of that kind.
            return _ArrayUnpickler(file, encoding="latin1").load()
    with _allowing(_TORCH_GLOBALS + _NUMPY_DTYPES):
        return torch.load(path, map_location="cpu", weights_only=True)


def _allowing(names: list[Any]) -> AbstractContextManager[None]:
    """Lets torch read these classes and functions; torch 2.4 can allow them for good only."""
    if hasattr(torch.serialization, "safe_globals"):
        return torch.serialization.safe_globals(names)
    torch.serialization.add_safe_globals(names)
    return nullcontext()


def _load_safetensors(path: str) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        names = (file.metadata() or {}).get("class_names")
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    return {"model": tensors} | ({"class_names": json.loads(names)} if names else {})


def _class_names_in_meta(checkpoint: Mapping[str, Any]) -> Any:
    """Return the names that mmdetection 3 ("dataset_meta") and 2 save."""
    meta = checkpoint.get("meta")
    if not isinstance(meta, Mapping):
        return None
    dataset = meta.get("dataset_meta")
    places = [place for place in (dataset, meta) if isinstance(place, Mapping)]
    return next((place[key] for place in places for key in ("classes", "CLASSES") if _are_names(place.get(key))), None)


def _class_names_beside(path: str) -> list[str | None] | None:
    """Return the names that transformers saves beside its weights, unless nobody gave the classes names."""
    config = os.path.join(os.path.dirname(path), "config.json")
    if os.path.basename(path) not in _TRANSFORMERS_FILES or not os.path.isfile(config):
        return None
    try:
        with open(config, encoding="utf-8") as file:
            labels = json.load(file).get("id2label") or {}
    except ValueError as error:
        raise CheckpointError(
            f"{config}, in which transformers names the classes, is broken ({error}): fetch it again, or delete it"
        ) from error
    # COCO's ids of no category are classes called "N/A" there.
    names = [None if (name := labels.get(str(row))) == "N/A" else name for row in range(len(labels))]
    return None if all(re.fullmatch(r"LABEL_\d+", str(name)) for name in names) else names


def _are_names(names: Any) -> bool:
    return isinstance(names, list | tuple) and bool(names) and all(isinstance(n, str | None) for n in names)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLE_GLOBALS:
            raise pickle.UnpicklingError(f"{_FORBIDDEN} {module}.{name}")
        return _PICKLE_GLOBALS[module, name]


def _explain(error: Exception) -> str:
    message = str(error) or type(error).__name__
    if forbidden := re.search(rf"{_FORBIDDEN} (\S+)", message):
        return (
            f"is refused: loading it would run code from the file ({forbidden[1]}). Where you trust it, save its "
            "tensors alone, as a plain dict or as .safetensors"
        )
    # Torch's own advice, which comes before its reason, is to run the code.
    reason = message.split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
    return f"is truncated or not a checkpoint, fetch it again ({reason})"


def _find_state_dict(content: Any, path: str) -> dict[str, Any]:
    """Return ``content`` with its state dict under "model", whatever it was called."""
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of parameters")
    for name in _STATE_DICT_KEYS:
        if isinstance(content.get(name), Mapping):
            return {"model": content[name]} | {key: value for key, value in content.items() if key != name}
    return {"model": dict(content)}
