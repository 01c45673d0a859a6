"""``--train-json`` and its companions: the user's own data, weights and schedule from the command line."""

import argparse
import logging
import os
from collections.abc import Callable, Container, Sequence
from typing import Any

from detectron2.config import CfgNode, LazyConfig
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from yaml import YAMLError

from ..config import RunConfig, load_config
from ..data.checks import CocoData, Problems, drop_overlap, load_coco_data
from ..data.coco_format import DatasetError, has_byte_order_mark, read_coco_json
from ..data.datasets import USER_DATA, read_user_data, register_coco_data
from ..data.mapper import NamedErrorsMapper
from ..files import write_json
from .folders import Folder, convert_folders, find_folder, find_folders
from .schedule import FINETUNE_EPOCHS, apply_schedule

logger = logging.getLogger(__name__)

SPLITS = {"train": "to train on", "val": "to evaluate on"}
# Of the coarsest map of the backbone.
_COARSE_STRIDE = 32


def add_user_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that :func:`apply_user_data` reads."""
    group = parser.add_argument_group("your own data, in COCO's format (sets the datasets and the number of classes)")
    for split, use in SPLITS.items():
        group.add_argument(f"--{split}-json", metavar="FILE", help=f"annotations {use}; or a folder, as for --data")
        group.add_argument(f"--{split}-images", metavar="FOLDER", help=f"images {use}")
    group.add_argument(
        "--data",
        metavar="FOLDER",
        help="in place of those: a data.yaml of YOLO's format, its folder, or one of Pascal VOC's format",
    )
    group.add_argument("--repair", action="store_true", help="leave out what is wrong with the data, or correct it")
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="weights to start from or to evaluate, such as deformable-detr://deformable_detr_R_50_two_stage; their "
        "classes are found by name",
    )
    group.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"train for N epochs of --train-json, at a batch and a learning rate for your number of GPUs (default: "
        f"{FINETUNE_EPOCHS} with --weights, otherwise the schedule of the configuration)",
    )


def apply_user_data(cfg: CfgNode | DictConfig, args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Register the files named on the command line and point the configuration at them.

    Where the configuration is that of an earlier run with such files and none are named, they are those of that run.

    Returns:
        Split -> annotation file and image folder.

    Raises:
        FileNotFoundError, ModuleNotFoundError: what :func:`find_folders` and :func:`convert_folders` do.
        ValueError: if flags do not go together, or an override says something else than they; if the two splits differ
            in their classes.
        DatasetError: if something is wrong with the data, unless ``--repair`` was given.
    """
    run = RunConfig(cfg, args.opts)
    if args.weights is not None:
        _set(run, "weights", args.weights, flag="--weights")
    folders = _named_folders(args)
    files = _named_files(args, without=folders)
    if folders:
        files |= _in_main_process(convert_folders, folders, run.get("output_dir"))
    files = files or _recorded_files(run, args)
    if args.epochs is not None and "train" not in files:
        raise ValueError("--epochs needs --train-json: an epoch is as long as its images are many")
    if args.repair and not files:
        raise ValueError("--repair needs --train-json or --val-json, the data to repair")
    if not files:
        return {}
    boxes_only = _needs_boxes_only(run)
    contents = {split: read_coco_json(paths[0]) for split, paths in files.items()}
    classes = {
        split: register_coco_data(f"user_{split}", *paths, content=contents[split], boxes_only=boxes_only)
        for split, paths in files.items()
    }
    if len({tuple(names) for names in classes.values()}) > 1:
        raise ValueError(f"train and val must have the same categories, got {classes['train']} and {classes['val']}")
    _set_datasets(run, files, num_classes=len(next(iter(classes.values()))))
    checked, num_images = _in_main_process(
        check_user_data,
        files,
        contents,
        repair=args.repair,
        output_dir=run.get("output_dir"),
        boxes_only=boxes_only,
    )
    for split, paths in checked.items():
        # The repaired file.
        register_coco_data(f"user_{split}", *paths, boxes_only=boxes_only)
    epochs = FINETUNE_EPOCHS if args.epochs is None and args.weights is not None else args.epochs
    if "train" in files and epochs is not None and not args.eval_only:
        _pad_to_strides(run)
        apply_schedule(
            run,
            reference=RunConfig(load_config(args.config_file)),
            epochs=epochs,
            num_images=num_images["train"],
            num_gpus=comm.get_world_size(),
            # Before the main process writes another file there.
            resumed_batch=_in_main_process(_resumed_batch, run.get("output_dir")) if args.resume else None,
        )
    return {**files, **checked}


