"""Dated result files: bench/results/<date>-<machine>.json. A figure is published only from one of these."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from pathlib import Path
from typing import Any

from engine.runtime import device

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    load = None
    with contextlib.suppress(OSError):
        load = float(Path("/proc/loadavg").read_text().split()[0])
    return {
        "cpu": cpu,
        "threads": device.threads(),
        "isa": device.isa_name(),
        "python": platform.python_version(),
        "load_at_start": load,
    }


class Report:
    """Collects rows; `save` writes them with the machine and the roofs of the run."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.data: dict[str, Any] = {
            "suite": suite,
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "machine": machine(),
            "rows": [],
        }

    def add(self, **row: Any) -> None:
        self.data["rows"].append(row)

    def save(self, folder: Path = RESULTS) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        name = "".join(ch if ch.isalnum() else "-" for ch in self.data["machine"]["cpu"].lower()).strip("-")
        path = folder / f"{time.strftime('%Y-%m-%d')}-{name}-{self.suite}.json"
        path.write_text(json.dumps(self.data, indent=1, default=float) + "\n")
        return path
