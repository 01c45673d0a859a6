"""``python -m deformable_detr.study`` (see ``--help``)."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import check_device, make_parser, run
from ..startup.processors import available_cores, share_processors
from .cells import Workshop
from .page import as_markdown, fill_markdown, read_marked
from .run import count_finished, make_page, run_studies, summaries
from .table import Table, read_table

ALL = "all"
EPILOG = """
Whatever ends it, the same command goes on: finished cells are kept, those in between continue from their last
checkpoint. Seed 1 comes first, then seed 2 and so on. docs/study.md says how long each size takes.
"""


def parse_args(argv: Sequence[str] | None, table: Table) -> argparse.Namespace:
    studies = "\n".join(f"  {name:16}{study.question}" for name, study in table.studies.items())
    parser = make_parser(
        "study",
        description=f"Trains small models on generated images, and compares them on one page.\n\nstudies:\n{studies}",
        epilog=EPILOG,
    )
    parser.add_argument(
        "studies", nargs="+", choices=[*table.studies, ALL], metavar="STUDY", help="one or more, or all"
    )
    parser.add_argument("--size", default="small", choices=table.sizes, help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: output/study/SIZE")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every variant (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=table.variants, metavar="VARIANT", help="only these of them")
    parser.add_argument("--jobs", type=int, default=1, help="cells to train at the same time (default: %(default)s)")
    parser.add_argument("--keep-weights", action="store_true", help="keep the weights of finished cells")
    parser.add_argument("--list", action="store_true", help="say what is finished and what is to do, and do nothing")
    parser.add_argument("--page", action="store_true", help="only make the page again, from what is finished")
    parser.add_argument("--fill", type=Path, metavar="FILE", help="also put the tables into this Markdown file")
    args = parser.parse_args(argv)
    if ALL in args.studies:
        args.studies = list(table.only(args.variants or table.variants).studies)
    args.studies = list(dict.fromkeys(args.studies))
    args.output = args.output or Path("output") / "study" / args.size
    return args


def main(argv: Sequence[str] | None = None) -> None:
    if sys.platform == "win32":
        raise OSError("a study needs Linux or macOS: it locks its folder and ends its trainings by what Windows lacks")
    table = read_table()
    args = parse_args(argv, table)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%m/%d %H:%M:%S")
    logging.getLogger("deformable_detr.study").setLevel(logging.INFO)
    if args.variants:
        table = table.only(args.variants)
        if unknown := [study for study in args.studies if study not in table.studies]:
            raise ValueError(f"{' and '.join(unknown)} has none of the variants {', '.join(args.variants)}")
    if args.fill:
        read_marked(args.fill)  # refused before hours of training
    workshop = Workshop(
        args.output,
        table,
        args.size,
        keep_weights=args.keep_weights,
        jobs=args.jobs,
        threads=_threads_of_each(args.jobs),
    )
    if args.list:
        for cell in table.cells(args.studies, seeds=args.seeds):
            print(f"{workshop.state(cell):10}{cell}")
        return
    if not args.page:
        check_device(workshop.size.device)
    _end_as_with_ctrl_c(signal.SIGTERM, signal.SIGHUP)
    make = make_page if args.page else run_studies
    try:
        page = make(workshop, args.studies, seeds=args.seeds)
    finally:
        print(count_finished(workshop, args.studies, seeds=args.seeds), flush=True)
    if args.fill:
        found = summaries(workshop, args.studies, seeds=args.seeds)
        fill_markdown(args.fill, as_markdown(found, size=args.size))
    print(page)


def _threads_of_each(jobs: int) -> int | None:
    """Return the share of the cores that one of several trainings has, unless the user has set it."""
    if jobs < 2 or "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, available_cores() // jobs)


def _end_as_with_ctrl_c(*signals: signal.Signals) -> None:
    """Let the trainings end too, and the page be written; nohup's way to have a signal ignored stays."""
    for number in signals:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda got, _: sys.exit(128 + got))


if __name__ == "__main__":
    share_processors(long_running=True)
    sys.exit(run(main))