def _pad_to_strides(run: RunConfig) -> None:
    """Fine-tune on canvases that the strides divide: on others, reference points of small images shift.

    Ten COCO images at 480 pixels are learnt to AP 100 so, and to 71 and 76 without (docs/finetuning.md).
    """
    if run.get("size_divisibility") == 0 and not run.overridden("size_divisibility"):
        run.set("size_divisibility", _COARSE_STRIDE)
        key = run.key("size_divisibility")
        logger.info("%s is %d for fine-tuning; 0 on the command line keeps the official canvas", key, _COARSE_STRIDE)


def record_user_data(files: dict[str, tuple[str, str]], output_dir: str) -> None:
    """Write down the files of a training, for later runs with its ``config.yaml``."""
    if files and comm.is_main_process():
        absolute = {split: list(map(os.path.abspath, paths)) for split, paths in files.items()}
        write_json(os.path.join(output_dir, USER_DATA), absolute, indent=1)


def check_user_data_given(split: str, names: Sequence[str]) -> None:
    """Check that the user's data are named again beside the ``config.yaml`` of an earlier run with them.

    Args:
        split: "train" or "val".
        names: of the configuration's datasets for this split.

    Raises:
        ValueError: if the configuration asks for them, and the command line does not name them.
    """
    if f"user_{split}" in names and f"user_{split}" not in DatasetCatalog:
        raise ValueError(
            f"the configuration is that of a run with --{split}-json: give --{split}-json and --{split}-images again"
        )


def _needs_boxes_only(run: RunConfig) -> bool:
    """Whether the mapper of the training takes neither masks nor keypoints; another project's mapper might."""
    mapper = run.lazy_node("dataloader.train.mapper")
    if mapper is None:
        model = run.cfg.get("MODEL", {})
        return not (model.get("MASK_ON") or model.get("KEYPOINT_ON"))
    target = mapper.get("_target_")
    is_ours = (locate(target) if isinstance(target, str) else target) is NamedErrorsMapper
    return is_ours and not (mapper.get("use_instance_mask") or mapper.get("use_keypoint"))


def _named_folders(args: argparse.Namespace) -> dict[str, Folder]:
    """Return the splits that the command line names and that are in YOLO's or Pascal VOC's format."""
    named = {split: getattr(args, f"{split}_json") for split in SPLITS}
    if args.data is None:
        found = {
            split: find_folder(split, path, getattr(args, f"{split}_images")) for split, path in named.items() if path
        }
        return {split: folder for split, folder in found.items() if folder is not None}
    if given := [f"--{split}-json" for split, path in named.items() if path]:
        raise ValueError(f"--data has the place of {' and '.join(given)}: leave out one of the two")
    folders = find_folders(args.data)
    if args.eval_only:
        folders.pop("train", None)
    return folders


def _named_files(args: argparse.Namespace, *, without: Container[str] = ()) -> dict[str, tuple[str, str]]:
    """Return the annotation file and the image folder of every split that the command line names.

    Args:
        without: splits that are in folders.
    """
    files = {}
    for split in SPLITS:
        if split in without:
            continue
        json_file, images = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if (json_file is None) != (images is None):
            raise ValueError(f"--{split}-json and --{split}-images must be given together")
        if json_file is not None:
            files[split] = (json_file, images)
    return files


