"""Everything that needs a GPU, in one command: `./run bench gpu [op ...]` or `python -m bench.gpu`.

Each op against its reference on the device, twice for bit-repeatability; compute-sanitizer; nemotron-tiny as CUDA
graphs against the CPU; then speeds at real widths against torch and what else is installed. Writes
bench/results/<date>-<gpu>-gpu.json. A red gate withholds the speed. Without a GPU it says so and ends with status 0.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.mirror import Mirror, mirrored
from bench.report import RESULTS, machine
from engine import _C
from engine.ops import dispatch
from engine.ops.registry import Arrays, Case, Op, error, ops, surrounded, watch
from engine.runtime import cuda
from engine.runtime.plan import capture

STEPS = ("cases", "sanitizer", "model", "speed")
QUERY = ("name", "driver_version", "compute_cap", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm",
         "clocks.max.mem", "power.limit", "temperature.gpu")  # fmt: skip
# Which kernels a case runs on: rows up to this number take the CUDA C++ kernel, more the Triton programs.
PATHS = {"cuda": 1 << 30, "triton": 0}
TOOLS = ("memcheck", "racecheck", "synccheck")
BATCH = 32  # launches between two synchronisations
PROMPT = "What is 612 - 247? Think step by step, then answer with the number."
LIMITS = {"fp32": 5e-6, "bf16": 1e-3, "int8": 1e-2, "int4": 1e-2}  # of logits, between two devices


def shell(command: Sequence[str]) -> tuple[int, str]:
    """Status and output; 127 where there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 127, ""
    return done.returncode, done.stdout + done.stderr


@dataclass
class Host:
    """What the steps work with; a test gives another driver, shell and paths."""

    driver: Any = _C
    shell: Callable[[Sequence[str]], tuple[int, str]] = shell
    paths: Sequence[str] = tuple(PATHS)
    results: Path = RESULTS


def probe(host: Host) -> dict[str, str] | None:
    """Name, driver and clocks of the first GPU; None without one."""
    status, out = host.shell(["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"])
    lines = out.strip().splitlines()
    if status or not lines:
        return None
    return dict(zip(QUERY, (field.strip() for field in lines[0].split(","))))


# ---------------------------------------------------------------------------------------------------------- gates
@contextmanager
def _path(name: str) -> Iterator[None]:
    before, dispatch.PROGRAM_ROWS = dispatch.PROGRAM_ROWS, PATHS[name]
    try:
        yield
    finally:
        dispatch.PROGRAM_ROWS = before


def run_case(op: Op, case: Case, arrays: Arrays, host: Host) -> tuple[Arrays, list[str], str]:
    """Outputs of a case on the device, what was written outside, and the kind of kernel that ran."""
    with mirrored(Mirror(host.driver)) as mirror, watch() as broken:
        given = surrounded(arrays)
        got = {k: v.copy() for k, v in op.run(case, given).items()}
        wrong = [f"outside {n}" for n in broken()]
        wrong += [
            f"input {k}" for k, v in arrays.items() if not np.array_equal(given[k].view(np.uint8), v.view(np.uint8))
        ]
    return got, wrong, "triton" if mirror.launched["triton"] else "cuda" if mirror.launched["cuda"] else "nothing"


def check_case(op: Op, case: Case, path: str, host: Host, want: Arrays | None = None) -> dict[str, Any]:
    """Error against the reference, twice the same bits, nothing written outside: one row with its gate."""
    arrays = op.inputs(case, np.random.default_rng(7))
    row: dict[str, Any] = {"op": op.name, "case": case.id, "path": path, "tolerance": op.tolerance_of(case)}
    want = op.reference(case, arrays) if want is None else want
    try:
        with _path(path):
            first, written, ran = run_case(op, case, arrays, host)
            second, _, _ = run_case(op, case, arrays, host)
    except Exception as fault:  # of the driver, a kernel, the compiler: the case is red, the others go on
        return row | {"gate": "RED", "fault": f"{type(fault).__name__}: {str(fault)[:500]}"}
    row |= {
        "ran": ran,
        "error": max(error(first[k], want[k]) for k in want),
        "repeatable": all(np.array_equal(first[k], second[k], equal_nan=True) for k in first),
        "written": written,
    }
    green = row["error"] <= row["tolerance"] and row["repeatable"] and not written and ran != "nothing"
    return row | {"gate": "green" if green else "RED"}


