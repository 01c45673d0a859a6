"""Trains, evaluates and shows a small Deformable DETR on shapes that it draws itself: what ``make demo``
runs.

Everything goes through the same commands that a user types: ``tools/make_shapes_dataset.py``,
``train_net.py`` and ``python -m deformable_detr.report``. Interrupted and called again, it goes on from the
last checkpoint; ``--fresh`` starts over.
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
CONFIG = "configs/quick_schedules/shapes_two_stage.yaml"
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


def train_command(data_flags: list[str], output_dir: str | Path, *extra: str) -> list[str]:
    """Return the arguments to Python that train and evaluate the demo's model on COCO-format data."""
    return ["train_net.py", "--config-file", CONFIG, *data_flags, *extra, "OUTPUT_DIR", str(output_dir)]


def summarize(output: Path) -> str:
    """Return the closing lines of the demo.

    Raises:
        SystemExit: the run holds no AP50, so its evaluation did not come to an end.
    """
    metrics = read_metrics(output)
    evaluations = [row for row in metrics.values() if "bbox/AP50" in row]
    if not evaluations:
        sys.exit(f"{output}/metrics.json has no bbox/AP50: the evaluation did not come to an end")
    final = evaluations[-1]
    return "\n".join(
        [
            "",
            f"Held-out images: AP {final['bbox/AP']:.1f}, AP50 {final['bbox/AP50']:.1f}",
            f"Training took {training_seconds(metrics):.0f} s. Checkpoint: {output / 'model_final.pth'}",
            f"Report, open it in a browser: {output / 'report.html'}",
            f"Detections on one sheet: {output / 'detections.png'}",
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
    output = ROOT / args.output
    dataset = args.output / "dataset"
    if args.fresh and output.exists():
        shutil.rmtree(output)
    run(["tools/make_shapes_dataset.py", str(dataset)])
    val_flags = ["--val-json", f"{dataset}/val.json", "--val-images", f"{dataset}/val"]
    data_flags = ["--train-json", f"{dataset}/train.json", "--train-images", f"{dataset}/train", *val_flags]
    resume = ["--resume"] if (output / "last_checkpoint").exists() else []
    run(train_command(data_flags, args.output, *resume))
    run(["-m", "deformable_detr.report", str(args.output), "--sheet", str(args.output / "detections.png")])
    print(summarize(args.output))


if __name__ == "__main__":
    sys.exit(cli.run(main))
