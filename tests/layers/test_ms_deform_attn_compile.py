"""Registration of ms_deform_attn: opcheck, torch.compile, torch.export, ONNX, and life without the compiled library."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import deformable_detr.layers
from deformable_detr.layers import MSDeformAttn, _ops, ms_deform_attn

# Feature maps (H, W) of four image sizes. All sizes change at once: PyTorch makes dynamic only what it saw change.
SIZES = [[(8, 12), (4, 6)], [(9, 14), (5, 7)], [(11, 7), (6, 4)], [(16, 10), (8, 5)]]


class Attention(nn.Module):
    """The module as a model uses it: feature maps in, shapes taken from them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=2)

    def forward(self, query, reference_points, *features):
        shapes = [tuple(feature.shape[-2:]) for feature in features]
        value = torch.cat([feature.flatten(2).transpose(1, 2) for feature in features], 1)
        return self.attention(query, reference_points, value, shapes)


def inputs(shapes, last=2):
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(2, 32, h, w, generator=generator) for h, w in shapes]
    return torch.randn(2, 5, 32, generator=generator), torch.rand(2, 5, 2, last, generator=generator), *features


def op_arguments(case):
    return case.value, [size for shape in case.spatial_shapes for size in shape], *case.tensors[1:]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_passes_all_checks_of_opcheck(make_case, dtype, requires_grad):
    case = make_case(D=8).to(dtype, torch.float32)
    case = case.with_grad() if requires_grad else case
    torch.library.opcheck(torch.ops.deformable_detr.ms_deform_attn.default, op_arguments(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_op_passes_all_checks_of_opcheck(make_case, dtype):
    case = make_case(D=8).to(dtype, torch.float32)
    grad = torch.randn(2, 5, 24, device=case.value.device).to(dtype)
    torch.library.opcheck(torch.ops.deformable_detr.ms_deform_attn_backward.default, (grad, *op_arguments(case)))


@pytest.mark.parametrize("last", [2, 4])
@pytest.mark.parametrize("dynamic", [True, None])
def test_many_image_sizes_compile_to_at_most_two_graphs(dynamic, last):
    module = Attention()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=counter)
    torch._dynamo.reset()
    for shapes in SIZES:
        args = inputs(shapes, last)
        torch.testing.assert_close(compiled(*args), module(*args))
        compiled(*args).sum().backward()
    assert counter.frame_count <= 2


def export(last=2):
    if not hasattr(torch.export.Dim, "AUTO"):
        pytest.skip(f"torch {torch.__version__} cannot find out by itself which sizes are dynamic")
    # Sizes are multiples of 8, as feature maps of strides 8 and 16 of one image are not independent.
    dynamic = ({}, {}, ({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},) * 2)
    return torch.export.export(Attention().eval(), inputs(SIZES[0], last), dynamic_shapes=dynamic)


@pytest.mark.parametrize("last", [2, 4])
def test_exported_program_works_for_other_sizes(last):
    exported = export(last)
    names = {str(node.target) for node in exported.graph.nodes}
    assert "deformable_detr.ms_deform_attn.default" in names
    for shapes in SIZES:
        torch.testing.assert_close(exported.module()(*inputs(shapes, last)), Attention()(*inputs(shapes, last)))


def test_exported_op_decomposes_to_grid_sample():
    program = deformable_detr.layers.decompose_ms_deform_attn(export())
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("ms_deform_attn" in name for name in names) and any("grid_sampler" in name for name in names)
    for shapes in SIZES[:2]:
        torch.testing.assert_close(program.module()(*inputs(shapes)), Attention()(*inputs(shapes)))


def test_schemas_in_python_and_in_the_compiled_library_agree():
    source = Path(__file__).parents[2] / "csrc" / "ms_deform_attn.cpp"
    text = "".join(source.read_text().split()).replace('""', "")
    for schema in _ops.SCHEMAS:
        assert f'm.def("{"".join(schema.split())}")' in text


def run_without_library(code: str) -> subprocess.CompletedProcess:
    """Run code in a new interpreter in which the compiled library cannot be found."""
    preamble = f"""
        import importlib.machinery, logging, sys, types
        package = types.ModuleType("deformable_detr")
        package.__path__ = [{str(Path(_ops.__file__).parents[1])!r}]
        sys.modules["deformable_detr"] = package
        importlib.machinery.EXTENSION_SUFFIXES = [".missing"]
        logging.basicConfig(format="%(levelname)s %(message)s")
        import torch
        from deformable_detr.layers import ms_deform_attn, ms_deform_attn_pytorch
    """
    script = textwrap.dedent(preamble) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)