def check_cases(names: Sequence[str], kinds: Sequence[str], host: Host) -> list[dict[str, Any]]:
    """Every case on every kind of kernel that the op has."""
    rows = []
    for name in names:
        op = ops()[name]
        for case in (c for c in op.cases if c.kind in kinds):
            arrays = op.inputs(case, np.random.default_rng(7))
            want = op.reference(case, arrays)
            for path in host.paths:
                row = check_case(op, case, path, host, want)
                if row.get("ran", path) != path:
                    continue  # the op has no program of this kind
                rows.append(row)
                if row["gate"] != "green":
                    print(f"RED {row}", flush=True)
        mine = [r for r in rows if r["op"] == name]
        print(f"{name:<10} {sum(r['gate'] == 'green' for r in mine)} of {len(mine)} cases green", flush=True)
    return rows


def check_sanitizer(names: Sequence[str], host: Host) -> dict[str, str]:
    """The tiny cases under each tool of compute-sanitizer: 'clean', what it found, or that it is not here."""
    tool = shutil.which("compute-sanitizer") or "compute-sanitizer"
    if host.shell([tool, "--version"])[0]:
        return dict.fromkeys(TOOLS, "not installed")
    inner = [sys.executable, "-m", "bench.gpu", *names, "--steps", "cases", "--kinds", "tiny", "--no-file"]
    out = {}
    for name in TOOLS:
        status, text = host.shell([tool, "--tool", name, "--error-exitcode", "66", *inner])
        out[name] = "clean" if status == 0 else text.strip()[-600:] or f"status {status}"
        print(f"compute-sanitizer {name}: {out[name]}", flush=True)
    return out


def check_model(kind: str, host: Host) -> dict[str, Any]:
    """nemotron-tiny as CUDA graphs beside the CPU: 16 tokens, drawn tokens, logits, audit."""
    import engine

    options: dict[str, Any] = {"quant": kind} if kind.startswith("int") else {"dtype": kind}

    def run(name: str) -> dict[str, Any]:
        with engine.load("nemotron-tiny", device=name, context=256, chunk=64, snapshots=1, **options) as m:
            prompt = m.tokenize(PROMPT)
            tokens = m.generate(prompt, max_new_tokens=16, ignore_eos=True).tokens
            again = m.generate(prompt, max_new_tokens=16, ignore_eos=True).tokens
            drawn = m.generate(prompt, max_new_tokens=16, ignore_eos=True, temperature=0.8, top_p=0.9, seed=5).tokens
            out = {"tokens": tokens, "again": again, "drawn": drawn, "logits": m.logits([*prompt, *tokens])}
            audit = m.plans["decode"].audit(m.arena, budget=m.node_budget, replays=8)
            return out | {"audit": audit.problems, "nodes": len(m.plans["decode"])}

    cpu = run("cpu")
    with cuda.use(host.driver):
        gpu = run("cuda")
    row = {
        "model": "nemotron-tiny",
        "format": kind,
        "error": error(gpu["logits"], cpu["logits"]),
        "tolerance": LIMITS[kind],
        "same_tokens": gpu["tokens"] == cpu["tokens"],
        "same_drawn": gpu["drawn"] == cpu["drawn"],
        "repeatable": gpu["tokens"] == gpu["again"],
        "audit": gpu["audit"],
        "nodes": gpu["nodes"],
    }
    green = row["error"] <= LIMITS[kind] and row["same_tokens"] and row["repeatable"] and not row["audit"]
    return row | {"gate": "green" if green else "RED"}


# --------------------------------------------------------------------------------------------------------- speeds
@contextmanager
def torch_on(name: str) -> Iterator[None]:
    """The opponents of the op entries, which are written for host arrays, with their tensors on the device."""
    import torch

    before = torch.from_numpy
    torch.from_numpy = lambda ndarray: before(np.ascontiguousarray(ndarray)).to(name)
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.from_numpy = before
        torch.set_default_device(None)


def opponents(op: Op, case: Case, arrays: Arrays) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """(launch, synchronise) of torch eager, torch.compile and the installed libraries."""
    import torch

    from bench.gpu_peers import peers
    from bench.ops import compiled

    calls: dict[str, Callable[[], Any]] = {}
    with torch_on("cuda"):
        if op.torch_eager is not None:
            calls["torch"] = op.torch_eager(case, arrays)
            if fn := compiled(calls["torch"]):
                calls["compile"] = fn
        calls |= peers(op, case, arrays)
    return {name: (_inside(call), torch.cuda.synchronize) for name, call in calls.items()}


