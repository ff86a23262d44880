"""Subjects: adapters with the views that they are shown beside, and which of the published ways of use they are for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.blocks.lru import digest
from engine.errors import CheckpointError, InputError
from engine.io.checkpoint import Source
from engine.io.files import read_json
from engine.models.dreambooth3d.config import DitConfig
from engine.models.dreambooth3d.files import ADAPTER, FOLDERS, open_adapter
from engine.models.dreambooth3d.views import SHRINK, View, read_views

#: joint: both adapters and views. views: the views' adapter alone, with one view. subject: the subject's alone.
MODES = ("joint", "views", "subject")
ATTENTION_SCALE = 2.0  # of an adapter of attention alone, on video tokens: its released files are run so


@dataclass(frozen=True)
class Subject:
    """What `generate` shows. mode: one of MODES. one_way: trained with references that see only one another."""

    mode: str
    name: str
    adapter: Source | None
    views_adapter: Source | None
    views: tuple[View, ...]
    scale: float = 1.0
    one_way: bool = False

    def __repr__(self) -> str:
        return f"<Subject {self.name!r}, {self.mode}, {len(self.views)} views>"

    @property
    def views_digest(self) -> str:
        return digest(*(np.ascontiguousarray(v.pixels) for v in self.views))


def adapter_files(given: str | os.PathLike[str]) -> tuple[dict[str, Path], Path | None]:
    """Files of a folder that `personalize` left, of a released subject, or one file; and its training_config.json.

    Raises: CheckpointError where there is no adapter.
    """
    path = Path(given)
    if path.is_file():
        return {"subject": path}, None
    for home in (path, path / "lora"):
        found = {part: home / name / ADAPTER for part, name in FOLDERS.items() if (home / name / ADAPTER).exists()}
        if found:
            config = next((p for p in (path, path.parent) if (p / "training_config.json").exists()), None)
            return found, None if config is None else config / "training_config.json"
    if (path / ADAPTER).exists():
        return {"subject": path / ADAPTER}, None
    names = " or ".join(f"{name}/{ADAPTER}" for name in FOLDERS.values())
    raise CheckpointError(f"{path} holds no adapter ({names}, or {ADAPTER} itself)")


def read_subject(
    c: DitConfig, given: str | os.PathLike[str] | None, references: Sequence[Any], views_file: Path | None,
    shrink: float = SHRINK,
) -> Subject:  # fmt: skip
    """A subject of adapters and views. views_file: of the base, for a subject that brings no adapter of views.

    Raises: InputError (views, adapters and views that do not go together), CheckpointError (files).
    """
    views = tuple(read_views(references, shrink=shrink)) if len(references) else ()
    files, config = ({}, None) if given is None else adapter_files(given)
    opened = {part: open_adapter(path, c) for part, path in files.items()}
    kind, adapter = opened.get("subject", ("", None))
    if kind == "views":  # one file that is the views' own
        opened["views"], kind, adapter = (kind, adapter), "", None  # type: ignore[assignment]
    if "views" in opened and opened["views"][0] != "views":
        raise CheckpointError(f"{files.get('views')} is an adapter of kind {opened['views'][0]!r}, not of views")
    name = Path(given).name if given is not None else "a view"
    if not views:
        if adapter is None:
            raise InputError("a subject needs adapters, references or both; without either, generate without a subject")
        return Subject("subject", name, adapter, None, (), ATTENTION_SCALE if kind == "attention" else 1.0)
    if kind == "attention":
        raise InputError(f"{given} adapts attention alone and was trained without views; leave out references=")
    if "views" not in opened:
        if views_file is None:
            raise InputError(
                "references need an adapter of views: in the subject's folder, or 3dapter/ beside the base"
            )
        opened["views"] = open_adapter(views_file, c)
    if adapter is None:
        if len(views) != 1:
            raise InputError(f"without a subject's adapter one view is shown, not {len(views)}")
        return Subject("views", name, None, opened["views"][1], views)
    return Subject("joint", name, adapter, opened["views"][1], views, one_way=_one_way(config))


def _one_way(config: Path | None) -> bool:
    if config is None:
        return False
    value = read_json(config, limit=1 << 20, error=CheckpointError)
    return isinstance(value, dict) and value.get("one_way") is True
