"""Runs whose steps are to be recorded as CUDA graphs: what they ask for, and what does not go with them."""

import pytest
import torch

from deformable_detr.config import KEYS
from deformable_detr.training.loop import TrainingLoop
from deformable_detr.training.settings import TrainingSettings

KEY = KEYS["cuda_graphs"][0]


def test_both_systems_have_the_key_and_name_it(run, tmp_path):
    key = KEYS["cuda_graphs"][int(run.is_lazy)]
    with pytest.raises(ValueError, match=f"^{key} is True: CUDA graphs for training need a model on CUDA, this one is"):
        run(tmp_path / "run", cuda_graphs=True, max_iter=1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("compile", True, f"{KEY} does not go with MODEL.DEFORMABLE_DETR.COMPILE: both are True"),
        ("auto_batch", True, f"{KEY} does not go with SOLVER.AUTO_BATCH: both are True"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused_by_their_keys(name, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainingSettings(output_dir="", cuda_graphs=True, **{name: value})


def test_it_asks_for_a_model_that_is_recorded_and_buffers_that_stay():
    settings = TrainingSettings(output_dir="", cuda_graphs=True)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=f"^{KEY} needs a model with record_for_training; Linear has none"):
        TrainingLoop(model, [], torch.optim.SGD(model.parameters()), settings)
    model.broadcast_buffers = True
    with pytest.raises(ValueError, match=f"^{KEY} needs broadcast_buffers of DistributedDataParallel to be False"):
        TrainingLoop(model, [], torch.optim.SGD(model.parameters()), settings)
