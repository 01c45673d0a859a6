"""What train_net.py leaves in its output folder: metrics.json, config.yaml, user_data.json, log.txt, inference/."""

import ast
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig
from omegaconf import DictConfig

from ..config import RunConfig
from ..data.coco_format import DatasetError
from ..data.datasets import read_user_data, register_coco_data
from ..training.metrics import Metrics, read_metrics, series
from ..training.settings import TrainingSettings

# A run writes a line every LOG_PERIOD iterations, and during an evaluation every five seconds. One that has been silent
# for three times as long, or for this many seconds if that is more, is taken to have stopped.
_SILENCE = 120

_ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_TIMESTAMP = re.compile(r"^\[(\d\d/\d\d \d\d:\d\d:\d\d)\]", re.MULTILINE)


class NoData(Exception):
    """Why a part of the report is left empty: one sentence for the reader of the page."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        done: iterations finished.
        total: iterations planned; None where the configuration does not say.
        state: "finished", "running" or "stopped".
    """

    done: int
    total: int | None
    state: str

    def __str__(self) -> str:
        return f"iteration {self.done:,} of {'?' if self.total is None else f'{self.total:,}'}, {self.state}"


@dataclass(frozen=True)
class Run:
    """An output folder, read once.

    Attributes:
        metrics: iteration -> name -> value.
        config: of either kind, as plain data; None where the folder has no config.yaml.
        recorded: split -> annotation file and image folder of the user's data that the training was on.
        log: text of log.txt without colours; empty where there is none.
        changed: seconds since the epoch at which the newest of metrics.json and log.txt was written.
    """

    folder: Path
    metrics: Metrics
    config: DictConfig | None
    recorded: dict[str, tuple[str, str]]
    log: str
    changed: float

    def setting(self, name: str) -> Any:
        """Value of a setting, by its name in :data:`KEYS`; None where the configuration does not have it."""
        return None if self.config is None else RunConfig(self.config).get(name)

    def dataset_names(self, split: str) -> list[str]:
        """Return the datasets of "train" or "test" as a reader knows them: the user's own by its annotation file."""
        names = self.setting(f"{split}_datasets") or ()
        own = {f"user_{part}": files[0] for part, files in self.recorded.items()}
        own |= {f"user_{part}": path for part in ("train", "val") if (path := self.argument(f"{part}_json"))}
        return [own.get(name, name) for name in names]

    def argument(self, name: str) -> str | bool | None:
        """Return a value of the run's last command line; None where it was not given or log.txt does not have it."""
        command = self.log.rpartition("Command line arguments: Namespace(")[2].partition("\n")[0]
        found = re.search(rf"""(?:^|, ){name}=((['"])(?:\\.|(?!\2).)*\2|True|False)""", command)
        return found and ast.literal_eval(found[1])

    def progress(self, now: float | None = None) -> Progress:
        """Says whether the run has come to its end, and otherwise whether it still writes.

        Args:
            now: seconds since the epoch; default: the clock.
        """
        # A line of training carries the number of an iteration counted from 0; an evaluation that of the next one.
        trained = [iteration + 1 for iteration, row in self.metrics.items() if "total_loss" in row]
        done = max(trained, default=max(self.metrics))
        total = self.setting("max_iter")
        _, seconds = series(self.metrics, "time")
        period = self.setting("log_period") or TrainingSettings.log_period
        allowed = max(_SILENCE, 3 * period * seconds[-1]) if seconds else _SILENCE
        silent = (time.time() if now is None else now) - self.changed > allowed
        if total is not None and done >= total and (silent or max(self.metrics) >= total):
            return Progress(done, total, "finished")
        return Progress(done, total, "stopped" if silent else "running")

    def log_times(self) -> tuple[str, str] | None:
        """First and last time stamp of log.txt, as "MM/DD HH:MM:SS" of the training machine's clock."""
        stamps = _TIMESTAMP.findall(self.log)
        return (stamps[0], stamps[-1]) if stamps else None

    def environment(self) -> str:
        """Versions and devices, as Detectron2's collect_env wrote them at the last start.

        Raises:
            NoData: log.txt is missing or holds none.
        """
        blocks = self.log.split("Environment info:\n")[1:]
        if not blocks:
            raise NoData(
                f"The versions are not known: there is no log.txt with an “Environment info” in {self.folder}."
            )
        lines = blocks[-1].split("PyTorch built with")[0].splitlines()
        return "\n".join(line for line in lines if line.strip() and not line.startswith("---"))


