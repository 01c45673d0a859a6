"""What is done, where it is asked for, before the first step: a sheet of the data, the size of a batch's parts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from omegaconf import OmegaConf
from PIL import Image

from deformable_detr import load_config
from deformable_detr.config import RunConfig, find_config_file
from deformable_detr.startup.checks import largest_image
from deformable_detr.training.auto_batch import AutoBatch, largest_images, largest_part, used_share
from deformable_detr.training.data_sheet import DataSheet, denormalised
from deformable_detr.training.loop import TrainingLoop
from deformable_detr.training.settings import TrainingSettings

from .conftest import losses_of


def test_flags_draw_the_data_and_set_the_batch(run, tmp_path):
    run(tmp_path / "run", "--show-data", "--batch-size", "1", max_iter=1, batch=1)
    saved = OmegaConf.load(tmp_path / "run" / "config.yaml")
    batch = saved.dataloader.train.total_batch_size if run.is_lazy else saved.SOLVER.IMS_PER_BATCH
    assert batch == 1
    with Image.open(tmp_path / "run" / "training_data.jpg") as sheet:
        # Sixteen images of at most 96 pixels, four in a row.
        assert sheet.width % 4 == 0 and 4 * 48 <= sheet.width <= 4 * 97
    # The sheet has not used up what is trained on.
    run(tmp_path / "again", max_iter=1, batch=1)
    assert losses_of(tmp_path / "again") == losses_of(tmp_path / "run")


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_the_sheet_shows_the_pixels_that_the_model_takes(tiny_yaml, order):
    _, path, *opts = tiny_yaml()
    model = build_model(load_config(path, [*opts, "INPUT.FORMAT", order]))
    samples = [{"image": torch.randint(256, (3, *size), dtype=torch.uint8)} for size in ((6, 9), (8, 5))]
    for canvas, sample in zip(denormalised(model, samples), samples, strict=True):
        pixels = sample["image"] if order == "RGB" else sample["image"].flip(0)
        height, width = pixels.shape[1:]
        assert canvas.shape == (8, 9, 3)
        assert torch.equal(torch.from_numpy(canvas).permute(2, 0, 1)[:, :height, :width], pixels)
        # Padding is zero behind the normalisation: the mean.
        mean = model.pixel_mean.flatten() if order == "RGB" else model.pixel_mean.flatten().flip(0)
        assert canvas[height:, width:].size == 0 or canvas[-1, -1].tolist() == mean.round().int().tolist()


def test_a_class_name_with_dollar_signs_is_drawn_as_it_is_written():
    labels = Instances((96, 96), gt_boxes=Boxes([[10.0, 40.0, 90.0, 90.0]]), gt_classes=torch.tensor([0]))

    def tile(name):
        sheet = SimpleNamespace(_class_names=[name])
        return DataSheet._tile(sheet, np.zeros((96, 96, 3), np.uint8), {"instances": labels})

    # As one sign alone, which begins no formula.
    assert tile("$5_$ bill").getbbox() and tile("5 $").tobytes() != tile("5 ").tobytes()


@pytest.mark.parametrize("batch_size", ["0", "many", "2.5"])
def test_a_batch_size_that_is_none_is_named(run_yaml, tmp_path, batch_size):
    with pytest.raises(ValueError, match=f"--batch-size must be auto, or .* at least 1, got '{batch_size}'"):
        run_yaml(tmp_path / "run", "--batch-size", batch_size)


def test_a_flag_that_an_override_contradicts_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="is 3 by a flag, but 2 by its override"):
        run(tmp_path / "run", "--batch-size", "3", batch=2)


# Parts that fit


def test_without_a_gpu_there_is_nothing_to_find_out(run, tmp_path):
    told = (
        r"\(--batch-size auto\) asks what fits into the memory of a GPU, and .* is 'cpu': set .* to the number of parts"
    )
    with pytest.raises(ValueError, match=told):
        run(tmp_path / "run", "--batch-size", "auto")


@pytest.mark.parametrize(
    "room, limit, tried, part",
    [(0, 8, [1], 0), (1, 8, [1, 2], 1), (5, 8, [1, 2, 4, 8], 4), (9, 8, [1, 2, 4, 8], 8), (9, 6, [1, 2, 4, 6], 6)],
)
def test_parts_double_until_one_does_not_fit(room, limit, tried, part):
    found = []
    assert largest_part(lambda count: found.append(count) or count <= room, limit) == part
    assert found == tried


@pytest.fixture
def loop(model_and_batch, tmp_path) -> TrainingLoop:
    model, _ = model_and_batch
    settings = TrainingSettings(output_dir=str(tmp_path), seed=1)
    loader = SimpleNamespace(total_batch_size=8)
    return TrainingLoop(model, loader, torch.optim.SGD(model.parameters(), lr=0.1), settings)


OUT_OF_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory")
# cuDNN's, for want of memory.
NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")


def with_room_for(images: int, model: torch.nn.Module, error: RuntimeError = OUT_OF_MEMORY) -> None:
    """Let a model run out of memory where a part is larger."""
    forward = model.forward

    def limited(batch):
        if len(batch) > images:
            raise error
        return forward(batch)

    model.forward = limited


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, NO_ENGINE], ids=lambda error: type(error).__name__)
def test_a_batch_goes_through_the_model_in_the_largest_parts_that_fit(loop, caplog, error):
    with_room_for(3, loop.model, error)
    before = {name: value.clone() for name, value in loop.model.state_dict().items()}
    hook = AutoBatch(loop, (48, 64), sizes_key="INPUT.MAX_SIZE_TRAIN")
    caplog.set_level("INFO")
    hook.before_train()
    # 1 and 2 fit, 4 do not: eight images in four parts.
    assert loop.settings.accumulation_steps == 4
    assert "2 of the largest images (48x64) fit at a time: SOLVER.ACCUMULATION_STEPS is 4, the batch 8" in caplog.text
    assert all(torch.equal(before[name], value) for name, value in loop.model.state_dict().items())
    assert all(parameter.grad is None for parameter in loop.model.parameters())


def test_an_image_that_does_not_fit_is_an_error_with_what_to_lower(loop):
    with_room_for(0, loop.model)
    with pytest.raises(RuntimeError, match=r"not even one training image of 48x64 .*: lower INPUT\.MAX_SIZE_TRAIN"):
        AutoBatch(loop, (48, 64), sizes_key="INPUT.MAX_SIZE_TRAIN").before_train()


@pytest.mark.parametrize(("room", "error"), [(0, NO_ENGINE), (3, RuntimeError("a bug"))])
def test_an_error_that_no_memory_explains_is_not_taken_for_one(loop, room, error):
    with_room_for(room, loop.model, error)
    with pytest.raises(RuntimeError, match=str(error)):
        AutoBatch(loop, (48, 64), sizes_key="INPUT.MAX_SIZE_TRAIN").before_train()


def test_a_loader_that_does_not_say_its_batch_is_named(loop):
    loop.data_loader = []
    with pytest.raises(TypeError, match=r"^SOLVER\.AUTO_BATCH needs a TrainLoader, .* total_batch_size, got list$"):
        AutoBatch(loop, (48, 64), sizes_key="INPUT.MAX_SIZE_TRAIN")


def test_several_processes_do_not_wait_for_each_other_in_what_they_try(loop, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    told = "SOLVER.AUTO_BATCH does not go with a batch norm that exchanges statistics with other processes"
    for norm in (torch.nn.SyncBatchNorm(4), NaiveSyncBatchNorm(4)):
        loop.model.further = norm
        with pytest.raises(ValueError, match=told):
            AutoBatch(loop, (48, 64), sizes_key="INPUT.MAX_SIZE_TRAIN")
    del loop.model.further, loop.model.criterion
    told = "SOLVER.AUTO_BATCH needs, of several processes, a model whose criterion can count objects alone"
    with pytest.raises(ValueError, match=told):
        AutoBatch(loop, (48, 64), sizes_key="INPUT.MAX_SIZE_TRAIN")


def test_the_memory_that_counts_is_that_of_the_models_gpu(monkeypatch):
    cuda = torch.device("cuda:1")
    monkeypatch.setattr("torch.cuda.max_memory_reserved", {cuda: 19, None: 1}.__getitem__)
    monkeypatch.setattr("torch.cuda.get_device_properties", {cuda: SimpleNamespace(total_memory=20)}.__getitem__)
    assert used_share(cuda) == 0.95 and used_share(torch.device("cpu")) == 0


def test_the_largest_images_lie_and_stand_and_have_valid_boxes():
    samples = largest_images(3, (48, 64))
    assert [tuple(sample["image"].shape) for sample in samples] == [(3, 48, 64), (3, 64, 48), (3, 48, 64)]
    for sample in samples:
        boxes = sample["instances"].gt_boxes
        assert len(boxes) == 100 and boxes.nonempty().all()


@pytest.mark.parametrize("suffix", [".yaml", ".py"])
def test_the_largest_image_is_that_of_the_augmentation(suffix):
    run = RunConfig(load_config(find_config_file("deformable_detr_R_50", suffix=suffix)))
    assert largest_image(run) == (800, 1333)
    run.set("lsj_size", 1024)
    assert largest_image(run) == (1024, 1024)
