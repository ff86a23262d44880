"""What the compilers make of every kernel for every shipped architecture, read from the cubins. No driver needed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from tests.emu.build import Sources

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache/cubins"
ARCHS = ("80", "86", "89", "90a", "100a", "120a")
FLAGS = ("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "--warn-on-spills", "-cubin")
MATRIX = r"\b(?:HMMA|IMMA|QMMA|QGMMA|HGMMA|IGMMA|UTCHMMA|UTCIMMA|UTCQMMA|OMMA)\b"
WIDE = r"\b(?:LDG\.E\.(?:\S*\.)?128|LDGSTS\.E\.(?:\S*\.)?128|UBLKCP|UTMALDG)"


@dataclass(frozen=True)
class Resources:
    """Of one kernel. stack: bytes of local memory per thread (spills lie there); shared: bytes known to the compiler;
    wide: 128-bit reads of global memory; matrix: tensor core instructions; instructions: all of them."""

    registers: int
    stack: int
    shared: int
    wide: int
    matrix: int
    instructions: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@cache
def tool(name: str) -> str:
    """cuobjdump and nvdisasm of the triton wheel."""
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


@cache
def nvcc() -> str | None:
    """CUDACXX, PATH, then the compiler of the package index beside this interpreter."""
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not found:
        import sysconfig

        path = Path(sysconfig.get_paths()["platlib"]) / "nvidia/cu13/bin/nvcc"
        found = str(path) if path.exists() else None
    return found


@cache
def nvcc_version() -> str:
    done = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True)
    return re.search(r"V[\d.]+", done.stdout).group(0)  # type: ignore[union-attr]


def _read(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _short(names: list[str]) -> list[str]:
    """'gemm_kernel<3, 1>' from mangled names."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    out = []
    for line in text.splitlines():
        found = re.search(r"(\w+(?:<[^()]*>)?)\((?!anonymous)", line)
        out.append(found.group(1) if found else line)
    return out


def resources(cubin: Path) -> dict[str, Resources]:
    """Per kernel of a cubin."""
    usage = _read([tool("cuobjdump"), "-res-usage", str(cubin)])
    found = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage)
    code: dict[str, str] = {}
    for part in re.split(r"//-+ \.text\.", _read([tool("nvdisasm"), "-c", str(cubin)]))[1:]:
        name, _, text = part.partition(" ")
        code[name.strip()] = text
    out = {}
    for name, short in zip((n for n, _ in found), _short([n for n, _ in found])):
        number = {k: int(v) for k, v in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", dict(found)[name])}
        sass = code[name]
        out[short] = Resources(
            number["REG"], number["STACK"] + number.get("LOCAL", 0), number.get("SHARED", 0),
            len(re.findall(WIDE, sass)), len(re.findall(MATRIX, sass)), len(re.findall(r"/\*[0-9a-f]{4,}\*/", sass)),
        )  # fmt: skip
    return out


def resources_of_image(image: bytes) -> dict[str, Resources]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.cubin"
        path.write_bytes(image)
        return resources(path)


@dataclass(frozen=True)
class Compiled:
    kernels: dict[str, Resources]
    seconds: float  # of the compiler; 0 if the cubin was there


def compile_cuda(room: str, arch: str) -> Compiled:
    """Every kernel of csrc/ops/<room>/<room>.cu. Raises BuildError-like CalledProcessError with nvcc's words."""
    source = f"csrc/ops/{room}/{room}.cu"
    sources = Sources()
    key = hashlib.sha256()
    for part in (nvcc_version(), arch, *FLAGS, *(f"{f}\0{sources.text(f)}" for f in sources.includes(source))):
        key.update(part.encode() + b"\0")
    cubin, seconds = CACHE / f"{room}-{arch}-{key.hexdigest()[:20]}.cubin", 0.0
    if not cubin.exists():
        cubin.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        command = [nvcc() or "nvcc", *FLAGS, f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", "-o", f"{cubin}.{os.getpid()}",
                   str(ROOT / source)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        seconds = time.monotonic() - start
        Path(f"{cubin}.{os.getpid()}").replace(cubin)
    return Compiled(resources(cubin), seconds)


def cuda_rooms() -> Iterator[str]:
    for path in sorted((ROOT / "csrc/ops").glob("*/*.cu")):
        yield path.stem
