"""Arguments of the command line that cannot work are named before anything takes long."""

from dataclasses import replace

import detectron2.data.transforms as T
import pytest
import torch

from deformable_detr.cli import run as run_command
from deformable_detr.export import exporter, onnx_format
from deformable_detr.export.__main__ import main, new_file


@pytest.fixture
def fails(tiny_yaml, tmp_path, capsys, monkeypatch):
    """A function that runs the command with flags, and returns its error message and leaves no file."""

    def run(*flags, output="model.onnx", opts=()):
        monkeypatch.chdir(tmp_path)
        _, path, *tiny = tiny_yaml()
        required = ["--model", path, "--weights", "", "--device", "cpu"]
        target = [] if output is None else ["--output", str(tmp_path / output)]
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit, match="2"):
            run_command(main, [*required, *target, *flags, "--opts", *tiny, *opts])
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("opset", [17, 21])
def test_opset_out_of_range(opset, fails):
    assert f"opset must be from 18 to 20, got {opset}" in fails("--format", "onnx", "--opset", str(opset))


def test_opset_of_another_format(fails):
    message = fails("--format", "torch_export", "--opset", "20", output="model.pt2")
    assert "opset 20 was given, but only ONNX has opsets" in message


def test_suffix_of_another_format(fails):
    message = fails("--format", "torchscript")
    assert "the output must end in .pt, got " in message and "model.onnx" in message


def test_missing_output_folder(fails, tmp_path):
    folder = tmp_path / "missing"
    message = fails("--format", "onnx", output="missing/model.onnx")
    assert message == f"error: cannot write {folder}/model.onnx: there is no folder {folder}\n"


def test_output_folder_that_is_a_file(fails, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"there is no folder {tmp_path}/file" in fails("--format", "onnx", output="file/model.onnx")


def test_output_whose_name_is_too_long(fails, tmp_path):
    name = "n" * 250 + ".onnx"
    assert f"cannot write {tmp_path}/{name}: File name too long" in fails("--format", "onnx", output=name)


def test_a_file_that_nobody_has_named_is_not_overwritten(fails, tmp_path):
    (tmp_path / "deformable_detr_R_50.onnx").write_text("another model")
    message = fails("--format", "onnx", output=None)
    assert "deformable_detr_R_50.onnx exists already: to write over it, give --output" in message


@pytest.mark.parametrize("model", ["deformable_detr_R_50", "runs/v1.2", "configs/small.yaml"])
def test_a_file_gets_the_name_of_its_model(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.yaml").touch()
    expected = {"runs/v1.2": "v1.2.onnx", "configs/small.yaml": "small.onnx"}
    assert str(new_file(model, ".onnx")) == expected.get(model, "deformable_detr_R_50.onnx")


def test_output_that_is_a_folder(fails, tmp_path):
    (tmp_path / "model.onnx").mkdir()
    assert "the output must be a file, " in fails("--format", "onnx")


def test_size_below_the_coarsest_stride(fails):
    message = fails("--format", "onnx", "--fixed-size", "32", "800")
    assert "height and width must be at least 64 pixels, the stride of the coarsest level, got 32 800" in message


def test_size_to_which_the_model_never_pads(fails):
    opts = "MODEL.DEFORMABLE_DETR.SIZE_DIVISIBILITY", "32"
    message = fails("--format", "onnx", "--fixed-size", "800", "1333", opts=opts)
    assert "must be multiples of 32 pixels, to which this model pads its images, got 800 1333: give 800 1344" in message


def test_batch_without_images(fails):
    assert "batch must be at least 1, got 0" in fails("--format", "onnx", "--batch", "0")


SHORTEST_EDGE = T.ResizeShortestEdge(64, 96)


@pytest.mark.parametrize("augmentations", [[T.Resize((64, 64))], [SHORTEST_EDGE, T.RandomFlip()], [SHORTEST_EDGE] * 2])
def test_a_resize_that_no_file_can_tell_of(augmentations, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "capture", lambda *_, **__: pytest.fail("began"))
    loaded = replace(tiny_model(), resize=T.AugmentationList(augmentations))
    with pytest.raises(ValueError, match=r"must be one ResizeShortestEdge or none, .* got \[Res"):
        exporter.export_model(loaded, tmp_path / "model.onnx", format_name="onnx")


def test_missing_package(fails, monkeypatch):
    monkeypatch.setattr(onnx_format, "_PACKAGES", ("onnx", "no_such_package"))
    assert "ONNX needs no_such_package: pip install no_such_package" in fails("--format", "onnx")


def test_a_pytorch_that_cannot_translate_captured_programs(fails, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda model, args, f, *, dynamo=False: pytest.fail("began"))
    assert f"ONNX needs PyTorch 2.6 or newer, for captured programs; this is {torch.__version__}" in (
        fails("--format", "onnx")
    )


def test_missing_image(fails, tmp_path):
    assert "no.jpg" in fails("--format", "onnx", "--check", "no.jpg")


def test_unknown_model(capsys):
    with pytest.raises(SystemExit, match="2"):
        run_command(main, ["--model", "deformable_detr_R_51", "--format", "onnx"])
    assert "deformable_detr_R_50_two_stage" in capsys.readouterr().err
