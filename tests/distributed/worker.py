"""Runs all checks that need several processes, and reports what each process found: ``worker.py TASK.json``.

The task has "configs" {variant: [--config-file, FILE, KEY, VALUE, ...]}, "json" and "images" of a COCO dataset, "flags"
that train on it, and "output", a folder. There every process leaves ``SIZE-RANK.json``: a number for each of its
checks. Models, data and the results of a single process are made once and inherited by all processes through fork.
"""

import argparse
import contextlib
import copy
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

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
from imitated_graphs import imitated_graphs  # of tests/modeling, which the caller puts on the path
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from deformable_detr import load_config
from deformable_detr.engine import argument_parser, build_evaluator
from deformable_detr.engine import main as train_net
from deformable_detr.modeling import HungarianMatcher, SetCriterion
from deformable_detr.modeling.training_graphs import TrainingGraphs
from deformable_detr.startup.launch import launch
from deformable_detr.training.auto_batch import AutoBatch
from deformable_detr.training.loop import TrainingLoop
from deformable_detr.training.per_layer_ap import LayerEvaluators
from deformable_detr.training.settings import TrainingSettings

SIZES = (2, 3)
DATASET = "distributed"
# Divisible by 2 and by 3. The last four have no objects: the last process of 2 and the last two of 3 have none.
OBJECTS = (2, 1, 0, 0, 0, 0)
# In every process the image with most objects has one: groups of denoising queries are made of it.
OBJECTS_OF_PAIRS = (1, 0, 1, 0, 1, 1)
NO_NOISE = ("DN_NUMBER 2", "DN_LABEL_NOISE_RATIO 0.0", "DN_BOX_NOISE_SCALE 0.0", "NUM_ONE2MANY_QUERIES 14")
# In two parts, losses of a part divided by its own objects would add up to others.
OBJECTS_OF_PARTS = (2, 2, 0, 1, 0, 1)


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


def train_two_steps(model: nn.Module, batch: list[dict], *, parts: int = 1) -> dict[str, torch.Tensor]:
    """Losses of two iterations of gradient descent, which the main process logs, and the gradients of the second."""
    settings = TrainingSettings(output_dir="", seed=0, accumulation_steps=parts)
    loop = TrainingLoop(model, [batch, batch], torch.optim.SGD(model.parameters(), lr=1e-3), settings)
    loop.train(0, 2)
    trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in trained.items() if p.grad is None]
    assert not missing, f"parameters without a gradient: {missing}"
    losses = {name: history for name, history in loop.storage.histories().items() if "loss" in name}
    assert bool(losses) == comm.is_main_process()
    results = {name: torch.tensor([value for value, _ in history.values()]) for name, history in losses.items()}
    return results | {name: p.grad for name, p in trained.items()}


