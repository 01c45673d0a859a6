"""Running studies from the first cell to the page."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from ..files import make_folder, write_json
from .cells import Workshop
from .latency import contenders, measure_latency
from .page import write_results
from .summary import summarise_study
from .table import Cell

logger = logging.getLogger(__name__)


def run_studies(workshop: Workshop, studies: Sequence[str], *, seeds: int) -> Path:
    """Measure latencies, run what is not finished, and write the page, which is made anew as cells finish.

    A cell that fails does not keep the others from their turn. Whatever ends the study ends its trainings as well, and
    the page is written from what is finished by then.

    Raises:
        RuntimeError: cells have failed; all others are finished, and the page is written.
    """
    cells = workshop.table.cells(studies, seeds=seeds)
    with workshop.locked():
        left = [cell for cell in cells if workshop.state(cell) != "finished"]
        logger.info(count_finished(workshop, studies, seeds=seeds))
        try:
            workshop.draw_data()
            # While the machine has nothing else to do.
            for study in studies:
                _time_study(workshop, study)
            failed = _run_side_by_side(workshop, left, lambda: make_page(workshop, studies, seeds=seeds))
        finally:
            page = make_page(workshop, studies, seeds=seeds)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(cells)} cells have failed ({', '.join(failed)}); see above")
    return page


def _run_side_by_side(workshop: Workshop, cells: Sequence[Cell], after_each: Callable[[], object]) -> list[str]:
    """Run cells, as many at the same time as the workshop has jobs, and return the names of those that have failed."""
    pool, failed = ThreadPoolExecutor(workshop.jobs), []
    running = {pool.submit(_run_cell, workshop, cell): cell for cell in workshop.table.longest_first(cells)}
    try:
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    future.result()
                except RuntimeError as error:
                    logger.error("%s: %s", cell, error)
                    failed.append(str(cell))
            if running:
                logger.info("%d cells to go", len(running))
                after_each()
    finally:
        # First what would take the places of those that end.
        pool.shutdown(wait=False, cancel_futures=True)
        workshop.children.stop()
        pool.shutdown()
    return failed


def _run_cell(workshop: Workshop, cell: Cell) -> None:
    started = time.monotonic()
    logger.info("%s: %s", cell, workshop.state(cell))
    workshop.run(cell)
    logger.info("%s is finished after %.0f s", cell, time.monotonic() - started)


def count_finished(workshop: Workshop, studies: Sequence[str], *, seeds: int) -> str:
    """Return one line that says how many cells are finished."""
    states = [workshop.state(cell) for cell in workshop.table.cells(studies, seeds=seeds)]
    return f"{states.count('finished')} of {len(states)} cells are finished"


def make_page(workshop: Workshop, studies: Sequence[str], *, seeds: int) -> Path:
    """Write the page of what is finished."""
    return write_results(workshop.folder, summaries(workshop, studies, seeds=seeds), size=workshop.size_name)


def summaries(workshop: Workshop, studies: Sequence[str], *, seeds: int) -> dict[str, dict[str, Any]]:
    """Put every study together, from files alone."""
    results = {variant: [] for study in studies for variant in workshop.table.studies[study].variants}
    for cell in workshop.table.cells(studies, seeds=seeds):
        if (result := workshop.result(cell)) is not None:
            results[cell.variant].append(result)
    return {study: summarise_study(workshop.table, study, results, _read_latency(workshop, study)) for study in studies}


def _time_study(workshop: Workshop, study: str) -> None:
    """Measure latencies, unless they are there."""
    if _read_latency(workshop, study) is None:
        logger.info("latencies of %s", study)
        make_folder(_latency_file(workshop, study).parent)
        measured = measure_latency(workshop.table, workshop.size_name, workshop.table.studies[study].variants)
        write_json(_latency_file(workshop, study), measured, indent=1)


def _read_latency(workshop: Workshop, study: str) -> Mapping[str, Any] | None:
    """Latencies of all that a study has now; None where some are missing."""
    path = _latency_file(workshop, study)
    if not path.is_file():
        return None
    latency = json.loads(path.read_text(encoding="utf-8"))
    found = {(row["variant"], row["test_queries"]) for row in latency["rows"]}
    expected = set(contenders(workshop.table, workshop.table.studies[study].variants))
    return latency if found == expected and latency["rounds"] == workshop.size.rounds else None


def _latency_file(workshop: Workshop, study: str) -> Path:
    return workshop.folder / "latency" / f"{study}.json"
