"""A finished cell evaluated with other numbers of queries, in a process of its own."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.datasets import register_coco_data
from ..engine import do_test
from ..files import write_json
from ..loading import load_model
from .measures import EVALUATED

RESULT = "queries.json"


def evaluate_queries(run_folder: Path, data: Path, numbers: Sequence[int], *, device: str) -> None:
    """Write number of queries -> AP (%) of the trained model with as many, into ``queries.json`` of its folder.

    Args:
        data: the images; their annotations are in the file of the same name with ``.json`` behind it.
    """
    register_coco_data("user_val", f"{data}.json", str(data))
    found = {}
    for number in numbers:
        output = run_folder / f"queries-{number}"
        opts = [f"model.num_queries_test={number}", f"train.output_dir={json.dumps(str(output))}"]
        loaded = load_model(str(run_folder), device=device, opts=opts)
        scores = do_test(loaded.cfg, loaded.model)["bbox"]
        found[str(number)] = {name: scores[name] for name in EVALUATED}
    write_json(run_folder / RESULT, found, indent=1)


def command(run_folder: Path, data: Path, numbers: Sequence[int], *, device: str) -> list[str]:
    """Return the command line that calls :func:`evaluate_queries`."""
    start = [sys.executable, "-m", f"{__package__}.queries", str(run_folder), str(data), "--device", device]
    return [*start, *map(str, numbers)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("numbers", type=int, nargs="+")
    parser.add_argument("--device", required=True)
    args = parser.parse_args(argv)
    evaluate_queries(args.run_folder, args.data, args.numbers, device=args.device)


if __name__ == "__main__":
    main()
