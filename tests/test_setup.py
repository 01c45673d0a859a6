"""What setup.py asks the C++ compiler before a build."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import setuptools

SETUP = Path(__file__).parents[1] / "setup.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("c++") is None, reason="needs c++ on Linux")


@pytest.fixture
def find_openmp_flags(tmp_path, monkeypatch):
    """The function of that name, beside a compiler that refuses the flags of the pattern that it is called with."""
    monkeypatch.setenv("DEFORMABLE_DETR_BUILD_OPS", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    functions = runpy.run_path(str(SETUP))

    def call(refused):
        compiler = tmp_path / "g++"
        compiler.write_text(f'#!/bin/sh\nfor flag; do case "$flag" in {refused}) exit 1; esac; done\nexec c++ "$@"\n')
        compiler.chmod(0o755)
        for variable in ("CC", "CXX"):  # without ninja PyTorch has the first one compile
            monkeypatch.setenv(variable, str(compiler))
        return functions["find_openmp_flags"]()

    return call


def test_a_compiler_too_old_for_the_standard_of_pytorch_leaves_the_operator_out(find_openmp_flags, capfd):
    assert find_openmp_flags("-std=*") is None
    assert "g++ 10 or newer) works here" in capfd.readouterr().err


def test_a_compiler_without_openmp_builds_the_operator_for_one_thread(find_openmp_flags, capfd):
    assert find_openmp_flags("-fopenmp") == []
    assert "the C++ compiler takes no -fopenmp" in capfd.readouterr().err
