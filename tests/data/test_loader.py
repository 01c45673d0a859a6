"""Batches as a function of seed and position."""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.config import LazyCall as L
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from omegaconf import DictConfig

from deformable_detr import load_config
from deformable_detr.data import loader as room
from deformable_detr.data.loader import TrainLoader
from deformable_detr.data.sampler import repeat_factor_sampler, sampler_from_config

CONFIG = Path(__file__).parents[2] / "configs" / "COCO-Detection" / "deformable_detr_R_50.py"
RECORDS = [{"id": n, "width": 10 + n % 3, "height": 11, "annotations": [{"category_id": n % 2}]} for n in range(10)]


def augment(record: dict) -> dict:
    return {**record, "noise": float(np.random.rand())}


def take(count: int, *, start: int = 0, seed: int = 1, **options) -> list[list[tuple]]:
    loader = TrainLoader(RECORDS, **{"mapper": augment, "total_batch_size": 4, **options})
    batches = islice(loader.batches(seed=seed, start=start), count)
    return [[(x["id"], x["noise"]) for x in batch] for batch in batches]


@pytest.mark.parametrize("grouping", [False, True])
def test_stream_that_starts_later_is_the_rest_of_the_stream(grouping):
    whole = take(9, aspect_ratio_grouping=grouping)
    assert take(4, start=5, aspect_ratio_grouping=grouping) == whole[5:]


def test_number_of_loading_processes_does_not_change_the_batches():
    assert take(5) == take(5, num_workers=2) == take(5, num_workers=3)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_images_are_pinned_where_a_gpu_is_in_use(monkeypatch, on_gpu):
    asked = []
    monkeypatch.setattr(room, "DataLoader", lambda *args, pin_memory, **options: asked.append(pin_memory) or [])
    monkeypatch.setattr(room.torch.cuda, "is_initialized", lambda: on_gpu)
    assert take(1) == []
    assert asked == [on_gpu]


def test_what_ran_before_does_not_change_the_batches():
    before = take(2)
    np.random.rand(3)
    assert take(2) == before


def test_every_image_is_seen_once_an_epoch_and_augmented_anew():
    samples = [sample for batch in take(5) for sample in batch]
    assert set(Counter(index for index, _ in samples).values()) == {2}
    assert len({noise for _, noise in samples}) == 20


def test_seeds_differ_in_order_and_augmentation():
    assert [[index for index, _ in batch] for batch in take(2)] != [[i for i, _ in batch] for batch in take(2, seed=2)]


def test_groups_have_one_orientation():
    for batch in take(12, aspect_ratio_grouping=True):
        assert len({RECORDS[index]["width"] > RECORDS[index]["height"] for index, _ in batch}) == 1


def test_processes_share_one_stream(monkeypatch):
    whole = take(4)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(take(4))
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(batch) == sorted(parts[0] + parts[1])


def test_record_that_the_mapper_leaves_out_is_replaced_by_another():
    samples = [i for batch in take(5, mapper=lambda r: augment(r) if r["id"] != 3 else None) for i, _ in batch]
    assert 3 not in samples and len(samples) == 20


def test_mapper_that_leaves_out_everything_is_told():
    with pytest.raises(ValueError, match="left out 100 records in a row"):
        take(1, mapper=lambda record: None)


def test_batch_must_be_divisible_among_processes(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="must be a multiple of the 3 processes, got 4"):
        take(1)


@pytest.mark.parametrize("name", ["TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"])
def test_samplers_of_detectron2_are_repeatable(name):
    data = CfgNode({"SAMPLER_TRAIN": name, "REPEAT_THRESHOLD": 0.6, "RANDOM_SUBSET_RATIO": 0.5})
    make = sampler_from_config(SimpleNamespace(DATALOADER=data), RECORDS)
    assert type(make(5)).__name__ == name
    first = list(islice(make(5), 30))
    assert list(islice(make(5), 30)) == first != list(islice(make(6), 30))
    assert len(set(first)) == (5 if name.startswith("RandomSubset") else 10)


def test_unknown_sampler_is_refused():
    cfg = SimpleNamespace(DATALOADER=SimpleNamespace(SAMPLER_TRAIN="Best"))
    with pytest.raises(ValueError, match="SAMPLER_TRAIN must be TrainingSampler.*got 'Best'"):
        sampler_from_config(cfg, RECORDS)


def test_random_subset_needs_a_detectron2_that_has_its_ratio():
    cfg = load_config(CONFIG.with_suffix(".yaml"), ["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"])
    cfg.DATALOADER.pop("RANDOM_SUBSET_RATIO", None)  # As in version 0.6.
    with pytest.raises(ValueError, match=r"needs DATALOADER\.RANDOM_SUBSET_RATIO, .* which the installed one"):
        sampler_from_config(cfg, RECORDS)


@pytest.mark.parametrize(
    "keys, asked", [({}, {}), ({"REPEAT_SQRT": True}, {}), ({"REPEAT_SQRT": False}, {"sqrt": False})]
)
def test_repeat_factors_are_without_a_root_where_a_later_detectron2_is_told_so(monkeypatch, keys, asked):
    def factors(dataset, threshold, **options):
        assert (dataset, threshold, options) == (RECORDS, 0.6, asked)
        return torch.ones(10)

    monkeypatch.setattr(RepeatFactorTrainingSampler, "repeat_factors_from_category_frequency", staticmethod(factors))
    node = CfgNode({"SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "REPEAT_THRESHOLD": 0.6, **keys})
    assert len(set(islice(sampler_from_config(SimpleNamespace(DATALOADER=node), RECORDS)(1), 10))) == 10


def rare_class() -> list[dict]:
    """Class 1 in one image of ten."""
    return [{**record, "annotations": [{"category_id": int(record["id"] == 7)}]} for record in RECORDS]


def augment_alone() -> Callable[[dict], dict]:
    return augment


def lazy_loader(sampler: DictConfig) -> TrainLoader:
    node = load_config(CONFIG).dataloader.train
    node.update(dataset=L(rare_class)(), mapper=L(augment_alone)(), sampler=sampler, total_batch_size=11, num_workers=0)
    return instantiate(node)


def test_a_lazy_config_repeats_images_of_rare_classes():
    """A frequency of 0.1 and a threshold of 0.4: sqrt(0.4 / 0.1) = 2 times in an epoch, which has 11 samples then."""
    loader = lazy_loader(L(repeat_factor_sampler)(dataset="${..dataset}", repeat_threshold=0.4))
    for batch in islice(loader.batches(seed=1), 3):
        assert sorted(x["id"] for x in batch) == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9]


def test_a_sampler_that_is_made_already_is_refused():
    with pytest.raises(TypeError, match=r"sampler must be a function of a seed .* got a RepeatFactorTrainingSampler"):
        lazy_loader(L(RepeatFactorTrainingSampler)(repeat_factors=torch.ones(10)))
