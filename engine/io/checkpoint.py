"""Checkpoints: safetensors files and sharded folders, mapped into memory and checked before use.

>>> with Checkpoint("folder") as weights:
...     weights.info("lm_head.weight"), weights.read("lm_head.weight")
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from engine.errors import CheckpointError, ClosedError
from engine.io.files import member, parse_json, read_json
from engine.io.mapped import MappedSource, Stack
from engine.io.tensors import (
    STORAGE,
    Source,
    TensorInfo,
    bf16_to_f32,
    check_finite,
    expect,
    f32_to_bf16,
    missing,
)
from engine.io.values import show
from engine.io.writer import save

__all__ = [
    "STORAGE",
    "Checkpoint",
    "MappedSource",
    "SafetensorsFile",
    "Source",
    "Stack",
    "TensorInfo",
    "bf16_to_f32",
    "check_finite",
    "expect",
    "f32_to_bf16",
    "save",
]

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_RANK = 8
MAX_SIZE = 2**48  # elements
MAX_SHARDS = 4096
_SUFFIX = ".safetensors"


class SafetensorsFile:
    """One safetensors file as a `Source` of views into a read-only memory map.

    The whole header is checked on opening. The map sees the file as it is: do not truncate it while it is open.

    Args:
        path: the file; symbolic links are followed.

    Raises:
        CheckpointError: missing, truncated, or a header that is not a valid description of exactly this file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        try:
            with self.path.open("rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                if size < 10:
                    raise self._bad(f"{size} bytes are too few for a header")
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as fault:
            raise CheckpointError(f"{path} does not exist; give the path of a .safetensors file") from fault
        except (OSError, ValueError) as fault:
            if isinstance(fault, CheckpointError):
                raise
            raise CheckpointError(f"{path} cannot be opened: {fault}") from fault
        try:
            self._read_header(self._map, size)
            # Own parsing gives the offsets for views (the library copies, and has no bf16 for numpy); the library,
            # audited and fuzzed, then has to accept the same file, so neither reader is trusted alone.
            with safe_open(str(self.path), framework="numpy"):
                pass
        except (SafetensorError, OSError) as fault:
            self.close()
            raise self._bad(f"refused by the safetensors library ({fault})") from fault
        except BaseException:
            self.close()
            raise

    def _bad(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {reason}; the file is damaged or not safetensors, fetch it again")

    def _read_header(self, data: mmap.mmap, size: int) -> None:
        length = int.from_bytes(data[:8], "little")
        if length > MAX_HEADER or length > size - 8:
            raise self._bad(f"header of {length} bytes (at most {min(MAX_HEADER, size - 8)} here)")
        raw = data[8 : 8 + length]
        if not raw.startswith(b"{"):
            raise self._bad("the header does not start with '{'")
        header = parse_json(raw, f"{self.path} (header)", CheckpointError, unique=True)
        self._start, room = 8 + length, size - 8 - length
        self.metadata = self._metadata(header.pop("__metadata__", {}))
        self._infos: dict[str, TensorInfo] = {}
        self._begin: dict[str, int] = {}
        for name, entry in header.items():
            begin, info = self._entry(name, entry, room)
            self._infos[name], self._begin[name] = info, self._start + begin
        end = self._start
        for name in sorted(self._infos, key=lambda key: (self._begin[key], self._infos[key].nbytes)):
            if self._begin[name] != end:
                raise self._bad(f"tensor {name[:200]!r} overlaps another or leaves a hole at byte {end}")
            end += self._infos[name].nbytes
        if end != size:
            raise self._bad(f"{size - end} bytes belong to no tensor")

    def _metadata(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise self._bad("__metadata__ is not a map of strings")
        return value

    def _entry(self, name: str, entry: Any, room: int) -> tuple[int, TensorInfo]:
        label = f"tensor {name[:200]!r}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"{label} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in STORAGE:
            raise self._bad(f"{label} has dtype {show(dtype)}, not one of {', '.join(STORAGE)}")
        if not isinstance(shape, list) or len(shape) > MAX_RANK:
            raise self._bad(f"{label} has a shape that is not a list of at most {MAX_RANK} sizes")
        # Every size is bounded before any product; sizes beside a zero count too, numpy would refuse them later.
        if (
            not all(type(n) is int and 0 <= n <= MAX_SIZE for n in shape)
            or math.prod(max(n, 1) for n in shape) > MAX_SIZE
        ):
            raise self._bad(f"{label} has sizes outside 0..{MAX_SIZE}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
            raise self._bad(f"{label} has data_offsets that are not two integers")
        begin, end = offsets
        if not 0 <= begin <= end <= room:
            raise self._bad(f"{label} lies at bytes {begin}..{end} of {room}")
        nbytes = math.prod(shape) * STORAGE[dtype].itemsize
        if nbytes != end - begin:
            raise self._bad(f"{label} {dtype} {shape} needs {nbytes} bytes, its offsets hold {end - begin}")
        return begin, TensorInfo(name, dtype, tuple(shape), nbytes)

    def keys(self) -> list[str]:
        """Every tensor name, sorted."""
        return sorted(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and bytes; `CheckpointError` where there is none of that name."""
        try:
            return self._infos[name]
        except KeyError:
            raise missing(name, self._infos, self.path) from None

    def read(self, name: str) -> np.ndarray:
        """Read-only array over the map (see `Source.read`); a copy only where the file misaligns the element type."""
        info = self.info(name)
        if self._map is None:
            raise ClosedError(f"{self.path} was closed; open it again")
        storage = STORAGE[info.dtype]
        if info.nbytes == 0:
            array: np.ndarray = np.empty(info.shape, storage)
        else:
            raw = np.frombuffer(self._map, np.uint8, info.nbytes, self._begin[name])
            if info.dtype == "BOOL" and int(raw.max()) > 1:
                raise self._bad(f"tensor {name!r} is BOOL and holds a byte above 1")
            # The format allows odd header lengths; kernels want aligned elements.
            if self._begin[name] % storage.itemsize:
                raw = raw.copy()
            array = raw.view(storage).reshape(info.shape)
        array.flags.writeable = False
        return array

    def release(self, name: str) -> None:
        """Hint that the tensor's pages may be dropped; reading it again still works."""
        self.release_range(name, 0, self.info(name).nbytes)

    def release_range(self, name: str, start: int, stop: int) -> None:
        """`release` for the bytes [start, stop) of the tensor."""
        begin = self._begin[self.info(name).name]
        first = (begin + start) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and stop > start and hasattr(mmap, "MADV_DONTNEED"):
            # Pages shared with a neighbour come back from the page cache: the map is read-only.
            self._map.madvise(mmap.MADV_DONTNEED, first, begin + stop - first)

    def close(self) -> None:
        """Unmap. Arrays handed out before stay valid and keep the map alive."""
        held, self._map = self._map, None
        if held is not None:
            with contextlib.suppress(BufferError):  # then it is unmapped with its last array
                held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Checkpoint:
    """The weights of a checkpoint folder as one `Source`: `<stem>.safetensors`, or shards listed by its index.

    Every shard is opened and every name of the index is checked before the first tensor can be read.

    Args:
        folder: checkpoint folder, or the path of one .safetensors file.
        stem: base name of the weight files (`model`, or `diffusion_pytorch_model` in diffusers folders).

    Raises:
        CheckpointError: no weights, a damaged file, an index that leaves the folder or does not match its shards.
    """

    def __init__(self, folder: str | os.PathLike[str], stem: str = "model"):
        self.folder = Path(folder)
        self._files: list[SafetensorsFile] = []
        self._home: dict[str, SafetensorsFile] = {}
        try:
            if self.folder.suffix == _SUFFIX and not self.folder.is_dir():
                self._add(self.folder)
            else:
                self._open_folder(stem)
        except BaseException:
            self.close()
            raise

    def _open_folder(self, stem: str) -> None:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder; give a folder with {stem}{_SUFFIX}")
        single = member(self.folder, stem + _SUFFIX, CheckpointError)
        index = member(self.folder, f"{stem}{_SUFFIX}.index.json", CheckpointError)
        if single.exists():
            self._add(single)
        elif index.exists():
            self._open_shards(index)
        else:
            raise CheckpointError(
                f"{self.folder} holds neither {single.name} nor {index.name}; "
                "other weight formats (.bin, .pt) are not read: convert them to safetensors"
            )

    def _open_shards(self, index: Path) -> None:
        table = read_json(index, limit=MAX_HEADER, error=CheckpointError, unique=True)
        weight_map = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map of tensor names to files; fetch it again")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not shard.endswith(_SUFFIX):
                raise CheckpointError(
                    f"{index}: tensor {name[:200]!r} is said to be in {show(shard)}, no {_SUFFIX} file"
                )
        shards = sorted(set(weight_map.values()))
        if len(shards) > MAX_SHARDS:
            raise CheckpointError(f"{index} names {len(shards)} files, the limit is {MAX_SHARDS}")
        paths = {shard: member(self.folder, shard, CheckpointError) for shard in shards}
        absent = [shard for shard, path in paths.items() if not path.is_file()]
        if absent:
            names = ", ".join(absent[:5])
            raise CheckpointError(
                f"{len(absent)} of {len(shards)} shards of {index} are missing ({names}); fetch the whole checkpoint"
            )
        opened = {shard: self._add(path) for shard, path in paths.items()}
        for name, shard in weight_map.items():
            if self._home.get(name) is not opened[shard]:
                raise CheckpointError(
                    f"{index} says that tensor {name[:200]!r} is in {shard}, it is not; fetch both again"
                )

    def _add(self, path: Path) -> SafetensorsFile:
        file = SafetensorsFile(path)
        self._files.append(file)
        for name in file.keys():  # noqa: SIM118 - a Source is no dict
            if name in self._home:
                raise CheckpointError(
                    f"tensor {name[:200]!r} is in both {self._home[name].path} and {path}; remove one"
                )
            self._home[name] = file
        return file

    @property
    def files(self) -> list[Path]:
        """The weight files, in the order they were opened."""
        return [file.path for file in self._files]

    @property
    def metadata(self) -> dict[str, str]:
        """Header metadata of all files; the first file wins where they differ."""
        return {key: value for file in reversed(self._files) for key, value in file.metadata.items()}

    def _file(self, name: str) -> SafetensorsFile:
        try:
            return self._home[name]
        except KeyError:
            raise missing(name, self._home, self.folder) from None

    def keys(self) -> list[str]:
        """Every tensor name, sorted."""
        return sorted(self._home)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and bytes; `CheckpointError` where there is none of that name."""
        return self._file(name).info(name)

    def read(self, name: str) -> np.ndarray:
        """Read-only array over the map of its file (see `Source.read`)."""
        return self._file(name).read(name)

    def release(self, name: str) -> None:
        """Hint that the tensor's pages may be dropped; reading it again still works."""
        self._file(name).release(name)

    def release_range(self, name: str, start: int, stop: int) -> None:
        """`release` for the bytes [start, stop) of the tensor."""
        self._file(name).release_range(name, start, stop)

    def close(self) -> None:
        """Unmap every file. Arrays handed out before stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
