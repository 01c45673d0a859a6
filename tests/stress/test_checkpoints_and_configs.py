"""Damaged checkpoints and configurations: each is understood completely, or refused by name."""

import copy
import random
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import LazyConfig
from hypothesis import given
from hypothesis import strategies as st

from deformable_detr import load_config
from deformable_detr.checkpoint import convert
from deformable_detr.checkpoint.coverage import CheckpointError
from deformable_detr.loading import build_model

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "COCO-Detection").glob("*"))
DAMAGE = ("drop", "rename", "reshape", "retype", "add", "prefix", "no tensor")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    options = "HIDDEN_DIM 8 NHEADS 2 ENC_LAYERS 1 DEC_LAYERS 2 DIM_FEEDFORWARD 8 NUM_QUERIES 5 NUM_CLASSES 3".split()
    opts = [f"MODEL.DEFORMABLE_DETR.{word}" if word.isupper() else word for word in options]
    path = str(CONFIGS[0].parent / "deformable_detr_R_50_two_stage.yaml")
    return build_model(load_config(path, [*opts, "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]))


def damage(state_dict: dict, kind: str, rng: random.Random) -> None:
    """Do one kind of harm to one entry, or the prefix to all."""
    key = rng.choice(list(state_dict))
    if kind == "prefix":
        for name in list(state_dict):
            state_dict[f"module.{name}"] = state_dict.pop(name)
    elif kind == "add":
        state_dict[f"{key}_{rng.randrange(9)}"] = torch.zeros(rng.randrange(4))
    elif kind == "drop":
        del state_dict[key]
    elif kind == "rename":
        letters = list(key)
        letters[rng.randrange(len(letters))] = rng.choice("abc.019_")
        state_dict["".join(letters)] = state_dict.pop(key)
    elif kind == "reshape":
        tensor = state_dict[key]
        state_dict[key] = rng.choice([tensor[None], tensor.flatten()[: rng.randrange(5)], tensor.new_zeros(())])
    elif kind == "retype":
        state_dict[key] = state_dict[key].to(rng.choice([torch.float16, torch.float64, torch.int64]))
    else:
        state_dict[key] = rng.choice([None, "text", {"a": 1}, [torch.zeros(1), "b"]])


def test_every_parameter_of_a_damaged_checkpoint_is_accounted_for(model, outcomes):
    whole = model.state_dict()

    @given(seed=st.integers(0, 2**32 - 1), kinds=st.lists(st.sampled_from(DAMAGE), max_size=4))
    def check(seed, kinds):
        state_dict, rng = dict(whole), random.Random(seed)
        for kind in kinds:
            damage(state_dict, kind, rng)
        before = dict(state_dict)
        try:
            converted, report = convert(state_dict, model=model)
        except CheckpointError as error:
            assert str(error)
            outcomes["refused with a reason"] += 1
            return
        assert state_dict.keys() == before.keys() and all(state_dict[key] is before[key] for key in before)
        read = {key for keys in report.used.values() for key in keys} | report.dropped.keys()
        unread = {key.removeprefix("module.") for key in before} - {key.removeprefix("module.") for key in read}
        assert not unread, "neither used nor dropped"
        assert converted.keys() | report.missing.keys() == whole.keys(), "neither loaded nor missing"
        assert all(converted[key].shape == whole[key].shape for key in converted)
        outcomes["converted, every name reported"] += 1

    check()


def keys_of(node: dict, prefix: str = "") -> list[str]:
    paths = []
    for key, value in node.items():
        path = f"{prefix}{key}"
        paths += keys_of(value, f"{path}.") if isinstance(value, dict) else [path]
    return paths


@pytest.mark.parametrize("suffix", [".yaml", ".py"])
def test_overrides_are_taken_or_refused_by_name(suffix, outcomes, monkeypatch):
    # Two thirds of the time would go into reading the same few files.
    read = lru_cache(LazyConfig.load)
    monkeypatch.setattr(LazyConfig, "load", lambda path: copy.deepcopy(read(path)))
    files = [str(path) for path in CONFIGS if path.suffix == suffix]
    if suffix == ".yaml":
        known = keys_of(yaml.safe_load(load_config(files[0]).dump()))
    else:
        known = ["train.max_iter", "model.num_queries", "optimizer.lr", "dataloader.train.total_batch_size"]
    values = st.one_of(
        st.integers(-5, 5), st.floats(allow_nan=True), st.booleans(), st.text(max_size=5), st.lists(st.integers(0, 3))
    ).map(str)
    misspelt = st.sampled_from(known).flatmap(
        lambda key: st.integers(0, len(key)).map(lambda at: f"{key[:at]}x{key[at:]}")
    )

    @given(file=st.sampled_from(files), key=st.one_of(st.sampled_from(known), misspelt), value=values)
    def check(file, key, value):
        opts = [key, value] if suffix == ".yaml" else [f"{key}={value}"]
        try:
            cfg = load_config(file, opts)
        except (KeyError, ValueError) as error:
            assert key in str(error)
            outcomes["refused by name"] += 1
        else:
            assert cfg is not None and key in known
            outcomes["taken"] += 1

    check()
