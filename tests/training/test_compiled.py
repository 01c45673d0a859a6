"""Runs with compiled parts, of which the compiler's front end is enough to see what they leave and how they go on."""

import shutil
from functools import partialmethod

import pytest
import torch

from deformable_detr.config import KEYS
from deformable_detr.modeling import SetPredictionDetector
from deformable_detr.training.loop import TrainingLoop
from deformable_detr.training.settings import TrainingSettings

from .conftest import differences, losses_of, read_checkpoint


@pytest.fixture
def front_end_alone(monkeypatch):
    torch._dynamo.reset()
    method = partialmethod(SetPredictionDetector.compile_for_training, backend="eager")
    monkeypatch.setattr(SetPredictionDetector, "compile_for_training", method)
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_run_resumes_bitwise_and_its_checkpoint_is_any_other_one(run_yaml, front_end_alone, tmp_path):
    options = {"max_iter": 3, "checkpoint_period": 2, "ema": True, "amp": True, "precision": "bfloat16"}
    run_yaml(tmp_path / "whole", compile=True, **options)
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copy(tmp_path / "whole" / "model_0000001.pth", cut)
    (cut / "last_checkpoint").write_text("model_0000001.pth")
    run_yaml(cut, "--resume", compile=True, **options)
    assert differences(read_checkpoint(cut), read_checkpoint(tmp_path / "whole")) == []
    assert losses_of(cut)[2] == losses_of(tmp_path / "whole")[2]
    run_yaml(tmp_path / "plain", "--eval-only", weights=tmp_path / "whole" / "model_final.pth")


def test_both_systems_have_the_key_and_name_it(run, tmp_path, monkeypatch):
    def refuse(model):
        raise ValueError("not this one")

    monkeypatch.setattr(SetPredictionDetector, "compile_for_training", refuse)
    key = KEYS["compile"][int(run.is_lazy)]
    with pytest.raises(ValueError, match=f"^{key} is True: not this one"):
        run(tmp_path / "run", compile=True, max_iter=1)


def test_the_key_asks_for_a_model_that_compiles():
    settings = TrainingSettings(output_dir="", compile=True)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=f"^{KEYS['compile'][0]} needs a model with compile_for_training; Linear"):
        TrainingLoop(model, [], torch.optim.SGD(model.parameters()), settings)
