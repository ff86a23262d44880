"""./run evidence [room ...] [--layer LAYER ...] [--all] [--check] [--fresh]: see --help."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence

from tests.emu import build

from . import cubins, layers, records, sources


def _show(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r    {done}/{of}  ", end="" if done < of else "\r", file=sys.stderr, flush=True)


def forget() -> None:
    """Built objects, libraries and cubins: the next units are made from nothing."""
    triton_cache = build.ROOT / ".cache/triton"
    for folder in (build.CACHE, cubins.CACHE, triton_cache):
        shutil.rmtree(folder, ignore_errors=True)
    os.environ["TRITON_CACHE_DIR"] = str(triton_cache)


def remake(room: str, layer: str) -> str:
    """Makes and writes a unit; returns its new state."""
    old = records.load(room, layer)
    try:
        new = layers.make(room, layer, progress=_show)
    except Exception:  # of a compiler, a worker, a suite: the other units go on
        print(traceback.format_exc(), file=sys.stderr)
        return "ERROR"
    if old:
        for line in records.difference(old.result, new.result)[:40]:
            print(f"    {line}")
    layers.keep(room, layer, new)
    for line in new.failures():
        print(f"    FAILED {line}")
    return records.state(room, layer)


def summary(chosen: Sequence[tuple[str, str]], states: dict[tuple[str, str], str]) -> str:
    lines = [f"{'room':<11}{'layer':<13}{'seconds':>8}  {'date':<11}state"]
    total = 0.0
    for unit in chosen:
        record = records.load(*unit)
        total += record.seconds if record else 0
        seconds, date = (f"{record.seconds:.1f}", record.date) if record else ("-", "-")
        lines.append(f"{unit[0]:<11}{unit[1]:<13}{seconds:>8}  {date:<11}{states[unit]}")
    return "\n".join([*lines, f"{'':<24}{total:>8.1f}"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="./run evidence", description="What every kernel is shown to do without a GPU; makes what is stale."
    )
    parser.add_argument("rooms", nargs="*", help="default: all")
    parser.add_argument("--layer", nargs="+", choices=sources.LAYERS, default=list(sources.LAYERS))
    parser.add_argument("--all", action="store_true", help="make what is fresh too")
    parser.add_argument("--fresh", action="store_true", help="forget built objects and cubins first (.cache)")
    parser.add_argument("--check", action="store_true", help="report only; status 1 if anything is not fresh")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.rooms) - set(sources.rooms())):
        parser.error(f"no room {', '.join(unknown)}; there are: {', '.join(sources.rooms())}")
    chosen = [u for u in sources.units() if (not args.rooms or u[0] in args.rooms) and u[1] in args.layer]
    states = {u: records.state(*u) for u in chosen}
    if not args.check:
        if args.fresh:
            forget()
        todo = [u for u in chosen if args.all or states[u] != "fresh"]
        for n, unit in enumerate(todo, 1):
            print(f"[{n}/{len(todo)}] {unit[0]} {unit[1]}: {states[unit]}", flush=True)
            begin = time.monotonic()
            states[unit] = remake(*unit)
            print(f"    {states[unit]}, {time.monotonic() - begin:.1f} s", flush=True)
        if todo:
            from bench.readme import README, render

            README.write_text(render(README.read_text("utf-8"), figures=False), "utf-8")
    print(summary(chosen, states))
    return int(any(s != "fresh" for s in states.values()))


if __name__ == "__main__":
    sys.exit(main())
