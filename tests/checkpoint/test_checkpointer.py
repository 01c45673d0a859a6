import argparse
import logging
import os
import pickle

import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from safetensors.torch import save_file

from deformable_detr.checkpoint import CheckpointError
from deformable_detr.training.checkpointer import DeformableDETRCheckpointer
from deformable_detr.training.ema import ModelEMA


def assert_same_parameters(model, expected):
    state_dict = model.state_dict()
    assert [key for key, value in expected.state_dict().items() if not torch.equal(state_dict[key], value)] == []


def test_official_file_loads_and_its_training_state_does_not(build, official_names, tmp_path):
    theirs, ours = build("_two_stage"), build("_two_stage")
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.5)
    content = {"model": official_names(theirs), "optimizer": {"nonsense": 1}, "epoch": 49}
    torch.save(content | {"args": argparse.Namespace(lr=2e-4)}, tmp_path / "official.pth")
    checkpointer = DeformableDETRCheckpointer(ours, optimizer=optimizer)
    assert checkpointer.load(str(tmp_path / "official.pth")) == {}
    assert_same_parameters(ours, theirs)


@pytest.mark.parametrize("suffix", (".bin", ".safetensors"))
def test_files_saved_by_transformers_load(suffix, build, transformers_names, tmp_path):
    theirs, ours = build("_box_refine"), build("_box_refine")
    path = tmp_path / f"model{suffix}"
    state_dict = {key: value.contiguous().clone() for key, value in transformers_names(theirs, 4).items()}
    if suffix == ".bin":
        torch.save(state_dict, path)
    else:
        save_file(state_dict, path)
    DeformableDETRCheckpointer(ours).load(str(path))
    assert_same_parameters(ours, theirs)


def test_imagenet_backbone_of_detectron2_loads_and_the_rest_stays(build, tmp_path):
    theirs, ours = build(), build()
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    backbone = theirs.backbone.bottom_up
    arrays = {key: value.numpy() for key, value in backbone.state_dict().items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    DeformableDETRCheckpointer(ours).resume_or_load(str(tmp_path / "R-50.pkl"), resume=False)
    assert_same_parameters(ours.backbone.bottom_up, backbone)
    rest = [key for key in before if not key.startswith("backbone.bottom_up.")]
    assert all(torch.equal(ours.state_dict()[key], before[key]) for key in rest)


def test_training_resumes_with_model_optimizer_scheduler_and_iteration(build, tmp_path):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model.transformer.level_embed.sum().backward()
    optimizer.step()
    scheduler.step()
    parts = {"optimizer": optimizer, "scheduler": scheduler}
    DeformableDETRCheckpointer(model, str(tmp_path), **parts).save("model_0000041", iteration=41)

    resumed = build()
    new_optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.1)
    new_scheduler = torch.optim.lr_scheduler.StepLR(new_optimizer, 1)
    checkpointer = DeformableDETRCheckpointer(resumed, str(tmp_path), optimizer=new_optimizer, scheduler=new_scheduler)
    assert checkpointer.resume_or_load("ignored.pth", resume=True)["iteration"] == 41
    assert_same_parameters(resumed, model)
    assert str(new_optimizer.state_dict()) == str(optimizer.state_dict())
    assert new_scheduler.state_dict() == scheduler.state_dict()


def test_resuming_another_model_is_refused(build, tmp_path):
    DeformableDETRCheckpointer(build(NUM_CLASSES=80), str(tmp_path)).save("model_final")
    checkpointer = DeformableDETRCheckpointer(build(NUM_CLASSES=5), str(tmp_path))
    with pytest.raises(CheckpointError, match=r"(?s)Cannot resume: .*model_final\.pth.*80 classes in the file, 5 in"):
        checkpointer.resume_or_load("", resume=True)
    assert checkpointer.resume_or_load(str(tmp_path / "model_final.pth"), resume=False) == {}


