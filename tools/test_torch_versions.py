"""Builds the operator with other PyTorch versions and runs the tests of layers/, all that needs no Detectron2.

    python tools/test_torch_versions.py 2.4.1 2.6.0 2.10.0

Each version downloads several GB into an environment that is then deleted, and needs a Python it has wheels for
(--python). Only the CPU is tested. With FORCE_CUDA=1 the CUDA kernels are built too, where the toolkit fits.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["numpy", "pytest", "setuptools<81", "tabulate"]


def make_stage(folder: Path) -> Path:
    """Copy what the operator needs."""
    package = Path("projects", "deformable_detr")
    (folder / package).mkdir(parents=True)
    for source in ("csrc", "setup.py", package / "__init__.py", package / "layers"):
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, folder / source)
    shutil.copytree(ROOT / "tests" / "layers", folder / "tests" / "layers")
    (folder / "pytest.ini").write_text(
        "[pytest]\naddopts = --import-mode=importlib\nmarkers = cuda: needs a CUDA device\n"
    )
    return folder


def try_version(version: str, python: str, log: Path) -> tuple[bool, str]:
    """Build and test with one version; returns whether it worked and the last line that was printed."""
    with tempfile.TemporaryDirectory() as temporary, log.open("w") as output:
        folder = make_stage(Path(temporary, "stage"))
        interpreter = Path(temporary, "venv", "bin", "python")
        environment = {**os.environ, "PYTHONPATH": str(folder / "projects")}
        steps = [
            [python, "-m", "venv", interpreter.parents[1]],
            [interpreter, "-m", "pip", "install", "--quiet", "--no-cache-dir", f"torch=={version}", *PACKAGES],
            [interpreter, "setup.py", "build_ext", "--inplace"],
            # The report of the environment needs Detectron2.
            [interpreter, "-m", "pytest", "-q", "-rs", "-k", "not cuda and not environment_report", "tests"],
        ]
        for step in steps:
            done = subprocess.run(step, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
            if done.returncode != 0:
                break
        lines = log.read_text().strip().splitlines()
        return done.returncode == 0, lines[-1] if lines else "no output"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", help="of torch, as on the package index")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the environments")
    parser.add_argument("--logs", type=Path, default=Path("output/torch_versions"))
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    failures = 0
    for version in args.versions:
        worked, line = try_version(version, args.python, args.logs / f"{version}.txt")
        print(f"torch {version}: {'works' if worked else 'FAILS'}: {line}", flush=True)
        failures += not worked
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
