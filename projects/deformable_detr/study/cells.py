"""Running cells: each is one training by train_net.py, whose results end up in one JSON file.

In the output folder: ``data/`` the images; ``runs/CELL/`` a training; ``cells/CELL.json`` its results, which exist
only once it is finished. Whatever ends in between is continued from its last checkpoint.
"""

import contextlib
import fcntl
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig

from ..data.datasets import register_coco_data
from ..data.shapes import VERSION, write_split
from ..detect.results import RESULTS
from ..engine import do_test
from ..files import make_folder, write_json
from ..loading import load_model
from ..training.metrics import read_metrics
from .configs import build_config
from .measures import EVALUATED, count_duplicates, learning_curve
from .table import Cell, Size, Table

logger = logging.getLogger(__name__)

_SEED = 0  # of the images: all cells learn the same ones
_TOLD = 15  # lines of a training that has failed


class Workshop:
    """The output folder of a study of one size.

    Args:
        folder: is made where it is missing.
        table: what is studied.
        size: name of a size in it.
        keep_weights: leave the checkpoints of finished cells, some of which are large, where they are.
    """

    def __init__(self, folder: Path, table: Table, size: str, *, keep_weights: bool = False) -> None:
        make_folder(folder)
        self.folder, self.table, self.size_name, self.keep_weights = folder, table, size, keep_weights

    @property
    def size(self) -> Size:
        return self.table.sizes[self.size_name]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other studies out of the folder; a training that has lost the study that started it does so too.

        Raises:
            BlockingIOError: the folder is in use.
        """
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
        """Return "finished", "begun" or "to do"."""
        if self.result(cell) is not None:
            return "finished"
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
        self._begin(run_folder / "made_with.json", cell)
        config = run_folder / "study_config.yaml"
        LazyConfig.save(build_config(self.table, self.size_name, cell), str(config))
        self._train(config, run_folder)
        result = {
            "variant": cell.variant,
            "seed": cell.seed,
            "curve": learning_curve(read_metrics(run_folder), iterations=self.size.iterations),
            **count_duplicates(json.loads((run_folder / RESULTS).read_text(encoding="utf-8"))),
            "test_queries": self._evaluate_queries(cell, run_folder),
            "made_with": self._fingerprint(cell),
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
        told = run_folder / "console.txt"
        with told.open("ab") as stream:
            # The training keeps the lock of the folder, should it live longer than this process.
            ended = subprocess.run(
                self.command(config, run_folder), stdout=stream, stderr=stream, pass_fds=[self._lock.fileno()]
            )
        if ended.returncode:
            lines = told.read_text(encoding="utf-8", errors="replace").splitlines()[-_TOLD:]
            raise RuntimeError(
                f"a training has failed with status {ended.returncode}, see {told}:\n" + "\n".join(lines)
            )

    def _evaluate_queries(self, cell: Cell, run_folder: Path) -> dict[str, dict[str, float]]:
        """Number of queries -> AP (%) of the trained model with as many."""
        data, found = self.folder / "data" / "val", {}
        for number in self.table.variants[cell.variant].test_queries:
            register_coco_data("user_val", f"{data}.json", str(data))
            output = run_folder / f"queries-{number}"
            opts = [f"model.num_queries_test={number}", f"train.output_dir={json.dumps(str(output))}"]
            loaded = load_model(str(run_folder), device=self.size.device, opts=opts)
            with (run_folder / "console.txt").open("a") as told, contextlib.redirect_stdout(told):
                scores = do_test(loaded.cfg, loaded.model)["bbox"]
            found[str(number)] = {name: scores[name] for name in EVALUATED}
        return found

    def _begin(self, path: Path, cell: Cell) -> None:
        if path.is_file():
            self._check_same(path, json.loads(path.read_text(encoding="utf-8")), cell)
        else:
            write_json(path, self._fingerprint(cell), indent=1)

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
