#!/usr/bin/env python3
"""Install Detectron2 where it is missing.

    python tools/install_detectron2.py                   # keep what is importable, else install v0.6
    python tools/install_detectron2.py --source FOLDER   # your checkout, or any pip requirement

Detectron2 publishes no wheel under its own name. The default is therefore the source archive
``pb1-detectron2`` of the package index, whose Python and config files are those of Detectron2's v0.6 tag. The
archive is pinned by hash, and none of its code runs here: its pure-Python part is repackaged as a wheel named
``detectron2``, with the changes listed in ``PATCHES``, which let it run on today's PyTorch, numpy and Pillow.
Detectron2's compiled operators (rotated boxes, its own deformable convolution) are not part of it;
``--source`` builds them.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SDIST_NAME, SDIST_VERSION = "pb1-detectron2", "0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

# What this repository uses of it; importing them shows that the patched files fit the installed libraries.
VERIFIED_MODULES = ("model_zoo", "modeling", "data", "evaluation", "engine", "checkpoint", "export")


class InstallError(RuntimeError):
    """A reason, in one sentence for the user, why Detectron2 was not installed."""


class Patch(NamedTuple):
    """Replace ``old``, which must occur exactly ``count`` times in ``file``, by ``new``."""

    file: str
    old: str
    new: str
    count: int = 1


OPTIONAL_EXTENSION = """\
try:
    from detectron2 import _C
except ImportError:  # repackaged without the compiled operators
    _C = None
"""
IMPORT_FAST_COCO_EVAL = "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
OPTIONAL_FAST_COCO_EVAL = """\
try:
    from detectron2.evaluation.fast_eval_api import COCOeval_opt
except ImportError:  # needs the compiled operators; pycocotools computes the same numbers
    COCOeval_opt = COCOeval
"""
OPTIONAL_CAFFE2 = """\
try:
    from .api import *
except ImportError:  # Caffe2 is no longer part of PyTorch
    pass
"""
CONFIG_FILE_FROM_PKG_RESOURCES = """\
pkg_resources.resource_filename(
        "detectron2.model_zoo", os.path.join("configs", config_path)
    )
"""
PATCHES = (
    # Pillow 10 removed the old name of the bilinear filter.
    Patch("detectron2/data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR"),
    # numpy 1.24 removed its aliases of Python's own types.
    Patch("detectron2/data/build.py", "dtype=np.int\n", "dtype=int\n"),
    Patch("detectron2/data/build.py", "dtype=np.int)", "dtype=int)"),
    Patch("detectron2/data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)"),
    Patch("detectron2/evaluation/pascal_voc_evaluation.py", "astype(np.bool)", "astype(bool)", 2),
    Patch("detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", 2),
    Patch("detectron2/evaluation/sem_seg_evaluation.py", "np.float)", "float)", 5),
    Patch("detectron2/structures/masks.py", "np.bool)", "bool)", 3),
    Patch("detectron2/utils/video_visualizer.py", "dtype=np.bool)", "dtype=bool)"),
    Patch("detectron2/utils/visualizer.py", "astype(np.bool)", "astype(bool)", 3),
    # The compiled extension is not there.
    Patch("detectron2/layers/deform_conv.py", "from detectron2 import _C\n", OPTIONAL_EXTENSION),
    Patch("detectron2/layers/roi_align_rotated.py", "from detectron2 import _C\n", OPTIONAL_EXTENSION),
    Patch("detectron2/layers/rotated_boxes.py", "from detectron2 import _C\n", OPTIONAL_EXTENSION),
    Patch("detectron2/evaluation/coco_evaluation.py", IMPORT_FAST_COCO_EVAL, OPTIONAL_FAST_COCO_EVAL),
    # Without it, TracingAdapter could not be imported from detectron2.export either.
    Patch("detectron2/export/__init__.py", "from .api import *\n", OPTIONAL_CAFFE2),
    # setuptools 81 removed pkg_resources, which was used for this one path only.
    Patch("detectron2/model_zoo/model_zoo.py", "import pkg_resources\n", ""),
    Patch(
        "detectron2/model_zoo/model_zoo.py",
        CONFIG_FILE_FROM_PKG_RESOURCES,
        'os.path.join(os.path.dirname(__file__), "configs", config_path)\n',
    ),
)

# pip asks an archive's build backend for metadata even when it only downloads it. Detectron2's setup.py would
# answer by importing torch, and pip would then reject the answer (one of its extras is a direct URL). This
# backend, found first on the path, answers instead.
METADATA_BACKEND = f"""\
import pathlib, sys

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "pb1_detectron2-{SDIST_VERSION}.dist-info")
    info.mkdir()
    text = "Metadata-Version: 2.1\\nName: {SDIST_NAME}\\nVersion: {SDIST_VERSION}\\n"
    (info / "METADATA").write_text(text)
    return info.name