def largest_difference(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of tensors of one name, relative to the largest number of each."""
    scales = {name: expected[name].abs().max().clamp(min=1e-6) for name in results}
    return max(((result - expected[name]).abs().max() / scales[name]).item() for name, result in results.items())


def exchange_and_count(counted: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A hook of DistributedDataParallel, which averages a bucket of gradients over processes as it would itself."""
    counted.append(bucket.index())
    return allreduce_hook(None, bucket)


def run_out_of_memory(happens: bool) -> None:
    if happens:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


class Detector(nn.Module):
    """Finds every object, the better the smaller its image's id is; AP is neither 0 nor 100.

    Args:
        num_layers: None returns detections, a number as many for every image, the last ones as without it.
    """

    def __init__(self, num_layers: int | None = None) -> None:
        super().__init__()
        self.num_layers = num_layers

    def forward(self, batch: list[dict]) -> list:
        truth = {record["image_id"]: record for record in DatasetCatalog.get(DATASET)}
        layers = [
            [{"instances": self._detect(truth[x["image_id"]], layer)} for x in batch]
            for layer in reversed(range(self.num_layers or 1))
        ]
        return layers[0] if self.num_layers is None else layers

    def _detect(self, record: dict, layers_left: int) -> Instances:
        x, y, width, height = record["annotations"][0]["bbox"]
        shift = 0.05 * width * (record["image_id"] - 10 + layers_left)
        result = Instances((record["height"], record["width"]))
        result.pred_boxes = Boxes(torch.tensor([[x + shift, y, x + shift + width, y + height]]))
        result.scores = torch.tensor([0.9])
        result.pred_classes = torch.tensor([record["annotations"][0]["category_id"]])
        return result


def evaluate(config: list[str], output: Path, num_layers: int | None = None) -> dict[str, float]:
    """AP by task, in the main process alone, as Detectron2 has it."""
    cfg = load_config(config[1], config[2:])
    evaluators = [
        build_evaluator(DATASET, str(output / f"inference-{comm.get_world_size()}")) for _ in range(num_layers or 1)
    ]
    evaluator = evaluators[0] if num_layers is None else LayerEvaluators(evaluators)
    results = inference_on_dataset(Detector(num_layers), build_detection_test_loader(cfg, DATASET), evaluator)
    return {task: metrics["AP"] for task, metrics in results.items()}


@dataclass
class Case:
    """A model and a batch to train it on, and what :func:`train_two_steps` finds in one process.

    Attributes:
        expected: by the number of objects that losses are divided by.
        recorded: make the second step of several processes a replay of graphs, imitated on the CPU.
    """

    model: nn.Module
    batch: list[dict]
    expected: dict[int, dict[str, torch.Tensor]]
    recorded: bool = False

    @classmethod
    def of(cls, config: list[str], objects: tuple[int, ...], *opts: str) -> "Case":
        torch.manual_seed(0)
        case = cls(build_model(load_config(config[1], [*config[2:], *opts])), make_batch(objects), {})
        for divisor in {case.divisor(size) for size in SIZES}:
            model = copy.deepcopy(case.model)
            with model.criterion.normalise_by(divisor):
                case.expected[divisor] = train_two_steps(model, case.batch)
        return case

    def divisor(self, size: int) -> int:
        """As the official code, several processes divide by one object per process if there are fewer in all."""
        return max(size, sum(len(x["instances"]) for x in self.batch))

    def differs_by(self, *, parts: int = 1) -> tuple[float, int]:
        """Difference from one process, and how often gradients were exchanged."""
        results, exchanged = self.trained(parts=parts)
        return largest_difference(results, self.expected[self.divisor(comm.get_world_size())]), exchanged

    def trained(self, *, parts: int = 1) -> tuple[dict[str, torch.Tensor], int]:
        """What :func:`train_two_steps` finds for the share of this process, and how often gradients were exchanged."""
        share = len(self.batch) // comm.get_world_size()
        start = comm.get_rank() * share
        # An unused parameter makes the second step fail.
        model = create_ddp_model(
            copy.deepcopy(self.model), device_ids=None, broadcast_buffers=False, find_unused_parameters=False
        )
        exchanged: list[int] = []
        model.register_comm_hook(exchanged, exchange_and_count)
        if self.recorded:
            model.module.graphs = TrainingGraphs(model.module)
        with imitated_graphs() if self.recorded else contextlib.nullcontext():
            results = train_two_steps(model, self.batch[start : start + share], parts=parts)
        assert not self.recorded or len(model.module.graphs) == 1, "the second step was not recorded"
        return results, len(exchanged)


class Checks:
    """Single-process results, and the checks that compare those of several processes with them."""

    def __init__(self, task: dict) -> None:
        self.output = Path(task["output"])
        self.config = task["configs"][""]
        self.data_flags = task["flags"]
        register_coco_instances(DATASET, {}, task["json"], task["images"])
        self.expected_ap = {num_layers: evaluate(self.config, self.output, num_layers) for num_layers in (None, 2)}
        assert len({0, 100, *self.expected_ap[2].values()}) == 4, "evaluations that differ would give the same"
        configs = task["configs"]
        self.cases = {f"variant {name or 'base'}": Case.of(config, OBJECTS) for name, config in configs.items()}
        checkpoints = ("MODEL.DEFORMABLE_DETR.ACTIVATION_CHECKPOINT", "True")
        queries = [part for pair in NO_NOISE for part in f"MODEL.DEFORMABLE_DETR.{pair}".split()]
        self.cases |= {
            "further queries": Case.of(configs["_two_stage"], OBJECTS_OF_PAIRS, *queries),
            "no objects anywhere": Case.of(configs["_two_stage"], (0,) * 6),
            "activation checkpoints": Case.of(configs["_two_stage"], OBJECTS, *checkpoints),
            "no auxiliary losses": Case.of(configs["_box_refine"], OBJECTS, "MODEL.DEFORMABLE_DETR.AUX_LOSS", "False"),
        }
        self.cases["recorded steps"] = replace(self.cases["variant _two_stage"], recorded=True)
        self.accumulated = Case.of(self.config, OBJECTS_OF_PARTS)

    def all(self) -> dict[str, Callable[[], float]]:
        checks = {name: lambda case=case: case.differs_by()[0] for name, case in self.cases.items()}
        checks["accumulation"] = self.accumulation_differs_by
        checks["nothing to denoise"] = self.trains_without_denoising
        checks |= {
            "evaluation": lambda: self.ap_differs_by(None),
            "evaluation of layers": lambda: self.ap_differs_by(2),
        }
        checks |= {"normaliser": self.normaliser, "unused": self.iterations_with_unused_parameters}
        checks["parts"] = self.parts_that_fit
        return checks | {"run": self.trained_ap, "killed": self.stop_seconds}

    def accumulation_differs_by(self) -> float:
        """Difference of training in two parts, and in one, from one process; both must exchange as many gradients."""
        (whole, exchanges), (parts, exchanges_of_parts) = (self.accumulated.differs_by(parts=n) for n in (1, 2))
        assert exchanges_of_parts == exchanges > 0, (exchanges_of_parts, exchanges)
        return max(whole, parts)

    def trains_without_denoising(self) -> bool:
        """Two steps where the last process has no object: it has no denoising query, but their losses and gradients."""
        results, _ = replace(self.cases["further queries"], batch=make_batch(OBJECTS)).trained()
        return all(bool(value.isfinite().all()) for value in results.values())

    def ap_differs_by(self, num_layers: int | None) -> float:
        """Difference of the APs from those of one process; 0 where Detectron2 gathers no results."""
        found, expected = evaluate(self.config, self.output, num_layers), self.expected_ap[num_layers]
        assert found.keys() == (expected.keys() if comm.is_main_process() else set())
        return max((abs(found[task] - expected[task]) for task in found), default=0.0)

    def normaliser(self) -> float:
        """What losses are divided by if rank r has counted r + 0.5 objects in all of its micro-batches."""
        criterion = SetCriterion(HungarianMatcher(), class_weight=1.0)
        outputs = {"pred_logits": torch.zeros(1, 1, 1, 1), "pred_boxes": torch.full((1, 1, 1, 4), 0.5)}
        nothing = [{"labels": torch.empty(0, dtype=torch.int64), "boxes": torch.empty(0, 4)}]
        with criterion.normalise_by(comm.get_rank() + 0.5):
            loss = criterion(outputs, nothing)["loss_ce"]
        return (0.75 * 0.25 * torch.tensor(2.0).log() / loss).item()

    def iterations_with_unused_parameters(self) -> float:
        """Iterations that a model trains whose last stage is not used, where that is refused without the key."""
        folder, size = self.output / f"unused-{comm.get_world_size()}", str(comm.get_world_size())
        opts = ["SOLVER.IMS_PER_BATCH", size, "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", str(folder)]
        opts += ["MODEL.DEFORMABLE_DETR.IN_FEATURES", "['res3', 'res4']", "SOLVER.LOG_PERIOD", "1"]
        arguments = [*self.data_flags[:4], *self.config, *opts]
        try:
            train_net(argument_parser().parse_args(arguments))
            raise AssertionError("unused parameters were not refused")
        except ValueError as error:
            assert "bottom_up.res5.0." in str(error) and "set SOLVER.FIND_UNUSED_PARAMETERS" in str(error), error
        train_net(argument_parser().parse_args([*arguments, "SOLVER.FIND_UNUSED_PARAMETERS", "True"]))
        comm.synchronize()
        return len((folder / "metrics.json").read_text().splitlines())

    def parts_that_fit(self) -> float:
        """Parts that 2 images of a process go in where the last process has memory for one, the others for both."""
        model = create_ddp_model(copy.deepcopy(self.cases["variant base"].model), device_ids=None)
        room = 1 if comm.get_rank() == comm.get_world_size() - 1 else 2
        model.module.register_forward_pre_hook(lambda module, args: run_out_of_memory(len(args[0]) > room))
        settings = TrainingSettings(output_dir="", seed=0)
        loader = SimpleNamespace(total_batch_size=2 * comm.get_world_size())
        loop = TrainingLoop(model, loader, torch.optim.SGD(model.parameters(), lr=1e-3), settings)
        AutoBatch(loop, (48, 64), sizes_key="INPUT.MAX_SIZE_TRAIN").before_train()
        return loop.settings.accumulation_steps

    def trained_ap(self) -> float:
        """AP at the end of a run of train_net.py, as each process finds it in the run's folder."""
        folder, size = self.output / f"run-{comm.get_world_size()}", str(comm.get_world_size())
        opts = ["SOLVER.IMS_PER_BATCH", size, "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", str(folder)]
        opts += ["TEST.PER_LAYER_AP", "True"]
        train_net(argument_parser().parse_args([*self.data_flags, *self.config, *opts]))
        comm.synchronize()
        # Detectron2 logs each further process into a file of its own.
        suffix = "" if comm.is_main_process() else f".rank{comm.get_rank()}"
        assert (folder / f"log.txt{suffix}").is_file() and (folder / "model_final.pth").is_file()
        metrics = json.loads((folder / "metrics.json").read_text().splitlines()[-1])
        assert metrics["bbox_layer_1/AP"] == metrics["bbox/AP"]
        return metrics["bbox/AP"]

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
