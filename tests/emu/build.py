"""Builds the emulated kernels for the host: plain, asan, watched. Objects are kept under .cache/emu by content."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pybind11

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache/emu"
EMULATOR = ("csrc/emu/emu.cpp",)
# Line tables only: faults are reported with file and line.
COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-g1", "-DENGINE_EMU",
          "-DENGINE_WITH_CUDA", "-DENGINE_NO_CPU_KERNELS", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
          "-Wno-unused-function")  # fmt: skip
ASAN = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
BUILDS = ("plain", "asan", "watched")
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.M)


class BuildError(Exception):
    """The host compiler refused; the message is its output."""


@cache
def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@cache
def _has_fma() -> bool:
    # Without it every fmaf() is a call into libm.
    try:
        return " fma " in Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return False


def flags(build: str, source: str) -> list[str]:
    kernel = source.endswith(".cu")
    out = [*COMMON, "-O1" if kernel or build == "asan" else "-O2"]
    if _has_fma():
        out.append("-mfma")
    if build == "asan":
        out += ASAN
    if build == "watched":
        out.append("-DENGINE_EMU_WATCH")
        if kernel:
            out.append("-fsanitize=thread")
    return out


class Sources:
    """Files of the checkout, some of them replaced by other text."""

    def __init__(self, replaced: Mapping[str, str] | None = None) -> None:
        self.replaced = dict(replaced or {})

    def text(self, name: str) -> str:
        return self.replaced[name] if name in self.replaced else (ROOT / name).read_text("utf-8")

    def includes(self, name: str) -> list[str]:
        """Files of the checkout that a source includes, itself first."""
        out, todo = [name], [name]
        while todo:
            here = todo.pop()
            for target in INCLUDE.findall(self.text(here)):
                beside = os.path.normpath(os.path.join(os.path.dirname(here), target))
                found = next(
                    (p for p in (f"csrc/{target}", f"tests/emu/{target}", beside) if (ROOT / p).is_file()), None
                )
                if found and found not in out:
                    out.append(found)
                    todo.append(found)
        return out


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-6000:]}")


_locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


def compile_object(build: str, source: str, sources: Sources) -> Path:
    files = sources.includes(source)
    extra = flags(build, source)
    if source.startswith("tests/emu/") and source.endswith(".cpp"):
        extra += [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    key = hashlib.sha256()
    for part in (compiler() or "", *extra, *(f"{f}\0{sources.text(f)}" for f in files)):
        key.update(part.encode() + b"\0")
    target = CACHE / "objects" / f"{Path(source).stem}-{build}-{key.hexdigest()[:20]}.o"
    with _locks[target]:
        if not target.exists():
            _compile(target, [*extra, "-x", "c++", "-c"], source, [f for f in files if f in sources.replaced], sources)
    return target


def _compile(target: Path, options: list[str], source: str, changed: list[str], sources: Sources) -> None:
    where, path = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/emu'}"], ROOT / source
    if changed:  # found before the checkout; an edit may leave a variable unused
        options = [*options, "-w"]
        tree = CACHE / "changed" / target.stem
        for f in changed:
            (tree / f).parent.mkdir(parents=True, exist_ok=True)
            (tree / f).write_text(sources.text(f), "utf-8")
        where.insert(0, f"-I{tree / 'csrc'}")
        if source in sources.replaced:
            path = tree / source
    # In a file of its own first: another process may build the same object.
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(f".{os.getpid()}.o")
    ccache = [shutil.which("ccache") or ""] if shutil.which("ccache") else []
    _run([*ccache, compiler() or "c++", *where, *options, str(path), "-o", str(draft)])
    draft.replace(target)


def link(name: str, build: str, objects: Sequence[Path]) -> Path:
    script = ROOT / "csrc/emu/shared.ld"
    key = hashlib.sha256("\0".join([*map(str, objects), script.read_text("utf-8")]).encode()).hexdigest()[:20]
    target = CACHE / build / key / f"{name}.so"
    with _locks[target]:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = target.with_suffix(f".{os.getpid()}.so")
            sanitizers = ASAN if build == "asan" else ()
            _run([compiler() or "c++", "-shared", *sanitizers, *map(str, objects), f"-Wl,-T,{script}", "-pthread",
                  "-ldl", "-o", str(draft)])  # fmt: skip
            draft.replace(target)
    return target


def kernels() -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc/ops").glob("*/*.cu"))


def library(name: str, build: str, files: Sequence[str], replaced: Mapping[str, str] | None = None) -> Path:
    """A shared object of these sources and the emulator."""
    if build not in BUILDS:
        raise ValueError(f"build {build!r} is not one of {', '.join(BUILDS)}")
    sources = Sources(replaced)
    todo = [*files, *EMULATOR, *(("csrc/emu/watch.cpp",) if build == "watched" else ())]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda f: compile_object(build, f, sources), todo))
    return link(name, build, objects)


def module(build: str = "plain", replaced: Mapping[str, str] | None = None) -> Path:
    """The pybind11 module `_emu` with all kernels of the checkout."""
    return library("_emu", build, ["tests/emu/module.cpp", "csrc/ops/ops.cpp", *kernels()], replaced)


def probes(build: str = "plain") -> Path:
    """The module `_probes`: the little kernels that test the emulator."""
    files = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "tests/emu/kernels").glob("*.cu"))
    return library("_probes", build, ["tests/emu/probes.cpp", *files])


def load(path: Path) -> Any:
    """Imports a module from its file."""
    # Under a name of its own: pybind11 keeps modules by name, and several builds may be loaded.
    spec = importlib.util.spec_from_file_location(f"emulated_{path.parent.name}.{path.stem}", path)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def environment(build: str) -> dict[str, str]:
    """What a process must have in its environment to load that build."""
    if build != "asan":
        return {}

    def runtime(name: str) -> str:
        return subprocess.run([compiler() or "c++", f"-print-file-name={name}"], capture_output=True, text=True,
                              check=True).stdout.strip()  # fmt: skip

    return {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')} {runtime('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:exitcode=66",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