__legacy__ = sys.modules[__name__]
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="install this folder or pip requirement instead of v0.6")
    parser.add_argument("--constraint", type=Path, help="a pip constraints file for the dependencies")
    args = parser.parse_args(argv)
    try:
        install(source=args.source, constraint=args.constraint)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def install(*, source: str | None, constraint: Path | None) -> None:
    """Leave an importable Detectron2 in the running interpreter, or raise InstallError.

    Args:
        source: a folder or pip requirement to install; None means the patched v0.6.
        constraint: a pip constraints file for the dependencies.
    """
    if importlib.util.find_spec("detectron2") is not None:
        print(f"Using the installed {import_detectron2()}; nothing was changed.")
        if source is not None:
            print(f"To have {source} in its place, first run: {sys.executable} -m pip uninstall detectron2")
        return
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None:
        raise InstallError("Detectron2 needs PyTorch: install torch and torchvision first.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = repackage(fetch_sdist(folder), folder) if source is None else build_wheel(source, folder)
        constraints = [] if constraint is None else ["--constraint", str(constraint)]
        if run_pip("install", *constraints, str(wheel)).returncode:
            raise InstallError("pip could not install Detectron2 and its dependencies; its message is above.")
    try:
        print(f"Installed {import_detectron2(VERIFIED_MODULES)}.")
    except InstallError as error:
        run_pip("uninstall", "--yes", "detectron2")
        raise InstallError(f"{error} (it was uninstalled again)") from error


def import_detectron2(modules: Iterable[str] = ()) -> str:
    """Import Detectron2 and some of its modules in a fresh interpreter; returns its version and place."""
    names = ", ".join(["detectron2", *(f"detectron2.{module}" for module in modules)])
    code = f"import {names}; print('Detectron2', detectron2.__version__, 'in', detectron2.__path__[0])"
    # Run from here, because the user's folder, first on the path, may itself be a Detectron2 checkout.
    here = Path(__file__).parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    if result.returncode:
        raise InstallError(f"Detectron2 was found but cannot be imported: {last_line(result.stderr)}")
    return last_line(result.stdout)


def fetch_sdist(folder: Path) -> Path:
    """Download the pinned source archive with pip, whose index, proxy and cache settings are the user's."""
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(METADATA_BACKEND)
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{SDIST_NAME}=={SDIST_VERSION} --hash=sha256:{SDIST_SHA256}\n")
    print(f"Fetching {SDIST_NAME}=={SDIST_VERSION} ...", flush=True)
    result = run_pip(
        *("download", "--no-deps", "--require-hashes", "--no-build-isolation", "--use-pep517"),
        *("--dest", str(folder), "--requirement", str(requirement)),
        capture=True,
        env={"PYTHONPATH": str(backend.parent)},
    )
    pinned = f"{SDIST_NAME}=={SDIST_VERSION}"
    if "DO NOT MATCH THE HASHES" in result.stderr:
        raise InstallError(f"The package index offers a {pinned} other than the one with sha256 {SDIST_SHA256}.")
    if result.returncode:
        reason = last_line(result.stderr)
        raise InstallError(f"{pinned} could not be fetched; is the package index reachable? pip says: {reason}")
    (archive,) = folder.glob("*.tar.gz")
    return archive


def repackage(sdist: Path, folder: Path, *, sha256: str = SDIST_SHA256) -> Path:
    """Turn the pure-Python part of Detectron2's source archive into an installable wheel.

    Args:
        sdist: the ``.tar.gz`` archive.
        folder: where the wheel is written.
        sha256: what the archive's hash must be.

    Returns:
        The path of the wheel, whose bytes depend on the archive and on this file only.

    Raises:
        InstallError: the archive's hash is another one, or a patch does not fit.
    """
    actual = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if actual != sha256:
        raise InstallError(f"{sdist.name} has the sha256 {actual}, expected {sha256}; nothing was installed.")
    archive = read_archive(sdist)
    files = select_package(archive)
    apply_patches(files, PATCHES)
    info = f"detectron2-{SDIST_VERSION}.dist-info"
    requirements = read_requirements(archive["pb1_detectron2.egg-info/requires.txt"].decode())
    files[f"{info}/METADATA"] = metadata(requirements).encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: tools/install_detectron2.py\n"
    files[f"{info}/WHEEL"] += b"Root-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/licenses/LICENSE"] = archive["LICENSE"]
    wheel = folder / f"detectron2-{SDIST_VERSION}-py3-none-any.whl"
    write_wheel(wheel, files, record=f"{info}/RECORD")
    return wheel


