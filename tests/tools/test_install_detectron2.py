"""Installing Detectron2, without a network: every archive and wheel here is a small one made on the spot."""

import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "install_detectron2.py"


def load_script():
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


installer = load_script()
InstallError, Patch = installer.InstallError, installer.Patch


def write_sdist(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path


def write_other_wheel(folder):
    """A wheel that pip accepts and that is not Detectron2."""
    wheel, info = folder / "other-1.0-py3-none-any.whl", "other-1.0.dist-info"
    files = {
        "other.py": b"",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: other\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    installer.write_wheel(wheel, files, record=f"{info}/RECORD")
    return wheel


@pytest.fixture
def sdist(tmp_path):
    """An archive laid out like Detectron2's, with exactly the texts that the patches look for."""
    files = {}
    for patch in installer.PATCHES:
        files[patch.file] = files.get(patch.file, "") + patch.old * patch.count
    files |= {
        "LICENSE": "the licence",
        "setup.py": "raise SystemExit",
        "detectron2/__init__.py": '__version__ = "0.6"\n',
        "detectron2/model_zoo/configs/Base.yaml": "VERSION: 2\n",
        "projects/PointRend/point_rend/config.py": "",
        "pb1_detectron2.egg-info/requires.txt": "tabulate\nblack==21.4b2\n\n[all]\nshapely\n",
    }
    return write_sdist(tmp_path / "pb1-detectron2-0.6.tar.gz", files)


@pytest.fixture
def wheel(sdist, tmp_path):
    return installer.repackage(sdist, tmp_path, sha256=hashlib.sha256(sdist.read_bytes()).hexdigest())


@pytest.fixture
def index_folder(tmp_path, monkeypatch):
    """Point pip at a folder instead of any package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def run_script(*arguments, python_path):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(python_path)})


def test_patches_replace_what_they_name_and_nothing_else():
    files = {"a.py": b"np.int) np.int64 np.int)", "b.py": b"np.int)"}
    installer.apply_patches(files, [Patch("a.py", "np.int)", "int)", 2)])
    assert files == {"a.py": b"int) np.int64 int)", "b.py": b"np.int)"}


@pytest.mark.parametrize(("text", "found"), [(b"nothing", 0), (b"old old", 2)])
def test_a_patch_that_does_not_fit_names_file_text_and_counts(text, found):
    with pytest.raises(InstallError, match=rf"a\.py has 'old' {found} times, expected 1"):
        installer.apply_patches({"a.py": text}, [Patch("a.py", "old", "new")])


def test_a_patch_for_a_missing_file_names_the_file():
    with pytest.raises(InstallError, match=r"b\.py.* is not in the archive"):
        installer.apply_patches({"a.py": b"old"}, [Patch("b.py", "old", "new")])


def test_an_archive_with_another_hash_is_not_even_opened(tmp_path):
    archive = tmp_path / "pb1-detectron2-0.6.tar.gz"
    archive.write_bytes(b"not a tar file")
    with pytest.raises(InstallError, match=f"expected {installer.SDIST_SHA256}"):
        installer.repackage(archive, tmp_path)
    assert list(tmp_path.glob("*.whl")) == []


def test_the_wheel_holds_package_configs_and_projects_under_their_installed_names(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"detectron2/model_zoo/configs/Base.yaml", "detectron2/projects/point_rend/config.py"} <= set(names)
    assert not any(name.startswith(("setup.py", "projects/", "pb1")) for name in names)


def test_the_wheel_is_patched_and_drops_the_pin_of_black(wheel):
    with zipfile.ZipFile(wheel) as archive:
        model_zoo = archive.read("detectron2/model_zoo/model_zoo.py").decode()
        metadata = archive.read("detectron2-0.6.dist-info/METADATA").decode()
    assert "pkg_resources" not in model_zoo
    assert [line for line in metadata.splitlines() if line.startswith("Requires-Dist")] == [
        "Requires-Dist: tabulate",
        "Requires-Dist: black",
    ]


def test_pip_installs_the_wheel(wheel, tmp_path, index_folder):
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "site/detectron2/__init__.py").read_text() == '__version__ = "0.6"\n'


def test_repackaging_twice_gives_the_same_bytes(sdist, wheel, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    second = installer.repackage(sdist, again, sha256=hashlib.sha256(sdist.read_bytes()).hexdigest())
    assert second.read_bytes() == wheel.read_bytes()


def test_another_archive_on_the_index_is_refused_before_its_code_runs(tmp_path, index_folder):
    trace = tmp_path / "setup_py_ran"
    setup_py = f"open({str(trace)!r}, 'w')"
    write_sdist(index_folder / "pb1-detectron2-0.6.tar.gz", {"setup.py": setup_py, "PKG-INFO": ""})
    with pytest.raises(InstallError, match=f"other than the one with sha256 {installer.SDIST_SHA256}"):
        installer.fetch_sdist(tmp_path)
    assert not trace.exists()


def test_fetching_never_runs_the_setup_py_of_the_archive(sdist, tmp_path, index_folder, monkeypatch):
    (index_folder / sdist.name).write_bytes(sdist.read_bytes())
    monkeypatch.setattr(installer, "SDIST_SHA256", hashlib.sha256(sdist.read_bytes()).hexdigest())
    folder = tmp_path / "fetched"
    folder.mkdir()
    assert installer.fetch_sdist(folder).read_bytes() == sdist.read_bytes()


def test_an_unreachable_index_is_one_clear_sentence(tmp_path, index_folder):
    with pytest.raises(InstallError, match="could not be fetched; is the package index reachable"):
        installer.fetch_sdist(tmp_path)


def test_an_environment_without_pip_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(InstallError, match="has no pip. Get it by .* -m ensurepip.* uv pip install pip"):
        installer.fetch_sdist(tmp_path)


def test_an_importable_detectron2_is_used_as_it_is(tmp_path):
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "9.9"\n')
    result = run_script("--source", "elsewhere", python_path=tmp_path)
    assert result.returncode == 0
    assert f"Using the installed Detectron2 9.9 in {package}; nothing was changed." in result.stdout
    assert "To have elsewhere in its place, first run" in result.stdout


def test_a_detectron2_that_does_not_import_is_reported_with_its_reason(tmp_path):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2/__init__.py").write_text('raise ImportError("libc10.so is missing")\n')
    result = run_script(python_path=tmp_path)
    assert result.returncode == 1
    assert result.stderr == ("error: Detectron2 was found but cannot be imported: ImportError: libc10.so is missing\n")


def test_a_source_folder_without_the_package_is_refused(tmp_path):
    with pytest.raises(InstallError, match=r"is not Detectron2: it has no detectron2/__init__\.py"):
        installer.build_wheel(str(tmp_path), tmp_path)


def test_a_source_that_is_another_project_is_refused(tmp_path, index_folder):
    other = write_other_wheel(index_folder)
    with pytest.raises(InstallError, match=r"is not Detectron2 but other-1\.0-py3-none-any\.whl"):
        installer.build_wheel(str(other), tmp_path)


def test_a_source_that_is_a_detectron2_wheel_is_accepted(wheel, tmp_path, index_folder):
    folder = tmp_path / "built"
    folder.mkdir()
    assert installer.build_wheel(str(wheel), folder) == folder / wheel.name
