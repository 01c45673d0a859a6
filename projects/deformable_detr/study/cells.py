"""Running cells: each is one training by train_net.py, whose results end up in one JSON file.

In the output folder: ``data/`` the images; ``runs/CELL/`` a training; ``cells/CELL.json`` its results, which exist
only once it is finished. Whatever ends in between is continued from its last checkpoint.
"""

import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig

from ..benchmark.timing import describe_machine
from ..data.shapes import VERSION, write_split
from ..detect.results import RESULTS
from ..files import make_folder, write_json
from ..training.metrics import read_metrics
from . import queries
from .children import Children
from .configs import build_config
from .measures import count_duplicates, learning_curve
from .table import Cell, Size, Table

_SEED = 0  # of the images: all cells learn the same ones
_BEGUN = "made_with.json"  # settings of a cell, in the folder of its training


class Workshop:
    """The output folder of a study of one size.

    Args:
        folder: is made where it is missing.
        table: what is studied.
        size: name of a size in it.
        keep_weights: leave the checkpoints of finished cells, some of which are large, where they are.
        jobs: how many cells :meth:`run` is called for at the same time, from as many threads.
        threads: of each training; None leaves their number to PyTorch.
    """

    def __init__(
        self,
        folder: Path,
        table: Table,
        size: str,
        *,
        keep_weights: bool = False,
        jobs: int = 1,
        threads: int | None = None,
    ) -> None:
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        make_folder(folder)
        self.folder, self.table, self.size_name, self.keep_weights = folder, table, size, keep_weights
        self.jobs, self.children = jobs, Children(threads=threads)
        # Reading a LazyConfig replaces Python's own import for a moment.
        self._reading_configs = threading.Lock()

    @property
    def size(self) -> Size:
        return self.table.sizes[self.size_name]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other studies out of the folder; a training that has lost the study that started it does so too.

        Raises:
            BlockingIOError: the folder is in use.
        """
        import fcntl  # not on Windows, where the command line says so

        with (self.folder / "lock").open("w") as self._lock:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(
                    f"{self.folder} is in use by another study, or by a training that one has left behind"
                ) from error
            yield

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Results of a cell; None where it is not finished.

        Raises:
            ValueError: if they were made with other settings.
        """
        path = self._result_file(cell)
        if not path.is_file():
            return None
        result = json.loads(path.read_text(encoding="utf-8"))
        self._check_same(path, result["made_with"], cell)
        return result

    def state(self, cell: Cell) -> str:
        """Return "finished", "begun" or "to do".

        Raises:
            ValueError: if it was finished or begun with other settings.
        """
        if self.result(cell) is not None:
            return "finished"
        self._check_begun(cell)
        return "begun" if self._run_folder(cell).is_dir() else "to do"

    def draw_data(self) -> None:
        """Draw the images, unless they are there."""
        for split, (name, number) in enumerate(self.size.images.items()):
            write_split(self.folder / "data", name, number, seed=_SEED, split=split, scene=self.size.scene)

    def run(self, cell: Cell) -> None:
        """Train a cell from where it stands, and write its results.

        Raises:
            RuntimeError: the training has failed; has the end of what it told.
            ValueError: it was begun with other settings.
        """
        run_folder = self._run_folder(cell)
        make_folder(run_folder)
        self._check_begun(cell)
        write_json(run_folder / _BEGUN, self._fingerprint(cell), indent=1)
        config = run_folder / "study_config.yaml"
        with self._reading_configs:
            LazyConfig.save(build_config(self.table, self.size_name, cell), str(config))
        self._train(config, run_folder)
        result = {
            "variant": cell.variant,
            "seed": cell.seed,
            "curve": learning_curve(read_metrics(run_folder), iterations=self.size.iterations),
            **count_duplicates(json.loads((run_folder / RESULTS).read_text(encoding="utf-8"))),
            "test_queries": self._evaluate_queries(cell, run_folder),
            "made_with": self._fingerprint(cell),
            # These decide how long it took, and nothing else.
            "jobs": self.jobs,
            "machine": describe_machine([self.size.device], self.children.threads or torch.get_num_threads()),
        }
        make_folder(self._result_file(cell).parent)
        write_json(self._result_file(cell), result, indent=1)
        if not self.keep_weights:
            for checkpoint in run_folder.glob("model_*.pth"):
                checkpoint.unlink()

    def command(self, config: Path, run_folder: Path) -> list[str]:
        """Return the command line that trains a cell, or goes on with it."""
        data = self.folder / "data"
        flags = [
            f for s in self.size.images for f in (f"--{s}-json", f"{data / s}.json", f"--{s}-images", f"{data / s}")
        ]
        gpus = "0" if self.size.device == "cpu" else "1"
        start = [sys.executable, "-m", "deformable_detr", "train", "--config-file", f"{config}", "--resume"]
        return [*start, "--num-gpus", gpus, *flags, f"train.output_dir={json.dumps(str(run_folder))}"]

    def _train(self, config: Path, run_folder: Path) -> None:
        self._run_child(self.command(config, run_folder), run_folder)

    def _evaluate_queries(self, cell: Cell, run_folder: Path) -> dict[str, dict[str, float]]:
        """Number of queries -> AP (%) of the trained model with as many."""
        numbers = self.table.variants[cell.variant].test_queries
        if not numbers:
            return {}
        data = self.folder / "data" / "val"
        self._run_child(queries.command(run_folder, data, numbers, device=self.size.device), run_folder)
        return json.loads((run_folder / queries.RESULT).read_text(encoding="utf-8"))

    def _run_child(self, command: list[str], run_folder: Path) -> None:
        # It keeps the lock of the folder, should it live longer than this process.
        self.children.run(command, run_folder / "console.txt", keep_open=self._lock.fileno())

    def _check_begun(self, cell: Cell) -> None:
        begun = self._run_folder(cell) / _BEGUN
        if begun.is_file():
            self._check_same(begun, json.loads(begun.read_text(encoding="utf-8")), cell)

    def _check_same(self, path: Path, found: dict[str, Any], cell: Cell) -> None:
        expected = self._fingerprint(cell)
        if found != expected:
            differing = " and ".join(name for name in expected if found.get(name) != expected[name])
            raise ValueError(
                f"{path} was made with another {differing} than now: "
                f"remove it and {self._run_folder(cell)}, or take another --output"
            )

    def _fingerprint(self, cell: Cell) -> dict[str, Any]:
        # As it is read back: lists in place of tuples.
        return json.loads(json.dumps({**self.table.fingerprint(self.size_name, cell), "pictures": VERSION}))

    def _run_folder(self, cell: Cell) -> Path:
        return self.folder / "runs" / str(cell)

    def _result_file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell}.json"