def read_archive(sdist: Path) -> dict[str, bytes]:
    """Read the regular files of an archive, named without its top folder."""
    with tarfile.open(sdist) as tar:
        return {m.name.partition("/")[2]: tar.extractfile(m).read() for m in tar if m.isfile()}


def select_package(archive: dict[str, bytes]) -> dict[str, bytes]:
    """Choose the files that Detectron2's setup.py installs, under their installed names."""
    files = {}
    for name, content in archive.items():
        if name.startswith("detectron2/"):
            files[name] = content
        elif name.startswith("projects/"):
            # projects/PointRend/point_rend/config.py -> detectron2/projects/point_rend/config.py
            files["detectron2/projects/" + name.split("/", 2)[2]] = content
    return files


def apply_patches(files: dict[str, bytes], patches: Iterable[Patch]) -> None:
    """Apply the patches to ``files`` in place; a patch that does not fit exactly raises InstallError."""
    for patch in patches:
        if patch.file not in files:
            raise InstallError(f"{patch.file}, which has to be patched, is not in the archive.")
        text = files[patch.file].decode()
        found = text.count(patch.old)
        if found != patch.count:
            raise InstallError(f"{patch.file} has {patch.old!r} {found} times, expected {patch.count}.")
        files[patch.file] = text.replace(patch.old, patch.new).encode()


def read_requirements(requires_txt: str) -> list[str]:
    """Read the unconditional requirements of an egg-info file, without the old exact pin of black."""
    unconditional = requires_txt.partition("\n[")[0].split()
    return ["black" if line.startswith("black==") else line for line in unconditional]


def metadata(requirements: list[str]) -> str:
    """Write the core metadata of the repackaged wheel."""
    lines = [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {SDIST_VERSION}",
        f"Summary: Detectron2 v{SDIST_VERSION}, its pure-Python part, patched to run on current libraries",
        "Home-page: https://github.com/facebookresearch/detectron2",
        "License: Apache-2.0",
        "Requires-Python: >=3.10",
        *(f"Requires-Dist: {requirement}" for requirement in requirements),
    ]
    return "\n".join(lines) + "\n"


def write_wheel(wheel: Path, files: dict[str, bytes], *, record: str) -> None:
    """Write ``files`` and their RECORD as a wheel, byte for byte the same for the same files."""
    rows = []
    for name, content in sorted(files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(content)}\n")
    contents = {**files, record: "".join([*rows, f"{record},,\n"]).encode()}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in contents.items():
            entry = zipfile.ZipInfo(name)  # dated 1980, whenever it is written
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)


def build_wheel(source: str, folder: Path) -> Path:
    """Have pip fetch or build the user's own Detectron2 as a wheel, and check that it is one."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "detectron2" / "__init__.py").is_file():
            raise InstallError(f"--source {source} is not Detectron2: it has no detectron2/__init__.py.")
        source = str(path.resolve())
    arguments = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), source]
    if run_pip(*arguments).returncode:
        raise InstallError(f"pip could not fetch or build --source {source}; its message is above.")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        if "detectron2/__init__.py" not in archive.namelist():
            raise InstallError(f"--source {source} is not Detectron2 but {wheel.name}.")
    return wheel


def run_pip(*arguments: str, capture: bool = False, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run pip in the running interpreter's environment, with ``env`` added to the variables."""
    # Asked by another way, setuptools takes it that pip runs, and gives up its own distutils in this process.
    if importlib.machinery.PathFinder.find_spec("pip") is None:
        raise InstallError(
            f"{sys.executable} has no pip. Get it by {sys.executable} -m ensurepip, or, in an environment of uv's, by "
            "uv pip install pip."
        )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=capture, text=True, env={**os.environ, **(env or {})})


def last_line(text: str) -> str:
    """The last line of a program's output that is not blank."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "(no message)")


if __name__ == "__main__":
    sys.exit(main())
