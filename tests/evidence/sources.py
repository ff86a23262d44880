"""Which files a unit of evidence rests on, and the compilers that made it."""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from tests.emu import build
from tests.emu.mutants import MUTANTS, SURVIVORS
from tests.emu.mutate import op_of

from . import cubins

ROOT = build.ROOT
LAYERS = ("emulated", "mutants", "interpreted", "compiled")
EMULATOR = ("tests/emu/module.cpp", "csrc/emu/emu.cpp", "csrc/emu/watch.cpp")
EMULATOR_TESTS = tuple(f"tests/emu/{name}.py" for name in ("build", "cases", "driver", "worker"))
INTERPRETER = ("tests/triton/interpreted.py", "tests/triton/test_interpreted.py")


def rooms() -> list[str]:
    """Every op with a room."""
    return sorted(p.name for p in (ROOT / "csrc/ops").iterdir() if p.is_dir())


def cuda(room: str) -> str:
    return f"csrc/ops/{room}/{room}.cu"


def triton(room: str) -> str:
    return f"triton_kernels/{room}.py"


def units() -> list[tuple[str, str]]:
    """Every (room, layer) of which there is a kernel."""
    out = []
    for room in rooms():
        has_cuda, has_triton = (ROOT / cuda(room)).exists(), (ROOT / triton(room)).exists()
        there = {"emulated": has_cuda, "mutants": has_cuda, "interpreted": has_triton, "compiled": True}
        out += [(room, layer) for layer in LAYERS if there[layer] and (has_cuda or has_triton)]
    return out


def _cxx(names: Iterable[str]) -> set[str]:
    return {os.path.normpath(file) for name in names for file in build.Sources().includes(name)}


def _python(name: str) -> set[str]:
    """A module and those beside it that it imports."""
    out, todo = set(), [name]
    while todo:
        here = todo.pop()
        if here in out or not (ROOT / here).exists():
            continue
        out.add(here)
        folder = Path(here).parent
        package = folder.as_posix().replace("/", ".")
        for node in ast.walk(ast.parse((ROOT / here).read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").startswith(package)):
                tail = (node.module or "").removeprefix(package).strip(".")
                names = [tail] if tail else [a.name for a in node.names]
                todo += [f"{folder}/{n}.py" for n in names]
    return out


def _mutants(room: str) -> str:
    """The room's part of a file that all rooms share."""
    mine = [m for m in MUTANTS if op_of(m) == room]
    return repr([(*m, SURVIVORS.get(m.id)) for m in mine])


def names(room: str, layer: str) -> list[str]:
    """Files whose text decides the result of a unit."""
    entry = _python(f"engine/ops/{room}.py")
    if layer in ("emulated", "mutants"):
        out = _cxx([cuda(room), *EMULATOR]) | entry | set(EMULATOR_TESTS) | {"csrc/emu/shared.ld"}
        return sorted(out | ({"tests/emu/mutate.py"} if layer == "mutants" else set()))
    if layer == "interpreted":
        suite = {"tests/ops/test_philox.py"} if room == "rng" else set(INTERPRETER)
        return sorted(_python(triton(room)) | entry | suite | {"engine/runtime/program.py"})
    out = {"tests/evidence/cubins.py"}
    if (ROOT / cuda(room)).exists():
        out |= _cxx([cuda(room)])
    if (ROOT / triton(room)).exists():
        out |= _python(triton(room)) | entry | {"engine/runtime/program.py", "tests/triton/shipped.py"}
    return sorted(out)


@cache
def _file_hash(name: str, stamp: tuple[int, int]) -> str:
    return hashlib.sha256((ROOT / name).read_bytes()).hexdigest()[:16]


def hashes(room: str, layer: str) -> dict[str, str]:
    """Hash of each file of a unit."""
    out = {}
    for name in names(room, layer):
        stat = (ROOT / name).stat()
        out[name] = _file_hash(name, (stat.st_mtime_ns, stat.st_size))
    if layer == "mutants":
        out["tests/emu/mutants"] = hashlib.sha256(_mutants(room).encode()).hexdigest()[:16]
    return out


def digest(files: Mapping[str, str]) -> str:
    """One hash of all files of a unit."""
    return hashlib.sha256("\n".join(f"{k} {v}" for k, v in sorted(files.items())).encode()).hexdigest()


@cache
def _cxx_version() -> str:
    command = [build.compiler() or "g++", "-dumpfullversion"]
    version = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"{version} {platform.machine()}"


@cache
def _triton_version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def tools(room: str, layer: str) -> dict[str, str]:
    """Versions of the compilers that a unit is made with; 'missing' where there is none."""
    if layer in ("emulated", "mutants"):
        return {"g++": _cxx_version() if build.compiler() else "missing"}
    out = {}
    if layer == "compiled" and (ROOT / cuda(room)).exists():
        out["nvcc"] = re.sub(r"^V", "", cubins.nvcc_version()) if cubins.nvcc() else "missing"
    if layer == "interpreted" or (ROOT / triton(room)).exists():
        out["triton"] = _triton_version()
    return out
