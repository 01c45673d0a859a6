"""What a study leaves for readers: study.json, plots, one HTML page, and tables for a Markdown file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import make_folder, write_json, write_text
from ..report.page import Chart, Grid, Part, Section, Table, Text, render
from . import figures
from .summary import show

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
MARKED = f"(?s){re.escape(BEGIN)}.*?{re.escape(END)}"

Summary = Mapping[str, Any]


def write_results(folder: Path, summaries: Mapping[str, Summary], *, size: str) -> Path:
    """Write ``study.json``, ``plots/*.png`` and ``study.html`` into a folder.

    Args:
        summaries: study -> what :func:`summary.summarise_study` returns.

    Returns:
        The page.
    """
    write_json(folder / "study.json", {"size": size, "studies": summaries}, indent=1)
    make_folder(folder / "plots")
    sections = []
    for name, summary in summaries.items():
        charts = study_charts(name, summary)
        for title, chart in charts.items():
            chart.figure.savefig(folder / "plots" / f"{title}.png", dpi=150)
        sections.append(
            Section(name.replace("_", " "), [*_words(summary), Grid(list(charts.values())), *_tables(summary)])
        )
    write_text(folder / "study.html", render(f"Study, size {size}", _STATE, sections))
    return folder / "study.html"


_STATE = (
    "Generated images, trained from scratch. Numbers are the mean over seeds ± their standard deviation; a dash is "
    "what was not measured. Bands in the plots are one standard deviation."
)


def _words(summary: Summary) -> list[Part]:
    machine = summary["machine"]
    return [
        Text(summary["question"]),
        *map(Text, _trained_on(summary)),
        Text(f"Latency on {machine}." if machine else "Latency was not measured yet.", missing=not machine),
    ]


def _trained_on(summary: Summary) -> list[str]:
    return [f"Seconds of training on {place}." for place in summary["trained_on"]]


def study_charts(name: str, summary: Summary) -> dict[str, Chart]:
    """Return the drawings of a study, by names for their files; none of what has no data."""
    rows, charts = summary["rows"], {}
    if any(row["curve"] for row in rows):
        for metric in ("AP", "APs"):
            for over in ("iteration", "seconds"):
                what = f"{metric} over {'iterations' if over == 'iteration' else 'seconds of training'}"
                drawing = figures.learning_curves(rows, metric, over=over)
                charts[f"{name}_{metric}_{over}"] = Chart(drawing, f"{name}: {what}", what)
    if any(row["test_queries"] and row["curve"] for row in rows) and name == "queries":
        charts[f"{name}_inference"] = Chart(
            figures.queries(rows), "AP over queries", "AP over the number of queries at inference, by that in training"
        )
    if any(row["latency"] and row["AP"] for row in rows):
        charts[f"{name}_latency"] = Chart(figures.latencies(rows), "AP over latency", "AP over latency")
    return charts


def variant_table(summary: Summary) -> Table:
    """Return the table of a study, one row for each variant."""
    seconds = summary["equal_time"]
    header = (
        "variant", "seeds", "AP", "AP small", f"AP after {seconds:.0f} s" if seconds else "AP at equal time",
        "training (s)", "detections", "duplicates", "ms an image", "parameters (M)",
    )  # fmt: skip
    rows = []
    for row in summary["rows"]:
        latency = row["latency"]
        rows.append((
            row["label"], str(row["seeds"]), show(row["AP"]), show(row["APs"]), show(row["AP at equal time"]),
            show(row["seconds"], 0), show(row["detections"], 0), show(row["duplicates"], 0),
            f"{latency['ms']:.1f}" if latency else "-", f"{latency['parameters'] / 1e6:.2f}" if latency else "-",
        ))  # fmt: skip
    return Table(rows, header)


def queries_table(summary: Summary) -> Table:
    """Return AP and latency for each number of queries at inference."""
    rows = [
        (row["label"], number, show(entry["AP"]), show(entry["APs"]),
         f"{entry['latency']['ms']:.1f}" if entry["latency"] else "-")
        for row in summary["rows"]
        for number, entry in row["test_queries"].items()
    ]  # fmt: skip
    return Table(rows, ("trained with", "queries at inference", "AP", "AP small", "ms an image"))


def _tables(summary: Summary) -> list[Table]:
    tables = [variant_table(summary)]
    if all(row["test_queries"] for row in summary["rows"]):
        tables.append(queries_table(summary))
    return tables


def as_markdown(summaries: Mapping[str, Summary], *, size: str) -> str:
    """Return the tables of all studies as Markdown."""
    parts = [f"Size `{size}`."]
    for name, summary in summaries.items():
        parts += [f"### {name.replace('_', ' ')}", summary["question"]]
        for table in _tables(summary):
            lines = [table.header, ["---"] * len(table.header), *table.rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        parts += _trained_on(summary)
        if summary["machine"]:
            parts.append(f"Latency on {summary['machine']}.")
    return "\n\n".join(parts)


def read_marked(path: Path) -> str:
    """Return what a Markdown file holds.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it does not have each mark once, in their order.
    """
    content = path.read_text(encoding="utf-8")
    if len(re.findall(MARKED, content)) != 1 or content.count(BEGIN) != 1:
        raise ValueError(f"{path} must have the marks {BEGIN} and {END} once, in this order")
    return content


def fill_markdown(path: Path, text: str) -> None:
    """Put a text between the two marks of a Markdown file, in place of what stands there.

    Raises:
        What :func:`read_marked` does.
    """
    write_text(path, re.sub(MARKED, lambda _: f"{BEGIN}\n\n{text}\n\n{END}", read_marked(path)))
