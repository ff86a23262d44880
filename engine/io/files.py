"""Careful access to the files of a folder that somebody else made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from engine.errors import EngineError

_HUB_REPO = re.compile(r"(?:models|datasets|spaces)--.+")


def member(folder: Path, name: str, error: type[EngineError]) -> Path:
    """The path of file `name` inside `folder`, refused where it would leave the folder.

    Absolute names, `..` and links that point elsewhere are refused. Links of a Hugging Face cache are accepted: from
    `snapshots/<revision>/` into the `blobs/` of the same repository or into the cache's shared `blobs/`.

    Args:
        folder: the folder that `name` must stay in.
        name: relative file name, `/` between parts, as an index file writes it.
        error: raised for a name that leaves the folder; a missing file is not an error here.
    """
    parts = name.split("/")
    if not name or "\0" in name or "\\" in name or ":" in name or any(part in ("", ".", "..") for part in parts):
        raise error(
            f"file name {name!r} leaves {folder} or is not plain; use names relative to the folder, without '..'"
        )
    path = folder.joinpath(*parts)
    try:
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as fault:
        raise error(f"{path} cannot be followed ({fault}); replace the link or the name") from fault
    if not any(target.is_relative_to(root) for root in [home, *_blob_folders(home)]):
        raise error(f"{path} is a link to {target}, outside {home}; copy the file into the folder instead")
    return path


def _blob_folders(home: Path) -> list[Path]:
    for snapshots in home.parents:
        repo = snapshots.parent
        if snapshots.name == "snapshots" and _HUB_REPO.fullmatch(repo.name):
            return [repo / "blobs", repo.parent / "blobs"]
    return []


def read_bytes(path: Path, *, limit: int, error: type[EngineError]) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; anything else raises `error`."""
    try:
        if not path.is_file():
            raise error(f"{path} is missing or not a regular file; give a complete checkpoint folder")
        with path.open("rb") as handle:
            data = handle.read(limit + 1)
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror or fault}") from fault
    if len(data) > limit:
        raise error(f"{path} is larger than {limit} bytes; it is not a file of this kind")
    return data


def parse_json(data: bytes, what: str, error: type[EngineError], *, unique: bool = False) -> Any:
    """Parse UTF-8 JSON from an untrusted file; `unique=True` also refuses objects that name a key twice."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"key {twice[:200]!r} appears twice")
        return made

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs if unique else None)
    except (ValueError, RecursionError) as fault:  # bad UTF-8, bad JSON, 4300-digit integers, nesting bombs
        raise error(f"{what} is not usable JSON ({_short(fault)}); the file is damaged, fetch it again") from fault


def read_json(path: Path, *, limit: int, error: type[EngineError], unique: bool = False) -> Any:
    """`parse_json` of a file of at most `limit` bytes."""
    return parse_json(read_bytes(path, limit=limit, error=error), str(path), error, unique=unique)


def _short(fault: BaseException) -> str:
    text = str(fault)
    return text if len(text) <= 300 else text[:300] + "..."