def read_run(folder: str | Path) -> Run:
    """Read an output folder of train_net.py, also while the run still writes to it.

    Raises:
        FileNotFoundError: there is no such folder, or no metrics.json in it.
        ValueError: metrics.json has no complete line yet, or lines that are not of its format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; expected the OUTPUT_DIR of train_net.py")
    metrics_file, config, log = (folder / name for name in ("metrics.json", "config.yaml", "log.txt"))
    if not metrics_file.is_file():
        raise FileNotFoundError(
            f"{folder} has no metrics.json; expected the OUTPUT_DIR of a training with train_net.py, which begins it "
            "after its first iterations"
        )
    metrics = read_metrics(folder)
    if not metrics:
        raise ValueError(f"{metrics_file} has no complete line of metrics yet")
    return Run(
        folder=folder,
        metrics=metrics,
        config=LazyConfig.load(str(config)) if config.is_file() else None,
        recorded=read_user_data(folder),
        log=_ANSI_COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else "",
        changed=max(path.stat().st_mtime for path in (metrics_file, log) if path.is_file()),
    )


def find_dataset(run: Run) -> str:
    """Name of the registered dataset that the run's last evaluation was on.

    The user's own data is registered again, from the files of the training's record or, where a later command line in
    log.txt names others to evaluate on, from those.

    Raises:
        NoData: the configuration names no test dataset, or the user's files are not known.
    """
    if run.config is None:
        raise NoData(f"The test data is not known: there is no config.yaml in {run.folder}; give --val-json.")
    names = run.setting("test_datasets")
    if not names:
        raise NoData("The configuration names no dataset to evaluate on.")
    # Every evaluation of a yaml run writes the same file: the last dataset's detections are the ones that stay.
    name = names[-1]
    if name == "user_val":
        try:
            register_coco_data(name, *_user_files(run))
        except DatasetError as error:
            raise NoData(f"The test data cannot be used: {error}") from error
    return name


def _user_files(run: Run) -> tuple[Path, Path]:
    """Annotation file and image folder of the last evaluation: of the training, or of a command line after it."""
    # A command that only evaluates is not recorded, and takes the recorded data unless it names others.
    evaluates_others = run.argument("eval_only") and _named_data(run) is not None
    if "val" in run.recorded and not evaluates_others:
        json_file, images = map(Path, run.recorded["val"])
        if not json_file.exists() and (run.folder / json_file.name).exists():
            # The run has written it into its folder, which has another name now.
            json_file = run.folder / json_file.name
    else:
        json_file, images = _files_in_log(run)
    for path in (json_file, images):
        if not path.exists():
            raise NoData(f"The test data has moved: there is no {path}, which the run was started with.")
    return json_file, images


def _named_data(run: Run) -> str | None:
    """Return the file or folder to evaluate on in the run's last command line."""
    return run.argument("val_json") or run.argument("data")


def _files_in_log(run: Run) -> tuple[Path, Path]:
    """Annotation file and image folder of ``--val-json`` and ``--val-images`` in the run's last command line."""
    named, images = _named_data(run), run.argument("val_images")
    if named is None:
        raise NoData("The run was evaluated on data of your own that log.txt does not name; give --val-json.")
    json_file = Path(named)
    if images is None or json_file.is_dir() or json_file.suffix in (".yaml", ".yml"):
        # The run has converted them; where their images are is not written down.
        converted = run.folder / "val_coco.json"
        raise NoData(f"The last evaluation was on folders, {named}: give --val-json {converted} and --val-images.")
    repaired = run.folder / "val_repaired.json"
    return repaired if run.argument("repair") and repaired.is_file() else json_file, Path(images)
