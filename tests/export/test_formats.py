"""Files of every format, written, read again and compared, through the command line."""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deformable_detr import cli
from deformable_detr.data.augmentation import ResizeShortestEdge
from deformable_detr.data.images import read_file
from deformable_detr.detect import prepare_image
from deformable_detr.detect.__main__ import parse_args as detect_arguments
from deformable_detr.export import DisagreementError, InputShape, export_model, exporter
from deformable_detr.export.__main__ import parse_args
from deformable_detr.export.agreement import draw_pictures
from deformable_detr.export.torch_formats import load_torchscript, write_torchscript

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

RUN_ONNX = Path(__file__).parents[2] / "tools" / "run_onnx.py"


def sizes(values):
    return {value.name: value.shape for value in values}


def test_onnx_has_dynamic_sizes_and_detects_without_torch_what_the_model_detects(short_model, capture, tmp_path):
    # Without refinement all decoder layers share their references, on which onnxscript's optimiser stumbles.
    loaded, path = short_model("_single_scale"), tmp_path / "model.onnx"
    differences = export_model(loaded, path, format_name="onnx")
    assert len(differences) == 3 and max(d.boxes for d in differences) < 1e-4

    session = onnxruntime.InferenceSession(path)
    assert sizes(session.get_inputs()) == {"images": ["batch", 3, "height", "width"], "image_sizes": ["batch", 2]}
    assert sizes(session.get_outputs())["boxes"] == ["batch", 100, 4]

    picture = draw_pictures()[1]
    Image.fromarray(picture).save(tmp_path / "picture.png")
    command = [sys.executable, RUN_ONNX, "picture.png", "--model", path, "--score", "0", "--output", "found.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    lines = [line.split() for line in done.stdout.splitlines()[:-1]]

    with torch.no_grad():
        expected = loaded.model([prepare_image(loaded, picture)])[0]["instances"]
    boxes = [[float(number) for number in line[-4:]] for line in lines]
    expected.pred_boxes.clip(expected.image_size)
    np.testing.assert_allclose(boxes, expected.pred_boxes.tensor.numpy(), atol=0.2)
    np.testing.assert_allclose([float(line[0]) for line in lines], expected.scores.numpy(), atol=1e-3)
    names = [loaded.class_names[label] for label in expected.pred_classes]
    assert [" ".join(line[1:-4]) for line in lines] == names
    assert Image.open(tmp_path / "found.png").size == (400, 600)


def test_onnx_of_a_detr_has_dynamic_sizes_too(short_model, capture, tmp_path):
    path = tmp_path / "model.onnx"
    differences = export_model(short_model("detr_R_50"), path, format_name="onnx")
    assert len(differences) == 3 and max(d.boxes for d in differences) < 1e-4
    assert sizes(onnxruntime.InferenceSession(path).get_inputs())["images"] == ["batch", 3, "height", "width"]


def test_onnx_of_a_fixed_size_and_an_older_opset(short_model, capture, tmp_path):
    path = tmp_path / "model.onnx"
    export_model(short_model("_two_stage"), path, format_name="onnx", shape=InputShape(1, (64, 96)), opset=18)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert [opset.version for opset in model.opset_import if not opset.domain] == [18]
    assert sizes(onnxruntime.InferenceSession(path).get_inputs())["images"] == [1, 3, 64, 96]


DINO = """
MIXED_QUERY_SELECTION True LOOK_FORWARD_TWICE True ANCHOR_QUERY_POS True MULTICLASS_PROPOSALS True DECODER_NORM True
SHARED_HEADS True INVERSE_SIGMOID_EPS 0.001 POSITION_TEMPERATURE 20.0 POSITION_OFFSET 0.0 DN_NUMBER 100
"""


@pytest.mark.slow
def test_onnx_of_a_model_with_all_switches_of_dino(short_model, capture, tmp_path):
    """Its layers move their references by the same numbers as their predictions, where the optimiser stumbles too."""
    opts = DINO.split()
    opts[::2] = [f"MODEL.DEFORMABLE_DETR.{key}" for key in opts[::2]]
    path = tmp_path / "model.onnx"
    differences = export_model(
        short_model("_two_stage", *opts), path, format_name="onnx", shape=InputShape(1, (64, 96))
    )
    assert max(d.boxes for d in differences) < 1e-4 and max(d.scores for d in differences) < 1e-4


def test_onnx_with_the_op_as_a_node(short_model, capture, tmp_path):
    path = tmp_path / "model.onnx"
    shape = InputShape(2, (64, 96))
    differences = export_model(short_model("_two_stage"), path, format_name="onnx", shape=shape, decompose=False)
    assert differences[0].boxes < 1e-4
    nodes = [node for node in onnx.load(path).graph.node if node.domain == "deformable_detr"]
    assert [node.op_type for node in nodes] == ["MSDeformAttn"] * 3
    assert [len(node.input) for node in nodes] == [4] * 3


LOAD_WITHOUT_THIS_PACKAGE = """
    import sys, torch
    for path in sys.argv[1:]:
        extra = dict.fromkeys(("class_names", "min_size", "max_size"), "")
        if path.endswith(".pt2"):
            run = torch.export.load(path, extra_files=extra).module()
        else:
            run = torch.jit.load(path, _extra_files=extra)
        boxes, scores, labels = run(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), torch.tensor([[64, 80]]))
        assert boxes.shape == (1, 100, 4) and scores.shape == labels.shape == (1, 100)
        text = extra["max_size"]
        print(text if isinstance(text, str) else text.decode())
    assert "deformable_detr" not in sys.modules
"""


def test_formats_of_pytorch_load_without_this_package(short_model, capture, tmp_path):
    program, script = tmp_path / "model.pt2", tmp_path / "model.pt"
    loaded, size = short_model("_two_stage"), (64, 96)
    assert len(export_model(loaded, program, format_name="torch_export", shape=InputShape(1, size))) == 2
    # TorchScript completes what is left open.
    assert len(export_model(loaded, script, format_name="torchscript", shape=InputShape(size=size))) == 2
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(LOAD_WITHOUT_THIS_PACKAGE), program, script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["96", "96"]


def test_a_canvas_that_is_left_open_is_one_that_the_model_pads_to(short_model, tmp_path, monkeypatch):
    def stop(program, shape, *, decompose):
        raise InterruptedError(str(shape))

    monkeypatch.setattr(exporter, "capture", stop)
    loaded = short_model("_two_stage", "MODEL.DEFORMABLE_DETR.SIZE_DIVISIBILITY", "40")
    # Images are tested with sides of 64 and 96 pixels.
    with pytest.raises(InterruptedError, match="1 x 3 x 80 x 120"):
        export_model(loaded, tmp_path / "model.pt", format_name="torchscript")


def test_a_file_is_for_the_cpu_unless_asked_otherwise(monkeypatch):
    monkeypatch.setattr(cli, "default_device", lambda: "cuda")
    required = ["--model", "deformable_detr_R_50", "--format", "torch_export"]
    assert parse_args(required).device == "cpu"
    assert parse_args([*required, "--device", "cuda:1"]).device == "cuda:1"


def test_torchscript_is_written_by_a_pytorch_whose_programs_have_no_guards(tmp_path):
    older = SimpleNamespace(module=lambda: torch.nn.Flatten(), example_inputs=((torch.ones(1, 2, 3),), {}))
    write_torchscript(older, tmp_path / "model.pt", metadata={})
    assert load_torchscript(tmp_path / "model.pt")(torch.ones(1, 2, 3)).shape == (1, 6)


def test_torchscript_keeps_the_op_on_demand(short_model, capture, tmp_path):
    shape = InputShape(2, (64, 96))
    loaded, path = short_model("_two_stage"), tmp_path / "model.pt"
    differences = export_model(loaded, path, format_name="torchscript", shape=shape, decompose=False)
    assert differences[0].boxes < 1e-5


def test_a_program_that_disagrees_is_an_error_and_leaves_no_file(short_model, capture, tmp_path, monkeypatch):
    kind = exporter.FORMATS["torchscript"]

    def load_wrongly(path):
        run = kind.load(path)
        return lambda *arguments: (run(*arguments)[0] + 0.002, *run(*arguments)[1:])

    monkeypatch.setitem(exporter.FORMATS, "torchscript", exporter.Format(".pt", kind.write, load_wrongly, False))
    with pytest.raises(DisagreementError, match="differs from the model for 64x85 on a canvas of 64x96: boxes 2.0e-03"):
        export_model(short_model("_two_stage"), tmp_path / "model.pt", format_name="torchscript")
    assert list(tmp_path.glob("*.pt")) == []


def load_run_onnx():
    namespace = {"__name__": "run_onnx"}
    exec(compile(RUN_ONNX.read_text(encoding="utf-8"), RUN_ONNX, "exec"), namespace)
    return namespace


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1000), st.integers(1, 1500))
def test_the_example_resizes_as_the_evaluation_does(width, height, min_size, max_size):
    resized_size = load_run_onnx()["resized_size"]
    rows, columns = ResizeShortestEdge.get_output_shape(height, width, min_size, max_size)
    assert resized_size(width, height, min_size=min_size, max_size=max_size) == (columns, rows)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA"])
def test_the_example_reads_images_as_training_does(tmp_path, mode):
    image = Image.effect_noise((9, 7), 90).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.convert(mode).save(tmp_path / "a.png")
    assert np.array_equal(load_run_onnx()["read"](tmp_path / "a.png"), read_file(tmp_path / "a.png"))


def test_the_example_refuses_pixels_that_it_would_clip(tmp_path):
    Image.new("I;16", (9, 7)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png has pixels of mode I;16; save it with 8 bits per channel"):
        load_run_onnx()["read"](tmp_path / "a.png")


def test_the_example_needs_neither_torch_nor_detectron2():
    tree = ast.parse(RUN_ONNX.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports}
    assert {name for name in modules if name not in sys.stdlib_module_names} == {"numpy", "onnxruntime", "PIL"}


def test_the_program_for_onnxruntime_shows_what_detect_shows():
    help = subprocess.run([sys.executable, RUN_ONNX, "--help"], capture_output=True, text=True, check=True).stdout
    default = detect_arguments(["a.jpg", "--model", "a"]).score
    assert re.search(rf"--score SCORE\s+lowest score to show \(default: {default}\)", help)
