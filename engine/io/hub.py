"""From what a user writes to a checkpoint folder: zoo name, local folder or hub id."""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Sequence
from pathlib import Path

from engine.errors import CheckpointError, InputError

_NAMED = ("tokenizer.model", "vocab.txt", "merges.txt", "bpe_simple_vocab_16e6.txt.gz")
#: What is ever fetched from a hub repository: weights without code, and text files that configure them.
FETCHED = ("*.safetensors", "*.json", "*.jinja", *_NAMED)
_SUFFIXES = (".safetensors", ".json", ".jinja", *_NAMED)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_MARKS = ("config.json", "transformer")  # of a checkpoint, or of one in parts
_ZOO_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*", re.ASCII)


def zoo_names() -> list[str]:
    """Names of the checkpoints that ship with the package, sorted."""
    root = _zoo()
    if root is None:
        return []
    return sorted(
        p.name for p in root.iterdir() if _ZOO_NAME.fullmatch(p.name) and any((p / f).exists() for f in _MARKS)
    )


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    allow_patterns: Sequence[str] = FETCHED,
) -> Path:
    """The folder of a checkpoint, fetched if it has to be.

    The first rule that fits decides:

    1. a `Path` object, or a string that starts with `/`, `.` or `~`: a local folder, never anything else;
    2. a zoo name (no slash): the checkpoint inside the package, also where a folder of that name exists;
    3. an existing local folder;
    4. `org/name`: a repository of the Hugging Face hub, through its cache. Without a network, what the cache holds.

    Args:
        name_or_path: see above.
        revision: branch, tag or commit of a hub repository; refused for the other kinds.
        local_files_only: never use the network.
        token: hub token; None takes the one that `hf auth login` stored.
        cache_dir: cache folder in place of the default.
        allow_patterns: file names to fetch; each must end like one of `FETCHED`.

    Raises:
        InputError: there is nothing of that name; lists the zoo.
        CheckpointError: the hub repository cannot be fetched, with the reason.
    """
    text = os.fspath(name_or_path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise InputError(f"{text!r} names no checkpoint; give a zoo name ({_listing()}), a folder or a hub id")
    explicit = not isinstance(name_or_path, str) or text[0] in "/.~" or os.path.isabs(text)
    zoo = _zoo()
    if not explicit and zoo is not None and text in zoo_names():
        return _local(zoo / text, revision)
    path = Path(text).expanduser() if text[0] == "~" else Path(text)
    if path.is_dir():
        return _local(path, revision)
    if path.is_file():
        raise InputError(f"{path} is a file; give the folder that holds config.json and the weights")
    if explicit or not _HUB_ID.fullmatch(text):
        raise InputError(
            f"there is no folder {text!r}, and it is neither a zoo name ({_listing()}) nor a hub id such as org/name"
        )
    for pattern in allow_patterns:
        if not pattern.endswith(_SUFFIXES):
            raise InputError(f"allow_patterns: {pattern!r} is not fetched; patterns end in {', '.join(_SUFFIXES)}")
    return _fetch(text, revision, local_files_only, token, cache_dir, list(allow_patterns))


def _local(path: Path, revision: str | None) -> Path:
    if revision is not None:
        raise InputError(f"revision={revision!r} applies to hub ids; {path} is a local folder, leave it out")
    return path


def _fetch(
    repo: str,
    revision: str | None,
    local_files_only: bool,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    patterns: list[str],
) -> Path:
    try:
        import huggingface_hub
    except ImportError as fault:
        raise CheckpointError(
            f"{repo!r} is a hub id and huggingface_hub is not installed; pip install huggingface_hub, or give a folder"
        ) from fault
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            allow_patterns=patterns,
        )
    except Exception as fault:  # many types, from three libraries, some of them private
        # Names, not classes: they move between releases of huggingface_hub.
        kinds = {kind.__name__ for kind in type(fault).__mro__}
        at = f"{repo!r}" + (f" at revision {revision!r}" if revision else "")
        if "GatedRepoError" in kinds:
            advice = "is gated: accept its licence on the hub and log in (hf auth login) or pass token="
        elif "RevisionNotFoundError" in kinds:
            advice = "has no such revision"
        elif "RepositoryNotFoundError" in kinds:
            advice = f"is not on the hub, or is private (then pass token=); zoo names: {_listing()}"
        elif kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError"}:
            advice = (
                "is not in the local cache, and the hub was not asked or not reached; go online once, "
                f"unset HF_HUB_OFFLINE / local_files_only, or use a local folder or zoo name ({_listing()})"
            )
        else:
            advice = "could not be fetched; check network, disk space and the name"
        raise CheckpointError(f"hub repository {at} {advice} [{type(fault).__name__}: {str(fault)[:200]}]") from fault
    return Path(folder)


def _zoo() -> Path | None:
    try:
        root = Path(str(importlib.resources.files("engine.zoo")))
    except (ModuleNotFoundError, TypeError):
        return None
    return root if root.is_dir() else None


def _listing() -> str:
    return ", ".join(zoo_names()) or "none in this installation"
