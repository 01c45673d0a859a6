"""Averaged weights, metrics file, hooks and settings."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from deformable_detr.data.datasets import register_coco_data
from deformable_detr.engine import argument_parser, main
from deformable_detr.training.checkpointer import DeformableDETRCheckpointer
from deformable_detr.training.ema import ModelEMA
from deformable_detr.training.hooks import BestCheckpointer, PeriodicCheckpointer, PreciseBN
from deformable_detr.training.loop import TrainingLoop
from deformable_detr.training.settings import TrainingSettings, warn_of_unscaled_learning_rate

from .conftest import losses_of, read_checkpoint


def test_average_moves_by_the_decay_and_faster_at_first():
    model = nn.Linear(1, 1)
    ema = ModelEMA(model, decay=0.5)
    value = 0.0
    for update in range(6):
        nn.init.constant_(model.weight, float(update))
        decay = min(0.5, (1 + update) / (10 + update))
        value = update if update == 0 else decay * value + (1 - decay) * update
        ema.update(model)
        assert ema.model.weight.item() == pytest.approx(value)


def test_average_resumes_where_it_was():
    model = nn.Linear(2, 2)
    ema, resumed = ModelEMA(model, 0.9), ModelEMA(nn.Linear(2, 2), 0.9)
    ema.update(model)
    resumed.load_state_dict(ema.state_dict())
    nn.init.ones_(model.weight)
    for average in (ema, resumed):
        average.update(model)
    assert torch.equal(ema.model.weight, resumed.model.weight)


def test_averaged_weights_are_evaluated_and_taken_as_weights(run, tmp_path):
    run(tmp_path / "run", ema=True, max_iter=2, checkpoint_period=9)
    final = read_checkpoint(tmp_path / "run")
    assert final["ema"]["updates"] == 2
    assert not torch.equal(final["ema"]["model"]["query_embed.weight"], final["model"]["query_embed.weight"])
    detections = (tmp_path / "run" / "inference" / "coco_instances_results.json").read_text()
    results = run(tmp_path / "again", "--eval-only", weights=tmp_path / "run" / "model_final.pth")
    assert "AP" in results["bbox"]
    assert (tmp_path / "again" / "inference" / "coco_instances_results.json").read_text() == detections


def test_a_finished_run_that_averages_only_now_is_evaluated_as_it_was(run_yaml, tmp_path, monkeypatch):
    evaluated = []
    monkeypatch.setattr(
        "deformable_detr.engine.Trainer.test", lambda _, cfg, model: evaluated.append(model.query_embed.weight.clone())
    )
    run_yaml(tmp_path / "run", max_iter=1)
    run_yaml(tmp_path / "run", "--resume", max_iter=1, ema=True)
    assert len(evaluated) == 2 and torch.equal(*evaluated)


def test_resumed_model_gets_its_trained_weights_and_not_the_average(model_and_batch, tmp_path):
    model, _ = model_and_batch
    ema = ModelEMA(model, 0.9)
    ema.model.query_embed.weight.data.fill_(7.0)
    DeformableDETRCheckpointer(model, str(tmp_path), ema=ema).save("model_final", iteration=1)
    trained = model.query_embed.weight.clone()
    checkpointer = DeformableDETRCheckpointer(model, str(tmp_path), ema=ema)
    checkpointer.resume_or_load("", resume=True)
    assert torch.equal(model.query_embed.weight, trained)
    extra = DeformableDETRCheckpointer(model).load(str(tmp_path / "model_final.pth"))
    assert extra == {"iteration": 1}
    assert model.query_embed.weight.eq(7.0).all()


def test_every_loss_and_the_gradient_norm_are_logged(run_yaml, tmp_path):
    run_yaml(tmp_path / "run", max_iter=2)
    row = losses_of(tmp_path / "run")[1]
    losses = {name: value for name, value in row.items() if name.startswith("loss_")}
    assert {"loss_ce", "loss_bbox_0", "loss_giou"} <= losses.keys()
    assert row["total_loss"] == pytest.approx(sum(losses.values()))
    assert row["grad_norm"] > 0 and row["lr"] == pytest.approx(2e-4)


def test_losses_are_written_before_the_checkpoint_of_their_iteration_and_evaluations_after(
    run_yaml, tmp_path, monkeypatch
):
    """A run that is killed in between does not write them again when it is resumed."""
    written = {}

    def save(self, name, **kwargs):
        written[name] = losses_of(tmp_path / "run")

    monkeypatch.setattr(DeformableDETRCheckpointer, "save", save)
    monkeypatch.setattr("deformable_detr.engine.Trainer.test", lambda *_: {"bbox": {"AP": 0.5}})
    run_yaml(tmp_path / "run", max_iter=3, checkpoint_period=2, eval_period=2)
    assert written["model_0000001"][1]["grad_norm"] > 0 and "bbox/AP" not in written["model_0000001"][1]
    metrics = losses_of(tmp_path / "run")
    assert metrics.keys() == {0, 1, 2, 3} and "total_loss" in metrics[2]
    assert metrics[1] == {**written["model_0000001"][1], "bbox/AP": 0.5} and metrics[3] == {"bbox/AP": 0.5}
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    assert sum('"total_loss"' in line for line in lines) == 3 and sum('"bbox/AP"' in line for line in lines) == 2


def test_batch_statistics_need_batches_that_can_be_found_again(model_and_batch, tmp_path):
    model, batch = model_and_batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = TrainingLoop(model, [batch], optimizer, TrainingSettings(output_dir=str(tmp_path), seed=1))
    with pytest.raises(TypeError, match=r"TEST\.PRECISE_BN needs a TrainLoader, got list"):
        PreciseBN(loop, model, period=1, num_iter=1)


def test_early_evaluation_and_best_checkpoint(run, tmp_path, monkeypatch):
    """The best one is kept through a resumed run, and is not what is resumed from."""
    aps = iter([0.1, 0.5, 0.3, 0.4])
    evaluated = []

    def evaluate(*_):
        evaluated.append(next(aps))
        return {"bbox": {"AP": evaluated[-1]}}

    name = "do_test" if run.is_lazy else "Trainer.test"
    monkeypatch.setattr(f"deformable_detr.engine.{name}", evaluate)
    options = {"first_eval": 1, "eval_period": 2, "best_metric": "bbox/AP", "checkpoint_period": 3}
    run(tmp_path / "run", max_iter=4, **options)
    assert evaluated == [0.1, 0.5, 0.3]
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"
    run(tmp_path / "run", "--resume", max_iter=5, **options)
    assert evaluated[3:] == [0.4]
    best = read_checkpoint(tmp_path / "run", "model_best")
    assert best["best"] == {"metric": "bbox/AP", "value": 0.5, "iteration": 1} and best["iteration"] == 1


def test_a_metric_that_no_evaluation_gives_is_told_with_those_that_there_are(caplog):
    hook = BestCheckpointer(SimpleNamespace(save_dir=""), "bbox/AP", period=1)
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(iter=0, max_iter=2, storage=storage)
        storage.put_scalars(**{"total_loss": 1.0, "a/bbox/AP": 5.0, "b/bbox/AP": 6.0})
        hook.after_step()
    assert "gives no 'bbox/AP'" in caplog.text and caplog.text.endswith("Its metrics are a/bbox/AP, b/bbox/AP\n")


OWN_PARTS = """
import copy
from detectron2.config import LazyCall as L
from detectron2.evaluation import DatasetEvaluators
from detectron2.solver.build import get_default_optimizer_params
from torch.optim import AdamW

