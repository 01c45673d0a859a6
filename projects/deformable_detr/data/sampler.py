"""Detectron2's training samplers, made from a seed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import detectron2
from detectron2.config import CfgNode
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler
from torch.utils.data import Sampler


def repeat_factor_sampler(
    *, dataset: Sequence[dict[str, Any]], repeat_threshold: float, sqrt: bool = True
) -> Callable[[int], Sampler]:
    """Return what makes Detectron2's sampler that repeats images of rare classes (LVIS) from a seed.

    Args:
        dataset: records in Detectron2's format; an interpolation in a LazyConfig, ``"${..dataset}"``, reads them again.
        repeat_threshold: share of the images below which a class is rare: an image is seen sqrt(threshold / share)
            times in an epoch, by the rarest of its classes.
        sqrt: False leaves the root out, which Detectron2 0.6 cannot.
    """
    # Named only where it differs from what every version does.
    options = {} if sqrt else {"sqrt": False}
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dataset, repeat_threshold, **options)
    return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)


def sampler_from_config(cfg: CfgNode, dataset: Sequence[dict[str, Any]]) -> Callable[[int], Sampler]:
    """Return what makes ``DATALOADER.SAMPLER_TRAIN`` from a seed.

    Raises:
        ValueError: on a name that is none of Detectron2's training samplers, on one whose key the installed version
            does not have.
    """
    node, size = cfg.DATALOADER, len(dataset)
    name = node.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return lambda seed: TrainingSampler(size, seed=seed)
    if name == "RepeatFactorTrainingSampler":
        # A key of versions later than 0.6, as that of the subset.
        sqrt = node.REPEAT_SQRT if "REPEAT_SQRT" in node else True
        return repeat_factor_sampler(dataset=dataset, repeat_threshold=node.REPEAT_THRESHOLD, sqrt=sqrt)
    if name == "RandomSubsetTrainingSampler":
        if "RANDOM_SUBSET_RATIO" not in node:
            raise ValueError(
                f"DATALOADER.SAMPLER_TRAIN {name} needs DATALOADER.RANDOM_SUBSET_RATIO, a key of Detectron2's main "
                f"branch, which the installed one ({detectron2.__version__}) does not have"
            )
        subset = partial(RandomSubsetTrainingSampler, size, node.RANDOM_SUBSET_RATIO)
        return lambda seed: subset(seed_shuffle=seed, seed_subset=seed)
    raise ValueError(
        "DATALOADER.SAMPLER_TRAIN must be TrainingSampler, RepeatFactorTrainingSampler or RandomSubsetTrainingSampler, "
        f"got {name!r}"
    )
