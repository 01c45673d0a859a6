"""Batches as a function of seed and position."""

from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from detectron2.utils import comm

from deformable_detr.data import loader as room
from deformable_detr.data.loader import TrainLoader
from deformable_detr.data.sampler import sampler_from_config

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
    data = SimpleNamespace(SAMPLER_TRAIN=name, REPEAT_THRESHOLD=0.6, RANDOM_SUBSET_RATIO=0.5)
    make = sampler_from_config(SimpleNamespace(DATALOADER=data), RECORDS)
    assert type(make(5)).__name__ == name
    first = list(islice(make(5), 30))
    assert list(islice(make(5), 30)) == first != list(islice(make(6), 30))
    assert len(set(first)) == (5 if name.startswith("RandomSubset") else 10)


def test_unknown_sampler_is_refused():
    cfg = SimpleNamespace(DATALOADER=SimpleNamespace(SAMPLER_TRAIN="Best"))
    with pytest.raises(ValueError, match="SAMPLER_TRAIN must be TrainingSampler.*got 'Best'"):
        sampler_from_config(cfg, RECORDS)
