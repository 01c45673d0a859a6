"""Runs all checks that need several processes, and reports what each process found: ``worker.py TASK.json``.

The task has "configs" {variant: [--config-file, FILE, KEY, VALUE, ...]}, "json" and "images" of a COCO dataset, "flags"
that train on it, and "output", a folder. There every process leaves ``SIZE-RANK.json``: a number for each of its
checks. Models, data and the results of a single process are made once and inherited by all processes through fork.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import create_ddp_model
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import nn

from deformable_detr import load_config
from deformable_detr.engine import argument_parser, build_evaluator
from deformable_detr.engine import main as train_net
from deformable_detr.launch import launch
from deformable_detr.modeling import HungarianMatcher, SetCriterion

SIZES = (2, 3)
DATASET = "distributed"
# Divisible by 2 and by 3. The last four have no objects: the last process of 2 and the last two of 3 have none.
OBJECTS = (2, 1, 0, 0, 0, 0)


def make_batch(objects: tuple[int, ...]) -> list[dict]:
    """Images of one size, so that a part of the batch is padded like the whole."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for index, count in enumerate(objects):
        instances = Instances((64, 96))
        instances.gt_boxes = Boxes(torch.tensor([[8.0, 9, 50, 60], [30, 20, 90, 40]])[:count])
        instances.gt_classes = torch.arange(count) + index
        image = torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def train_two_steps(model: nn.Module, batch: list[dict]) -> list[torch.Tensor]:
    """Losses of two steps of gradient descent, averaged over processes, and the gradients of the second."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    results = []
    for _ in range(2):
        optimizer.zero_grad()
        losses = model(batch)
        sum(losses.values()).backward()
        values = torch.stack([loss.detach() for loss in losses.values()])
        if comm.get_world_size() > 1:
            dist.all_reduce(values)
        results.append(values / comm.get_world_size())
        optimizer.step()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, f"parameters without a gradient: {missing}"
    return results + list(gradients.values())


def largest_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Largest difference of corresponding tensors, relative to the largest number of each."""
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in zip(one, other, strict=True))


class Detector(nn.Module):
    """Finds every object, the better the smaller its image's id is; AP is neither 0 nor 100."""

    def forward(self, batch: list[dict]) -> list[dict]:
        truth = {record["image_id"]: record for record in DatasetCatalog.get(DATASET)}
        return [{"instances": self._detect(truth[x["image_id"]])} for x in batch]

    def _detect(self, record: dict) -> Instances:
        x, y, width, height = record["annotations"][0]["bbox"]
        shift = 0.05 * width * (record["image_id"] - 10)
        result = Instances((record["height"], record["width"]))
        result.pred_boxes = Boxes(torch.tensor([[x + shift, y, x + shift + width, y + height]]))
        result.scores = torch.tensor([0.9])
        result.pred_classes = torch.tensor([record["annotations"][0]["category_id"]])
        return result


def evaluate(config: list[str], output: Path) -> dict:
    cfg = load_config(config[1], config[2:])
    evaluator = build_evaluator(DATASET, str(output / f"inference-{comm.get_world_size()}"))
    return inference_on_dataset(Detector(), build_detection_test_loader(cfg, DATASET), evaluator)


