"""An object of one instruction set hands no code to another.

An inline function that is compiled for AVX-512 and also for plain x86-64 ends up in the link once, and nobody says
which copy: an older machine then dies of an illegal instruction. So per-ISA objects define no weak or unique symbol.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from _layout import ROOT, files

from engine import _C

ISAS = ("scalar", "avx2", "avx512")
NM = shutil.which("nm")
pytestmark = pytest.mark.skipif(NM is None, reason="nm (binutils) is not installed")
LINE = re.compile(r"^[0-9a-f]*\s+([A-Za-z])\s+(.*)$")


def symbols(path: Path) -> list[tuple[str, str]]:
    out = subprocess.run([NM, "-C", str(path)], capture_output=True, text=True, check=True).stdout
    return [m.groups() for m in map(LINE.match, out.splitlines()) if m]


def objects() -> list[Path]:
    # Objects of sources that are gone stay in a build tree; only those of today's sources count.
    sources = {p.name for p in files("csrc/ops", ".cpp") if p.name.endswith("_cpu.cpp")}
    return [
        path
        for isa in ISAS
        for path in sorted((ROOT / "build").glob(f"*/CMakeFiles/engine_{isa}.dir/csrc/ops/*/*.o"))
        if path.name.removesuffix(".o") in sources
    ]


def test_objects_define_no_weak_symbols():
    paths = objects()
    if not paths:
        pytest.skip("no build tree under build/; the next test looks at the installed module")
    for path in paths:
        weak = [s for kind, s in symbols(path) if kind in "WVuw" and "DW.ref" not in s and not s.startswith("_ITM_")]
        assert not weak, f"{path.relative_to(ROOT)}: make these static or force-inline: {weak}"


def test_objects_export_only_their_namespace():
    for path in objects():
        isa = re.search(r"engine_(\w+)\.dir", str(path)).group(1)
        for kind, symbol in symbols(path):
            if kind in "TDBR" and "engine::" in symbol:
                ours = f"engine::cpu::{isa}::" in symbol
                # Functions that do not depend on the ISA, defined for the plain one only.
                assert ours or isa == "scalar", f"{path.relative_to(ROOT)} defines {symbol}"


def test_module_holds_no_shared_kernel_code():
    try:
        found = symbols(Path(_C.__file__))
    except subprocess.CalledProcessError:
        pytest.skip("the installed module is stripped")
    weak = [s for kind, s in found if kind in "WVuw" and "engine::cpu" in s]
    assert not weak, weak
