"""Makes a unit of evidence by running the suites of tests/emu, tests/triton and the compilers for one room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stderr
from io import StringIO
from multiprocessing import get_context
from typing import Any

from . import cubins, records, sources
from .records import Parts, Record

ROOT = sources.ROOT
Progress = Callable[[int, int], None]
WORKERS = 2
ROW = ("registers", "stack", "shared", "wide", "matrix")
MOST_FAILURES = 20  # kept in a record


def _silent(done: int, of: int) -> None:
    pass


def _each(run: Callable[[str], Any], parts: Sequence[str], progress: Progress) -> dict[str, Any]:
    """run of every part, two at a time."""
    out: dict[str, Any] = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        for part, result in zip(parts, pool.map(run, parts)):
            out[part] = result
            progress(len(out), len(parts))
    return out


def _references(room: str) -> None:
    """Workers do without torch: they find the references on disk."""
    from engine.ops.registry import ops
    from tests.emu.cases import reference, small

    for i, _ in small(ops()[room]):
        reference(ops()[room], i)


# ------------------------------------------------------------------------------------------------------- emulated
def emulated_parts(room: str) -> list[str]:
    from tests.emu import build

    return list(build.BUILDS)


def make_emulated(room: str, parts: Sequence[str], progress: Progress) -> tuple[Parts, dict]:
    """Every tiny and odd case on the builds of the emulator; the watched build also counts bytes."""
    from engine.ops.registry import ops
    from tests.emu import build, worker
    from tests.emu.cases import SCHEDULES, small

    _references(room)
    least = {c.id: ops()[room].bytes(c) for _, c in small(ops()[room])}

    def run(kind: str) -> dict[str, Any]:
        build.module(kind)
        schedules = SCHEDULES if kind == "plain" else SCHEDULES[-1:]
        done = worker.start(kind, "--ops", room, "--schedules", ",".join(map(str, schedules)))
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        failures = [f"{x['case']} (schedule {x['schedule']}): {p}" for x in lines for p in x["problems"]]
        expected = len(least) * len(schedules)
        if len(lines) != expected:
            failures.append(f"{len(lines)} of {expected} runs: {done.stderr[-2000:]}")
        out: dict[str, Any] = {"cases": len({x["case"] for x in lines}), "schedules": len(schedules)}
        if kind == "watched":
            counts = {x["case"]: _counts(x["counts"], least[x["case"]]) for x in lines}
            failures += [f"{case}: nothing ran on the device" for case, c in counts.items() if not c["launches"]]
            out["bytes"] = counts
        return out | {"failures": failures[:MOST_FAILURES]}

    return _each(run, parts, progress), {}


def _counts(launches: Sequence[dict[str, Any]], least: int) -> dict[str, int]:
    """Global bytes of a case: what its contract needs, what was touched, what blocks moved in sectors of 32 bytes."""
    return {
        "launches": len(launches),
        "least": least,
        "distinct": sum(c["bytes_read"] + c["bytes_written"] for c in launches),
        "issued": 32 * sum(c["block_sectors"] for c in launches),
    }


# -------------------------------------------------------------------------------------------------------- mutants
def mutants_parts(room: str) -> list[str]:
    from tests.emu.mutants import MUTANTS
    from tests.emu.mutate import op_of

    return [m.id for m in MUTANTS if op_of(m) == room]


def make_mutants(room: str, parts: Sequence[str], progress: Progress) -> tuple[Parts, dict]:
    """Each mutant of the room: killed, or with the reason why no case can tell."""
    from tests.emu.mutants import MUTANTS, SURVIVORS
    from tests.emu.mutate import verdict

    _references(room)
    by_id = {m.id: m for m in MUTANTS}

    def run(name: str) -> tuple[dict[str, Any], str]:
        try:
            killer, failures = verdict(by_id[name]), []
        except (ValueError, RuntimeError) as e:  # does not compile, or its worker failed
            return {"kernel": by_id[name].kernel, "killed": False, "failures": [str(e)[:2000]]}, "error"
        out: dict[str, Any] = {"kernel": by_id[name].kernel, "killed": bool(killer)}
        if name in SURVIVORS:
            out["reason"] = SURVIVORS[name]
            if killer:
                failures = [f"killed ({killer}); take it out of SURVIVORS"]
        elif not killer:
            failures = ["survives: add a case that sees it, or a reason to SURVIVORS"]
        return out | {"failures": failures}, killer

    made = _each(run, parts, progress)
    return {k: v[0] for k, v in made.items()}, {"killers": {k: v[1][:160] for k, v in made.items()}}


# ---------------------------------------------------------------------------------------------------- interpreted
PHILOX = "test_triton_interpreted"


def interpreted_parts(room: str) -> list[str]:
    if room == "rng":
        return [PHILOX]
    from tests.triton.test_interpreted import JOBS

    return [name for name, job in JOBS.items() if job["op_name"] == room]


def make_interpreted(room: str, parts: Sequence[str], progress: Progress) -> tuple[Parts, dict]:
    """The jobs of the interpreter's suite, judged by its test."""
    if room == "rng":
        return {PHILOX: {"programs": ["rng.rng"], "failures": _philox()}}, {}
    from tests.triton import test_interpreted as suite

    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/triton/interpreted.py")]
    out: Parts = {}
    with subprocess.Popen(command, env=environment, cwd=ROOT, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as worker:  # fmt: skip
        assert worker.stdin and worker.stdout and worker.stderr
        for name in parts:
            try:
                worker.stdin.write(json.dumps(suite.JOBS[name]) + "\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                raise RuntimeError(f"the interpreter ended at {name}: {worker.stderr.read()[-4000:]}")
            answer = json.loads(line)
            failures = []
            try:
                suite.test_program({name: answer}, name)
            except AssertionError as e:
                failures = [(str(e).splitlines() or ["assertion"])[0][:2000]]
            out[name] = {"programs": sorted(answer.get("ran", ())), "failures": failures}
            progress(len(out), len(parts))
    return out, {}


def _philox() -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/ops/test_philox.py::{PHILOX}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [] if done.returncode == 0 and " passed" in done.stdout else [done.stdout[-2000:]]


# ------------------------------------------------------------------------------------------------------- compiled
def compiled_parts(room: str) -> list[str]:
    return list(cubins.ARCHS)


def make_compiled(room: str, parts: Sequence[str], progress: Progress) -> tuple[Parts, dict]:
    """Every kernel of both compilers for each architecture. Processes: Triton compiles under the interpreter's lock."""
    out, seconds = {}, {}
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        for arch, (part, spent) in zip(parts, pool.map(_compile, [room] * len(parts), parts)):
            out[arch] = part
            seconds[arch] = spent
            progress(len(out), len(parts))
    return out, {"compile_seconds": seconds}


def _compile(room: str, arch: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Rows of the resource table, and what the compilers took (0 where the result was in a cache)."""
    os.environ.pop("TRITON_INTERPRET", None)
    rows: dict[str, dict[str, int]] = {}
    seconds: dict[str, float] = {}
    if (ROOT / sources.cuda(room)).exists():
        made = cubins.compile_cuda(room, arch)
        seconds["nvcc"] = round(made.seconds, 2)
        for name, r in made.kernels.items():
            rows[f"{room}/cuda/{name}/sm_{arch}"] = {k: r.as_dict()[k] for k in ROW}
    if (ROOT / sources.triton(room)).exists():
        from engine.runtime.program import compile_program

        start = time.monotonic()
        for name, program in programs(room):
            with redirect_stderr(StringIO()):
                cubin = compile_program(program, int(arch.rstrip("a")))
            (r,) = cubins.resources_of_image(cubin.image).values()
            row = r.as_dict() | {"shared": r.shared + cubin.shared}
            rows[f"{room}/triton/{name}/sm_{arch}"] = {k: row[k] for k in ROW}
        seconds["triton"] = round(time.monotonic() - start, 2)
    by_compiler = {c: sum(f"/{c}/" in name for name in rows) for c in ("cuda", "triton")}
    return {**by_compiler, "failures": [], "rows": dict(sorted(rows.items()))}, seconds


def programs(room: str) -> list[tuple[str, Any]]:
    """(name, Program) of the Triton kernels in the room's file: one per cubin at the widths of a large model."""
    from engine.runtime.program import key
    from tests.triton.shipped import shipped_programs

    out: dict[str, Any] = {}
    seen = set()
    if room == "rng":
        return list(_generator())
    for s in shipped_programs():
        if s.program.kernel.partition(".")[0] != room or key(s.program, 0) in seen:
            continue
        seen.add(key(s.program, 0))
        name, n = f"{s.program.kernel}<{s.use}, {s.format}>", 2
        while name in out:
            name, n = f"{s.program.kernel}<{s.use}, {s.format}, {n}>", n + 1
        out[name] = s.program
    return list(out.items())


def _generator() -> Iterable[tuple[str, Any]]:
    """No op records the Triton generator as a node yet; other kernels may call it."""
    from engine.ops.rng import KINDS
    from engine.runtime.arena import Tensor
    from engine.runtime.program import Program

    for kind, code in KINDS.items():
        at = [Tensor(1 << 32, (1024,), dtype, None, "cuda") for dtype in ("i32" if code == 0 else "f32", "u64", "u64")]
        args = dict(zip(("out", "n", "seed_ptr", "offset_ptr", "stream"), (at[0], 1000, at[1], at[2], 3)))
        # Contraction would change the bits of the normals from one Triton version to the next.
        yield f"rng.rng<{kind}>", Program("rng.rng", (4, 1, 1), args, {"KIND": code, "BLOCK": 256}, fusion=False)


# ----------------------------------------------------------------------------------------------------------- units
PARTS: dict[str, Callable[[str], list[str]]] = {
    "emulated": emulated_parts, "mutants": mutants_parts, "interpreted": interpreted_parts, "compiled": compiled_parts,
}  # fmt: skip
MAKE: dict[str, Callable[[str, Sequence[str], Progress], tuple[Parts, dict]]] = {
    "emulated": make_emulated, "mutants": make_mutants, "interpreted": make_interpreted, "compiled": make_compiled,
}  # fmt: skip


def make(room: str, layer: str, parts: Sequence[str] | None = None, progress: Progress = _silent) -> Record:
    """A unit, or some of its parts, made now."""
    files, start = sources.hashes(room, layer), time.monotonic()
    chosen = PARTS[layer](room) if parts is None else parts
    result, tracked = MAKE[layer](room, chosen, progress)
    seconds = round(time.monotonic() - start, 1)
    return Record(sources.digest(files), files, sources.tools(room, layer), result, seconds,
                  time.strftime("%Y-%m-%d"), tracked)  # fmt: skip


def keep(room: str, layer: str, new: Record) -> None:
    """Writes a unit. Times of an earlier record of the same sources stay where caches made the new ones shorter."""
    old = records.load(room, layer)
    if old and old.sources == new.sources and old.tools == new.tools:
        new.seconds = max(old.seconds, new.seconds)
        new.tracked = _longest(old.tracked, new.tracked)
    records.save(room, layer, new)


def _longest(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return {k: _longest(old.get(k), v) for k, v in new.items()}
    return max(old, new) if isinstance(old, float) and isinstance(new, (int, float)) else new
