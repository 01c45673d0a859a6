"""Who may import whom, and what importing the package may do."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import deformable_detr

PACKAGE = Path(deformable_detr.__file__).parent
STDLIB = sys.stdlib_module_names
LEAVES = {"benchmark", "detect", "explain", "export", "report", "study"}
# What each room may import and does import, from the ground up: a room stands on rooms that are listed before it.
MAY_IMPORT = {
    "files": set(),
    "wording": set(),
    "layers": set(),
    "cli": {"wording"},
    "checkpoint": {"wording"},
    "config": {"wording"},
    "data": {"config", "files", "wording"},
    "solver": set(),
    "modeling": {"data", "layers"},
    "training": {"checkpoint", "config", "data", "files", "wording"},
    "model_zoo": {"checkpoint", "config", "training"},
    "startup": {"cli", "config", "data", "files", "model_zoo", "training", "wording"},
    "engine": {"config", "data", "modeling", "solver", "startup", "training"},
    "loading": {"cli", "config", "data", "model_zoo", "modeling", "training", "wording"},
    "collect_env": {"cli", "layers", "wording"},
    "detect": {"checkpoint", "data", "files", "loading", "modeling", "wording"},
    "explain": {"data", "detect", "files", "layers", "loading", "modeling"},
    "report": {"config", "data", "detect", "files", "training", "wording"},
    "export": {"files", "layers", "loading", "modeling"},
    "benchmark": {"checkpoint", "cli", "files", "layers", "loading", "modeling", "solver", "wording"},
    "study": {
        "benchmark",
        "config",
        "data",
        "detect",
        "engine",
        "files",
        "layers",
        "loading",
        "modeling",
        "report",
        "training",
        "wording",
    },
    "front door": {"config", "layers", "model_zoo", "modeling"},
}
# A command line, __main__.py, sees its own room, what gives it a model, and the pictures that detect reads.
MAY_IMPORT["command lines"] = (LEAVES - {"benchmark"}) | {
    "checkpoint", "cli", "config", "data", "files", "loading", "model_zoo", "startup",
}  # fmt: skip


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


def files_of(room: str) -> list[Path]:
    return [path for path in files("**/*.py") if room_of(module_name(path)) == room]


def top_levels(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(path)} - STDLIB


def module_name(path: Path) -> str:
    """Name below deformable_detr: "layers.dropout", "solver"; "" of the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def own_modules(path: Path) -> set[str]:
    """What a file imports of this project, below deformable_detr; names of functions among them count as modules."""
    return {name.partition(".")[2] for name in imported_modules(path) if name.partition(".")[0] == "deformable_detr"}


def room_of(module: str) -> str:
    """The room of a module: its package or, at the top, itself. Command lines and the front door are rooms as well."""
    if not module:
        return "front door"
    return "command lines" if module.endswith("__main__") else module.partition(".")[0]