def test_without_the_library_the_twin_serves_and_says_so_once():
    done = run_without_library("""
        torch.manual_seed(0)
        shapes = [(3, 4), (2, 2)]
        tensors = torch.rand(2, 16, 3, 4), torch.rand(2, 5, 3, 2, 2, 2), torch.rand(2, 5, 3, 2, 2)
        value, locations, weights = (tensor.requires_grad_() for tensor in tensors)
        gradients = []
        for attend in (ms_deform_attn, ms_deform_attn_pytorch):
            output = attend(value, shapes, locations, weights)
            gradients.append((output, *torch.autograd.grad(output.square().sum(), (value, locations, weights))))
        torch.testing.assert_close(*gradients)
        ms_deform_attn(value, shapes, locations, weights)
        args = value.detach(), [3, 4, 2, 2], locations.detach(), weights.detach()
        torch.library.opcheck(torch.ops.deformable_detr.ms_deform_attn.default, args)
    """)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    reason = "ms_deform_attn uses its slower PyTorch implementation on cpu because deformable_detr._C is not built"
    assert reason in warnings[0]


def test_a_library_that_does_not_load_is_named_with_the_reason(monkeypatch, tmp_path):
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_ops, "find_library", lambda: broken)
    assert re.match("_C.so does not load: .*(file too short|invalid ELF header)", _ops._load())


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_warning_and_environment_report_name_the_symbol_that_a_library_misses(monkeypatch, tmp_path, caplog):
    from deformable_detr.collect_env import operator_rows

    (tmp_path / "a.cpp").write_text("extern int of_another_torch(); int a = of_another_torch();")
    command = ["c++", "-shared", "-fPIC", "-o", str(tmp_path / "_C.so"), str(tmp_path / "a.cpp")]
    subprocess.run(command, check=True, timeout=60)
    monkeypatch.setattr(_ops, "find_library", lambda: tmp_path / "_C.so")
    reason = _ops._load()
    assert re.match(r"_C\.so does not load: .*undefined symbol: .*of_another_torch", reason)
    monkeypatch.setattr(_ops, "unavailable_reason", reason)
    _ops._warn_once.cache_clear()
    with caplog.at_level("WARNING"):
        _ops._warn_once("cpu")
    assert reason in caplog.text and f"To build it for torch {torch.__version__}: {_ops.BUILD} (" in caplog.text
    monkeypatch.setattr(_ops, "has_kernel", lambda device_type: False)
    assert reason in dict(operator_rows())["CPU kernel"]


def test_failing_kernel_fails_instead_of_falling_back(make_case):
    case = make_case()
    with pytest.raises(RuntimeError, match="cover 48 positions but value has S=0"):
        ms_deform_attn(case.value[:, :0], *case.args[1:])


def test_environment_report_says_what_is_missing_and_how_to_get_it(monkeypatch):
    from deformable_detr import collect_env

    monkeypatch.setattr(_ops, "has_kernel", lambda device_type: False)
    monkeypatch.setattr(_ops, "unavailable_reason", "deformable_detr._C is not built")
    rows = dict(collect_env.operator_rows())
    expected = f"no: deformable_detr._C is not built; to build it for torch {torch.__version__}: pip install"
    assert rows["CPU kernel"].startswith(expected)
    monkeypatch.undo()
    expected = "yes" if _ops.has_kernel("cpu") else "no"
    assert dict(collect_env.operator_rows())["CPU kernel"].startswith(expected)


@pytest.mark.skipif(sys.platform != "linux", reason="built with OpenMP on Linux only")
def test_library_runs_in_threads():
    """Compiled without OpenMP, PyTorch's parallel_for is a plain loop that nothing else would notice."""
    library = _ops.find_library()
    if library is None:
        pytest.skip("the library is not built")
    assert b"GOMP_parallel" in library.read_bytes() or b"__kmpc_fork_call" in library.read_bytes()
