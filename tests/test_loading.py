"""The one way in which tools get a model."""

import re

import pytest
import torch
from detectron2.config import LazyConfig

from deformable_detr.checkpoint.coverage import CheckpointError
from deformable_detr.config import load_config
from deformable_detr.engine import main
from deformable_detr.loading import build_model, load_model
from deformable_detr.startup.setup import argument_parser, setup


@pytest.fixture(params=("tiny_yaml", "tiny_lazy"))
def config(request):
    """A config file and overrides."""
    _, path, *opts = request.getfixturevalue(request.param)("_two_stage")
    return path, opts


def test_a_config_and_weights_give_the_same_model(config, tmp_path):
    path, opts = config
    trained = build_model(load_config(path, opts))
    torch.save({"model": trained.state_dict()}, tmp_path / "model.pth")
    loaded = load_model(path, str(tmp_path / "model.pth"), opts=opts)
    assert not loaded.model.training
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), loaded.model.parameters(), strict=True))
    assert loaded.class_names[:2] == ["person", "bicycle"]


def test_an_output_folder_gives_its_last_checkpoint_and_its_class_names(config, tmp_path):
    path, opts = config
    cfg = load_config(path, opts)
    trained = build_model(cfg)
    if path.endswith(".py"):
        LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    else:
        (tmp_path / "config.yaml").write_text(cfg.dump())
    names = [f"name {index}" for index in range(80)]
    torch.save({"model": trained.state_dict(), "class_names": names}, tmp_path / "model_0000009.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    loaded = load_model(tmp_path)
    assert torch.equal(loaded.model.transformer.level_embed, trained.transformer.level_embed)
    assert loaded.class_names == names


def test_weights_among_the_overrides_are_taken_for_a_model_of_the_zoo(tiny_yaml):
    _, _, *opts = tiny_yaml("_two_stage")
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_model("deformable_detr_R_50_two_stage", opts=[*opts, "MODEL.WEIGHTS", "absent.pth"])


def test_images_are_resized_as_for_evaluation(config):
    path, opts = config
    resize = load_model(path, "", opts=opts).resize
    assert [(a.short_edge_length, a.max_size) for a in resize.augs] == [((64, 64), 96)]


def test_a_config_that_does_not_say_how_images_are_resized_is_refused_before_weights_are_read(tmp_path):
    model = "from detectron2.config import LazyCall as L\nfrom torch import nn\nmodel = L(nn.Identity)()\n"
    (tmp_path / "model.py").write_text(model)
    with pytest.raises(ValueError, match=r"has no dataloader.test.mapper.augmentations, .* \[\] for not at all"):
        load_model(tmp_path / "model.py", "absent.pth")


def test_weights_of_a_backbone_alone_cannot_detect(config, write_coco, tmp_path):
    path, opts = config
    backbone = build_model(load_config(path, opts)).backbone.bottom_up
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    told = r"backbone\.pth leaves \d+ parameters of the model as initialised: it cannot detect\. Give .* detector by "
    with pytest.raises(CheckpointError, match=told + "--weights"):
        load_model(path, tmp_path / "backbone.pth", opts=opts)
    # Nor is it evaluated.
    key = "MODEL.WEIGHTS" if opts else "train.init_checkpoint"
    override = f"{key} {tmp_path / 'backbone.pth'}".split() if opts else [f"{key}={tmp_path / 'backbone.pth'}"]
    arguments = ["--eval-only", *write_coco().flags("val"), "--config-file", path, *opts, *override]
    with pytest.raises(CheckpointError, match=told + re.escape(key)):
        main(argument_parser().parse_args(arguments))


@pytest.mark.parametrize(
    "opts, expected", [([], "deformable-detr://deformable_detr_R_50"), (["MODEL.WEIGHTS", "mine.pth"], "mine.pth")]
)
def test_to_evaluate_a_name_means_the_published_weights(opts, expected, write_coco, tmp_path):
    fixed = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "output")]
    arguments = ["--eval-only", *write_coco().flags("val"), "--config-file", "deformable_detr_R_50", *fixed, *opts]
    assert setup(argument_parser().parse_args(arguments)).MODEL.WEIGHTS == expected


def test_a_file_of_other_classes_is_told_by_their_numbers(tiny_yaml, tmp_path):
    _, path, *opts = tiny_yaml()
    four, three = (["MODEL.DEFORMABLE_DETR.NUM_CLASSES", number] for number in "43")
    torch.save({"model": build_model(load_config(path, [*opts, *four])).state_dict()}, tmp_path / "model.pth")
    with pytest.raises(
        CheckpointError, match="it cannot detect. The file has 4 classes, the configuration 3: set MODEL"
    ):
        load_model(path, str(tmp_path / "model.pth"), opts=[*opts, *three])


def test_an_output_folder_without_checkpoint_is_named(config, tmp_path):
    path, opts = config
    if path.endswith(".yaml"):
        (tmp_path / "config.yaml").write_text(load_config(path, opts).dump())
        with pytest.raises(FileNotFoundError, match="last_checkpoint"):
            load_model(str(tmp_path))


def test_an_unknown_name_lists_the_zoo():
    with pytest.raises(ValueError, match="deformable_detr_R_50_two_stage"):
        load_model("deformable_detr_R_51")


@pytest.mark.parametrize(
    "device, gpus, message",
    [
        ("gpu", 0, "got 'gpu'"),
        ("cuda", 0, "sees none here"),
        ("cuda:7", 1, "device cuda:7 is not here: PyTorch sees 1 GPU, counted from cuda:0"),
    ],
)
def test_a_device_that_is_not_there_is_named(device, gpus, message, config, monkeypatch):
    path, opts = config
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=message):
        load_model(path, "", device=device, opts=opts)


@pytest.mark.parametrize(
    "opts, error, name",
    [(["MODEL.NO_SUCH_KEY", "1"], KeyError, "MODEL.NO_SUCH_KEY"), (["MODEL.MASK_ON"], ValueError, "MODEL.MASK_ON")],
)
def test_overrides_that_do_not_fit_the_config_are_named(opts, error, name):
    with pytest.raises(error, match=name):
        load_model("deformable_detr_R_50", "", opts=opts)
