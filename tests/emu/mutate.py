"""Runs mutants of kernels over the cases of their op: `python -m tests.emu.mutate [--ops rng] [--kernel gemm]`.

A mutant is killed by a wrong result, an error, a crash or a timeout of the plain build; failing that, by a fault that
the watched build reports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.ops.registry import ops as registry

from . import build, worker
from .cases import kernels_of
from .mutants import MUTANTS, SURVIVORS, Mutant

TIMEOUT = 120.0  # seconds, for the cases of an op


def mutated(mutant: Mutant) -> dict[str, str]:
    """The changed text by its path in the checkout."""
    name = f"csrc/{mutant.file}"
    text = (build.ROOT / name).read_text("utf-8")
    if (n := text.count(mutant.old)) != 1:
        raise ValueError(f"mutant {mutant.id!r}: {mutant.old!r} occurs {n} times in {name}; it must occur once")
    return {name: text.replace(mutant.old, mutant.new)}


def op_of(mutant: Mutant) -> str:
    """The room that the file lies in; of a file that rooms share, that of the kernel."""
    home, room = Path(mutant.file).parts[:2]
    return room if home == "ops" else next(n for n, op in registry().items() if mutant.kernel in kernels_of(op))


def verdict(mutant: Mutant, ops: str = "") -> str:
    """What killed it; '' if nothing did."""
    replaced = mutated(mutant)
    path = build.CACHE / "mutants" / f"{abs(hash(mutant))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(replaced), "utf-8")
    built = []
    try:
        for kind, schedules in (("plain", "0,3,4"), ("watched", "4")):
            try:
                built.append(build.module(kind, replaced))
            except build.BuildError as e:
                raise ValueError(f"mutant {mutant.id!r} does not compile: {e}") from None
            try:
                done = worker.start(kind, "--ops", ops or op_of(mutant), "--schedules", schedules, "--replace",
                                    str(path), "--first-failure", timeout=TIMEOUT)  # fmt: skip
            except subprocess.TimeoutExpired:
                return f"{kind}: timeout"
            if done.returncode == 0:
                continue
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            if lines and lines[-1]["problems"]:
                return f"{kind}: {lines[-1]['problems'][0]}"
            if done.returncode < 0:
                return f"{kind}: signal {-done.returncode}"
            raise RuntimeError(f"the worker failed on mutant {mutant.id!r}: {done.stderr[-2000:]}")
        return ""
    finally:
        path.unlink()
        for module in built:  # objects are kept: they make the next run fast
            module.unlink()


def score(mutants: Iterable[Mutant]) -> tuple[str, list[str]]:
    """A table of killed mutants per kernel, and what is wrong: survivors without a reason, reasons without one."""
    mutants = list(mutants)
    with ThreadPoolExecutor(2) as pool:
        verdicts = dict(zip((m.id for m in mutants), pool.map(verdict, mutants), strict=True))
    table: dict[str, list[str]] = defaultdict(list)
    wrong = []
    for m in mutants:
        killer = verdicts[m.id]
        table[m.kernel].append(killer)
        if not killer and m.id not in SURVIVORS:
            wrong.append(f"{m.id} survives: add a case that sees it, or a reason to SURVIVORS")
        if killer and m.id in SURVIVORS:
            wrong.append(f"{m.id} is killed ({killer}); take it out of SURVIVORS")
    lines = [f"{'kernel':<24}{'mutants':>8}{'killed':>8}{'by watch':>10}"]
    for kernel, killers in table.items():
        watched = sum(k.startswith("watched") for k in killers)
        lines.append(f"{kernel:<24}{len(killers):>8}{sum(map(bool, killers)):>8}{watched:>10}")
    lines += [f"  {m.id:<44} {verdicts[m.id][:110] or 'SURVIVES'}" for m in mutants]
    return "\n".join(lines), wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ops", default="", help="rooms, comma-separated; default: all")
    parser.add_argument("--kernel", default="")
    args = parser.parse_args()
    rooms = args.ops.split(",") if args.ops else []
    chosen = [m for m in MUTANTS if (not rooms or op_of(m) in rooms) and (not args.kernel or m.kernel == args.kernel)]
    table, wrong = score(chosen)
    print(table)
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
