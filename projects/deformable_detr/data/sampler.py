"""Detectron2's training samplers, made from a seed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler
from torch.utils.data import Sampler


def sampler_from_config(cfg: CfgNode, dataset: Sequence[dict[str, Any]]) -> Callable[[int], Sampler]:
    """Return what makes ``DATALOADER.SAMPLER_TRAIN`` from a seed.

    Raises:
        ValueError: on a name that is none of Detectron2's training samplers.
    """
    name, size = cfg.DATALOADER.SAMPLER_TRAIN, len(dataset)
    if name == "TrainingSampler":
        return lambda seed: TrainingSampler(size, seed=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)
    if name == "RandomSubsetTrainingSampler":
        subset = partial(RandomSubsetTrainingSampler, size, cfg.DATALOADER.RANDOM_SUBSET_RATIO)
        return lambda seed: subset(seed_shuffle=seed, seed_subset=seed)
    raise ValueError(
        "DATALOADER.SAMPLER_TRAIN must be TrainingSampler, RepeatFactorTrainingSampler or RandomSubsetTrainingSampler, "
        f"got {name!r}"
    )
