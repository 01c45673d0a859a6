"""Puts the page together."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

from ..detect.results import BEST_SCORES
from ..files import check_writable, write_json, write_text
from . import sections
from .evaluation import Evaluation, load_evaluation
from .gallery import draw_sheet
from .page import Section, Text, render
from .run import NoData, Run, read_run

logger = logging.getLogger(__name__)


def write_report(
    output_dir: str | Path,
    html_path: str | Path | None = None,
    *,
    sheet_path: str | Path | None = None,
    dataset_name: str | None = None,
    num_images: int = 8,
    score_threshold: float = 0.3,
) -> Path:
    """Write one self-contained HTML page about a finished or running training.

    Args:
        output_dir: ``OUTPUT_DIR`` of train_net.py.
        html_path: the page; default: ``report.html`` in the folder.
        sheet_path: a PNG picture to draw as well, of the evenly spaced test images, to show around; None draws none.
        dataset_name: registered dataset of the last evaluation; default: as the run's configuration says.
        num_images: at most so many of the images with the most errors, and of evenly spaced ones.
        score_threshold: detections below this score are neither drawn nor counted as errors.

    Returns:
        ``html_path``.

    Raises:
        FileNotFoundError: there is no such folder, no metrics.json in it, or no folder to write a file into.
        ValueError: metrics.json is not of its format, or an argument is out of range.
        NoData: a sheet was asked for, and there was no evaluation yet or its data cannot be had.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must be in [0, 1], got {score_threshold}")
    path = Path(html_path) if html_path is not None else Path(output_dir) / "report.html"
    run = read_run(output_dir)
    for file in (path, *([] if sheet_path is None else [sheet_path])):
        check_writable(file)

    @cache
    def evaluation() -> Evaluation:
        return load_evaluation(run, dataset_name)

    builders = {
        "Summary": lambda: sections.summary(run),
        "Loss": lambda: sections.losses(run),
        "Loss by layer": lambda: sections.layers(run),
        "Schedule": lambda: sections.schedule(run),
        "Average precision": lambda: sections.average_precision(run),
        "Precision and recall": lambda: sections.precision_recall(evaluation()),
        "Best scores": lambda: sections.best_scores(evaluation()),
        "Confusion": lambda: sections.confusion(evaluation(), score_threshold),
        "Scores": lambda: sections.scores(evaluation(), score_threshold),
        "Most wrong images": lambda: sections.most_wrong(evaluation(), score_threshold, num_images),
        "Test images": lambda: sections.examples(evaluation(), score_threshold, num_images),
        "Speed": lambda: sections.inference_speed(run),
        "Configuration and versions": lambda: sections.environment(run),
    }
    built = []
    for title, build in builders.items():
        try:
            built.append(Section(title, build()))
        except NoData as reason:
            built.append(Section(title, [Text(str(reason), missing=True)]))
    state = f"{run.progress()}. Page made {time.strftime('%Y-%m-%d %H:%M:%S')}. A click on a picture enlarges it."
    _store_best_scores(run, evaluation)
    write_text(path, render(Path(output_dir).resolve().name, state, built))
    if sheet_path is not None:
        shown = evaluation()
        options = {"num_images": num_images, "score_threshold": score_threshold}
        draw_sheet(shown.dicts, shown.metadata, shown.detections, sheet_path, **options)
    return path


def _store_best_scores(run: Run, evaluation: Callable[[], Evaluation]) -> None:
    """Leave the scores with the best F1 where ``detect --score best`` looks for them."""
    try:
        overall, by_class = evaluation().best_scores()
    except NoData:
        return
    if overall is None:
        return
    names = evaluation().class_names
    categories = {name: asdict(best) for name, best in zip(names, by_class, strict=True) if best is not None}
    content = {**asdict(overall), "iou": 0.5, "data": str(evaluation().metadata.json_file), "categories": categories}
    try:
        write_json(run.folder / BEST_SCORES, content, indent=2)
    except OSError as error:
        # A page elsewhere, about a run in a folder that may only be read, is fine without it.
        logger.warning("the best scores are not stored for detect --score best: %s", error)
