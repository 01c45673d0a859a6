"""Trains, evaluates and shows small Deformable DETRs, on shapes that it draws and on ten photos: what ``make demo``
runs.

The first part learns shapes from thousands of generated images and is evaluated on others. The second part learns
the ten photos of ``tools/demo_photos`` and draws what it detects in them: training images.

Everything goes through the same commands that a user types: ``tools/make_shapes_dataset.py``, ``train_net.py``,
``python -m deformable_detr.report`` and ``.detect``. Interrupted and called again, it goes on from the last
checkpoint; ``--fresh`` starts over.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from deformable_detr import cli
from deformable_detr.startup.processors import describe_load
from deformable_detr.training.metrics import read_metrics, training_seconds

ROOT = Path(__file__).resolve().parents[1]
SHAPES_CONFIG = "configs/quick_schedules/shapes_two_stage.yaml"
PHOTOS_CONFIG = "configs/quick_schedules/overfit_10_images.yaml"
PHOTOS = Path("tools/demo_photos")
FINE_TUNING = """\
python train_net.py --config-file configs/COCO-Detection/deformable_detr_R_50_two_stage.yaml \\
    --weights deformable-detr://deformable_detr_R_50_two_stage --train-json my/train.json --train-images my/train \\
    --val-json my/val.json --val-images my/val OUTPUT_DIR output/mine"""


def run(command: list[str]) -> None:
    """Run a Python command line in the repository root, its output passed on as it comes.

    Raises:
        SystemExit: the command failed, with its exit status; or Ctrl-C was pressed, with 130.
    """
    print("$ python " + shlex.join(command), flush=True)
    try:
        status = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    except KeyboardInterrupt:
        print("\nInterrupted. Called again, the demo goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if status:
        # A process ended by a signal has a negative status, which a shell writes as 128 + signal.
        sys.exit(status if status > 0 else 128 - status)


def train(config: str, train_data: tuple[Path, Path], val_data: tuple[Path, Path], output: Path) -> None:
    """Train and evaluate a model, from the last checkpoint on where there is one.

    Args:
        train_data, val_data: a COCO-format file and the folder of its images.
        output: relative to the repository, as all paths of the demo.
    """
    names = ("--train-json", "--train-images", "--val-json", "--val-images")
    data_flags = [word for pair in zip(names, map(str, (*train_data, *val_data)), strict=True) for word in pair]
    resume = ["--resume"] if (ROOT / output / "last_checkpoint").exists() else []
    run(["train_net.py", "--config-file", config, *data_flags, *resume, "OUTPUT_DIR", str(output)])


def photos_folder(output: Path) -> Path:
    """Return where the second part is written, given the folder of the first."""
    return output / "photos"


def learn_shapes(output: Path) -> None:
    """Train on generated images, evaluate on others, and write a report and a sheet of detections."""
    dataset = output / "dataset"
    run(["tools/make_shapes_dataset.py", str(dataset)])
    data = [(dataset / f"{split}.json", dataset / split) for split in ("train", "val")]
    train(SHAPES_CONFIG, *data, output)
    run(["-m", "deformable_detr.report", str(output), "--sheet", str(output / "detections.png")])


def learn_photos(output: Path) -> None:
    """Train on ten photos until the model knows them, and draw what it detects in them."""
    print("\nPart 2: ten real photos, with which the model is trained and which it then detects in.", flush=True)
    data = (PHOTOS / "instances.json", PHOTOS / "images")
    train(PHOTOS_CONFIG, data, data, output)
    shown = ["--model", str(output), "--score", "0.5", "--output", str(output / "detections")]
    run(["-m", "deformable_detr.detect", str(PHOTOS / "images"), *shown])


def summarize_training(output: Path, of: str) -> list[str]:
    """Return two lines about a training: its last evaluation and its time.

    Raises:
        SystemExit: the run holds no AP50, so its evaluation did not come to an end.
    """
    metrics = read_metrics(output)
    evaluations = [row for row in metrics.values() if "bbox/AP50" in row]
    if not evaluations:
        sys.exit(f"{output}/metrics.json has no bbox/AP50: the evaluation did not come to an end")
    final = evaluations[-1]
    return [
        f"{of}: AP {final['bbox/AP']:.1f}, AP50 {final['bbox/AP50']:.1f}",
        f"Training took {training_seconds(metrics):.0f} s. Checkpoint: {output / 'model_final.pth'}",
    ]


def summarize(output: Path) -> str:
    """Return the closing lines of the demo.

    Raises:
        SystemExit: as :func:`summarize_training`.
    """
    photos = photos_folder(output)
    return "\n".join(
        [
            "",
            *summarize_training(output, "Shapes, held-out images"),
            f"Report, open it in a browser: {output / 'report.html'}",
            f"Detections on one sheet: {output / 'detections.png'}",
            "",
            *summarize_training(photos, "Photos, the ten that it was trained on"),
            f"What it draws is what it was trained on: {photos / 'detections'}",
            "",
            *activation(),
            "Fine-tune the published R50 model on COCO-format data of your own, best on a GPU:",
            FINE_TUNING,
        ]
    )


def activation() -> list[str]:
    """What to type before the commands of the README find this project, where that was not done yet."""
    if sys.prefix == sys.base_prefix or os.environ.get("VIRTUAL_ENV") == sys.prefix:
        return []
    environment = Path(os.path.relpath(sys.prefix, ROOT) if Path(sys.prefix).is_relative_to(ROOT) else sys.prefix)
    return ["Before other commands, once in each terminal:", f"source {shlex.quote(str(environment / 'bin/activate'))}"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="relative to the repository")
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier call left, and start over")
    args = parser.parse_args(argv)
    if (busy := describe_load()) is not None:
        print(busy, flush=True)
    if args.fresh and (ROOT / args.output).exists():
        shutil.rmtree(ROOT / args.output)
    learn_shapes(args.output)
    learn_photos(photos_folder(args.output))
    print(summarize(args.output))


if __name__ == "__main__":
    sys.exit(cli.run(main))
