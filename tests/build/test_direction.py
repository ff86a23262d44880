"""Imports and includes point one way.

    csrc/base -> csrc/ops -> python -> engine/runtime -> engine/ops -> engine/blocks -> engine/models -> serve, cli
    triton_kernels -> engine/ops,  engine/io -> engine/blocks, engine/models

The runtime sits below the ops: an op's public function asks the runtime which plan records, on which device and on
which memory it works, and the runtime needs to know nothing of an op but its index in the C++ table. The other way
round every new op would touch the runtime.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from _layout import MODELS, ROOT, files, name

# What each part of the Python package may import from the package; `errors` and the C++ module are open to all.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "runtime": {"runtime"},
    "ops": {"runtime", "ops", "triton_kernels"},
    "io": {"io"},
    "blocks": {"runtime", "ops", "io", "blocks"},
    "models": {"runtime", "ops", "io", "blocks", "models", "zoo"},
    "zoo": set(),
    "serve": {"runtime", "ops", "io", "blocks", "models", "zoo", "serve", ""},
    "cli": {"runtime", "ops", "io", "blocks", "models", "zoo", "serve", ""},
    "": {"runtime", "io", "blocks", "models", "zoo"},  # engine/__init__.py: load() and the public types
    "__main__": {"cli"},
}
OUTSIDE = {"tests", "bench", "examples"}
# `engine bench` hands over to the checkout that it is called in; an installed package has none and says so.
BRIDGES = {("engine/cli.py", "bench.run")}
SOURCES = files("engine", ".py")


def part(path: Path) -> str:
    rest = path.relative_to(ROOT / "engine").with_suffix("").parts
    return "" if rest == ("__init__",) else rest[0]


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import, those inside functions and those made by name included."""
    package = path.relative_to(ROOT).parent.parts
    out = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            out += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(x for x in (base, node.module or "") if x)
            # `from engine import x` may mean the module engine.x.
            out += [(node.lineno, f"{module}.{a.name}" if module == "engine" else module) for a in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            out += [
                (node.lineno, value.value.rstrip("."))
                for value in ast.walk(node.args[0])
                if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value.startswith("engine")
            ]
    return out


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_point_one_way(path):
    me = part(path)
    assert me in ALLOWED, f"engine/{me} is new: give it a place in the direction (this test, ARCHITECTURE.md)"
    wrong = []
    for line, module in imported(path):
        top, *rest = module.split(".")
        if top in OUTSIDE and (name(path), module) not in BRIDGES:
            wrong.append(f"{name(path)}:{line} imports {module}, which only looks at the package")
        if top != "engine":
            continue
        target = rest[0] if rest else ""
        if target in ("_C", "errors"):
            continue
        if rest and not is_module(f"engine.{target}") and target != "triton_kernels":
            target = ""  # a public name of engine/__init__.py
        if target != me and target not in ALLOWED[me]:
            wrong.append(f"{name(path)}:{line} imports {module}; engine/{me} may use: {', '.join(sorted(ALLOWED[me]))}")
    assert not wrong, "\n".join(wrong)


def test_models_do_not_know_each_other():
    home = ROOT / "engine/models"
    wrong = [
        f"{name(path)}:{line} imports {module}"
        for path in files("engine/models", ".py")
        if path.parent != home
        for line, module in imported(path)
        if module.startswith("engine.models.") and module.split(".")[2] != path.relative_to(home).parts[0]
    ]
    assert not wrong, "\n".join(wrong)


def test_triton_kernels_import_triton_only():
    for path in files("triton_kernels", ".py"):
        for line, module in imported(path):
            assert module.split(".")[0] in ("triton", "triton_kernels", "__future__"), (
                f"{name(path)}:{line} imports {module}"
            )


INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)
CXX = (".h", ".cpp", ".cu", ".cuh")
FOREIGN = re.compile(r"(^|/)(Python\.h|pybind11/|torch/|ATen/|c10/|numpy/)")


@pytest.mark.parametrize("path", files("csrc", *CXX), ids=name)
def test_csrc_includes(path):
    layer = path.relative_to(ROOT / "csrc").parts[0]
    may = {"base": ("base/",), "ops": ("base/", "ops/"), "emu": ("emu/", "base/")}[layer]
    for kind, target in INCLUDE.findall(path.read_text("utf-8")):
        assert not FOREIGN.search(target), f"{name(path)} includes {target}: csrc knows no Python and no torch"
        if kind == '"':
            # One exception: the launch header is where a kernel meets the emulator.
            if (name(path), target) == ("csrc/base/launch.h", "emu/emu.h"):
                continue
            assert target.startswith(may), f"{name(path)} includes {target}; csrc/{layer} may include {may}"
            assert (ROOT / "csrc" / target).is_file(), f"{name(path)} includes {target}, which is not there"


def test_binding_includes():
    for path in files("python", *CXX):
        for kind, target in INCLUDE.findall(path.read_text("utf-8")):
            assert not re.match(r"(torch|ATen|c10)/", target), (
                f"{name(path)} includes {target}: one build serves every torch"
            )
            if kind == '"':
                assert target.startswith(("base/", "ops/")) or (path.parent / target).is_file(), (
                    f"{name(path)}: {target}"
                )


def test_kernels_launch_in_one_place_and_ptx_has_one_home():
    for path in files("csrc", *CXX):
        text = path.read_text("utf-8")
        # cuda_graph.cpp launches what was compiled elsewhere (Triton), of which there is no C++ function.
        if name(path) not in ("csrc/base/launch.h", "csrc/base/cuda_graph.cpp"):
            assert "<<<" not in text and "cudaLaunchKernel" not in text, f"{name(path)}: launch through base/launch.h"
        if name(path) != "csrc/base/ptx.cuh" and path.suffix in (".cu", ".cuh"):
            assert not re.search(r"\basm\b", text), f"{name(path)}: inline PTX belongs to base/ptx.cuh"


@pytest.mark.parametrize("folder", ["csrc", "engine/ops", "engine/runtime", "triton_kernels", "python"])
def test_no_kernel_or_op_names_a_model(folder):
    pattern = re.compile("|".join(MODELS), re.I)
    hits = [
        f"{name(path)}:{i}: {line.strip()}"
        for path in files(folder, ".py", ".md", *CXX)
        for i, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not hits, "say what mechanism it is instead:\n" + "\n".join(hits)
