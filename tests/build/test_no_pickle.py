"""No pickle, no torch.load, no eval or exec, no remote code: foreign files are data."""

from __future__ import annotations

import ast
import re

import pytest
from _layout import ROOT, files, name

# For files of trainers that write nothing else: torch.load(..., weights_only=True), once.
CONVERTER = "examples/convert_pickle.py"
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
LOADERS = re.compile(r"^(torch|np|numpy|yaml|pandas|pd)\.(load|unsafe_load|full_load|read_pickle)$")

SOURCES = [p for f in ("engine", "python", "examples", "triton_kernels", "bench") for p in files(f, ".py")]


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def offences(text: str) -> list[tuple[int, str]]:
    out = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            out += [(node.lineno, f"import {a.name}") for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            out.append((node.lineno, f"from {node.module} import"))
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            if called.removeprefix("builtins.") in BUILTINS or LOADERS.match(called):
                out.append((node.lineno, f"{called}()"))
            for k in node.keywords:
                constant = isinstance(k.value, ast.Constant) and k.value.value is False
                if k.arg in ("trust_remote_code", "allow_pickle") and not constant:
                    out.append((node.lineno, f"{k.arg}="))
    return out


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_source(path):
    found = offences(path.read_text("utf-8"))
    if name(path) == CONVERTER:
        text = path.read_text("utf-8")
        assert [what for _, what in found] == ["torch.load()"] and "weights_only=True" in text
        return
    assert not found, "\n".join(f"{name(path)}:{line}: {what}" for line, what in found)


def test_csrc_runs_no_commands():
    for path in files("csrc", ".h", ".cpp", ".cu", ".cuh") + files("python", ".h", ".cpp"):
        found = re.findall(r"\b(system|popen|dlopen|execv\w*|PyRun_\w+)\s*\(", path.read_text("utf-8"))
        assert not found, f"{name(path)}: {found}"


def test_no_pickles_in_the_tree():
    bad = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin"}
    found = [name(p) for f in ("engine", "examples") for p in (ROOT / f).rglob("*") if p.suffix in bad]
    assert not found, found


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("import pickle", 1),
        ("from cloudpickle import loads", 1),
        ("torch.load('x')", 1),
        ("np.load('x', allow_pickle=True)", 2),
        ("eval('1')", 1),
        ("f(trust_remote_code=True)", 1),
        ("f(trust_remote_code=False)", 0),
        ("model.eval()", 0),
        ("torch.compile(f)", 0),
        ("re.compile('a')", 0),
        ("json.load(f)", 0),
    ],
)
def test_the_guard_itself(text, caught):
    assert len(offences(text)) == caught
