"""The loop itself."""

import logging
import math
import os
import shlex
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn

from ..data.loader import TrainLoader
from .ema import ModelEMA
from .failure import NonFiniteError, describe, find_cause, save_step
from .precision import Precision
from .settings import TrainingSettings
from .step import Step, unwrap

logger = logging.getLogger(__name__)

# Gradients of float16 may overflow: the scaler then leaves the step out and halves its scale. Below this there is
# nothing left to halve.
_MIN_LOSS_SCALE = 1.0


class TrainingLoop(SimpleTrainer):
    """Detectron2's SimpleTrainer with mixed precision, accumulation, exact resume and explained failures.

    The random numbers of a step are a function of (seed, iteration, rank), those of a sample of (seed, position):
    what a step does depends on the weights, the optimiser and its number, never on what ran before it in the process.

    Args:
        model: also wrapped for distributed training.
        data_loader: a :class:`TrainLoader`; others work, but start from the beginning when a run is resumed.
        optimizer: best a ``ClippedAdamW``, whose clipping gives the gradient norm for nothing.

    Raises:
        ValueError: if the settings ask for what the model or its device cannot do.
    """

    def __init__(
        self, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer, settings: TrainingSettings
    ) -> None:
        # Without the loader, whose processes Detectron2 0.6 would start right here.
        super().__init__(model, (), optimizer)
        self.data_loader = data_loader
        if settings.accumulation_steps > 1 and not hasattr(getattr(unwrap(model), "criterion", None), "normalise_by"):
            raise ValueError(
                f"{settings.keys['accumulation_steps']} needs a model whose criterion can normalise_by a number of "
                f"objects; {type(unwrap(model)).__name__} has none"
            )
        self.settings = settings
        self.precision = Precision.of(settings, model)
        self.scaler = self.precision.grad_scaler()
        self.ema = None if settings.ema_decay is None else ModelEMA(model, settings.ema_decay)
        self.seed = settings.seed if settings.seed >= 0 else comm.shared_random_seed()
        self.images_seen = 0
        self.skipped_steps = 0
        self._batches: Iterator[list[dict]] | None = None
        # After the average is made, which is a copy that only evaluates.
        if settings.compile:
            self._prepare_model("compile", "compile_for_training")
        if settings.cuda_graphs:
            if getattr(model, "broadcast_buffers", False):
                raise ValueError(
                    f"{settings.keys['cuda_graphs']} needs broadcast_buffers of DistributedDataParallel to be False "
                    f"(train.ddp.broadcast_buffers): buffers that are written before each step make recordings useless"
                )
            self._prepare_model("cuda_graphs", "record_for_training")
        # Batch statistics change in the forward pass: a step that is left out must take them back.
        self._norms = get_bn_modules(model) if settings.max_skipped_steps else []

    def _prepare_model(self, setting: str, method: str) -> None:
        """Call a method of the model for a setting that asks for it."""
        model, key = unwrap(self.model), self.settings.keys[setting]
        if not hasattr(model, method):
            raise ValueError(f"{key} needs a model with {method}; {type(model).__name__} has none")
        try:
            getattr(model, method)()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{key} is True: {error}") from error

    @property
    def evaluated_model(self) -> nn.Module:
        """The model with the averaged weights where there are any, else the trained one."""
        return self.model if self.ema is None else self.ema.model

    def run_step(self) -> None:
        """One iteration; it waits for the device in the matcher of every part, and to read all losses together."""
        assert self.model.training, "the model was switched to evaluation mode"
        start = time.perf_counter()
        batch = self._next_batch()
        data_time = time.perf_counter() - start
        step = Step(
            *(batch, self.iter, self.seed, comm.get_rank(), self.settings.accumulation_steps),
            accumulation_key=self.settings.keys["accumulation_steps"],
        )
        self.optimizer.zero_grad()
        statistics = [buffer.clone() for buffer in self._statistics()]
        try:
            losses = step.backward(self.model, self.precision, self.scaler)
        except FloatingPointError as error:
            told = describe(step, losses={}, grad_norm=float("nan"), reason=str(error))
            # Other processes know nothing of this error and wait: of several, this one must end.
            self._reject(step, statistics, told, may_skip=comm.get_world_size() == 1)
            return
        self.scaler.unscale_(self.optimizer)
        rows = self._exchange(losses, self._clip_gradients(), data_time)
        if self._is_sound(rows):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema is not None:
                self.ema.update(self.model)
            self._log(list(losses), rows)
        else:
            # Also resets what the scaler remembers of this step.
            self.scaler.update()
            own = dict(zip(losses, rows[step.rank].tolist(), strict=False))
            self._reject(step, statistics, describe(step, losses=own, grad_norm=rows[0, -2].item()))

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "grad_scaler": self.scaler.state_dict(),
            "seed": self.seed,
            "images_seen": self.images_seen,
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        configured = _base_rates(self.optimizer)
        super().load_state_dict(state_dict)
        self._warn_of_kept_rates(configured)
        if state_dict.get("grad_scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(state_dict["grad_scaler"])
        if "seed" not in state_dict:
            logger.warning("The checkpoint knows no position in the data: the resumed run begins with a new order")
            return
        if self.settings.seed >= 0 and self.settings.seed != state_dict["seed"]:
            logger.warning(
                f"The run goes on with seed {state_dict['seed']} of its checkpoint, not {self.settings.seed}"
            )
        self.seed = state_dict["seed"]
        self.images_seen = state_dict["images_seen"]
        self.skipped_steps = state_dict["skipped_steps"]

    def _warn_of_kept_rates(self, configured: list[float]) -> None:
        """Warn where the optimiser of the checkpoint has brought other learning rates than the configuration's."""
        rates = zip(_base_rates(self.optimizer), configured, strict=True)
        if changed := [pair for pair in rates if not math.isclose(*pair)]:
            kept, asked = max(changed)
            logger.warning(
                f"The run goes on with the learning rate {kept:g} of its checkpoint, not {asked:g}: a resumed run "
                f"keeps its optimiser. For another rate start a new one, with {self.settings.keys['weights']} set to "
                "that file"
            )

    def _next_batch(self) -> list[dict[str, Any]]:
        if self._batches is None:
            # Only now is it known from where the run goes on.
            if isinstance(self.data_loader, TrainLoader):
                start = self.images_seen // self.data_loader.total_batch_size
                self._batches = self.data_loader.batches(seed=self.seed, start=start)
            else:
                self._batches = iter(self.data_loader)
        batch = next(self._batches)
        self.images_seen += len(batch) * comm.get_world_size()
        return batch

    def _clip_gradients(self) -> Tensor:
        """Norm of the gradient before it is clipped."""
        if hasattr(self.optimizer, "clip_gradients"):
            return self.optimizer.clip_gradients()
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return torch.stack([torch.linalg.vector_norm(gradient.float()) for gradient in gradients]).norm()

    def _exchange(self, losses: dict[str, Tensor], grad_norm: Tensor, data_time: float) -> Tensor:
        """Return (processes, losses + 2) on the CPU: losses, gradient norm and loading time of every process."""
        values = [*losses.values(), grad_norm, torch.tensor(data_time)]
        row = torch.stack([value.to(grad_norm.device, torch.float32, non_blocking=True) for value in values])
        if comm.get_world_size() == 1:
            return row[None].cpu()
        rows = [torch.empty_like(row) for _ in range(comm.get_world_size())]
        dist.all_gather(rows, row)
        return torch.stack(rows).cpu()

    def _is_sound(self, rows: Tensor) -> bool:
        """Whether to take the step; the same answer in every process."""
        if not rows[:, :-2].isfinite().all():
            return False
        if rows[:, -2].isfinite().all():
            return True
        return self.scaler.is_enabled() and self.scaler.get_scale() > _MIN_LOSS_SCALE

    def _log(self, names: list[str], rows: Tensor) -> None:
        if not comm.is_main_process():
            return
        rows = rows.double()
        storage = get_event_storage()
        means = dict(zip(names, rows.mean(0).tolist(), strict=False))
        storage.put_scalars(total_loss=sum(means.values()), **means)
        storage.put_scalar("data_time", rows[:, -1].max().item())
        storage.put_scalar("grad_norm", rows[0, -2].item())

    def _statistics(self) -> list[Tensor]:
        # Asked for anew: precise batch norm puts other tensors in their place.
        return [buffer for norm in self._norms for buffer in norm.buffers()]

    def _reject(self, step: Step, statistics: list[Tensor], told: str, *, may_skip: bool = True) -> None:
        """Leave a step out, or end the run."""
        for buffer, before in zip(self._statistics(), statistics, strict=True):
            buffer.copy_(before)
        if may_skip and self.skipped_steps < self.settings.max_skipped_steps:
            self.skipped_steps += 1
            get_event_storage().put_scalar("skipped_steps", self.skipped_steps, smoothing_hint=False)
            logger.warning(f"{told}\nSkipped, {self.skipped_steps} of at most {self.settings.max_skipped_steps} steps")
            return
        self.optimizer.zero_grad()
        cause = find_cause(step, self.model, self.precision, alone=comm.get_world_size() == 1)
        explanation = f"{told}\n{cause}"
        path = os.path.join(self.settings.output_dir, f"failure_{step.iteration:07d}_rank{step.rank}.pt")
        save_step(path, step, self.model, explanation)
        config = os.path.join(self.settings.output_dir, "config.yaml")
        again = shlex.join(["deformable-detr", "train", "--config-file", config, "--replay", path])
        raise NonFiniteError(
            f"{explanation}\nThe batch and the weights before it are in {path}; this repeats the step:\n  {again}"
        )


def _base_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the learning rate of every group, before a schedule multiplies it."""
    return [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
