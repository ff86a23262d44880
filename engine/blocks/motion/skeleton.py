"""The skeletons of the two motion data sets, and where each feature of a frame is."""

from __future__ import annotations

import functools
import itertools
import numbers
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.errors import ConfigError, InputError

MAX_JOINTS = 1024
_AXES = {"+x": (1, 0, 0), "-x": (-1, 0, 0), "+y": (0, 1, 0), "-y": (0, -1, 0), "+z": (0, 0, 1), "-z": (0, 0, -1)}


class Layout(NamedTuple):
    """Slices of the D = 12 J - 1 features of a frame, for J joints. Source: HumanML3D."""

    turn: slice  # 1: half of the root's turn about +Y until the next frame, negated, rad
    travel: slice  # 2: x, z of the root's way to the next frame, in the heading of the next frame
    height: slice  # 1: y of the root
    positions: slice  # 3 (J - 1): joints 1.. relative to the root's x and z, heading taken out
    rotations: slice  # 6 (J - 1): of the bones that end in joints 1..
    velocities: slice  # 3 J: way of each joint to the next frame, heading taken out
    contacts: slice  # 4: left ankle, left foot, right ankle, right foot, 0 or 1

    @classmethod
    def of(cls, joints: int) -> Layout:
        """For a skeleton of `joints` joints."""
        widths = (1, 2, 1, 3 * (joints - 1), 6 * (joints - 1), 3 * joints, 4)
        ends = np.cumsum(widths).tolist()
        return cls(*(slice(end - width, end) for width, end in zip(widths, ends)))


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A tree of joints; the bone of joint j >= 1 leads from its parent to it.

    Attributes:
        name: of the data set.
        names: of the joints; 0 is the root.
        parents: -1 for the root, else smaller than the joint.
        chains: along which rotations are accumulated, each from the rotation of the root, wherever it begins.
        directions: of the bones at rest: '+x' ... '-z'; '' for the root.
        lengths: [J] of the bones, in `unit`, 0 for the root; None where the data set does not fix them.
        feet: joints of the contact features, in their order.
        facing: (right hip, left hip, right shoulder, left shoulder), which say where a pose looks.
        legs: two bones of a leg whose lengths give the size of a person.
        skating: the feet that `metrics.foot_skate` looks at.
        fps: frames a second of the data set.
        metre: metres per `unit`.
        contact: a joint that moves less than this between two frames, in unit squared, is in contact.
    """

    name: str
    names: tuple[str, ...]
    parents: tuple[int, ...]
    chains: tuple[tuple[int, ...], ...]
    directions: tuple[str, ...]
    lengths: tuple[float, ...] | None
    feet: tuple[int, int, int, int]
    facing: tuple[int, int, int, int]
    legs: tuple[int, int]
    skating: tuple[int, ...]
    fps: float
    metre: float
    contact: float

    def __post_init__(self) -> None:
        n = len(self.names)
        sizes = {n, len(self.parents), len(self.directions), n if self.lengths is None else len(self.lengths)}
        if sizes != {n} or not 2 <= n <= MAX_JOINTS or len(set(self.names)) != n:
            raise ConfigError(f"skeleton {self.name}: one name, parent, direction and length for each of its joints")
        if self.parents[0] != -1 or not all(0 <= p < j for j, p in enumerate(self.parents) if j):
            raise ConfigError(f"skeleton {self.name}: a joint must come after its parent, and the root has -1")
        steps = sorted((b, a) for chain in self.chains for a, b in itertools.pairwise(chain))
        if steps != [(j, self.parents[j]) for j in range(1, n)]:
            raise ConfigError(f"skeleton {self.name}: the chains must hold every bone once")
        if any(d not in _AXES for d in self.directions[1:]):
            raise ConfigError(f"skeleton {self.name}: bones at rest point along one of {', '.join(_AXES)}")

    @property
    def joints(self) -> int:
        """J."""
        return len(self.names)

    @property
    def dims(self) -> int:
        """D, features of a frame."""
        return 12 * self.joints - 1

    @property
    def unit(self) -> str:
        """Of positions in features: 'm' or 'mm'."""
        return {1.0: "m", 0.001: "mm"}.get(self.metre, f"{self.metre:g} m")

    @functools.cached_property
    def layout(self) -> Layout:
        """Where the features are."""
        return Layout.of(self.joints)

    @functools.cached_property
    def axes(self) -> np.ndarray:
        """[J, 3] fp64 unit vectors of the bones at rest, zero for the root."""
        out = np.array([_AXES.get(d, (0, 0, 0)) for d in self.directions], np.float64)
        out.flags.writeable = False
        return out

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """[J, 3] fp64: joints relative to their parents at rest, in `unit`.

        Raises:
            InputError: the data set fixes no lengths.
        """
        if self.lengths is None:
            raise InputError(f"{self.name} has no bone lengths of its own; pass lengths=, one for each joint")
        out = self.axes * np.array(self.lengths)[:, None]
        out.flags.writeable = False
        return out

    @functools.cached_property
    def leaves(self) -> tuple[int, ...]:
        """Joints without children."""
        return tuple(j for j in range(self.joints) if j not in self.parents)

    @functools.cached_property
    def before(self) -> tuple[int, ...]:
        """Per joint, the one whose accumulated rotation its own continues: 0 where a chain begins."""
        out = [-1] * self.joints
        for chain in self.chains:
            for a, b in itertools.pairwise(chain):
                out[b] = 0 if a == chain[0] else a
        return tuple(out)

    def joint(self, which: int | str) -> int:
        """The index of a joint given by index or name ('l_wrist', 'Left Wrist', 'root').

        Raises:
            InputError: there is no such joint; the message lists the names.
        """
        if isinstance(which, str):
            found = self._by_name.get(_plain(which))
        elif isinstance(which, numbers.Integral) and not isinstance(which, bool) and 0 <= which < self.joints:
            found = int(which)
        else:
            found = None
        if found is None:
            known = ", ".join(f"{i} {name}" for i, name in enumerate(self.names))
            raise InputError(f"joint {str(which)[:80]!r} is not one of {self.name}: {known}")
        return found

    @functools.cached_property
    def _by_name(self) -> dict[str, int]:
        return {"root": 0, **{_plain(name): i for i, name in enumerate(self.names)}}

    def __repr__(self) -> str:
        return f"Skeleton({self.name}: {self.joints} joints, {self.dims} features, {self.fps:g} fps, {self.unit})"


def skeleton_of(dims: int) -> Skeleton:
    """The data set whose frames have `dims` features.

    Raises:
        InputError: neither has.
    """
    for skeleton in (HUMANML3D, KIT):
        if skeleton.dims == dims:
            return skeleton
    raise InputError(f"{dims} features a frame; HumanML3D has {HUMANML3D.dims}, KIT-ML {KIT.dims}. Pass skeleton=")


def _plain(name: str) -> str:
    word = re.sub(r"[\s.\-]+", "_", name.strip().lower())
    return re.sub(r"^(left|right)_?(?=[a-z])", lambda m: m[1][0] + "_", word)


HUMANML3D = Skeleton(
    name="HumanML3D",
    names=(
        "pelvis", "l_hip", "r_hip", "spine1", "l_knee", "r_knee", "spine2", "l_ankle", "r_ankle", "spine3", "l_foot",
        "r_foot", "neck", "l_collar", "r_collar", "head", "l_shoulder", "r_shoulder", "l_elbow", "r_elbow", "l_wrist",
        "r_wrist",
    ),
    parents=(-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19),
    chains=((0, 2, 5, 8, 11), (0, 1, 4, 7, 10), (0, 3, 6, 9, 12, 15), (9, 14, 17, 19, 21), (9, 13, 16, 18, 20)),
    directions=(
        "", "+x", "-x", "+y", "-y", "-y", "+y", "-y", "-y", "+y", "+z", "+z", "+y", "+x", "-x", "+z", "-y", "-y", "-y",
        "-y", "-y", "-y",
    ),
    lengths=(
        0, 0.10307, 0.10988, 0.13157, 0.39362, 0.39019, 0.14319, 0.43243, 0.42564, 0.05736, 0.14338, 0.14942, 0.21936,
        0.13749, 0.14338, 0.10304, 0.13161, 0.12298, 0.25684, 0.26309, 0.26601, 0.26988,
    ),
    feet=(7, 10, 8, 11),
    facing=(2, 1, 17, 16),
    legs=(5, 8),
    skating=(10, 11),
    fps=20.0,
    metre=1.0,
    contact=0.002,
)  # fmt: skip

#: Source of axes, facing and feet: MoMask. Its facing takes joint 11 for the right hip, which the data set calls left.
KIT = Skeleton(
    name="KIT-ML",
    names=(
        "root", "BP", "BT", "BLN", "BUN", "LS", "LE", "LW", "RS", "RE", "RW", "LH", "LK", "LA", "LMrot", "LF", "RH",
        "RK", "RA", "RMrot", "RF",
    ),
    parents=(-1, 0, 1, 2, 3, 3, 5, 6, 3, 8, 9, 0, 11, 12, 13, 14, 0, 16, 17, 18, 19),
    chains=((0, 11, 12, 13, 14, 15), (0, 16, 17, 18, 19, 20), (0, 1, 2, 3, 4), (3, 5, 6, 7), (3, 8, 9, 10)),
    directions=(
        "", "+y", "+y", "+y", "+y", "+x", "-y", "-y", "-x", "-y", "-y", "+x", "-y", "-y", "+z", "+z", "-x", "-y", "-y",
        "+z", "+z",
    ),
    lengths=None,
    feet=(19, 20, 14, 15),
    facing=(11, 16, 5, 8),
    legs=(17, 18),
    skating=(15, 20),
    fps=12.5,
    metre=0.001,
    contact=0.05,
)  # fmt: skip
