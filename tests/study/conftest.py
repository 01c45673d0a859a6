"""A table of two variants, and a workshop whose trainings are played instead of run."""

import dataclasses
import json
from pathlib import Path

import pytest

from deformable_detr.detect.results import RESULTS
from deformable_detr.study.cells import Workshop
from deformable_detr.study.table import Study, read_table


@pytest.fixture(scope="session")
def table():
    whole = read_table()
    return dataclasses.replace(whole, studies={"pair": Study("Which?", ("detr", "multi_scale"))})


class PlayedWorkshop(Workshop):
    """Leaves what a training leaves; the AP is 10 times the seed, and 1 more for multi_scale.

    Attributes:
        trained: cells, in the order in which they were trained.
        stop_at: names of cells whose training ends with an error.
    """

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.trained, self.stop_at = [], {}

    def _train(self, config: Path, run_folder: Path) -> None:
        self.trained.append(run_folder.name)
        if error := self.stop_at.get(run_folder.name):
            raise error
        variant, seed = run_folder.name.rsplit("-", 1)
        ap = 10.0 * int(seed) + (variant == "multi_scale")
        rows = [{"iteration": 3, "time": 0.5}, {"iteration": 4, "bbox/AP": ap, "bbox/AP50": ap, "bbox/APs": ap / 2}]
        (run_folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
        box = {"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 5.0, 5.0], "score": 0.5}
        (run_folder / RESULTS).parent.mkdir(exist_ok=True)
        (run_folder / RESULTS).write_text(json.dumps([box, box]))
        (run_folder / "model_final.pth").write_bytes(b"")


@pytest.fixture
def workshop(table, tmp_path):
    return PlayedWorkshop(tmp_path / "study", table, "tiny")
