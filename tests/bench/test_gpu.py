"""bench/gpu.py without a GPU: arguments, gates and report over the emulated device, whose memory the mirror copies."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.emu import build

if build.compiler() is None:
    pytest.skip("no C++ compiler here: the CUDA text does not run on the host", allow_module_level=True)

from bench import gpu, gpu_peers, readme
from bench import run as bench_run
from bench.mirror import Mirror, mirrored
from engine.ops.gather import gather
from engine.ops.registry import Case, ops
from engine.runtime.arena import Arena, Tensor, as_tensor
from engine.runtime.plan import capture
from tests.emu.driver import EmulatedCuda

CARD = "NVIDIA Test 90, 600.10, 9.0, 24000, 210, 405, 2520, 10501, 450.00, 35\n"


class Shell:
    """nvidia-smi and compute-sanitizer of a machine that is not here."""

    def __init__(self, sanitizer: int | None = 0) -> None:
        self.commands: list[list[str]] = []
        self.sanitizer = sanitizer

    def __call__(self, command):
        self.commands.append(list(command))
        if command[0] == "nvidia-smi":
            return 0, CARD
        if self.sanitizer is None:
            return 127, ""
        return (0, "2026.1") if "--version" in command else (self.sanitizer, "" if not self.sanitizer else "a race")


@pytest.fixture(scope="module")
def emulated():
    return EmulatedCuda()


@pytest.fixture
def host(emulated, tmp_path):
    return gpu.Host(emulated, Shell(), ("cuda",), tmp_path)


def test_without_a_gpu_one_line_and_status_0(tmp_path, capsys):
    nothing = gpu.Host(shell=lambda command: (127, ""), results=tmp_path)
    assert gpu.main([], nothing) == 0
    assert capsys.readouterr().out.splitlines() == [
        "bench gpu: no NVIDIA GPU here (nvidia-smi finds none); nothing was run"
    ]
    assert not list(tmp_path.iterdir())


def test_a_gpu_and_a_build_without_cuda(capsys):
    class Plain:
        cuda = False

    assert gpu.main([], gpu.Host(Plain(), Shell())) == 1
    assert "built without CUDA; `./run bench gpu` builds" in capsys.readouterr().err


def test_arguments(host, capsys):
    for words in (["nothing"], ["--steps", "nothing"]):
        with pytest.raises(SystemExit):
            gpu.main(words, host)
    assert "no op nothing; there are: attention" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        bench_run.main(["gpu", "--help"])
    assert ended.value.code == 0


def test_cases_are_checked_and_written(host, tmp_path, monkeypatch):
    assert gpu.main(["gather", "rng", "sample", "--steps", "cases", "sanitizer"], host) == 0
    (path,) = tmp_path.iterdir()
    data = json.loads(path.read_text())
    assert path.name == f"{data['date'][:10]}-nvidia-test-90-gpu.json"
    assert data["device"]["driver_version"] == "600.10" and data["device"]["clocks.max.sm"] == "2520"
    assert set(data["sanitizer"].values()) == {"clean"}
    assert all(r["gate"] == "green" and r["repeatable"] and r["ran"] == "cuda" for r in data["rows"])
    tested = [c for name in ("gather", "rng", "sample") for c in ops()[name].cases if c.kind != "real"]
    assert len(data["rows"]) == len(tested)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme._ran("gather") == f"NVIDIA Test 90, {data['date'][:10]}" and readme._ran("gemm") == "not run"


@pytest.mark.parametrize("name", ["attention", "gemm", "moe", "ssm"])
def test_a_tiny_case_of_the_other_ops(name, host):
    case = next(c for c in ops()[name].cases if c.kind == "tiny")
    row = gpu.check_case(ops()[name], case, "cuda", host)
    assert row["gate"] == "green", row


def small(name: str):
    """An op whose real width is small."""
    op = ops()[name]
    return replace(op, cases=[Case("real", op.cases[1].dims)])


def test_speeds_stand_behind_gates(host, monkeypatch):
    op = small("gather")
    torch_like = {"torch": (lambda: None, lambda: None)}
    row = gpu.bench_case(op, op.cases[0], "cuda", host, lambda *_: torch_like)
    assert row["gate"] == "green" and row["us"] > 0 and row["torch_us"] > 0 and row["vs_torch"] > 0
    assert [n["node"] for n in row["nodes"]] == ["gather"]
    for wrong in (
        replace(op, reference=lambda c, a: {"out": np.ones((c.t, c.d))}),
        replace(op, run=lambda c, a: {"out": np.random.default_rng().standard_normal((c.t, c.d))}),
    ):
        row = gpu.bench_case(wrong, op.cases[0], "cuda", host, lambda *_: torch_like)
        assert row["gate"] == "RED" and "us" not in row


def test_a_fault_is_a_red_row_and_the_others_go_on(host, tmp_path, monkeypatch, capsys):
    def fail(case, arrays):
        raise RuntimeError("an illegal memory access")

    bad = replace(small("gather"), name="bad", run=fail)
    bad.cases[0] = Case("tiny", bad.cases[0].dims)
    monkeypatch.setattr(gpu, "ops", lambda: {"bad": bad, "rng": ops()["rng"]})
    assert gpu.main(["--steps", "cases", "--kinds", "tiny"], host) == 1
    data = json.loads(next(tmp_path.iterdir()).read_text())
    assert data["rows"][0]["fault"] == "RuntimeError: an illegal memory access" and data["rows"][0]["gate"] == "RED"
    assert {r["gate"] for r in data["rows"][1:]} == {"green"}
    assert "1 red" in capsys.readouterr().err


def test_sanitizer(host):
    assert set(gpu.check_sanitizer(["rng"], replace(host, shell=Shell(None))).values()) == {"not installed"}
    shell = Shell(66)
    assert set(gpu.check_sanitizer(["rng"], replace(host, shell=shell)).values()) == {"a race"}
    command = shell.commands[-1]
    assert "synccheck" in command and command[-6:] == ["rng", "--steps", "cases", "--kinds", "tiny", "--no-file"]


def test_the_mirror_copies_and_stays():
    driver = EmulatedCuda()
    table, ids = np.arange(32, dtype=np.float32).reshape(4, 8), np.array([2, 0], np.int32)
    out = np.zeros((2, 8), np.float32)
    init = Tensor.__init__
    with mirrored(Mirror(driver)) as mirror:
        gather(as_tensor(table), as_tensor(ids), as_tensor(out))
    assert mirror.launched == {"cuda": 1, "triton": 0} and Tensor.__init__ is init
    np.testing.assert_array_equal(out, table[[2, 0]])
    with mirrored(Mirror(driver, resident=True)) as mirror:
        tensors = as_tensor(table), as_tensor(ids), as_tensor(out)
        plan = capture(lambda: gather(*tensors))
        ids[:] = 3, 3  # the plan's buffers are on the device: a change here is not seen there
        out[:] = 0
        plan.replay()
        assert not out.any()
        mirror.fetch()
    np.testing.assert_array_equal(out, table[[2, 0]])


def test_the_mirror_knows_its_buffers():
    driver = EmulatedCuda()
    with mirrored(Mirror(driver)) as mirror:
        whole = Arena().alloc("whole", (4, 8))
        part = whole.columns(2, 4)
        assert mirror._regions() == [(whole.address, whole.nbytes)] and part.ld == 8
        with pytest.raises(LookupError, match="belongs to no Tensor"), mirror._moved() as move:
            move(whole.address + whole.nbytes)
    with pytest.raises(ValueError, match="resident"):
        mirror.CudaTape(0)


def test_opponents_of_other_libraries(monkeypatch, capsys):
    assert set(gpu_peers.PEERS) <= set(ops())

    def missing(case):
        raise ModuleNotFoundError("no such library")

    def refuses(case):
        raise ValueError("head size 16 is not supported")

    called = []
    made = {"a": missing, "b": refuses, "c": lambda case: lambda: called.append(case)}
    monkeypatch.setattr(gpu_peers, "PEERS", {"attention": made})
    op = ops()["attention"]
    assert list(gpu_peers.peers(op, op.cases[0], {})) == ["c"] and called == [op.cases[0]]
    assert "b: ValueError: " in capsys.readouterr().err
    assert gpu_peers.peers(ops()["rng"], ops()["rng"].cases[0], {}) == {}


class Loaded:
    """What the model step asks of a loaded model."""

    def __init__(self, device: str, wrong: str) -> None:
        self.there, self.wrong = device != "cpu", wrong
        audit = type("Audit", (), {"problems": ["it allocates"] if wrong == "audit" and self.there else []})
        plan = type("Plan", (), {"audit": lambda self, *a, **k: audit, "__len__": lambda self: 21})
        self.plans, self.arena, self.node_budget = {"decode": plan()}, None, 21

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def tokenize(self, text):
        return [1, 2]

    def generate(self, prompt, **options):
        return type("Answer", (), {"tokens": [3, 4 + (self.there and self.wrong == "tokens")]})

    def logits(self, tokens):
        return np.full((4, 8), 1.1 if self.there and self.wrong == "logits" else 1.0)


@pytest.mark.parametrize("wrong", ["", "tokens", "logits", "audit"])
def test_the_model_step(host, monkeypatch, wrong):
    import engine

    monkeypatch.setattr(engine, "load", lambda name, device, **options: Loaded(device, wrong))
    row = gpu.check_model("int4", host)
    assert row["gate"] == ("RED" if wrong else "green") and row["nodes"] == 21
    assert gpu.red({"rows": [], "models": [row], "speeds": [], "sanitizer": {}}) == bool(wrong)


def test_host_arrays_of_opponents_go_to_the_device():
    import torch

    before = torch.from_numpy
    with gpu.torch_on("meta"):
        assert torch.from_numpy(np.zeros(3)).device.type == "meta" and torch.zeros(2).device.type == "meta"
    assert torch.from_numpy is before and torch.zeros(2).device.type == "cpu"
