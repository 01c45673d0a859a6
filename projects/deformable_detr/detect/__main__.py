"""Detects in images, videos, cameras and streams: ``python -m deformable_detr.detect`` (see ``--help``)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import add_model_arguments, make_parser, run
from ..files import make_folder, show
from ..loading import DTYPES
from ..startup.processors import share_processors
from .inputs import Source, SourceError, find_sources, name_outputs, without_repetitions
from .job import Job, warn
from .outputs import SideFiles
from .predictor import Predictor
from .results import CocoResults, GroundTruthIds

# With so few files each gets a line of its own.
_MAX_LINES = 10


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(
        "detect",
        description="Detects objects in images, videos, streams, by a camera or on the screen, and writes annotated "
        "copies of them.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help='image, video, folder (searched with all folders below it), address, number of a camera, or "screen"',
    )
    add_model_arguments(parser)
    _add_choices(parser)
    _add_outputs(parser)
    _add_computation(parser)
    # Inputs may also stand between and behind the flags.
    args = parser.parse_intermixed_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.seconds is not None and not args.seconds > 0:
        parser.error(f"--seconds must be above 0, got {args.seconds:g}")
    if args.ids_from and not args.json:
        parser.error("--ids-from is about the ids in detections.json: give --json as well")
    return args


def _add_choices(parser: argparse.ArgumentParser) -> None:
    """Which detections are shown."""
    parser.add_argument(
        "--score",
        type=score_or_best,
        default=0.3,
        help='lowest score to show (default: %(default)s); "best": the one with the best F1, which the report of an '
        "OUTPUT_DIR has found",
    )
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="show these only (default: all)")
    parser.add_argument(
        "--merge",
        type=float,
        metavar="IOU",
        help="show only the best of detections of one class that overlap by more than this; for models that were "
        "trained briefly (default: show all)",
    )
    parser.add_argument(
        "--seconds", type=float, help="leave each camera, stream or screen after so long (default: with Ctrl-C)"
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="also write detections.json there, in COCO's format")
    parser.add_argument("--csv", action="store_true", help="also write detections.csv, one row per detection")
    parser.add_argument(
        "--txt", action="store_true", help="also write labels/NAME.txt in YOLO's format: label cx cy w h score"
    )
    parser.add_argument("--crops", action="store_true", help="also write crops/CLASS/NAME_1.jpg, one per detection")
    parser.add_argument(
        "--ids-from",
        type=Path,
        metavar="ANNOTATIONS",
        help="COCO annotation file whose image and category ids detections.json takes, to be compared with it",
    )


def _add_computation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images at a time, one of what is live (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        "--dtype",
        dest="dtype",
        choices=DTYPES,
        default="float32",
        help="of weights and computation (default: %(default)s)",
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="replay images of a size that was seen before as one CUDA graph",
    )
    parser.add_argument("--channels-last", action="store_true", help="memory layout of the backbone")
    parser.add_argument("--compile", action="store_true", help="compile the transformer; the first images take minutes")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0, or 1 if an input could not be read or a result not be written.

    Raises:
        OSError, KeyError, ValueError: before anything is computed, if an argument cannot be obeyed.
    """
    args = parse_args(argv)
    sources, failed = _find_all(args.inputs, args.output)
    make_folder(args.output)
    tasks = list(zip(sources, name_outputs(sources, args.output), strict=True))
    ids = GroundTruthIds.load(args.ids_from) if args.ids_from else None
    if not tasks:
        return 1
    predictor = _build_predictor(args)
    if ids:
        ids.check(names=[source.name for source in sources], class_names=args.classes or predictor.class_names)
    categories = ids.categories if ids else dict(zip(predictor.class_names, predictor.category_ids, strict=True))
    results = CocoResults(categories, ids.images if ids else None)
    side_files = SideFiles(args.output, predictor.class_names, crops=args.crops, txt=args.txt)
    job = Job(predictor, results, side_files, seconds=args.seconds, verbose=len(tasks) <= _MAX_LINES)
    job.failures = failed
    try:
        job.detect_all(tasks)
    finally:
        # Also of a run that somebody stops.
        if args.json:
            results.save(args.output / "detections.json")
        if args.csv:
            results.save_csv(args.output / "detections.csv")
    print(job.summary())
    return 1 if job.failures else 0


def _find_all(arguments: Sequence[str], output: Path) -> tuple[list[Source], int]:
    """Return the sources of all arguments, and how many arguments there was nothing to find in; those are named."""
    sources, failed = [], 0
    for argument in arguments:
        try:
            sources += find_sources(argument, output=output)
        except SourceError as error:
            failed += 1
            warn(f"error: {show(str(error))}")
    return without_repetitions(sources), failed


def score_or_best(text: str) -> float | str:
    return text if text == "best" else float(text)


def _build_predictor(args: argparse.Namespace) -> Predictor:
    return Predictor(
        args.model,
        args.weights,
        device=args.device,
        dtype=DTYPES[args.dtype],
        channels_last=args.channels_last,
        cuda_graphs=args.cuda_graphs,
        compile=args.compile,
        opts=args.opts,
        score_threshold=args.score,
        merge_iou=args.merge,
        classes=args.classes,
        batch_size=args.batch_size,
    )


if __name__ == "__main__":
    share_processors(long_running=False)
    sys.exit(run(main))