def own_rooms(path: Path) -> set[str]:
    """Rooms that a file imports from, its own left out."""
    return {room_of(name) for name in own_modules(path) if name} - {room_of(module_name(path))}


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
    assert own_rooms(path) == {"data", "engine"}
    assert own_modules(path) == {"data", "data.x", "", "engine", "layers", "layers.b"}
    assert top_levels(path) == {"torch", "deformable_detr"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_it_may(room):
    imports = {path.relative_to(PACKAGE).as_posix(): own_rooms(path) for path in files_of(room)}
    assert {name: rooms - MAY_IMPORT[room] for name, rooms in imports.items() if rooms - MAY_IMPORT[room]} == {}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_needs_all_that_it_may_import(room):
    assert set().union(*map(own_rooms, files_of(room))) == MAY_IMPORT[room]


def test_every_module_belongs_to_a_room_and_no_arrow_points_up():
    assert {room_of(module_name(path)) for path in files("**/*.py")} == set(MAY_IMPORT)
    rooms = list(MAY_IMPORT)
    for index, room in enumerate(rooms):
        assert MAY_IMPORT[room] <= set(rooms[:index])


def test_modules_do_not_import_in_a_circle():
    modules = {module_name(path): path for path in files("**/*.py")}
    graph = {name: (own_modules(path) & modules.keys()) - {name, ""} for name, path in modules.items() if name}
    # A package is loaded before its modules: what they name of it is a part of it, and no way round.
    TopologicalSorter({n: {m for m in found if not n.startswith(f"{m}.")} for n, found in graph.items()}).prepare()


@pytest.mark.parametrize("path", files("layers/**/*.py"), ids=lambda p: p.name)
def test_layers_need_torch_alone(path):
    assert top_levels(path) <= {"torch", "deformable_detr"}


@pytest.mark.parametrize("path", files("checkpoint/**/*.py"), ids=lambda p: p.name)
def test_weights_are_converted_without_detectron2(path):
    if path.name != "__main__.py":
        assert top_levels(path) <= {"torch", "numpy", "safetensors", "tabulate", "deformable_detr"}


def test_the_operator_works_where_there_is_only_torch():
    others = ["cv2", "detectron2", "fvcore", "iopath", "matplotlib", "omegaconf", "pycocotools", "scipy", "torchvision"]
    script = f"import sys; sys.modules.update(dict.fromkeys({others}))\nimport deformable_detr.layers as layers\n" + (
        "import torch; one = torch.ones\n"
        "print(layers.ms_deform_attn(one(1, 6, 1, 2), [(2, 3)], one(1, 4, 1, 1, 2, 2) / 2, one(1, 4, 1, 1, 2)).shape)"
    )
    assert run_python(script) == "torch.Size([1, 4, 2])\n"


WITH_TORCH_ALONE = """
import sys
sys.modules.update(dict.fromkeys(
    "cv2 detectron2 fvcore hydra iopath jinja2 matplotlib omegaconf pycocotools scipy tabulate torchvision".split()
))
from deformable_detr import collect_env
from deformable_detr.__main__ import main
collect_env.get_pretty_env_info = lambda: "torch's own report"  # It asks pip, which takes its time.
for arguments in (["env"], ["benchmark", "op", "--rounds", "1"], ["detect", "a.jpg", "--model", "a"]):
    sys.argv, sys.stderr = ["deformable-detr", *arguments], sys.stdout
    try:
        main()
    except SystemExit as ended:
        print("status", ended.code)
"""


def test_commands_work_with_torch_alone_or_say_which_package_they_need():
    lines = run_python(WITH_TORCH_ALONE).splitlines()
    assert lines[:2] == ["torch's own report", "Detectron2 is not installed: python tools/install_detectron2.py"]
    assert [line for line in lines if line.startswith("CPU kernel")]
    assert lines[-4:] == [
        "error: the package tabulate is missing: pip install tabulate",
        "status 2",
        "error: the package detectron2 is missing: python tools/install_detectron2.py",
        "status 2",
    ]


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


def test_importing_registers_one_model_and_the_backbones_that_detectron2_has_no_builder_for(importing):
    before, after, _ = importing
    assert set(after["models"]) - set(before["models"]) == {"DETR", "DeformableDETR"}
    assert set(after["backbones"]) - set(before["backbones"]) == {
        "build_multi_scale_backbone",
        "build_regnet_backbone",
        "build_swin_backbone",
        "build_vit_pyramid_backbone",
    }


def test_importing_changes_nothing_else(importing):
    before, after, _ = importing
    for key in ("models", "backbones"):
        before.pop(key), after.pop(key)
    assert after == before


def test_importing_loads_no_leaf(importing):
    assert not {name.split(".")[1] for name in importing[2]} & (LEAVES | {"engine"})


# What this project cannot do without, as neither Detectron2 0.6 nor its main branch has a public name for it.
PRIVATE = {
    # The half of Detectron2's mapper that follows reading, with what it does to masks and keypoints.
    "data.mapper": {"_transform_annotations"},
    # By these alone DefaultTrainer finds the loop that makes its steps, and the results that its train() returns.
    "engine": {"_trainer", "_last_eval_results"},
    # The way in which handlers of iopath's addresses are written.
    "model_zoo.download": {"_get_supported_prefixes", "_get_local_path", "_open"},
    # Where there is no create_local_process_group: in version 0.6.
    "startup.launch": {"_LOCAL_PROCESS_GROUP"},
}


def is_theirs(thing: object) -> bool:
    """Whether a class, function or module is Detectron2's or of a library that is released with it."""
    name = thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", None) or ""
    return name.partition(".")[0] in ("detectron2", "fvcore", "iopath")


def private_names(source: str) -> set[str]:
    """Names with one underscore that are defined as functions, or reached for as attributes."""
    nodes = list(ast.walk(ast.parse(textwrap.dedent(source))))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def names_shared_with_bases(module: object) -> set[str]:
    classes = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__]
    shared = set()
    for cls in classes:
        bases = [base for base in cls.__mro__ if is_theirs(base)]
        theirs = {name for base in bases for name in private_names(inspect.getsource(base))}
        shared |= private_names(inspect.getsource(cls)) & theirs
    return shared


def names_of_imported_things(module: object) -> set[str]:
    nodes = ast.walk(ast.parse(inspect.getsource(module)))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    found = {node.attr for node in attributes if is_theirs(getattr(module, node.value.id, None))}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_detectron2_is_used_by_its_public_names():
    found = {}
    for path in files("**/*.py"):
        if path.name != "__main__.py":
            module = importlib.import_module(f"deformable_detr.{module_name(path)}".rstrip("."))
            found[module_name(path)] = names_shared_with_bases(module) | names_of_imported_things(module)
    assert {name: names for name, names in found.items() if names} == PRIVATE