optimizer = L(AdamW)(params=L(get_default_optimizer_params)(base_lr=1e-4))
dataloader.train = L(copy.copy)(x=dataloader.train)
dataloader.train.x.dataset.names = dataloader.test.dataset.names = "here"
dataloader.evaluator = [dataloader.evaluator, L(DatasetEvaluators)(evaluators=[])]
model.num_classes = 3
train.update(max_iter=1, per_layer_ap=True)
del train["ddp"]
"""


def test_a_lazy_config_of_other_parts_trains_as_it_is(tiny_lazy, write_coco, tmp_path):
    """A loader and an optimiser with other arguments, two evaluators, nothing about distributed training."""
    data = write_coco()
    register_coco_data("here", data.json, data.images)
    arguments = tiny_lazy()
    with open(arguments[-1], "a", encoding="utf-8") as file:
        file.write(OWN_PARTS)
    main(argument_parser().parse_args(arguments))
    assert {"bbox/AP", "bbox_layer_0/AP"} <= losses_of(tmp_path / "output")[1].keys()


def test_a_resumed_run_keeps_as_many_checkpoints_as_one_that_was_never_stopped(tmp_path):
    def train(start: int, end: int) -> list[str]:
        checkpointer = DeformableDETRCheckpointer(nn.Linear(1, 1), str(tmp_path))
        hook = PeriodicCheckpointer(checkpointer, period=1, max_to_keep=2)
        hook.trainer = SimpleNamespace(start_iter=start, max_iter=99)
        hook.before_train()
        for hook.trainer.iter in range(start, end):
            hook.after_step()
        return sorted(path.stem for path in tmp_path.glob("model_*.pth"))

    assert train(0, 3) == ["model_0000001", "model_0000002"]
    (tmp_path / "model_best.pth").touch()
    # Of iterations that are to be made again, as last_checkpoint was set back.
    (tmp_path / "model_0000008.pth").touch()
    assert train(3, 4) == ["model_0000002", "model_0000003", "model_0000008", "model_best"]


@pytest.mark.parametrize("lr, batch, warned", [(2e-4, 2, True), (2e-4, 32, False), (2e-4, 64, False), (1e-4, 4, False)])
def test_recipe_rate_at_another_batch_is_pointed_out(lr, batch, warned, caplog):
    warn_of_unscaled_learning_rate(lr, batch)
    assert (f"0.0002 x {batch}/32 = {2e-4 * batch / 32:g}" in caplog.text) == warned


@pytest.mark.parametrize("name, value", [("accumulation_steps", 0), ("ema_decay", 1.0), ("max_skipped_steps", -1)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"must be .*got {value}"):
        TrainingSettings(output_dir="", **{name: value})


def test_reference_world_size_scales_batch_rate_and_length(run_yaml, tmp_path):
    """Detectron2's own scaling: a schedule for two processes in one."""
    arguments = run_yaml.arguments
    run_yaml.arguments = lambda: [*arguments(), "SOLVER.REFERENCE_WORLD_SIZE", "2"]
    run_yaml(tmp_path / "run", max_iter=2, batch=2)
    final = read_checkpoint(tmp_path / "run")
    assert final["iteration"] == 3
    assert final["trainer"]["_trainer"]["images_seen"] == 4
    rates = {group["initial_lr"] for group in final["trainer"]["_trainer"]["optimizer"]["param_groups"]}
    assert max(rates) == pytest.approx(1e-4)