def _recorded_files(run: RunConfig, args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Return the files that lie recorded beside the ``config.yaml`` of a run, of the splits that it asks for."""
    recorded = {} if args.replay else read_user_data(os.path.dirname(args.config_file))
    wanted = {"val": run.evaluated_datasets(), "train": () if args.eval_only else run.get("train_datasets", ())}
    files = {split: paths for split, paths in recorded.items() if f"user_{split}" in wanted[split]}
    for split, paths in files.items():
        logger.info("Data %s, as in the run of %s: %s in %s", SPLITS[split], args.config_file, *paths)
    return files


def _resumed_batch(output_dir: str) -> int | None:
    """Return the batch of the run that goes on; None where none does, or where its configuration is gone.

    Raises:
        ValueError: if its configuration cannot be read.
    """
    config = os.path.join(output_dir, "config.yaml")
    if not (os.path.isfile(os.path.join(output_dir, "last_checkpoint")) and os.path.isfile(config)):
        return None
    try:
        return RunConfig(LazyConfig.load(config)).get("batch")
    # TypeError is that of an empty file.
    except (TypeError, ValueError, YAMLError) as error:
        raise ValueError(
            f"{config}, of the run that goes on, is empty, cut short or no configuration: {error}. Remove it, and the "
            "run goes on with the batch of this command"
        ) from error


def _in_main_process(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Prepare the data in one process; every process gets the result, or raises an error."""
    outcome = error = None
    if comm.is_main_process():
        try:
            outcome = work(*args, **options)
        # Of any kind, a full disk as well: the others wait for the outcome, without one until they are killed.
        except Exception as caught:
            error = caught
    # As text, since not every error survives the way to another process; a launcher may show that of any of them.
    outcome, message = comm.all_gather((outcome, error and f"{type(error).__name__}: {error}"))[0]
    if error is not None:
        raise error
    if message is not None:
        raise RuntimeError(f"the main process has failed to check the data: {message}")
    return outcome


def check_user_data(
    files: dict[str, tuple[str, str]],
    contents: dict[str, dict] | None = None,
    *,
    repair: bool,
    output_dir: str,
    boxes_only: bool = True,
) -> tuple[dict[str, tuple[str, str]], dict[str, int]]:
    """Look through all splits together.

    Args:
        files: split -> annotation file and image folder.
        contents: split -> content of its annotation file, where :func:`read_coco_json` has read it already.
        repair: write annotation files without what is wrong into ``output_dir``.
        boxes_only: see :func:`load_coco_data`.

    Returns:
        The files to use instead, of splits that were repaired or have a byte order mark; and the number of images of
        every split.

    Raises:
        DatasetError: if something is wrong and not to be repaired, or if nothing is left after repairing.
    """
    contents = contents or {}
    data = {
        split: load_coco_data(*paths, content=contents.get(split), for_evaluation=split == "val", boxes_only=boxes_only)
        for split, paths in files.items()
    }
    if len(set(files.values())) < len(files):
        logger.warning("Training and validation data are the same: the evaluation says nothing about other images")
    elif data.keys() == SPLITS.keys():
        drop_overlap(data["train"], data["val"])
    found = [split_data.problems for split_data in data.values() if split_data.problems]
    if found and not repair:
        raise DatasetError(_list_problems(found) + "\nCorrect the files, or add --repair to the command")
    if found:
        logger.warning("--repair changed the data:\n%s", _list_problems(found))
    repaired = {}
    for split, split_data in data.items():
        if not split_data.content["images"]:
            raise DatasetError(f"{split_data.json_file} has no usable image\n{split_data.problems}")
        # COCO's evaluation reads the file once more, and does not know byte order marks.
        if split_data.problems or has_byte_order_mark(split_data.json_file):
            name = "repaired" if split_data.problems else "utf8"
            path = os.path.join(output_dir, f"{split}_{name}.json")
            os.makedirs(output_dir, exist_ok=True)
            write_json(path, split_data.content)
            repaired[split] = (path, split_data.image_root)
    _log_what_was_found(data, repaired=bool(found))
    return repaired, {split: len(split_data.content["images"]) for split, split_data in data.items()}


def _log_what_was_found(data: dict[str, CocoData], *, repaired: bool) -> None:
    """Say in one line that the data may be used, and what they are."""
    classes = len(next(iter(data.values())).content["categories"])
    splits = "; ".join(f"{split_data.describe()} {SPLITS[split]}" for split, split_data in data.items())
    outcome = "what is wrong was repaired" if repaired else "nothing is wrong"
    logger.info(f"Data checked, {outcome}: {splits}; {classes} classes")


def _list_problems(found: list[Problems]) -> str:
    return "\n".join(map(str, found))


def _set_datasets(run: RunConfig, files: dict[str, tuple[str, str]], *, num_classes: int) -> None:
    """Point a configuration at the registered data; a split that was not named is not used."""
    flag = " and ".join(f"--{split}-json" for split in files)
    _set(run, "num_classes", num_classes, flag=flag)
    for split, name in {"train": "train_datasets", "val": "test_datasets"}.items():
        _set(run, name, (f"user_{split}",) if split in files else (), flag=flag)
    if "val" in files and not run.evaluated_datasets():
        raise ValueError("--val-json needs an evaluator, and the LazyConfig has no dataloader.evaluator")


def _set(run: RunConfig, name: str, value: Any, *, flag: str) -> None:
    """Set what follows from a flag; an override that says something else would be ignored."""
    if run.overridden(name) and (given := run.get(name)) != value:
        raise ValueError(
            f"{run.key(name)} is {value!r} by {flag}, but {given!r} by its override: leave out one of the two"
        )
    run.set(name, value)
