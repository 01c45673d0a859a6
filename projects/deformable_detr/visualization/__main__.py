"""Draws a finished run: ``python -m deformable_detr.visualization OUTPUT_DIR`` (see ``--help``)."""

import argparse
import logging
from pathlib import Path

from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data import register_coco_data
from .gallery import draw_gallery, load_coco_predictions
from .training_curves import plot_training_curves


def first_test_dataset(config_path: Path) -> str:
    """Returns the name of the first test dataset in a run's ``config.yaml``, of either kind of config."""
    config = LazyConfig.load(str(config_path))
    names = config.DATASETS.TEST if "DATASETS" in config else config.dataloader.test.dataset.names
    return names if isinstance(names, str) else names[0]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deformable_detr.visualization",
        description="Draws training_curves.png and detections.png of a run into its output folder.",
    )
    parser.add_argument("output_dir", type=Path, help="OUTPUT_DIR of train_net.py, after its evaluation")
    parser.add_argument("--num-images", type=int, default=8, help="images in detections.png")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score to draw")
    parser.add_argument("--val-json", help="as given to train_net.py, for COCO-format data of your own")
    parser.add_argument("--val-images", help="as given to train_net.py")
    args = parser.parse_args()
    if (args.val_json is None) != (args.val_images is None):
        parser.error("--val-json and --val-images must be given together")
    return args


def main() -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    args = parse_args()
    if args.val_json:
        register_coco_data("user_val", args.val_json, args.val_images)
    print(plot_training_curves(args.output_dir / "metrics.json", args.output_dir / "training_curves.png"))
    name = first_test_dataset(args.output_dir / "config.yaml")
    dataset_dicts, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
    results = args.output_dir / "inference" / "coco_instances_results.json"
    predictions = load_coco_predictions(results, dataset_dicts, metadata)
    print(
        draw_gallery(
            dataset_dicts,
            metadata,
            predictions,
            args.output_dir / "detections.png",
            num_images=args.num_images,
            score_threshold=args.score,
        )
    )


if __name__ == "__main__":
    main()
