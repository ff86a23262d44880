"""Two real motions from the tests of bvhtoolbox (MIT), fetched once, kept in .cache/peers, never in this tree."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = "0.1.3"
SHA256 = "2d9dcae87cd6bfa28c89463450de84497e612682ca0697ea088fc7f2ef0f937f"
FILES = ("test_mocapbank.bvh", "test_freebvh.bvh")


@functools.cache
def bvh_file(name: str) -> bytes:
    """One of FILES, read from the source archive, of which nothing is unpacked or installed."""
    with tarfile.open(_archive()) as archive:
        member = archive.extractfile(f"bvhtoolbox-{VERSION}/tests/example_files/{name}")
        assert member is not None
        return member.read()


@functools.cache
def _archive() -> Path:
    kept = ROOT / ".cache/peers" / f"bvhtoolbox-{VERSION}.tar.gz"
    path = Path(os.environ.get("QUINTET_PEER_BVHTOOLBOX", kept))
    if path == kept and not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="making-", dir=kept.parent) as folder:
            _download(Path(folder))
            (Path(folder) / kept.name).rename(kept)  # complete or not there at all
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        pytest.fail(
            f"{path} is not the source archive of bvhtoolbox {VERSION}; remove it, or set QUINTET_PEER_BVHTOOLBOX"
        )
    return path


def _download(folder: Path) -> None:
    wanted = folder / "wanted.txt"
    wanted.write_text(f"bvhtoolbox=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), "--require-hashes", "--requirement", str(wanted)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.fail(
            "bvhtoolbox could not be fetched; set QUINTET_PEER_BVHTOOLBOX to its source archive:\n"
            + done.stderr[-2000:]
        )
