"""Tiny runs of both configuration systems, as ``train_net.py`` makes them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from deformable_detr import load_config
from deformable_detr.engine import argument_parser, main
from deformable_detr.training.metrics import read_metrics

YAML_KEYS = {
    "output": "OUTPUT_DIR",
    "max_iter": "SOLVER.MAX_ITER",
    "batch": "SOLVER.IMS_PER_BATCH",
    "workers": "DATALOADER.NUM_WORKERS",
    "log_period": "SOLVER.LOG_PERIOD",
    "eval_period": "TEST.EVAL_PERIOD",
    "first_eval": "TEST.FIRST_EVAL",
    "per_layer_ap": "TEST.PER_LAYER_AP",
    "best_metric": "TEST.BEST_METRIC",
    "patience": "TEST.PATIENCE",
    "wandb": "WANDB.ENABLED",
    "checkpoint_period": "SOLVER.CHECKPOINT_PERIOD",
    "amp": "SOLVER.AMP.ENABLED",
    "precision": "SOLVER.AMP.PRECISION",
    "accumulation": "SOLVER.ACCUMULATION_STEPS",
    "max_skipped": "SOLVER.MAX_SKIPPED_STEPS",
    "ema": "MODEL.EMA.ENABLED",
    "compile": "MODEL.DEFORMABLE_DETR.COMPILE",
    "cuda_graphs": "MODEL.DEFORMABLE_DETR.CUDA_GRAPHS",
    "seed": "SEED",
    "weights": "MODEL.WEIGHTS",
}
LAZY_KEYS = {
    "output": "train.output_dir",
    "max_iter": "train.max_iter",
    "batch": "dataloader.train.total_batch_size",
    "workers": "dataloader.train.num_workers",
    "log_period": "train.log_period",
    "eval_period": "train.eval_period",
    "first_eval": "train.first_eval",
    "per_layer_ap": "train.per_layer_ap",
    "best_metric": "train.best_metric",
    "patience": "train.patience",
    "wandb": "train.wandb.enabled",
    "checkpoint_period": "train.checkpointer.period",
    "amp": "train.amp.enabled",
    "precision": "train.amp.precision",
    "accumulation": "train.accumulation_steps",
    "max_skipped": "train.max_skipped_steps",
    "ema": "train.ema.enabled",
    "compile": "train.compile",
    "cuda_graphs": "train.cuda_graphs",
    "seed": "train.seed",
    "weights": "train.init_checkpoint",
}


class Runner:
    """Runs ``main`` with tiny values in one of the configuration systems; every iteration is logged."""

    def __init__(self, arguments: Callable[[], list[str]], *, is_lazy: bool, flags: list[str]) -> None:
        self.arguments = arguments
        self.is_lazy = is_lazy
        self.flags = flags

    def __call__(self, output: Path, *flags: str, **values: object) -> object:
        values = {"output": output, "log_period": 1, **values}
        if self.is_lazy:
            opts = [f"{LAZY_KEYS[name]}={value}" for name, value in values.items()]
        else:
            opts = [part for name, value in values.items() for part in (YAML_KEYS[name], str(value))]
        return main(argument_parser().parse_args([*self.flags, *flags, *self.arguments(), *opts]))


@pytest.fixture
def data(write_coco) -> list[str]:
    return write_coco("train").flags("train") + write_coco("val").flags("val")


@pytest.fixture
def run_yaml(tiny_yaml, data) -> Runner:
    return Runner(tiny_yaml, is_lazy=False, flags=data)


@pytest.fixture(params=["yaml", "lazy"])
def run(request, tiny_yaml, tiny_lazy, data) -> Runner:
    is_lazy = request.param == "lazy"
    return Runner(tiny_lazy if is_lazy else tiny_yaml, is_lazy=is_lazy, flags=data)


def read_checkpoint(output: Path, name: str = "model_final") -> dict:
    return torch.load(output / f"{name}.pth", weights_only=False)


def losses_of(output: Path) -> dict[int, dict[str, float]]:
    """Iteration -> everything that was logged, without times."""
    timed = ("time", "data_time", "eta_seconds")
    return {
        iteration: {name: value for name, value in row.items() if name not in timed}
        for iteration, row in read_metrics(str(output)).items()
    }


def differences(a: object, b: object, path: str = "") -> list[str]:
    """Where two nested states differ in a single bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys(), key=str)
        return [d for key in keys for d in differences(a.get(key), b.get(key), f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    return [] if a == b else [path]


@pytest.fixture
def model_and_batch(tiny_yaml) -> tuple[torch.nn.Module, list[dict]]:
    """A tiny model without dropout, and four images of one size with one, two, no and three objects."""
    return build_tiny(tiny_yaml()), make_batch(1, 2, 0, 3)


def build_tiny(arguments: list[str], *opts: str) -> torch.nn.Module:
    """Build the model of tiny_yaml, for three classes and without dropout."""
    _, path, *tiny = arguments
    fixed = ["MODEL.DEFORMABLE_DETR.DROPOUT", "0.0", "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]
    torch.manual_seed(0)
    return build_model(load_config(path, [*tiny, *fixed, *opts])).train()


def make_batch(*counts: int) -> list[dict]:
    """Images of one size with so many objects."""
    generator = torch.Generator().manual_seed(1)
    batch = []
    for index, count in enumerate(counts):
        instances = Instances((64, 64))
        corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values * 50
        instances.gt_boxes = Boxes(torch.cat((corners[:, 0], corners[:, 1] + 8), dim=1))
        instances.gt_classes = torch.randint(3, (count,), generator=generator)
        image = torch.randint(256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "file_name": f"{index}.jpg", "instances": instances})
    return batch