@pytest.mark.parametrize(
    "found, told",
    [
        (["model_0000041.pth", "model_0000041.pth", ""], r"model_0000041\.pth to process 0 and none to process 2"),
        (["", "model_0000041.pth"], r"none to process 0 and model_0000041\.pth to process 1"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_find_different_checkpoints_do_not_resume(rank, found, told, tmp_path, monkeypatch):
    """Machines without a common folder would train different weights on averaged gradients."""
    checkpointer = DeformableDETRCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    if found[rank]:
        checkpointer.save("model_0000041")
    everybody = {found[rank]: found}
    monkeypatch.setattr(comm, "all_gather", everybody.__getitem__)
    with pytest.raises(CheckpointError, match=rf"Cannot resume: .*{told}.*the same for all machines"):
        checkpointer.resume_or_load("", resume=True)
    assert checkpointer.resume_or_load("", resume=False) == {}


def test_what_became_of_the_parameters_is_logged(build, official_names, tmp_path, caplog):
    torch.save(official_names(build(NUM_CLASSES=91)), tmp_path / "official.pth")
    caplog.set_level(logging.INFO)
    checkpointer = DeformableDETRCheckpointer(build(NUM_CLASSES=5))
    checkpointer.load(str(tmp_path / "official.pth"))
    assert str(checkpointer.report) in caplog.text
    assert "91 classes in the file, 5 in the model" in caplog.text


def test_missing_file_is_named_with_its_config_key(build, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth.*MODEL\.WEIGHTS"):
        DeformableDETRCheckpointer(build()).load(str(tmp_path / "nowhere.pth"))


def test_weights_that_cannot_be_downloaded_are_named_by_their_address(build, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(type(PathManager), "get_local_path", refuse)
    address = r"https://\S+/detectron2/ImageNetPretrained/R-50\.pkl"
    message = rf'detectron2://\S+ cannot be .*no route to host.*Download {address} where.*init_checkpoint to an .* ""'
    with pytest.raises(CheckpointError, match=message):
        checkpointer = DeformableDETRCheckpointer(build(), weights_key="train.init_checkpoint")
        checkpointer.load("detectron2://ImageNetPretrained/R-50.pkl")


def test_folder_is_not_taken_for_weights(build, tmp_path):
    with pytest.raises(CheckpointError, match="is a folder; name the weights file inside it"):
        DeformableDETRCheckpointer(build()).load(str(tmp_path))


def test_last_checkpoint_that_names_a_deleted_file_is_told(build, tmp_path):
    (tmp_path / "last_checkpoint").write_text("deleted.pth")
    with pytest.raises(FileNotFoundError, match=r"deleted\.pth.*last_checkpoint"):
        DeformableDETRCheckpointer(build(), str(tmp_path)).resume_or_load("", resume=True)


def test_a_checkpointer_works_after_a_failed_load(build, tmp_path):
    model = build()
    (tmp_path / "bad.pth").write_text("<html>not found</html>")
    checkpointer = DeformableDETRCheckpointer(model, str(tmp_path))
    checkpointer.save("good")
    with pytest.raises(CheckpointError, match="is a web page"):
        checkpointer.load(str(tmp_path / "bad.pth"))
    checkpointer.load(str(tmp_path / "good.pth"))
    assert checkpointer.report.exact


def test_no_weights_leave_the_model_as_it_is(build):
    assert DeformableDETRCheckpointer(build()).load("") == {}


def test_an_interrupted_save_leaves_the_last_checkpoint_in_place(build, tmp_path, monkeypatch):
    checkpointer = DeformableDETRCheckpointer(build(), str(tmp_path))
    checkpointer.save("model", iteration=1)

    def fill_the_disk(_, stream):
        stream.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    for name in ("model", "model_final"):
        with pytest.raises(OSError, match="No space left"):
            checkpointer.save(name, iteration=2)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]
    assert checkpointer.load(checkpointer.get_checkpoint_file()) == {"iteration": 1}


def test_nothing_is_written_without_a_folder_or_by_other_processes(build, tmp_path):
    DeformableDETRCheckpointer(build()).save("model")
    DeformableDETRCheckpointer(build(), str(tmp_path), save_to_disk=False).save("model")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def with_averages(build, detrex_names, tmp_path):
    """A file as detrex writes it, and the models of its trained and of its averaged weights."""
    trained, averaged = build("_two_stage"), build("_two_stage")
    # Buffers that are no part of the file's model are averaged there too.
    averages = detrex_names(averaged) | {"pixel_mean": torch.zeros(3)}
    content = {"model": detrex_names(trained), "ema_state": averages, "iteration": 9}
    torch.save(content, tmp_path / "detrex.pth")
    return str(tmp_path / "detrex.pth"), trained, averaged


def test_averaged_weights_of_detrex_are_taken_when_asked_for(build, with_averages, caplog):
    path, _, averaged = with_averages
    caplog.set_level(logging.INFO)
    ours = build("_two_stage")
    assert DeformableDETRCheckpointer(ours).load(f"{path}?ema=True") == {}
    assert_same_parameters(ours, averaged)
    assert "Averaged weights (ema_state)" in caplog.text


def test_averaged_weights_that_are_not_asked_for_are_not_dropped_without_a_word(build, with_averages, caplog):
    path, trained, _ = with_averages
    caplog.set_level(logging.INFO)
    ours = build("_two_stage")
    DeformableDETRCheckpointer(ours).load(path)
    assert_same_parameters(ours, trained)
    assert "Not the file's averaged weights (ema_state): those are asked for by FILE?ema=True" in caplog.text


def test_asking_for_averaged_weights_that_are_not_there_is_an_error(build, tmp_path):
    model = build()
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="asks for averaged weights, and the file has none"):
        DeformableDETRCheckpointer(model).load(f"{tmp_path}/x.pth?ema=True")


def test_own_files_give_their_averages_with_and_without_asking(build, tmp_path):
    trained, averaged = build(), build()
    content = {"model": trained.state_dict(), "ema": {"model": averaged.state_dict(), "updates": 7}}
    torch.save(content, tmp_path / "x.pth")
    for query in ("", "?ema=True"):
        ours = build()
        DeformableDETRCheckpointer(ours).load(f"{tmp_path}/x.pth{query}")
        assert_same_parameters(ours, averaged)


def test_a_new_run_begins_with_the_averages_whether_or_not_it_averages_itself(build, tmp_path):
    ours = build()
    averages = {key: torch.full_like(value, 3) for key, value in ours.state_dict().items()}
    torch.save({"model": ours.state_dict(), "ema": {"model": averages, "updates": 7}}, tmp_path / "x.pth")
    checkpointer = DeformableDETRCheckpointer(ours, ema=ModelEMA(ours, 0.9))
    checkpointer.resume_or_load(str(tmp_path / "x.pth"), resume=False)
    assert all((value == 3).all() for value in ours.state_dict().values())
    assert checkpointer.report.note == "Weights averaged over 7 updates (ema)"
