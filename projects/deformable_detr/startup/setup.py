"""From the command line of ``train_net.py`` to a configuration with which a run can begin."""

import argparse
import logging
import os

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig

from ..cli import add_overrides_word
from ..config import RunConfig, find_config_file, load_config
from ..model_zoo import default_weights
from ..training.precision import DTYPES
from .checks import check_before_start
from .console import describing_environment, log_configuration, log_load, set_up_console
from .flags import add_training_flags, flags_as_overrides
from .schedule import scale_to_processes
from .user_data import add_user_data_arguments, apply_user_data, record_user_data

EPILOG = """
Examples:
  Train on 8 GPUs:      train_net.py --num-gpus 8 --config-file deformable_detr_R_50
  Several CPU processes: torchrun --nproc-per-node 2 train_net.py --config-file FILE MODEL.DEVICE cpu
  Continue a run:       add --resume
  One step that failed: train_net.py --config-file OUTPUT_DIR/config.yaml --replay OUTPUT_DIR/failure_*.pt
  Evaluate:             train_net.py --eval-only --config-file FILE --weights model.pth
  Your own COCO data:   add --train-json a.json --train-images a/ --val-json b.json --val-images b/
  Fine-tune on it:      add --weights deformable-detr://deformable_detr_R_50 as well
  Change a value:       add KEY VALUE pairs (yaml) or key=value (LazyConfig .py), behind all options

FILE is a .yaml or .py file, the OUTPUT_DIR of a training, or the name of a model of the zoo.
"""


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments and those for the user's own data and weights."""
    parser = default_argument_parser(EPILOG)
    parser.add_argument("--model", dest="config_file", metavar="MODEL", help="another name of --config-file")
    add_overrides_word(parser)
    parser.add_argument(
        "--precision",
        choices=["float32", *DTYPES],
        help="with --eval-only: of weights and computation (default: what the configuration trains in)",
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="with --eval-only: replay batches of a shape that was seen before as CUDA graphs",
    )
    parser.add_argument(
        "--replay", metavar="FILE", help="repeat the step with which a training has failed, and explain it"
    )
    add_training_flags(parser)
    add_user_data_arguments(parser)
    return parser


def configured_device(args: argparse.Namespace) -> dict[str, str]:
    """Return the "device" of the model, such as "cuda" or "cpu", and its "device_key": for ``launch``."""
    run = RunConfig(_read_config(args))
    return {"device": run.get("device"), "device_key": run.key("device")}


def setup(args: argparse.Namespace) -> CfgNode | DictConfig:
    """Read the configuration, register the user's data, and start logging into the output folder.

    Raises:
        What :func:`check_before_start` does, besides the errors of reading configuration and data.
    """
    cfg = _read_config(args)
    output_dir = RunConfig(cfg).get("output_dir")
    set_up_console(output_dir)
    log_load()
    files = apply_user_data(cfg, args)
    is_training = not (args.eval_only or args.replay)
    if is_training:
        # What is checked, logged and saved is what runs.
        cfg = scale_to_processes(cfg, comm.get_world_size())
    check_before_start(cfg, args)
    is_saved = is_training or not os.path.isfile(os.path.join(output_dir, "config.yaml"))
    with describing_environment():
        (default_setup if is_saved else _log_and_seed)(cfg, args)
    log_configuration(args, output_dir, is_saved=is_saved)
    if is_training:
        record_user_data(files, output_dir)
    return cfg


def _read_config(args: argparse.Namespace) -> CfgNode | DictConfig:
    if not args.config_file:
        raise ValueError("--config-file is required")
    model = args.config_file
    # default_setup reads the file as well.
    args.config_file = find_config_file(model)
    cfg = load_config(args.config_file, args.opts)
    if flags := flags_as_overrides(args, RunConfig(cfg, args.opts)):
        # As if they had been typed, for all who ask what the user has set. They are read once.
        args.opts, args.show_data, args.batch_size = [*args.opts, *flags], False, None
        cfg = load_config(args.config_file, args.opts)
    missing = [node for node in ("model", "dataloader", "train") if node not in cfg]
    if args.config_file.endswith(".py") and missing:
        raise ValueError(f"{args.config_file} has no {' and no '.join(missing)}, which a LazyConfig needs")
    if args.eval_only and not args.resume and args.weights is None:
        # A name and an output folder mean the trained model, as for all commands.
        args.weights = default_weights(model, RunConfig(cfg, args.opts))
    return cfg


def _log_and_seed(cfg: CfgNode | DictConfig, args: argparse.Namespace) -> None:
    """Do what ``default_setup`` does, which would write an evaluation's config.yaml over that of the training.

    Giving the file its content back afterwards is no way: the process may be killed before, or the disk be full.
    """
    detectron2 = logging.getLogger("detectron2")
    detectron2.info(f"Environment info:\n{collect_env_info()}")
    detectron2.info(f"Command line arguments: {args}")
    with PathManager.open(args.config_file) as file:
        detectron2.info(f"Contents of args.config_file={args.config_file}:\n{file.read()}")
    detectron2.info(f"Running with full config:\n{cfg}")
    seed = RunConfig(cfg).get("seed", -1)
    seed_all_rng(None if seed < 0 else seed + comm.get_rank())
