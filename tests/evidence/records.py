"""The records: a JSON file per room and one table of compiled kernels, written atomically and unit by unit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import sources

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records"
RESOURCES = HERE / "resources.json"  # the rows of the layer `compiled`, of all rooms
Parts = dict[str, dict[str, Any]]


@dataclass
class Record:
    """A unit as it was made. result: figures by part, the same on every machine with the same tools.

    tracked: figures that are kept and not compared.
    """

    sources: str
    files: dict[str, str]
    tools: dict[str, str]
    result: Parts
    seconds: float
    date: str
    tracked: dict[str, Any]

    def failures(self) -> list[str]:
        return [f"{part}: {text}" for part, found in self.result.items() for text in found.get("failures", ())]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, "utf-8")
    draft.replace(path)


def _text(value: Any, indent: str = "") -> str:
    """JSON with short objects on one line each."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict) or not value:
        return line
    if len(line) <= 110 and not any(isinstance(v, dict) for v in value.values()):
        return line
    inside = indent + " "
    lines = (f"{inside}{json.dumps(k, ensure_ascii=False)}: {_text(v, inside)}" for k, v in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def table() -> dict[str, dict[str, int]]:
    """Registers, stack, shared memory, wide loads and matrix instructions by 'room/compiler/kernel/sm_..'."""
    return json.loads(RESOURCES.read_text("utf-8")) if RESOURCES.exists() else {}


def rows_of(room: str, arch: str) -> dict[str, dict[str, int]]:
    return {k: v for k, v in table().items() if k.startswith(f"{room}/") and k.endswith(f"/sm_{arch}")}


def load(room: str, layer: str) -> Record | None:
    """The record of a unit, or None."""
    path = RECORDS / f"{room}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text("utf-8")).get(layer)
    if found is None:
        return None
    record = Record(**found)
    if layer == "compiled":
        for arch, part in record.result.items():
            part["rows"] = rows_of(room, arch)
    return record


def save(room: str, layer: str, record: Record) -> None:
    """Writes one unit; the others of the room stay as they are."""
    result = record.result
    if layer == "compiled":
        kept = {k: v for k, v in table().items() if not k.startswith(f"{room}/")}
        for part in result.values():
            kept |= part["rows"]
        _write(RESOURCES, _text(dict(sorted(kept.items()))) + "\n")
        result = {arch: {k: v for k, v in part.items() if k != "rows"} for arch, part in result.items()}
    path = RECORDS / f"{room}.json"
    whole = json.loads(path.read_text("utf-8")) if path.exists() else {}
    whole[layer] = {**vars(record), "result": result}
    ordered = {name: whole[name] for name in sources.LAYERS if name in whole}
    _write(path, _text(ordered) + "\n")


def changed(record: Record, files: Mapping[str, str]) -> list[str]:
    """Files that are not those of the record."""
    return sorted(n for n in {*record.files, *files} if record.files.get(n) != files.get(n))


def state(room: str, layer: str) -> str:
    """'fresh', or why a unit has to be made again."""
    record = load(room, layer)
    if record is None:
        return "missing"
    files = sources.hashes(room, layer)
    if record.sources != sources.digest(files):
        names = changed(record, files)
        return f"stale: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") if names else "stale"
    if failures := record.failures():
        return f"FAILED: {len(failures)}"
    return "fresh"


def other_tools(room: str, layer: str, record: Record) -> str:
    """Which tools are not those of the record; '' if all are."""
    here = sources.tools(room, layer)
    return ", ".join(f"{n} {here.get(n)} instead of {v}" for n, v in record.tools.items() if here.get(n) != v)


def difference(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """One line per figure that is not the same: 'sm_80 gemm_kernel registers: 40 -> 44'."""
    out: list[str] = []
    for name in sorted({*old, *new}):
        a, b, here = old.get(name), new.get(name), f"{where} {name}".strip()
        if isinstance(a, dict) and isinstance(b, dict):
            out += difference(a, b, here)
        elif a != b:
            out.append(f"{here}: {'nothing' if a is None else a} -> {'nothing' if b is None else b}")
    return out
