"""Training batches whose content depends on the seed and on their position alone."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from .randomness import DATA, seed_generators

Mapper = Callable[[dict[str, Any]], dict[str, Any] | None]
# Position in the stream of samples of all processes, and index into the dataset.
Sample = tuple[int, int]
# Samples to try in place of one that the mapper left out.
_MAX_REPLACEMENTS = 100


class TrainLoader:
    """Endless training batches, like Detectron2's ``build_detection_train_loader``, which can start anywhere.

    Detectron2's loader draws its augmentation from generators whose state depends on the number of workers and on
    how long each has run. Here every sample is augmented with numbers drawn from (seed, position), so a run that was
    interrupted sees exactly the batches that it would have seen, with any number of workers.

    Args:
        dataset: records in Detectron2's format.
        mapper: makes of a record what the model takes; None leaves the record out, and another one takes its place.
        total_batch_size: images per iteration, over all processes.
        sampler: makes a sampler of Detectron2 from a seed, as what :func:`repeat_factor_sampler` returns; None shuffles
            the dataset.
        aspect_ratio_grouping: only images wider than high, or only others, in one batch.
        num_workers: loading processes; 0 loads in this one.

    Raises:
        ValueError: if the batch cannot be divided among the processes.
        TypeError: on a sampler that is made already.
    """

    def __init__(
        self,
        dataset: Sequence[dict[str, Any]],
        *,
        mapper: Mapper,
        total_batch_size: int,
        sampler: Callable[[int], Sampler] | None = None,
        aspect_ratio_grouping: bool = False,
        num_workers: int = 0,
    ) -> None:
        world_size = comm.get_world_size()
        if total_batch_size < 1 or total_batch_size % world_size:
            raise ValueError(
                f"total_batch_size must be a multiple of the {world_size} processes, got {total_batch_size}"
            )
        if sampler is not None and not callable(sampler):
            raise TypeError(
                "sampler must be a function of a seed that makes a sampler, as repeat_factor_sampler(dataset=dataset, "
                "repeat_threshold=0.001) or lambda seed: TrainingSampler(len(dataset), seed=seed), got a "
                f"{type(sampler).__name__}"
            )
        self.num_images = len(dataset)
        self.total_batch_size = total_batch_size
        self.num_workers = num_workers
        self._is_wide = [r["width"] > r["height"] for r in dataset] if aspect_ratio_grouping else None
        # The records themselves are kept once, serialised, for all loading processes.
        size = len(dataset)
        self._make_sampler = sampler or (lambda seed: TrainingSampler(size, seed=seed))
        self._samples = _MappedSamples(dataset, mapper)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        # A generator, like everything here: no process is started before the first batch is asked for.
        yield from self.batches(seed=comm.shared_random_seed())

    def batches(self, *, seed: int, start: int = 0) -> Iterator[list[dict[str, Any]]]:
        """Batches of this process.

        Args:
            seed: of the order and the augmentation; the same in all processes.
            start: batches to leave out. No image of them is read.
        """
        self._samples.seed = seed
        indices = islice(self._index_batches(seed), start, None)
        yield from DataLoader(
            self._samples,
            batch_sampler=indices,
            num_workers=self.num_workers,
            collate_fn=trivial_batch_collator,
            # For a model on a GPU: from other memory a copy waits for what the GPU has still to do.
            pin_memory=torch.cuda.is_initialized(),
        )

    def _index_batches(self, seed: int) -> Iterator[list[Sample]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        # Detectron2's samplers give a process every world_size-th sample of one stream.
        samples = ((rank + n * world_size, index) for n, index in enumerate(self._make_sampler(seed)))
        buckets: dict[bool, list[Sample]] = {False: [], True: []}
        for sample in samples:
            bucket = buckets[self._is_wide[sample[1]] if self._is_wide else False]
            bucket.append(sample)
            if len(bucket) == self.total_batch_size // world_size:
                yield bucket.copy()
                bucket.clear()


class _MappedSamples(Dataset):
    """Maps samples to model inputs, with generators seeded by the sample's position."""

    def __init__(self, dataset: Sequence[dict[str, Any]], mapper: Mapper) -> None:
        self.records = DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset
        self.mapper = mapper
        self.seed = 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, sample: Sample) -> dict[str, Any]:
        position, index = sample
        for replacement in range(_MAX_REPLACEMENTS):
            seed_generators(self.seed, DATA, position, replacement)
            mapped = self.mapper(self.records[index])
            if mapped is not None:
                return mapped
            index = (index + 1) % len(self)
        raise ValueError(f"the mapper left out {_MAX_REPLACEMENTS} records in a row, the last one is number {index}")
