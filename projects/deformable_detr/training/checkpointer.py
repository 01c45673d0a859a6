"""Detectron2's checkpointer, with every source of weights that ``convert`` knows and saves that cannot be cut short."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from detectron2.utils.file_io import Detectron2Handler
from torch import nn

from ..checkpoint.convert import convert
from ..checkpoint.coverage import CheckpointError, ConversionReport
from ..checkpoint.reading import check_weights_file, read_checkpoint, select_weights, split_options
from ..checkpoint.sources import DENSE_ATTENTION, OURS
from ..files import replacing


def last_checkpoint(folder: str) -> str:
    """Return the newest checkpoint in the output folder of a training.

    Raises:
        FileNotFoundError: if it holds none.
    """
    pointer = os.path.join(folder, "last_checkpoint")
    if not os.path.exists(pointer):
        raise FileNotFoundError(f"{folder} holds no checkpoint: there is no {pointer}. Give weights as well")
    with open(pointer, encoding="utf-8") as file:
        return os.path.join(folder, file.read().strip())


def step_checkpoints(folder: str) -> dict[int, str]:
    """Return the periodic checkpoints in the output folder of a training: iteration -> file, in ascending order."""
    files = {path.name.removeprefix("model_").removesuffix(".pth"): path for path in Path(folder).glob("model_*.pth")}
    return {int(name): os.fspath(files[name]) for name in sorted(filter(str.isdecimal, files), key=int)}


class DeformableDETRCheckpointer(DetectionCheckpointer):
    """Loads official, transformers, ImageNet and own checkpoints into the model, or says why it cannot.

    Unlike its base it never skips a parameter silently: what was used, mapped, dropped and missing is logged, and a
    backbone or transformer that is not covered is a CheckpointError. It runs no code from the files it reads.

    Args:
        class_names: of the model's classes, such as ``thing_classes`` of its dataset. By them the rows of a file
            with other classes are found, and they are saved, so that later models can do the same.
        weights_key: the key, or the flag, by which the user names the weights; for error texts.
        args, kwargs: as for Detectron2's checkpointer.

    Attributes:
        report: the ConversionReport of the last load, None before.
    """

    report: ConversionReport | None = None

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        class_names: Sequence[str | None] | None = None,
        weights_key: str = "MODEL.WEIGHTS",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, *args, **kwargs)
        self.class_names = class_names
        self._weights_key = weights_key

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint.

        Args:
            path: file or URL of any handler of Detectron2's PathManager; if empty, nothing is loaded. ``?ema=True``
                behind it takes the averaged weights of a file of another project's.
            checkpointables: names of what to load beside the model; None means all.

        Returns:
            What our own training checkpoints hold beyond that, e.g. "iteration"; empty for other projects' files.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if the file cannot be fetched or read, or does not fit the model.
        """
        if not path:
            return super().load(path, checkpointables)
        wanted = list(self.checkpointables) if checkpointables is None else checkpointables
        self.logger.info("Loading %s", path)
        path, averaged = split_options(path)
        content = self.read(self._fetch(path))
        # A run that is resumed needs the trained weights, everybody else the better ones.
        self._load_weights(content, *select_weights(content, averaged=averaged, own_averages=not wanted))
        for name in wanted:
            if name in content:
                self.checkpointables[name].load_state_dict(content.pop(name))
        return content

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the last checkpoint of ``save_dir`` where asked and there is one, else load ``path``.

        Raises:
            CheckpointError: if the last checkpoint is of another model than the present one, or if processes find
                different ones, besides the cases of :meth:`load`.
        """
        last = self._newest_whole_file() if resume and self.has_checkpoint() else ""
        if resume:
            self._check_that_all_find(os.path.basename(last))
        if not last:
            return super().resume_or_load(path, resume=False)
        extra = self.load(last)
        if not self.report.exact:
            raise CheckpointError(
                f"Cannot resume: {last} holds another model than the config describes. "
                f"Start in another output folder, with {self._weights_key} set to that file.\n{self.report}"
            )
        return extra

    def load_to_detect(self, path: str, *, resume: bool = False) -> None:
        """Load what a model shall detect with, as :meth:`resume_or_load` does; an empty path keeps random weights.

        Raises:
            CheckpointError: if the weights leave a part of the model as initialised, besides the cases of
                :meth:`resume_or_load`.
        """
        self.resume_or_load(path, resume=resume)
        if self.report is not None and (missing := self.report.undetermined):
            remedy = self.report.mismatch or f"Give the weights of a trained detector by {self._weights_key}"
            raise CheckpointError(
                f"{path} leaves {len(missing)} parameters of the model as initialised: it cannot detect. {remedy}\n"
                f"{self.report}"
            )

    def read(self, path: str) -> dict[str, Any]:
        """Everything in a checkpoint file, without loading it into anything."""
        return read_checkpoint(path)

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth``: either the whole file appears under that name, or none.

        Args:
            name: file name without folder and suffix.
            tag: whether it is the file to resume from.
            kwargs: plain values to save beside the model and the checkpointables.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        file = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", file)
        if self.class_names is not None:
            kwargs["class_names"] = list(self.class_names)
        with replacing(file) as stream:
            torch.save({"model": self.model.state_dict(), **states, **kwargs}, stream)
        if tag:
            self.tag_last_checkpoint(os.path.basename(file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Record the file to resume from."""
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as stream:
            stream.write(last_filename_basename.encode())

    def _check_that_all_find(self, name: str) -> None:
        """Refuse to go on from different checkpoints; DistributedDataParallel compares no weights after it is built."""
        found = [name or "none" for name in comm.all_gather(name)]
        for rank, other in enumerate(found):
            if other != found[0]:
                raise CheckpointError(
                    f"Cannot resume: the last checkpoint in {self.save_dir} is {found[0]} to process 0 and {other} to "
                    f"process {rank}. The output folder must be one and the same for all machines"
                )

    def _newest_whole_file(self) -> str:
        """Return the file that ``last_checkpoint`` names, or the newest one before it that can be read if it cannot.

        Our own saves cannot leave such a file behind, but disks and copies of folders can.
        """
        last = self.get_checkpoint_file()
        # Not model_best.pth: its evaluation may be of steps that are made again.
        others = [os.path.join(self.save_dir, "model_final.pth"), *step_checkpoints(self.save_dir).values()]
        others = [file for file in others if file != last and os.path.isfile(file)]
        candidates = [last, *sorted(others, key=os.path.getmtime, reverse=True)]
        errors = []
        for file in candidates:
            try:
                self.read(self._fetch(file))
            except CheckpointError as error:
                errors.append(f"{error}")
                continue
            if errors:
                self.logger.warning(
                    "Resuming from %s, as newer checkpoints cannot be read: %s", file, "; ".join(errors)
                )
            return file
        raise CheckpointError(f"Cannot resume: no checkpoint in {self.save_dir} can be read: {'; '.join(errors)}")

    def _fetch(self, path: str) -> str:
        try:
            local_path = self.path_manager.get_local_path(path)
        except OSError as error:
            # Detectron2's own prefix is no address to download from by hand.
            url = path.replace(Detectron2Handler.PREFIX, Detectron2Handler.S3_DETECTRON2_PREFIX)
            raise CheckpointError(
                f"{self._weights_key}: {path} cannot be downloaded ({error}). Download {url} where there is a network, "
                f"and give the path of the local file instead; to train from scratch, set {self._weights_key} to an "
                'empty text: ""'
            ) from error
        if not os.path.exists(local_path):
            raise FileNotFoundError(
                f"There is no checkpoint file {local_path} "
                f"(asked for by {self._weights_key}, or by last_checkpoint when resuming)"
            )
        check_weights_file(local_path)
        return local_path

    def _load_weights(self, checkpoint: dict[str, Any], weights: Mapping[str, Any], note: str) -> None:
        """Load these weights; take them and what means nothing to our runs out of the checkpoint."""
        del checkpoint["model"]
        if "ema" not in self.checkpointables:
            checkpoint.pop("ema", None)
        state_dict, self.report = convert(
            weights,
            model=self.model,
            class_names=self.class_names,
            file_class_names=checkpoint.pop("class_names", None),
        )
        self.report.note = "\n".join(filter(None, (self.report.note, note)))
        if self.class_names is None:
            self.class_names = self.report.class_names
        if self.report.source != OURS.name:
            # Another project's optimizer or iteration means nothing to ours.
            checkpoint.clear()
        # A backbone leaves the rest to be trained; a detector that leaves something (its classes) is worth a warning.
        is_detector = "transformer.level_embed" in state_dict or DENSE_ATTENTION in state_dict
        self.logger.log(logging.WARNING if is_detector and self.report.missing else logging.INFO, "%s", self.report)
        self.model.load_state_dict(state_dict, strict=False)
