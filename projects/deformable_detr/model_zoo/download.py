"""``deformable-detr://<name>``: published weights by name, fetched once and kept in Detectron2's cache."""

import hashlib
import os
from http.client import HTTPException
from typing import IO, Any

from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.download import download
from iopath.common.file_io import file_lock, get_cache_dir

from ..checkpoint.coverage import CheckpointError
from .records import SCHEME, PublishedModel, find_model

# huggingface_hub's variable for a mirror of the Hub.
_HUB_VARIABLE = "HF_ENDPOINT"
_HUB = "https://huggingface.co"


class ModelZooHandler(PathHandler):
    """Lets Detectron2's PathManager resolve ``deformable-detr://<name>``."""

    def _get_supported_prefixes(self) -> list[str]:
        return [SCHEME]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        try:
            model = find_model(path.removeprefix(SCHEME))
        except KeyError as error:
            raise CheckpointError(f"{path}: {error.args[0]}") from error
        return fetch(model, force=force)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return PathManager.open(self._get_local_path(path), mode, buffering=buffering, **kwargs)


def register_handler() -> None:
    """Teach Detectron2's PathManager the scheme; harmless where it is known already."""
    PathManager.register_handler(ModelZooHandler(), allow_override=True)


def hub_url(model: PublishedModel) -> str:
    return f"{os.environ.get(_HUB_VARIABLE, _HUB).rstrip('/')}/{model.hub_file}"


def weights_url(model: PublishedModel) -> str | None:
    """Return the address of the file that is downloaded; None where no program can download it."""
    return hub_url(model) if model.hub_repository else model.address


def cache_folder() -> str:
    """Return the folder of the weights: below FVCORE_CACHE, which Detectron2 uses too, or iopath's default."""
    return os.path.join(get_cache_dir(), "deformable_detr")


def fetch(model: PublishedModel, *, force: bool = False) -> str:
    """Return the path of a model's weights, downloading them where they are not there yet.

    A file that was put into the cache by hand is taken, be it the Hub's or the official one, under its own name or the
    model's. Of several processes one downloads while the others wait.

    Args:
        force: download again.

    Raises:
        CheckpointError: if the file cannot be downloaded, or is another one than was published.
    """
    names = (model.cached_file, model.official_file, f"{model.name}.pth")
    path, *others = (os.path.join(cache_folder(), name) for name in names)
    there = next(filter(os.path.isfile, (path, *others)), None)
    downloadable = weights_url(model) is not None
    if there and not (force and downloadable):
        return there
    if not downloadable:
        raise CheckpointError(
            f"{model.weights} cannot be downloaded by a program: {_by_hand(model)} (FVCORE_CACHE sets the cache)"
        )
    with file_lock(path):
        if force or not os.path.isfile(path):
            _download(model, path)
    return path


def _download(model: PublishedModel, path: str) -> None:
    """Download to a temporary name, so that only a complete and verified file appears under ``path``."""
    folder, name = os.path.split(path)
    unverified = f"{path}.unverified"
    try:
        # Not overwritten by download(): it may be left from a process that was killed.
        _remove(unverified)
        download(weights_url(model), folder, filename=f"{name}.unverified")
        _verify(model, unverified)
        os.replace(unverified, path)
    # A connection that breaks while the header arrives is an HTTPException.
    except (OSError, HTTPException) as error:
        raise CheckpointError(
            f"{model.weights} cannot be downloaded: {weights_url(model)} answers {_reason(error)}. Calling again "
            "starts a new download. Without a network, download that file on another machine and save it as "
            f"{path}, or {_by_hand(model)} (FVCORE_CACHE sets the cache, {_HUB_VARIABLE} another address of the Hub)"
        ) from error
    finally:
        _remove(unverified)


def _by_hand(model: PublishedModel) -> str:
    """Say how a person gets the official file, which may be called as its authors call it or by the model's name."""
    file = model.official_file or f"the file of {model.epochs} epochs"
    name = "" if model.official_file else f" as {model.cached_file}"
    return f"download {file} from {model.drive_page or model.address} and put it into {cache_folder()}{name}"


def _verify(model: PublishedModel, path: str) -> None:
    for what, expected, measure in (("size", model.size, os.path.getsize), ("sha256", model.sha256, _sha256)):
        if expected is not None and (actual := measure(path)) != expected:
            raise OSError(f"another file than was published: its {what} is {actual}, expected {expected}")


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return str(error).strip("<>") or type(error).__name__


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.remove(path)
