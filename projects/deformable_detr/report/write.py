"""Puts the page together."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import html, sections
from .evaluation import Evaluation, load_evaluation
from .gallery import draw_sheet
from .run import NoData, Run, read_run


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
    for file in (path, *([] if sheet_path is None else [Path(sheet_path)])):
        if not file.parent.is_dir():
            raise FileNotFoundError(f"cannot write {file}: there is no folder {file.parent}")
    evaluation = _load_or_reason(run, dataset_name)
    shown = {"num_images": num_images, "score_threshold": score_threshold}
    built = _build_sections(run, evaluation, **shown)
    state = f"{run.progress()}. Page made {time.strftime('%Y-%m-%d %H:%M:%S')}."
    path.write_text(html.page(Path(output_dir).resolve().name, state, built), encoding="utf-8")
    if sheet_path is not None:
        drawn = _or_raise(evaluation)
        draw_sheet(drawn.dicts, drawn.metadata, drawn.detections, sheet_path, **shown)
    return path


def _build_sections(
    run: Run, evaluation: Evaluation | NoData, *, num_images: int, score_threshold: float
) -> list[html.Section]:
    def of_evaluation(build: Callable[..., list[str]], *args: object) -> list[str]:
        return build(_or_raise(evaluation), *args)

    parts = {
        "Summary": partial(sections.summary, run),
        "Loss": partial(sections.losses, run),
        "Loss by layer": partial(sections.layers, run),
        "Schedule": partial(sections.schedule, run),
        "Average precision": partial(sections.average_precision, run),
        "Precision and recall": partial(of_evaluation, sections.precision_recall_curves),
        "Confusion": partial(of_evaluation, sections.confusion, score_threshold),
        "Scores": partial(of_evaluation, sections.scores, score_threshold),
        "Most wrong images": partial(of_evaluation, sections.most_wrong, score_threshold, num_images),
        "Test images": partial(of_evaluation, sections.examples, score_threshold, num_images),
        "Speed": partial(sections.inference_speed, run),
        "Configuration and versions": partial(sections.environment, run),
    }
    return [sections.build_section(title, build) for title, build in parts.items()]


def _load_or_reason(run: Run, dataset_name: str | None) -> Evaluation | NoData:
    try:
        return load_evaluation(run, dataset_name)
    except NoData as reason:
        return reason


def _or_raise(evaluation: Evaluation | NoData) -> Evaluation:
    if isinstance(evaluation, NoData):
        raise evaluation
    return evaluation
