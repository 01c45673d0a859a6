"""One call of the command: images, videos and what is live go through the model, and results into files."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice, takewhile
from pathlib import Path
from time import monotonic

import numpy as np
from detectron2.structures import Instances
from tqdm import tqdm

from ..files import show
from ..wording import counted
from .drawing import LARGEST_PICTURE, draw_detections, draw_frame
from .images import ImageError, prepare_image, read_image, save_image, shrink
from .inputs import Source, files_of, local_file
from .live import RealTimeWriter, Video, open_live
from .outputs import SideFiles
from .predictor import Predictor
from .results import CocoResults
from .video import VideoError, VideoReader, VideoWriter

# Some containers only estimate how many frames they have; with a smaller share of them a video was cut off.
_WHOLE_VIDEO = 0.95


class Job:
    """Detects in sources, writes what comes of it, and counts.

    Args:
        seconds: after which a live source is left; None waits for its end or for Ctrl-C.
        verbose: tell of every file that was written.
    """

    def __init__(
        self, predictor: Predictor, results: CocoResults, side_files: SideFiles, *, seconds: float | None, verbose: bool
    ) -> None:
        self.predictor = predictor
        self.results = results
        self.side_files = side_files
        self.seconds = seconds
        self.verbose = verbose
        self._inputs: set[str] = set()
        self.images = self.frames = self.detections = self.failures = 0

    def detect_all(self, tasks: Sequence[tuple[Source, Path]]) -> None:
        """Detect in all images, then in all videos; with a progress bar where there is someone to see it."""
        self._inputs = files_of([source for source, _ in tasks])
        images = [task for task in tasks if not task[0].is_video]
        self.detect_images(tqdm(images, unit="image", disable=True if len(images) < 2 else None))
        for source, path in tasks:
            if source.is_video:
                self.detect_video(source, path)

    def detect_images(self, tasks: Iterable[tuple[Source, Path]]) -> None:
        """Detect in images, a window of the predictor at a time; those that cannot be read are named."""
        tasks = iter(tasks)
        while window := list(islice(tasks, self.predictor.window)):
            loaded = [(task, *image) for task in window if (image := self._load(task[0])) is not None]
            found = self.predictor.predict([inputs for _, inputs, _ in loaded])
            for ((source, path), _, picture), instances in zip(loaded, found, strict=True):
                self._finish_image(source, path, picture, instances)

    def detect_video(self, source: Source, output: Path) -> None:
        """Detect in every frame of a video, or in the newest of a live source; what fails is named."""
        try:
            with _open_video(source) as video:
                self._detect_frames(video, source, output)
        except OSError as error:
            reason = error if isinstance(error, VideoError) else error.strerror or error
            self.fail(f"video {show(source.title)}: {reason}")

    def fail(self, message: str) -> None:
        """Count a failure and name it."""
        self.failures += 1
        warn(message)

    def summary(self) -> str:
        """Say how much was found in how much."""
        counts = [(self.images, "image"), (self.frames, "video frame"), (self.failures, "failure")]
        shown = [counted(n, noun) for n, noun in counts if n or noun == "image"]
        return f"{counted(self.detections, 'detection')} in {', '.join(shown)}"

    def _load(self, source: Source) -> tuple[dict, np.ndarray] | None:
        """Return the model's input, and a picture to draw on that is small enough to be kept until then."""
        try:
            rgb = read_image(source.path)
        except ImageError as error:
            self.fail(str(error))
            return None
        # Crops come from the image itself.
        return prepare_image(self.predictor.loaded, rgb), rgb if self.side_files.crops else shrink(rgb, LARGEST_PICTURE)

    def _finish_image(self, source: Source, path: Path, picture: np.ndarray, instances: Instances) -> None:
        self.images += 1
        self._record(source, instances)
        try:
            self.side_files.write(path, picture, instances)
            drawn = draw_detections(shrink(picture, LARGEST_PICTURE), instances, self.predictor.class_names)
            save_image(drawn, path)
        except OSError as error:
            self.fail(f"cannot write {show(path)}: {error.strerror or error}")
            return
        if self.verbose:
            self._say(path, instances.pred_classes.tolist())

    def _detect_frames(self, video: Video, source: Source, output: Path) -> None:
        has_all_frames = isinstance(video, VideoReader)
        writer = (VideoWriter if has_all_frames else RealTimeWriter)(output, video.fps, inputs=self._inputs)
        before, classes = self.frames, []
        total, title = video.num_frames or None, show(source.name)
        bar = tqdm(self._in_time(video, source), total=total, unit="frame", desc=title, disable=None)
        # What comes as it happens is not held back until there is a batch of it.
        batch_size = self.predictor.batch_size if has_all_frames else 1
        with closing(video), bar, closing(writer):
            try:
                for index, (frame, instances) in enumerate(self._predict_frames(bar, batch_size)):
                    self._record(source, instances, frame_index=index)
                    self.frames += 1
                    classes += instances.pred_classes.tolist()
                    self.side_files.write(output, frame, instances, frame=index)
                    writer.write(draw_frame(frame, instances, self.predictor.class_names))
            except KeyboardInterrupt:
                if not source.is_live:
                    raise
        if writer.path != output:
            warn(f"video {show(source.title)}: OpenCV cannot write mp4v here; wrote {writer.codec} to {writer.path}")
        count = self.frames - before
        if self.verbose and count:
            self._say(writer.path, classes)
        if not source.is_live and count < _WHOLE_VIDEO * video.num_frames:
            raise VideoError(f"it breaks off after {count} of the {video.num_frames} frames that it announces")

    def _predict_frames(self, frames: Iterable[np.ndarray], batch_size: int) -> Iterator[tuple[np.ndarray, Instances]]:
        frames = iter(frames)
        while batch := list(islice(frames, batch_size)):
            inputs = [prepare_image(self.predictor.loaded, frame) for frame in batch]
            yield from zip(batch, self.predictor.predict(inputs), strict=True)

    def _in_time(self, frames: Iterable[np.ndarray], source: Source) -> Iterable[np.ndarray]:
        """The frames of a live source that come before its time is up."""
        if not source.is_live:
            return frames
        if self.seconds is None:
            warn(f"{show(source.title)}: Ctrl-C ends it")
            return frames
        end = monotonic() + self.seconds
        return takewhile(lambda _: monotonic() < end, frames)

    def _record(self, source: Source, instances: Instances, **fields: object) -> None:
        self.detections += len(instances)
        name = source.title if self.results.has_own_ids else source.name
        self.results.add(name, instances.image_size, self.predictor.to_json(instances), **fields)

    def _say(self, path: Path, classes: list[int]) -> None:
        counts = Counter(self.predictor.class_names[label] for label in classes)
        print(f"{show(path)}: {', '.join(f'{n} {name}' for name, n in counts.most_common()) or 'nothing'}")


def warn(message: str) -> None:
    """Print to stderr, above a progress bar."""
    tqdm.write(message, file=sys.stderr)


@contextmanager
def _open_video(source: Source) -> Iterator[Video]:
    if source.is_live:
        yield open_live(source.path)
    else:
        with local_file(source.path) as path:
            yield VideoReader(path)
