"""What an installed package holds, and what the build says when it cannot do what was asked."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from _layout import ROOT

import engine

pytestmark = pytest.mark.slow


def contents() -> list[str]:
    """Files of the wheel named by QUINTET_WHEEL, else of the installed package, if it was installed from a wheel."""
    if os.environ.get("QUINTET_WHEEL"):
        return zipfile.ZipFile(os.environ["QUINTET_WHEEL"]).namelist()
    try:
        files = importlib.metadata.files("quintet-engine") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed; `.ci/run` builds wheels and sets QUINTET_WHEEL")
    listed = [str(f) for f in files if not str(f).startswith("..") and "__pycache__" not in str(f)]
    if any("_editable_" in f for f in listed):
        pytest.skip("installed in editable mode; `.ci/run` builds wheels and sets QUINTET_WHEEL")
    return listed


def test_only_engine_at_the_top():
    top = {f.split("/")[0] for f in contents()}
    assert {t for t in top if not t.endswith(".dist-info")} == {"engine"}


def test_holds_what_the_package_needs():
    files = contents()
    for wanted in ("engine/py.typed", "engine/triton_kernels/rng.py", "engine/zoo/__init__.py", "engine/cli.py"):
        assert wanted in files, wanted
    assert any(f.startswith("engine/_C.") and f.endswith((".so", ".pyd")) for f in files)
    for model in sorted(p.name for p in (ROOT / "engine/zoo").iterdir() if (p / "config.json").is_file()):
        for file in sorted(p.name for p in (ROOT / "engine/zoo" / model).iterdir() if p.is_file()):
            assert f"engine/zoo/{model}/{file}" in files


def test_holds_nothing_else():
    stray = [f for f in contents() if f.endswith((".pyc", ".o", ".cpp", ".cu", ".h", ".pkl", ".pt"))]
    assert not stray, stray


def test_imports_without_torch_and_triton():
    code = "import sys; sys.modules['torch'] = sys.modules['triton'] = None; import engine.ops; engine.ops.load_all()"
    # Where the package lies, so that an installed one is not shadowed by the source tree.
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(engine.__file__).parents[1])


def configure(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if not cmake or not ninja:
        pytest.skip("cmake and ninja are not installed here")
    pybind11 = pytest.importorskip("pybind11")
    command = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ENGINE_", "CUDA"))}
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **environment}, check=False)


def test_cuda_on_without_a_compiler_is_a_clear_error(tmp_path):
    done = configure(tmp_path, "-DENGINE_CUDA=ON", CUDACXX=str(tmp_path / "nvcc"))
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "ENGINE_CUDA=ON, but no CUDA compiler was found" in message and "CUDACXX" in message, done.stderr


def test_cuda_auto_asks_for_a_driver_or_architectures(tmp_path):
    if Path("/dev/nvidia0").exists():
        pytest.skip("a driver is here: AUTO builds CUDA")
    done = configure(tmp_path, "-DENGINE_CUDA=AUTO")
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels: OFF (no driver on this host and ENGINE_CUDA_ARCHS is empty)" in done.stdout
    again = configure(tmp_path, "-DENGINE_CUDA=AUTO", "-DENGINE_CUDA_ARCHS=90a-real", CUDACXX=str(tmp_path / "nvcc"))
    assert "CUDA kernels: OFF (no nvcc found)" in again.stdout, again.stdout + again.stderr


def test_cuda_option_is_checked(tmp_path):
    done = configure(tmp_path, "-DENGINE_CUDA=maybe")
    assert done.returncode != 0 and "ENGINE_CUDA=maybe is not one of AUTO, ON, OFF" in " ".join(done.stderr.split())
