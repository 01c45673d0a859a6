"""Converts a file of weights to our names, or from them: ``python -m deformable_detr.checkpoint SRC DST ...``."""

import argparse
import json
import sys
from collections.abc import Sequence

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..cli import add_model, add_overrides_word, make_parser, run
from ..config import load_config
from ..files import check_writable, replacing_file
from ..loading import build_model
from .convert import convert
from .coverage import CheckpointError, ConversionReport
from .foreign import FORMATS, export
from .reading import read_checkpoint, select_weights, split_options

EPILOG = """
Example, keeping the 91 outputs of the official model:
  python -m deformable_detr.checkpoint r50_deformable_detr-checkpoint.pth deformable_detr_R_50.safetensors \\
      --config-file configs/COCO-Detection/deformable_detr_R_50.yaml MODEL.DEFORMABLE_DETR.NUM_CLASSES 91

Example, for the official code, which evaluates the 80 COCO classes by their 91 raw ids:
  python -m deformable_detr.checkpoint output/model_final.pth for_official_code.pth --to official --coco-ids \\
      --config-file configs/COCO-Detection/deformable_detr_R_50.yaml
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(
        "checkpoint",
        description="Converts weights of other projects to the names and classes of a model, and says what became "
        "of every parameter. Training and evaluation do the same by themselves for MODEL.WEIGHTS.",
        epilog=EPILOG,
    )
    parser.add_argument("source", metavar="SRC", help=".pth, .pyth, .bin, .pkl or .safetensors file")
    parser.add_argument("destination", metavar="DST", help="file to write; safetensors by that suffix, else torch.save")
    add_model(parser, required=True)
    parser.add_argument("--to", choices=("ours", *FORMATS), default="ours", help="whose names to write (default: ours)")
    parser.add_argument("--coco-ids", action="store_true", help="with --to: spread 80 COCO classes over the 91 raw ids")
    add_overrides_word(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config, as for train_net.py")
    # Intermixed: options may stand between the files and the overrides.
    parsed = parser.parse_intermixed_args(argv)
    if parsed.coco_ids and parsed.to == "ours":
        parser.error("--coco-ids needs --to official or --to transformers")
    return parsed


def export_for(args: argparse.Namespace, model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the converted weights in the names that ``--to`` asks for.

    Raises:
        CheckpointError: if the weights do not fill the model; half of it would be random for the other project.
    """
    missing = model.load_state_dict(state_dict, strict=False).missing_keys
    if missing:
        raise CheckpointError(f"{args.source} leaves {len(missing)} parameters as initialised, such as {missing[0]}")
    return export(model, to=args.to, coco_ids=args.coco_ids)


def write(path: str, state_dict: dict[str, Tensor], *, to: str, report: ConversionReport) -> None:
    """Write safetensors or, by any other suffix, what the project loads by torch.load."""
    names = report.class_names if to == "ours" else None
    with replacing_file(path) as file:
        if path.endswith(".safetensors"):
            # This format does not hold two names of one tensor, such as heads that all layers share.
            copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state_dict.items()}
            save_file(copies, file, metadata={"format": "pt"} | ({"class_names": json.dumps(names)} if names else {}))
        elif to == "transformers":
            torch.save(state_dict, file)
        else:
            torch.save({"model": state_dict} | ({"class_names": list(names)} if names else {}), file)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    check_writable(args.destination)
    cfg = load_config(args.model, args.opts)
    path, averaged = split_options(args.source)
    checkpoint = read_checkpoint(path)
    weights, note = select_weights(checkpoint, averaged=averaged)
    model = build_model(cfg)
    state_dict, report = convert(weights, model=model, file_class_names=checkpoint.get("class_names"))
    if args.to != "ours":
        state_dict = export_for(args, model, state_dict)
    write(args.destination, state_dict, to=args.to, report=report)
    print(report)
    if note:
        print(note)


if __name__ == "__main__":
    sys.exit(run(main))
