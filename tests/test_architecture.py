"""Who may import whom, and what importing the package may do."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import deformable_detr

PACKAGE = Path(deformable_detr.__file__).parent
STDLIB = sys.stdlib_module_names
LEAVES = {"benchmark", "detect", "explain", "export", "report"}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, also inside of functions."""
    package = ["deformable_detr", *path.relative_to(PACKAGE).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            # "from . import x" may name a module x: both count.
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def files(*patterns: str) -> list[Path]:
    found = sorted(path for pattern in patterns for path in PACKAGE.glob(pattern))
    assert found, f"no file matches {patterns}"
    return found


def top_levels(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(path)} - STDLIB


def own_rooms(path: Path) -> set[str]:
    """First parts below deformable_detr of what a file imports: "layers", "config", ..."""
    names = [name.split(".") for name in imported_modules(path)]
    return {parts[1] for parts in names if parts[0] == "deformable_detr" and len(parts) > 1}


def run_python(script: str, *options: str) -> str:
    """What a fresh process prints that finds this package."""
    command = [sys.executable, *options, "-c", script]
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_check_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "layers" / "a.py"
    path.parent.mkdir()
    lines = [
        "import torch.nn as nn",
        "from ..data import x",
        "from .. import engine",
        "def f():",
        "    from . import b",
    ]
    path.write_text("\n".join(lines))
    assert own_rooms(path) == {"data", "engine", "layers"}
    assert top_levels(path) == {"torch", "deformable_detr"}


@pytest.mark.parametrize("path", files("layers/**/*.py"), ids=lambda p: p.name)
def test_layers_need_torch_alone(path):
    assert top_levels(path) <= {"torch", "deformable_detr"}
    assert own_rooms(path) <= {"layers"}


def test_the_operator_works_where_there_is_only_torch():
    others = ["cv2", "detectron2", "fvcore", "iopath", "matplotlib", "omegaconf", "pycocotools", "scipy", "torchvision"]
    script = f"import sys; sys.modules.update(dict.fromkeys({others}))\nimport deformable_detr.layers as layers\n" + (
        "import torch; one = torch.ones\n"
        "print(layers.ms_deform_attn(one(1, 6, 1, 2), [(2, 3)], one(1, 4, 1, 1, 2, 2) / 2, one(1, 4, 1, 1, 2)).shape)"
    )
    assert run_python(script) == "torch.Size([1, 4, 2])\n"


@pytest.mark.parametrize("path", files("modeling/**/*.py"), ids=lambda p: p.name)
def test_modeling_builds_on_layers(path):
    assert own_rooms(path) <= {"dataset_dict", "layers", "modeling"}


@pytest.mark.parametrize("path", files("config.py", "data.py", "solver.py"), ids=lambda p: p.name)
def test_config_data_and_solver_know_no_model(path):
    assert own_rooms(path) <= {"coco_format", "dataset_dict"}


@pytest.mark.parametrize("path", files("coco_format.py", "dataset_dict.py", "launch.py"), ids=lambda p: p.name)
def test_reading_annotations_and_launching_need_nothing_of_this_project(path):
    assert own_rooms(path) == set()


@pytest.mark.parametrize("path", files("training/**/*.py"), ids=lambda p: p.name)
def test_training_builds_on_the_checkpointer_alone(path):
    assert own_rooms(path) <= {"training", "checkpoint"}


def test_engine_builds_on_config_data_solver_and_the_checkpointer():
    assert own_rooms(PACKAGE / "engine.py") <= {
        "checkpoint",
        "config",
        "data",
        "evaluation",
        "run_checks",
        "schedule",
        "solver",
        "training",
        "user_data",
    }


@pytest.mark.parametrize("path", files("checkpoint/**/*.py"), ids=lambda p: p.name)
def test_weights_are_converted_without_detectron2(path):
    allowed = {"torch", "numpy", "safetensors", "tabulate", "deformable_detr"}
    if path.name in ("checkpointer.py", "__main__.py"):
        allowed |= {"detectron2"}
    else:
        assert own_rooms(path) <= {"checkpoint"}
    assert top_levels(path) <= allowed


@pytest.mark.parametrize("room", sorted((LEAVES & {path.stem for path in PACKAGE.iterdir()}) | {"model_zoo"}))
def test_only_leaves_import_leaves_and_few_others_the_model_zoo(room):
    users = (path for path in files("**/*.py") if room in own_rooms(path))
    importers = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in users} - {room}
    assert importers <= LEAVES | ({"__init__", "loading"} if room == "model_zoo" else set())


IMPORT_AND_REPORT = """
import json, logging, os, sys, warnings
import numpy, scipy.optimize, torch, torchvision
import detectron2.data, detectron2.engine, detectron2.evaluation, detectron2.modeling
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

def state():
    return {
        "datasets": sorted(DatasetCatalog.list()),
        "metadata": sorted(MetadataCatalog.list()),
        "models": sorted(name for name, _ in META_ARCH_REGISTRY),
        "backbones": sorted(name for name, _ in BACKBONE_REGISTRY),
        "path": list(sys.path),
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
        "default_dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32],
        "cuda_used": torch.cuda.is_initialized(),
        "seed": torch.initial_seed(),
        "random": hash(torch.get_rng_state().numpy().tobytes()),
        "numpy_random": hash(numpy.random.get_state()[1].tobytes()),
        "filters": len(warnings.filters),
        "handlers": {name: len(logging.getLogger(name).handlers) for name in (None, "detectron2", "deformable_detr")},
    }

before = state()
import deformable_detr
print(json.dumps([before, state(), sorted(m for m in sys.modules if m.startswith("deformable_detr."))]))
"""


@pytest.fixture(scope="module")
def importing() -> tuple[dict, dict, list[str]]:
    """State of a fresh process before and after ``import deformable_detr``, and the modules that this loads."""
    before, after, modules = json.loads(run_python(IMPORT_AND_REPORT, "-W", "ignore").splitlines()[-1])
    return before, after, modules


def test_importing_registers_one_model_and_one_backbone(importing):
    before, after, _ = importing
    assert set(after["models"]) - set(before["models"]) == {"DeformableDETR"}
    assert set(after["backbones"]) - set(before["backbones"]) == {"build_multi_scale_backbone"}


def test_importing_changes_nothing_else(importing):
    before, after, _ = importing
    for key in ("models", "backbones"):
        before.pop(key), after.pop(key)
    assert after == before


def test_importing_loads_no_leaf(importing):
    assert not {name.split(".")[1] for name in importing[2]} & (LEAVES | {"engine"})
