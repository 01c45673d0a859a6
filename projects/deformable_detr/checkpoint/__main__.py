"""Converts a file of weights to our names: ``python -m deformable_detr.checkpoint SRC DST --config-file X``."""

import argparse

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from safetensors.torch import save_file
from torch import nn

from ..config import load_config
from .convert import convert
from .files import read_checkpoint

EPILOG = """
Example, keeping the 91 outputs of the official model:
  python -m deformable_detr.checkpoint r50_deformable_detr-checkpoint.pth deformable_detr_R_50.safetensors \\
      --config-file configs/COCO-Detection/deformable_detr_R_50.yaml MODEL.DEFORMABLE_DETR.NUM_CLASSES 91
"""


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deformable_detr.checkpoint",
        description="Converts weights of other projects to the names and classes of a model, and says what became "
        "of every parameter. Training and evaluation do the same by themselves for MODEL.WEIGHTS.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help=".pth, .bin, .pkl or .safetensors file")
    parser.add_argument("destination", metavar="DST", help="file to write; safetensors by that suffix, else torch.save")
    parser.add_argument("--config-file", required=True, help="the model to convert for, .yaml or .py")
    parser.add_argument("opts", nargs="*", help="overrides of the config, as for train_net.py")
    # Intermixed: options may stand between the files and the overrides.
    return parser.parse_intermixed_args(args)


def build_cpu_model(config_file: str, opts: list[str]) -> nn.Module:
    """Builds the model that a yaml or LazyConfig file describes."""
    cfg = load_config(config_file, opts)
    if not isinstance(cfg, CfgNode):
        return instantiate(cfg.model)
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


def main(args: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(args.source)
    state_dict, report = convert(checkpoint["model"], model=build_cpu_model(args.config_file, args.opts))
    if args.destination.endswith(".safetensors"):
        # This format does not hold two names of one tensor, such as heads that all layers share.
        copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state_dict.items()}
        save_file(copies, args.destination)
    else:
        torch.save({"model": state_dict}, args.destination)
    print(report)


if __name__ == "__main__":
    main(parse_args())
