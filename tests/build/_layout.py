"""Where things are, for the tests that guard the layout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("nemotron", "pi05", "xvla", "vega", "dreambooth", "motok")


def files(folder: str, *suffixes: str) -> list[Path]:
    return sorted(
        p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix in suffixes and "__pycache__" not in p.parts
    )


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