class Checks:
    """Single-process results, and the checks that compare those of several processes with them."""

    def __init__(self, task: dict) -> None:
        self.output = Path(task["output"])
        self.config = task["configs"][""]
        self.data_flags = task["flags"]
        register_coco_instances(DATASET, {}, task["json"], task["images"])
        self.average_precision = evaluate(self.config, self.output)["bbox"]["AP"]
        assert 0 < self.average_precision < 100, "every evaluation would give the same"
        self.cases = {}
        for variant, config in task["configs"].items():
            self._add_case(f"variant {variant or 'base'}", config, OBJECTS)
        self._add_case("no objects anywhere", task["configs"]["_two_stage"], (0,) * 6)
        self._add_case(
            "activation checkpoints",
            [*task["configs"]["_two_stage"], "MODEL.DEFORMABLE_DETR.ACTIVATION_CHECKPOINT", "True"],
            OBJECTS,
        )
        self._add_case(
            "no auxiliary losses",
            [*task["configs"]["_box_refine"], "MODEL.DEFORMABLE_DETR.AUX_LOSS", "False"],
            OBJECTS,
        )

    def _add_case(self, name: str, config: list[str], objects: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        model = build_model(load_config(config[1], config[2:])).train()
        start = {key: value.clone() for key, value in model.state_dict().items()}
        batch = make_batch(objects)
        expected = {}
        for size in SIZES:
            # As the official code, several processes divide by one object per process if there are fewer in all.
            divisor = max(size, sum(objects))
            if divisor not in expected:
                model.load_state_dict(start)
                with model.criterion.normalise_by(divisor):
                    expected[divisor] = train_two_steps(model, batch)
        model.load_state_dict(start)
        self.cases[name] = (model, batch, expected)

    def all(self) -> dict[str, Callable[[], float]]:
        checks = {name: lambda case=case: self.steps_differ_by(*case) for name, case in self.cases.items()}
        checks |= {"evaluation": self.evaluated_ap, "normaliser": self.normaliser, "run": self.trained_ap}
        return checks | {"killed": self.stop_seconds}

    def steps_differ_by(self, model: nn.Module, batch: list[dict], expected: dict[int, list[torch.Tensor]]) -> float:
        size, objects = comm.get_world_size(), sum(len(x["instances"]) for x in batch)
        share = len(batch) // size
        start = comm.get_rank() * share
        # An unused parameter makes the second step fail.
        distributed = create_ddp_model(model, device_ids=None, broadcast_buffers=False, find_unused_parameters=False)
        results = train_two_steps(distributed, batch[start : start + share])
        return largest_difference(results, expected[max(size, objects)])

    def evaluated_ap(self) -> float:
        """AP minus that of one process; 0 where Detectron2 gathers no results."""
        results = evaluate(self.config, self.output)
        return results["bbox"]["AP"] - self.average_precision if comm.is_main_process() else 0.0

    def normaliser(self) -> float:
        """What losses are divided by if rank r has counted r + 0.5 objects in all of its micro-batches."""
        criterion = SetCriterion(HungarianMatcher(), class_weight=1.0)
        outputs = {"pred_logits": torch.zeros(1, 1, 1, 1), "pred_boxes": torch.full((1, 1, 1, 4), 0.5)}
        nothing = [{"labels": torch.empty(0, dtype=torch.int64), "boxes": torch.empty(0, 4)}]
        with criterion.normalise_by(comm.get_rank() + 0.5):
            loss = criterion(outputs, nothing)["loss_ce"]
        return (0.75 * 0.25 * torch.tensor(2.0).log() / loss).item()

    def trained_ap(self) -> float:
        """AP at the end of a run of train_net.py, as each process finds it in the run's folder."""
        folder, size = self.output / f"run-{comm.get_world_size()}", str(comm.get_world_size())
        opts = ["SOLVER.IMS_PER_BATCH", size, "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", str(folder)]
        train_net(argument_parser().parse_args([*self.data_flags, *self.config, *opts]))
        comm.synchronize()
        # Detectron2 logs each further process into a file of its own.
        suffix = "" if comm.is_main_process() else f".rank{comm.get_rank()}"
        assert (folder / f"log.txt{suffix}").is_file() and (folder / "model_final.pth").is_file()
        return json.loads((folder / "metrics.json").read_text().splitlines()[-1])["bbox/AP"]

    def stop_seconds(self) -> float:
        """Seconds that a process waits for one that was killed before it raises; must be the last check."""
        comm.synchronize()
        if comm.get_rank() == comm.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        with contextlib.suppress(RuntimeError):
            for _ in range(3):
                dist.all_reduce(torch.zeros(1000))
            raise AssertionError("communication with a killed process succeeded")
        return time.monotonic() - start


def run_checks(args: argparse.Namespace) -> None:
    """All checks of one process, as ``main`` of the launcher."""
    results, path = {}, args.checks.output / f"{comm.get_world_size()}-{comm.get_rank()}.json"
    results["local size"] = comm.get_local_size()
    for name, check in args.checks.all().items():
        # Written before the last check, which the last process does not survive.
        path.write_text(json.dumps(results))
        try:
            results[name] = check()
        except Exception:
            # Reported as this check's result. The others are out of step now: no further check can be trusted.
            path.write_text(json.dumps(results | {name: traceback.format_exc()}))
            raise
    path.write_text(json.dumps(results))
    # Without the killed process there is no orderly end.
    os._exit(0)


def run_process(rank: int, size: int, port: int, checks: Checks) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    launch(run_checks, argparse.Namespace(num_gpus=1, num_machines=1, checks=checks))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main() -> None:
    torch.set_num_threads(1)
    checks = Checks(json.loads(Path(sys.argv[1]).read_text()))
    for size in SIZES:
        port = free_port()
        context = mp.get_context("fork")
        processes = [context.Process(target=run_process, args=(rank, size, port, checks)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(90)
            # Still there after so long: it hangs, and its report ends with the check before.
            process.kill()


if __name__ == "__main__":
    main()
