"""Runs registry cases on one build of the emulator in a process of its own; a JSON line per case.

python -m tests.emu.worker --build asan --ops rng,gemm [--schedules 0,3,4] [--kinds tiny,odd] [--first-failure]

The asan build needs the environment of build.environment("asan"); `start` gives it to a worker.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import build


def start(kind: str, *arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess:
    """Runs a worker to its end."""
    environment = {**os.environ, **build.environment(kind), "PYTHONPATH": os.pathsep.join([str(build.ROOT), *sys.path])}
    return subprocess.run([sys.executable, "-m", "tests.emu.worker", "--build", kind, *arguments], env=environment,
                          cwd=build.ROOT, capture_output=True, text=True, check=False, timeout=timeout)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", choices=build.BUILDS, default="plain")
    parser.add_argument("--ops", required=True)
    parser.add_argument("--schedules", default="0,3,4")
    parser.add_argument("--kinds", default="tiny,odd")
    parser.add_argument("--first-failure", action="store_true")
    parser.add_argument("--replace", default="", help="JSON file: texts of the checkout's files that are replaced")
    args = parser.parse_args(argv)

    from engine.ops.registry import ops

    from .cases import problems, reference, small
    from .driver import EmulatedCuda

    replaced = json.loads(Path(args.replace).read_text("utf-8")) if args.replace else None
    driver = EmulatedCuda(args.build, replaced)
    failed = False
    for name in args.ops.split(","):
        op = ops()[name]
        for index, case in small(op):
            if case.kind not in args.kinds.split(","):
                continue
            for schedule in map(int, args.schedules.split(",")):
                begin = time.perf_counter()
                found = problems(driver, op, index, schedule, reference(op, index))
                line = {"op": name, "case": case.id, "schedule": schedule, "problems": found,
                        "seconds": round(time.perf_counter() - begin, 4)}  # fmt: skip
                if args.build == "watched":
                    line["counts"] = driver.counts()
                print(json.dumps(line), flush=True)
                failed |= bool(found)
                if failed and args.first_failure:
                    return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
