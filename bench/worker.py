"""An opponent in a process of its own, where its threads spin for themselves: a line of JSON asks, a line answers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

PEERS = Path(__file__).resolve().parent / "peers"


class Worker:
    """bench/peers/<script> run by `python`; ready when made."""

    def __init__(self, python: Path, script: str, *arguments: object) -> None:
        if not python.exists():
            raise SystemExit(f"no peer environment at {python}; make it with ./run peers")
        self.script = script
        command = [str(python), str(PEERS / script), *map(str, arguments)]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, text=True, env=env)
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"the process of {self.script} ended; run bench/peers/{self.script} by hand to see why")

    def tell(self, **command: Any) -> dict[str, Any]:
        """The whole answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def ask(self, **command: Any) -> float:
        """The seconds that it took."""
        return float(self.tell(**command)["seconds"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
