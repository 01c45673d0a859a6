"""Writes and runs ONNX files. The packages for it are imported where they are used: few users have all of them."""

import importlib.util
import inspect
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..layers import ms_deform_attn
from .agreement import Runner

INPUTS, OUTPUTS = ("images", "image_sizes"), ("boxes", "scores", "labels")
# torch.onnx.export translates to opset 18 and converts from there; files of newer ones than these were never tried.
OLDEST_OPSET, DEFAULT_OPSET, NEWEST_OPSET = 18, 20, 20
# The node that stands for the op where it is not written out.
OP_DOMAIN, OP_NAME = "deformable_detr", "MSDeformAttn"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_requirements() -> None:
    """Say at once what would otherwise fail after minutes.

    Raises:
        ModuleNotFoundError: with the command that installs what is missing.
        ValueError: if this PyTorch is too old.
    """
    if "custom_translation_table" not in inspect.signature(torch.onnx.export).parameters:
        raise ValueError(f"ONNX needs PyTorch 2.6 or newer, for captured programs; this is {torch.__version__}")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def write_onnx(program: ExportedProgram, path: Path, *, opset: int, metadata: dict[str, str]) -> None:
    """Translate a captured program. An ms_deform_attn that it holds becomes a node ``OP_DOMAIN::OP_NAME``.

    That node has the inputs value (N, S, M, D), spatial_shapes (L, 2) int64, sampling_locations (N, Lq, M, L, P, 2)
    and attention_weights (N, Lq, M, L, P), and one output (N, Lq, M*D), as ``layers.ms_deform_attn`` documents them.

    Args:
        metadata: stored as the file's ``metadata_props``.
    """
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, IdentityEliminationPass

    with warnings.catch_warnings():
        # Deprecations inside of PyTorch and onnxscript.
        warnings.simplefilter("ignore")
        result = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            custom_translation_table=_translation(),
            optimize=False,
            verbose=False,
        )
        # First, because onnxscript's optimiser makes an invalid graph of two equal Min(Max(x)) of one x, or of one x
        # by two names.
        IdentityEliminationPass()(result.model)
        CommonSubexpressionEliminationPass()(result.model)
        result.optimize()
    _name_dimensions(result.model.graph)
    result.model.metadata_props.update(metadata)
    result.save(path)


def load_onnx(path: Path) -> Runner:
    """Run a file in onnxruntime, or in the reference runtime of the onnx package where it holds our node."""
    import onnx

    if any(node.domain == OP_DOMAIN for node in onnx.load(path, load_external_data=False).graph.node):
        run = _reference_session(path)
    else:
        import onnxruntime

        run = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run

    def runner(images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        inputs = {name: tensor.cpu().numpy() for name, tensor in zip(INPUTS, (images, image_sizes), strict=True)}
        return tuple(torch.from_numpy(array) for array in run(list(OUTPUTS), inputs))

    return runner


def _translation() -> dict:
    """Return what torch.onnx.export writes for the op."""
    from onnx.defs import OpSchema
    from onnxscript import FLOAT, INT64, opset18, values

    floats, sizes = "tensor(float)", "tensor(int64)"
    inputs = {"value": floats, "spatial_shapes": sizes, "sampling_locations": floats, "attention_weights": floats}
    schema = OpSchema(
        OP_NAME,
        OP_DOMAIN,
        since_version=1,
        inputs=[OpSchema.FormalParameter(*parameter) for parameter in inputs.items()],
        outputs=[OpSchema.FormalParameter("output", floats)],
    )
    node = values.Op(values.Opset(OP_DOMAIN, 1), OP_NAME, schema)

    def translate(value: FLOAT, spatial_shapes: INT64, sampling_locations: FLOAT, attention_weights: FLOAT) -> FLOAT:
        pairs = opset18.Reshape(spatial_shapes, opset18.Constant(value_ints=[-1, 2]))
        return node(value, pairs, sampling_locations, attention_weights)

    return {torch.ops.deformable_detr.ms_deform_attn.default: translate}


def _reference_session(path: Path):
    """Return the ``run`` of an evaluator, in NumPy, that knows our node and can gather from any number of queries."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    def _run(self, value, spatial_shapes, sampling_locations, attention_weights):
        tensors = (torch.from_numpy(np.ascontiguousarray(a)) for a in (value, sampling_locations, attention_weights))
        value, locations, weights = tensors
        return (ms_deform_attn(value, spatial_shapes.tolist(), locations, weights).numpy(),)

    class GatherElements(OpRun):
        """The runtime's own cannot gather from more than 64 elements."""

        op_domain = ""

        def _run(self, data, indices, axis=0):
            return (np.take_along_axis(data, indices, axis),)

    node = type(OP_NAME, (OpRun,), {"op_domain": OP_DOMAIN, "_run": _run})
    return ReferenceEvaluator(str(path), new_ops=[node, GatherElements]).run


def _name_dimensions(graph) -> None:
    """Name dynamic sizes by their meaning; PyTorch leaves expressions of symbols such as s34."""
    names = {"images": ("batch", None, "height", "width"), "image_sizes": ("batch", None)}
    names |= {"boxes": ("batch", "detections", None), **dict.fromkeys(("scores", "labels"), ("batch", "detections"))}
    for value in (*graph.inputs, *graph.outputs):
        sizes = zip(value.shape, names[value.name], strict=True)
        value.shape = type(value.shape)([size if isinstance(size, int) else name for size, name in sizes])
