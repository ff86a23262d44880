"""BVH files: any hierarchy and channel order to joint positions, checked, and back to text.

BVH is text: a tree of joints with offsets and channels, then one line of channel values a frame. Angles are degrees;
the unit of positions is not said, and is centimetres in most files. A joint with position channels is moved *to* them,
its offset is not added: so exporters write them, and the root of most files has offset 0 anyway.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.blocks.motion.arrays import FAR, MAX_FRAMES, fps, scalar
from engine.blocks.motion.resample import resample, resample_rotations
from engine.blocks.motion.rotations import from_euler, to_euler
from engine.errors import InputError
from engine.io.files import read_bytes
from engine.io.values import show

MAX_BYTES = 64 << 20
MAX_JOINTS = 1024
#: Joints times frames: what a few lines of a file may make this package compute.
MAX_CELLS = 4_000_000
MAX_DEPTH = 128
MAX_NAME = 200
MAX_FPS = 10_000.0
_AXIS = {"x": 0, "y": 1, "z": 2}
POSITIONS = ("Xposition", "Yposition", "Zposition")
#: In the order that is most common: R = Rz Rx Ry.
ROTATIONS = ("Zrotation", "Xrotation", "Yrotation")
_CHANNELS = {c.lower(): c for c in (*POSITIONS, *ROTATIONS)}


@dataclass(frozen=True)
class BvhJoint:
    """A joint of the hierarchy.

    Attributes:
        name: unique in the file.
        parent: index of the parent, -1 for the root.
        offset: from the parent, in the file's unit.
        channels: in the order of the values: 'Xposition' ... 'Zrotation'.
        end: offset of the End Site behind it, or None.
    """

    name: str
    parent: int
    offset: tuple[float, float, float]
    channels: tuple[str, ...]
    end: tuple[float, float, float] | None = None


@dataclass(frozen=True, eq=False)
class Bvh:
    """A motion as a BVH file holds it.

    Attributes:
        joints: parents before children, depth first, as in the file.
        frame_time: seconds a frame.
        values: [T, C] fp64, channel values of all joints in order; degrees and the file's unit.

    Raises:
        InputError: joints in another order, values that do not fit them or are not finite.
    """

    joints: tuple[BvhJoint, ...]
    frame_time: float
    values: np.ndarray

    def __post_init__(self) -> None:
        if not 1 <= len(self.joints) <= MAX_JOINTS:
            raise InputError(f"{len(self.joints)} joints; 1 to {MAX_JOINTS} are allowed")
        open_: list[int] = []
        for i, joint in enumerate(self.joints):
            while open_ and open_[-1] != joint.parent:
                open_.pop()
            if (i == 0) != (joint.parent == -1) or (i > 0 and not open_) or len(open_) >= MAX_DEPTH:
                raise InputError(f"joint {joint.name!r} does not follow its parent depth first, or is too deep")
            open_.append(i)
            if not joint.name or joint.name != joint.name.strip() or re.search(r"[\r\n{}]", joint.name):
                raise InputError(f"joint name {joint.name!r} cannot be written to a BVH file")
            if not set(joint.channels) <= set(_CHANNELS.values()) or len(set(joint.channels)) != len(joint.channels):
                raise InputError(f"joint {joint.name!r} has channels {show(joint.channels)}; each of X, Y, Z once")
        if len({j.name for j in self.joints}) != len(self.joints):
            raise InputError("two joints have one name; rename one")
        scalar(self.frame_time, "frame_time", 1 / MAX_FPS, 10)
        values = np.array(self.values, np.float64)
        width = sum(len(j.channels) for j in self.joints)
        if values.ndim != 2 or values.shape[1] != width or not 1 <= len(values) <= MAX_FRAMES:
            raise InputError(
                f"values have shape {list(values.shape)}; [T, {width}] with 1 to {MAX_FRAMES} frames is needed"
            )
        if len(values) * len(self.joints) > MAX_CELLS:
            raise InputError(f"{len(values)} frames of {len(self.joints)} joints; {MAX_CELLS} together at most")
        if not (np.abs(values) <= FAR).all():
            raise InputError(f"values hold a number that is not finite or beyond {FAR:g}")
        values.flags.writeable = False
        object.__setattr__(self, "values", values)

    @property
    def fps(self) -> float:
        """Frames a second; whole where the frame time is a rounded one of a whole rate (0.033333: 30)."""
        rate = 1 / self.frame_time
        return float(round(rate)) if abs(rate / max(round(rate), 1) - 1) < 1e-4 else rate

    @property
    def names(self) -> tuple[str, ...]:
        """Of the joints, then '<name>.end' of the End Sites."""
        return (*(j.name for j in self.joints), *(f"{j.name}.end" for j in self.joints if j.end is not None))

    @functools.cached_property
    def local(self) -> tuple[np.ndarray, np.ndarray]:
        """Translations [T, N, 3] and rotations [T, N, 3, 3] of the joints relative to their parents, fp64."""
        n, frames = len(self.joints), len(self.values)
        moves = np.empty((frames, n, 3))
        turns = np.empty((frames, n, 3, 3))
        for i, (joint, columns) in enumerate(zip(self.joints, self._columns)):
            moves[:, i] = joint.offset
            axes, angles = [], []
            for channel, column in zip(joint.channels, columns):
                axis = _AXIS[channel[0].lower()]
                if channel.endswith("position"):
                    moves[:, i, axis] = self.values[:, column]
                else:
                    axes.append(axis)
                    angles.append(np.radians(self.values[:, column]))
            turns[:, i] = from_euler(np.stack(angles, -1) if angles else np.empty((frames, 0)), axes)
        return moves, turns

    @functools.cached_property
    def world(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions [T, N, 3] and rotations [T, N, 3, 3] of the joints in the file's world, fp64."""
        places, turns = (x.copy() for x in self.local)
        for i, joint in enumerate(self.joints):
            if joint.parent >= 0:
                up = turns[:, joint.parent]
                places[:, i] = (up @ places[:, i, :, None])[..., 0] + places[:, joint.parent]
                turns[:, i] = up @ turns[:, i]
        return places, turns

    def positions(self) -> np.ndarray:
        """[T, len(names), 3] fp64: joints, then End Sites, in the order of `names`."""
        places, turns = self.world
        ends = [(turns[:, i] @ np.array(j.end)) + places[:, i] for i, j in enumerate(self.joints) if j.end is not None]
        return np.concatenate([places, np.stack(ends, 1)], axis=1) if ends else places.copy()

    def resample(self, to: float) -> Bvh:
        """At `to` frames a second: rotations along the arc, positions linear.

        Joints with fewer than three rotation channels have their angles interpolated.
        """
        rate = self.fps
        turns = self.local[1]
        parts = []
        for i, (joint, columns) in enumerate(zip(self.joints, self._columns)):
            part = resample(self.values[:, columns], rate, to) if columns else None
            spin = [k for k, c in enumerate(joint.channels) if c.endswith("rotation")]
            if part is not None and len(spin) == 3:
                axes = [_AXIS[joint.channels[k][0].lower()] for k in spin]
                part[:, spin] = np.degrees(to_euler(resample_rotations(turns[:, i], rate, to), axes))
            if part is not None:
                parts.append(part)
        values = np.concatenate(parts, axis=1) if parts else resample(self.values, rate, to)
        return replace(self, frame_time=1 / fps(to, "to"), values=values)

    def dumps(self) -> str:
        """The text of the file; six decimals."""
        lines = ["HIERARCHY"]
        children: dict[int, list[int]] = {}
        for i, joint in enumerate(self.joints):
            children.setdefault(joint.parent, []).append(i)

        def write(i: int, pad: str) -> None:
            joint, inner = self.joints[i], pad + "  "
            lines.append(f"{pad}{'JOINT' if i else 'ROOT'} {joint.name}")
            lines.extend([f"{pad}{{", f"{inner}OFFSET {_row(joint.offset)}"])
            lines.append(" ".join([f"{inner}CHANNELS {len(joint.channels)}", *joint.channels]))
            for child in children.get(i, ()):
                write(child, inner)
            if joint.end is not None:
                lines.extend([f"{inner}End Site", f"{inner}{{", f"{inner}  OFFSET {_row(joint.end)}", f"{inner}}}"])
            lines.append(f"{pad}}}")

        write(0, "")
        lines += ["MOTION", f"Frames: {len(self.values)}", f"Frame Time: {self.frame_time:.9g}"]
        lines += [_row(row) for row in self.values.tolist()]
        return "\n".join(lines) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file.

        Raises:
            InputError: it cannot be written.
        """
        return write_bytes(path, self.dumps().encode("utf-8"))

    @functools.cached_property
    def _columns(self) -> list[list[int]]:
        ends = np.cumsum([len(j.channels) for j in self.joints]).tolist()
        return [list(range(end - len(j.channels), end)) for j, end in zip(self.joints, ends)]


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file; a fault of the system becomes an InputError."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    except OSError as fault:
        raise InputError(f"{target} cannot be written: {fault.strerror or fault}; check space and rights") from fault
    return target


def read_bvh(path: str | os.PathLike[str]) -> Bvh:
    """Read a BVH file of at most 64 MiB.

    Raises:
        InputError: missing, too large, or damaged; the message names the line.
    """
    return parse_bvh(read_bytes(Path(path), limit=MAX_BYTES, error=InputError), str(path))


def parse_bvh(data: bytes | str, name: str = "BVH") -> Bvh:
    """Read the text of a BVH file.

    Args:
        data: UTF-8 or Latin-1, any line ends.
        name: for messages.

    Raises:
        InputError: not a hierarchy and a motion that fit each other: unknown words, braces that do not match, more
            than 1024 joints, 128 levels or 100,000 frames, joints of one name, numbers that are missing, not finite or
            beyond 1e6. The message names the line.
    """
    if isinstance(data, str):
        text = data
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
    # Only what ends lines in such files; splitlines() would also split at form feeds and the like.
    return _Parser(name, re.split(r"\r\n|\r|\n", text)).parse()


class _Parser:
    def __init__(self, name: str, lines: list[str]):
        self.name, self.lines, self.line = name, lines, 0

    def parse(self) -> Bvh:
        if self._next().upper() != "HIERARCHY":
            raise self._fault("HIERARCHY is needed here; this is no BVH file")
        joints = self._hierarchy()
        return self._motion(tuple(joints))

    def _fault(self, what: str) -> InputError:
        return InputError(f"{self.name}, line {self.line}: {what}")

    def _rows(self) -> Iterator[str]:
        """Lines with something in them; `line` counts from 1."""
        while self.line < len(self.lines):
            self.line += 1
            row = self.lines[self.line - 1].strip()
            if row:
                yield row

    def _next(self) -> str:
        for row in self._rows():
            return row
        raise self._fault("the file ends here; it was cut off")

    def _hierarchy(self) -> list[BvhJoint]:
        made: list[dict[str, Any]] = []
        names: set[str] = set()
        open_: list[int] = []  # joints; ~i is the End Site of joint i
        announced: int | None = None  # what the next brace opens
        while True:
            row = self._next()
            brace = row.endswith("{") and row != "{"
            words = (row[:-1] if brace else row).split(None, 1)
            word, rest = words[0].upper(), words[1].strip() if len(words) > 1 else ""
            inside = open_[-1] if open_ else None
            if announced is not None and word != "{":
                raise self._fault("'{' is needed here")
            if word == "{" and announced is not None and not rest:
                open_.append(announced)
                announced = None
            elif word in ("ROOT", "JOINT"):
                if (word == "ROOT") != (not made) or (made and (inside is None or inside < 0)):
                    raise self._fault(f"{word} is not allowed here; a file has one ROOT, and JOINTs inside it")
                if not rest or len(rest) > MAX_NAME or re.search(r"[{}]", rest):
                    raise self._fault(f"a name of 1 to {MAX_NAME} characters is needed after {word}")
                if rest in names:
                    raise self._fault(f"there are two joints {show(rest)}; rename one")
                if len(made) >= MAX_JOINTS or len(open_) >= MAX_DEPTH:
                    raise self._fault(f"more than {MAX_JOINTS} joints or {MAX_DEPTH} levels")
                names.add(rest)
                announced = len(made)
                made.append({"name": rest, "parent": -1 if inside is None else inside})
            elif word == "END" and rest.upper() == "SITE":
                if inside is None or inside < 0 or "end" in made[inside]:
                    raise self._fault("End Site is not allowed here; a joint has at most one")
                made[inside]["end"] = None
                announced = ~inside
            elif word == "OFFSET" and inside is not None:
                key, entry = ("offset", made[inside]) if inside >= 0 else ("end", made[~inside])
                if entry.get(key) is not None:
                    raise self._fault("a second OFFSET")
                entry[key] = tuple(self._numbers(rest, 3))
            elif word == "CHANNELS" and inside is not None and inside >= 0:
                if "channels" in made[inside]:
                    raise self._fault("a second CHANNELS")
                made[inside]["channels"] = self._channels(rest)
            elif word == "}" and inside is not None and not rest:
                key, entry = ("offset", made[inside]) if inside >= 0 else ("end", made[~inside])
                if entry.get(key) is None:
                    raise self._fault("this part has no OFFSET")
                open_.pop()
                if not open_:
                    return [BvhJoint(**{"channels": (), **m}) for m in made]
            else:
                raise self._fault(f"{show(row)} is not understood here")
            if brace:
                if announced is None:
                    raise self._fault("'{' is not allowed here")
                open_.append(announced)
                announced = None

    def _numbers(self, text: str, count: int) -> list[float]:
        words = text.split()
        if len(words) != count:
            raise self._fault(f"{count} numbers are needed, not {len(words)}")
        return self._floats(words).tolist()

    def _floats(self, words: list[str]) -> np.ndarray:
        try:
            # Python would take 1_0 for ten.
            if any("_" in w for w in words):
                raise ValueError
            values = np.array(words, dtype=np.float64)
        except ValueError:
            bad = next((w for w in words if not _is_number(w)), "?")
            raise self._fault(f"{show(bad)} is no number") from None
        good = np.abs(values) <= FAR
        if not good.all():
            bad = words[int(np.argmin(good))]
            raise self._fault(f"{show(bad)} is not finite or beyond {FAR:g}")
        return values

    def _channels(self, text: str) -> tuple[str, ...]:
        count, *words = text.split() or [""]
        made = [_CHANNELS.get(w.lower()) for w in words]
        if not count.isascii() or not count.isdigit() or len(count) > 2 or int(count) != len(words):
            raise self._fault(f"CHANNELS {show(text)}: a count and as many names are needed")
        if None in made or len(set(made)) != len(made):
            raise self._fault(f"CHANNELS {show(text)}: each of {', '.join(_CHANNELS.values())} at most once")
        return tuple(c for c in made if c is not None)

    def _motion(self, joints: tuple[BvhJoint, ...]) -> Bvh:
        if self._next().upper() != "MOTION":
            raise self._fault("MOTION is needed behind the hierarchy; a file has one ROOT")
        frames = self._field(r"frames\s*:\s*(\d{1,9})", "Frames: <number>")
        count = int(frames)
        if not 1 <= count <= MAX_FRAMES:
            raise self._fault(f"{count} frames; 1 to {MAX_FRAMES} are allowed")
        if count * len(joints) > MAX_CELLS:
            raise self._fault(f"{count} frames of {len(joints)} joints; {MAX_CELLS} together at most")
        time = float(self._floats([self._field(r"frame\s+time\s*:\s*(\S+)", "Frame Time: <seconds>")])[0])
        if not 1 / MAX_FPS <= time <= 10:
            raise self._fault(f"a frame time of {time:g} s; {1 / MAX_FPS:g} to 10 are allowed")
        width = sum(len(j.channels) for j in joints)
        # Memory is taken for lines that are there, not for what the header says.
        rows: list[np.ndarray] = []
        if width == 0:
            rows = [np.empty(0)] * count
        for row in self._rows():
            if len(rows) == count:
                raise self._fault(f"more than the {count} frames that the file announces")
            words = row.split()
            if len(words) != width:
                raise self._fault(f"frame {len(rows)} has {len(words)} values, the hierarchy has {width} channels")
            rows.append(self._floats(words))
        if len(rows) != count:
            raise self._fault(f"the file ends after {len(rows)} of {count} frames; it was cut off")
        return Bvh(joints, time, np.stack(rows))

    def _field(self, pattern: str, wanted: str) -> str:
        found = re.fullmatch(pattern, self._next(), re.I | re.A)
        if not found:
            raise self._fault(f"'{wanted}' is needed here")
        return found[1]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return "_" not in word


def _row(numbers: Sequence[float]) -> str:
    # -0.000000 would be right, and looks wrong.
    return " ".join("0.000000" if (t := f"{v:.6f}") == "-0.000000" else t for v in numbers)
