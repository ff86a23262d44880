from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.append(str(ROOT))  # for bench/; behind an installed engine, which must win over the source tree

# Suites that run each case of each kernel for minutes. Their results are kept in tests/evidence/records.
RECORDED = {
    "tests/emu/test_ops.py": ("test_case", "test_faults"),
    "tests/emu/test_mutants.py": ("test_every_mutant_is_killed",),
    "tests/triton/test_interpreted.py": ("test_program", "test_every_kernel_ran"),
    "tests/triton/test_compiled.py": ("test_program",),
}


def pytest_configure(config):
    # Kernels and torch must not spin on the same cores while tests compare them.
    try:
        import torch

        torch.set_num_threads(1)
    except ImportError:
        pass


def _named(config) -> set[Path]:
    """Files that the command line names."""
    paths = (Path(config.invocation_params.dir, a.split("::")[0]) for a in config.args)
    return {p.resolve() for p in paths if p.is_file()}


@pytest.hookimpl(tryfirst=True)  # before -m deselects by marker
def pytest_collection_modifyitems(config, items):
    named, asked = _named(config), "evidence" in config.option.markexpr
    kept, left, smoked = [], [], set()
    for item in items:
        name = item.path.relative_to(ROOT).as_posix() if item.path.is_relative_to(ROOT) else ""
        recorded = getattr(item, "originalname", "") in RECORDED.get(name, ())
        if recorded:
            item.add_marker(pytest.mark.evidence)
        if not recorded or asked or item.path in named:
            kept.append(item)
        elif op := _smoke(item, smoked):
            smoked.add(op)
            kept.append(item)
        else:
            left.append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def _smoke(item, done: set[str]) -> str:
    """The op, if this is its first tiny case on the plain build of the emulator."""
    values = getattr(getattr(item, "callspec", None), "params", {})
    op = values.get("op")
    if item.originalname != "test_case" or op is None or op.name in done:
        return ""
    return op.name if op.cases[values["index"]].kind == "tiny" else ""
