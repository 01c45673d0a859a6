"""ms_deform_attn in ONNX: the exported decomposition in ONNX Runtime against eager."""

import pytest
import torch
from torch import nn

from deformable_detr.layers import decompose_ms_deform_attn, ms_deform_attn

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture
def device():
    return "cpu"


class Attend(nn.Module):
    """The function with the shapes of its maps built in."""

    def __init__(self, spatial_shapes):
        super().__init__()
        self.spatial_shapes = spatial_shapes

    def forward(self, value, sampling_locations, attention_weights):
        return ms_deform_attn(value, self.spatial_shapes, sampling_locations, attention_weights)


@pytest.mark.parametrize("opset", [18, 20])
def test_onnx_runtime_computes_what_eager_computes(make_case, opset, tmp_path):
    case = make_case(D=8).to(torch.float32, torch.float32)
    # Outside the maps, and what grid_sample alone would turn into NaN.
    case.sampling_locations[0, 0, 0, 0] = torch.tensor([[1.9, -0.7], [float("nan"), float("inf")]])
    module = Attend(case.spatial_shapes)
    program = decompose_ms_deform_attn(torch.export.export(module, case.tensors))
    path = str(tmp_path / "attend.onnx")
    torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), case.tensors, strict=True)}
    (output,) = session.run(None, inputs)
    torch.testing.assert_close(torch.from_numpy(output), module(*case.tensors), rtol=0, atol=1e-5)