def _inside(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        with torch_on("cuda"):  # some make tensors as they run
            call()

    return run


def bench_case(op: Op, case: Case, path: str, host: Host, others: Callable = opponents) -> dict[str, Any]:
    """A replayed graph of one op at real widths beside its opponents; times only behind a green gate."""
    from bench.timing import interleave, ratio

    row = check_case(op, case, path, host)
    if row["gate"] != "green" or op.prepare is None:
        return row
    arrays = op.inputs(case, np.random.default_rng(7))
    with _path(path), mirrored(Mirror(host.driver, resident=True)):
        call = op.prepare(case, arrays)
        call()
        plan = capture(call, op.name)
        tape = plan._tape
        contestants = {"ours": (tape.launch, tape.synchronize), **others(op, case, arrays)}
        times = interleave({name: _batch(*c) for name, c in contestants.items()}, limit=10.0)
        nodes = [{"node": info.label, "us": seconds * 1e6} for info, seconds in plan.profile()]
    ours = times["ours"].median / BATCH
    row |= {"us": ours * 1e6, "gb_s": op.bytes(case) / ours / 1e9, "gflop_s": op.flops(case) / ours / 1e9}
    row |= {f"{name}_us": t.median / BATCH * 1e6 for name, t in times.items() if name != "ours"}
    row |= {f"vs_{name}": ratio(t, times["ours"]) for name, t in times.items() if name != "ours"}
    # Back to back: what fits into the L2 cache is read from there, by every contestant.
    return row | {"nodes": nodes, "cache": "warm"}


def _batch(launch: Callable[[], Any], synchronize: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(BATCH):
            launch()
        synchronize()

    return run


def bench_ops(names: Sequence[str], host: Host, others: Callable = opponents) -> list[dict[str, Any]]:
    """Every op at its real widths."""
    rows = []
    for name in names:
        for case in (c for c in ops()[name].cases if c.kind == "real"):
            for path in host.paths:
                row = bench_case(ops()[name], case, path, host, others)
                if row.get("ran", path) != path:
                    continue
                rows.append(row)
                figure = f"{row['us']:9.1f} us {row['gb_s']:7.1f} GB/s" if "us" in row else "no speed"
                versus = "  ".join(f"{k[3:]} x{v:.2f}" for k, v in row.items() if k.startswith("vs_"))
                print(f"{name:<10} {path:<7} {case.id:<40} {row['gate']:<6} {figure}  {versus}", flush=True)
    return rows


# --------------------------------------------------------------------------------------------------------- report
def save(data: dict[str, Any], folder: Path) -> Path:
    """bench/results/<date>-<gpu>-gpu.json"""
    folder.mkdir(parents=True, exist_ok=True)
    words = "".join(ch if ch.isalnum() else " " for ch in data["device"]["name"].lower()).split()
    path = folder / f"{data['date'][:10]}-{'-'.join(words)}-gpu.json"
    path.write_text(json.dumps(data, indent=1, default=float) + "\n")
    return path


def red(data: dict[str, Any]) -> int:
    """Red gates of a result."""
    gates = [r["gate"] for part in ("rows", "models", "speeds") for r in data[part]]
    tools = [t for t in data["sanitizer"].values() if t not in ("clean", "not installed", "not asked for")]
    return gates.count("RED") + len(tools)


def main(argv: Sequence[str] | None = None, host: Host | None = None, others: Callable = opponents) -> int:
    parser = argparse.ArgumentParser(prog="./run bench gpu", description=__doc__)
    parser.add_argument("ops", nargs="*", help="default: all")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--kinds", nargs="+", choices=("tiny", "odd"), default=["tiny", "odd"])
    parser.add_argument("--no-file", action="store_true", help="print only")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.ops) - set(ops())):
        parser.error(f"no op {', '.join(unknown)}; there are: {', '.join(ops())}")
    host, names = host or Host(), args.ops or list(ops())
    card = probe(host)
    with cuda.use(host.driver):
        missing = cuda.missing()
    if card is None:
        print("bench gpu: no NVIDIA GPU here (nvidia-smi finds none); nothing was run")
        return 0
    if missing:
        fix = "`./run bench gpu` builds the package with ENGINE_CUDA=ON"
        print(f"bench gpu: {card['name']} is here, but CUDA kernels do not run: {missing}; {fix}", file=sys.stderr)
        return 1
    data: dict[str, Any] = {
        "suite": "gpu",
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": card,
        "machine": machine(),
        "rows": check_cases(names, args.kinds, host) if "cases" in args.steps else [],
        "sanitizer": dict.fromkeys(TOOLS, "not asked for"),
        "models": [],
        "speeds": [],
    }
    if "sanitizer" in args.steps:
        data["sanitizer"] = check_sanitizer(names, host)
    if "model" in args.steps:
        data["models"] = [check_model(kind, host) for kind in LIMITS]
        for m in data["models"]:
            print(
                f"{m['model']} {m['format']:<5} {m['gate']}  error {m['error']:.1e} of {m['tolerance']:.0e}", flush=True
            )
    if "speed" in args.steps:
        data["speeds"] = bench_ops(names, host, others)
        data["device_after"] = probe(host)  # clocks under load
    if not args.no_file:
        print("written:", save(data, host.results))
    if n := red(data):
        print(f"{n} red", file=sys.stderr)
    return int(n > 0)


if __name__ == "__main__":
    sys.exit(main())
