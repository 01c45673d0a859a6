"""Running studies from the first cell to the page."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import make_folder, write_json
from .cells import Workshop
from .latency import contenders, measure_latency
from .page import write_results
from .summary import summarise_study

logger = logging.getLogger(__name__)


def run_studies(workshop: Workshop, studies: Sequence[str], *, seeds: int) -> Path:
    """Run what is not finished, measure latencies, and write the page, which is made anew after every cell.

    A cell that fails does not keep the others from their turn.

    Raises:
        RuntimeError: cells have failed; all others are finished, and the page is written.
    """
    cells, failed = workshop.table.cells(studies, seeds=seeds), {}
    with workshop.locked():
        states = {cell: workshop.state(cell) for cell in cells}
        left = [cell for cell in cells if states[cell] != "finished"]
        logger.info("%d of %d cells are finished", len(cells) - len(left), len(cells))
        workshop.draw_data()
        for number, cell in enumerate(left, start=1):
            if number > 1:
                make_page(workshop, studies, seeds=seeds)
            started = time.monotonic()
            logger.info("%d of %d, %s: %s", number, len(left), cell, states[cell])
            try:
                workshop.run(cell)
            except RuntimeError as error:
                logger.error("%s: %s", cell, error)
                failed[str(cell)] = error
            else:
                logger.info("%s is finished after %.0f s", cell, time.monotonic() - started)
        for study in studies:
            _time_study(workshop, study)
    page = make_page(workshop, studies, seeds=seeds)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(cells)} cells have failed ({', '.join(failed)}); see above")
    return page


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
