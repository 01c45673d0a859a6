"""Detects in images, folders, videos and addresses: ``python -m deformable_detr.detect`` (see ``--help``)."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
from detectron2.structures import Instances
from tqdm import tqdm

from ..cli import add_model_arguments, make_parser, run
from ..files import make_folder, show
from ..loading import DTYPES
from ..startup.processors import share_processors
from .drawing import LARGEST_PICTURE, draw_detections, draw_frame
from .images import ImageError, prepare_image, read_image, save_image, shrink
from .inputs import Source, SourceError, find_sources, local_file, name_outputs, without_repetitions
from .predictor import Predictor
from .results import CocoResults, GroundTruthIds
from .video import VideoError, VideoReader, VideoWriter

# With so few files each gets a line of its own.
_MAX_LINES = 10
# Some containers only estimate how many frames they have; with a smaller share of them a video was cut off.
_WHOLE_VIDEO = 0.95


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(
        "detect",
        description="Detects objects in images and videos, and writes annotated copies of them.",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="IMAGE|FOLDER|VIDEO|URL", help="folders are searched with all folders below them"
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--score",
        type=score_or_best,
        default=0.3,
        help='lowest score to show (default: %(default)s); "best": the one with the best F1, which the report of an '
        "OUTPUT_DIR has found",
    )
    parser.add_argument(
        "--merge",
        type=float,
        metavar="IOU",
        help="show only the best of detections of one class that overlap by more than this; for models that were "
        "trained briefly (default: show all)",
    )
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="also write detections.json there, in COCO's format")
    parser.add_argument(
        "--ids-from",
        type=Path,
        metavar="ANNOTATIONS",
        help="COCO annotation file whose image and category ids detections.json takes, to be compared with it",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time (default: %(default)s)")
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
        help="replay images of a size that was seen before as one CUDA graph (not yet run on a GPU)",
    )
    parser.add_argument("--channels-last", action="store_true", help="memory layout of the backbone")
    parser.add_argument("--compile", action="store_true", help="compile the transformer; the first images take minutes")
    # Inputs may also stand between and behind the flags.
    args = parser.parse_intermixed_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.ids_from and not args.json:
        parser.error("--ids-from is about the ids in detections.json: give --json as well")
    return args


class Job:
    """One call of the command: what it detects with, where it writes, and what came of it."""

    def __init__(self, predictor: Predictor, results: CocoResults, *, verbose: bool) -> None:
        self.predictor = predictor
        self.results = results
        self.verbose = verbose
        self.images = self.frames = self.detections = self.failures = 0

    def detect_images(self, tasks: Iterable[tuple[Source, Path]]) -> None:
        """Detect in images, a window of the predictor at a time; those that cannot be read are named."""
        tasks = iter(tasks)
        while window := list(islice(tasks, self.predictor.window)):
            loaded = [(task, *image) for task in window if (image := self._load(task[0])) is not None]
            found = self.predictor.predict([inputs for _, inputs, _ in loaded])
            for ((source, path), _, picture), instances in zip(loaded, found, strict=True):
                self._finish_image(source, path, picture, instances)

    def detect_video(self, source: Source, output: Path) -> None:
        """Detect in every frame of a video; one that cannot be read or written is named."""
        try:
            with local_file(source.path) as path:
                self._detect_frames(VideoReader(path), source, output)
        except OSError as error:
            reason = error if isinstance(error, VideoError) else error.strerror or error
            self.fail(f"video {show(source.path)}: {reason}")

    def fail(self, message: str) -> None:
        self.failures += 1
        warn(message)

    def summary(self) -> str:
        counts = [(self.images, "image"), (self.frames, "video frame"), (self.failures, "failure")]
        shown = [_count(n, noun) for n, noun in counts if n or noun == "image"]
        return f"{_count(self.detections, 'detection')} in {', '.join(shown)}"

    def _load(self, source: Source) -> tuple[dict, np.ndarray] | None:
        """Return the model's input, and a picture to draw on that is small enough to be kept until then."""
        try:
            rgb = read_image(source.path)
        except ImageError as error:
            self.fail(str(error))
            return None
        return prepare_image(self.predictor.loaded, rgb), shrink(rgb, LARGEST_PICTURE)

    def _finish_image(self, source: Source, path: Path, picture: np.ndarray, instances: Instances) -> None:
        self.images += 1
        self._record(source, instances)
        try:
            save_image(draw_detections(picture, instances, self.predictor.class_names), path)
        except OSError as error:
            self.fail(f"cannot write {show(path)}: {error.strerror or error}")
            return
        if self.verbose:
            self._say(path, instances.pred_classes.tolist())

    def _detect_frames(self, video: VideoReader, source: Source, output: Path) -> None:
        writer = VideoWriter(output, video.fps)
        before, classes = self.frames, []
        bar = tqdm(video, total=video.num_frames or None, unit="frame", desc=show(source.name), disable=None)
        with closing(video), bar, closing(writer):
            frames = iter(bar)
            while batch := list(islice(frames, self.predictor.batch_size)):
                inputs = [prepare_image(self.predictor.loaded, frame) for frame in batch]
                for frame, instances in zip(batch, self.predictor.predict(inputs), strict=True):
                    self._record(source, instances, frame_index=self.frames - before)
                    self.frames += 1
                    classes += instances.pred_classes.tolist()
                    writer.write(draw_frame(frame, instances, self.predictor.class_names))
        if writer.path != output:
            warn(f"video {show(source.path)}: OpenCV cannot write mp4v here; wrote {writer.codec} to {writer.path}")
        if self.verbose:
            self._say(writer.path, classes)
        count = self.frames - before
        if count < _WHOLE_VIDEO * video.num_frames:
            raise VideoError(f"it breaks off after {count} of the {video.num_frames} frames that it announces")

    def _record(self, source: Source, instances: Instances, **fields: object) -> None:
        self.detections += len(instances)
        name = source.path if self.results.has_own_ids else source.name
        self.results.add(name, instances.image_size, self.predictor.to_json(instances), **fields)

    def _say(self, path: Path, classes: list[int]) -> None:
        counts = Counter(self.predictor.class_names[label] for label in classes)
        print(f"{show(path)}: {', '.join(f'{n} {name}' for name, n in counts.most_common()) or 'nothing'}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def warn(message: str) -> None:
    """Print to stderr, above a progress bar."""
    tqdm.write(message, file=sys.stderr)


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
        ids.check(names=[source.name for source in sources], class_names=predictor.class_names)
    categories = ids.categories if ids else dict(zip(predictor.class_names, predictor.category_ids, strict=True))
    results = CocoResults(categories, ids.images if ids else None)
    job = Job(predictor, results, verbose=len(tasks) <= _MAX_LINES)
    job.failures = failed
    try:
        detect_all(job, tasks)
    finally:
        # Also of a run that somebody stops.
        if args.json:
            results.save(args.output / "detections.json")
    print(job.summary())
    return 1 if job.failures else 0


def detect_all(job: Job, tasks: Sequence[tuple[Source, Path]]) -> None:
    """Detect in all images, then in all videos; with a progress bar where there are several and someone to see it."""
    images = [task for task in tasks if not task[0].is_video]
    job.detect_images(tqdm(images, unit="image", disable=True if len(images) < 2 else None))
    for source, path in tasks:
        if source.is_video:
            job.detect_video(source, path)


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
        batch_size=args.batch_size,
    )


if __name__ == "__main__":
    share_processors(long_running=False)
    sys.exit(run(main))
