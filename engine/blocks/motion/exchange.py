"""Motions of the models to BVH, and any BVH to the joints of a model: which joint of a file is which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.blocks.motion.arrays import fps, poses, scalar
from engine.blocks.motion.bvh import POSITIONS, ROTATIONS, Bvh, BvhJoint
from engine.blocks.motion.features import (
    SMOOTHING,
    bone_lengths,
    bone_rotations,
    from_joints,
    mean_lengths,
    recover_joints,
    recover_root,
    shortest_arcs,
)
from engine.blocks.motion.pose import StartPose
from engine.blocks.motion.rotations import to_euler, yaw
from engine.blocks.motion.skeleton import HUMANML3D, Skeleton, skeleton_of
from engine.errors import InputError
from engine.io.values import show

#: Axes of ROTATIONS.
_ORDER = (2, 0, 1)

#: Where a joint of a model is in a file: a joint, the end of one ('Foot.end'), or the mean of several.
Place = str | Sequence[str]


def bvh_from_joints(
    joints: Any,
    skeleton: Skeleton = HUMANML3D,
    *,
    rate: float | None = None,
    lengths: str | Sequence[float] | np.ndarray = "mean",
    scale: float = 1.0,
) -> Bvh:
    """Positions to BVH ('pos'): each bone turns by the shortest arc from its direction at rest.

    A node `bone_<j>` stands at the parent of joint j and carries the bone to j, so that bones of one joint can point
    anywhere. Bones of generated motions change their length a little; those of BVH do not, and positions move by the
    difference. After guidance this is the right mode: guidance leaves the features of rotations alone.

    Args:
        joints: [T, J, 3] in any world.
        skeleton: of the joints.
        rate: frames a second; default: the skeleton's.
        lengths: 'mean' of the motion, 'canonical' of the data set, or [J].
        scale: file units per unit of the joints: 100 writes metres as centimetres.

    Raises:
        InputError: another shape, a value that is not finite, lengths that are not known.
    """
    p = poses(joints, skeleton.joints).astype(np.float64)
    turns = shortest_arcs(p, skeleton)
    return _export(turns, p[:, 0], skeleton, rate, _lengths(lengths, p, skeleton), scale)


def bvh_from_features(
    features: Any,
    skeleton: Skeleton | None = None,
    *,
    rate: float | None = None,
    lengths: str | Sequence[float] | np.ndarray = "canonical",
    scale: float = 1.0,
    start: StartPose | None = None,
) -> Bvh:
    """Features to BVH ('rot'): bones turn as the features of rotations say, the root carries the heading.

    Nodes as in `bvh_from_joints`. The rotations are of bones, not the pose parameters of SMPL.

    Args:
        features: [T, D], not normalised.
        skeleton: default: the data set whose D it is.
        rate: frames a second; default: the skeleton's.
        lengths: 'canonical' of the data set, 'mean' of the positions in the features, or [J].
        scale: file units per unit of the features.
        start: where the motion starts in the user's world, in the features' unit; default: the origin.

    Raises:
        InputError: another shape, a value that is not finite, lengths that are not known.
    """
    p = poses(recover_joints(features, skeleton), None, "features")
    x = np.asarray(features, np.float64)
    skeleton = skeleton or skeleton_of(x.shape[-1])
    heading, root = recover_root(x)
    turns = bone_rotations(x, heading, skeleton)
    pose = start or StartPose()
    return _export(
        yaw(pose.heading) @ turns, pose.to_world(root), skeleton, rate, _lengths(lengths, p, skeleton), scale
    )


def _sides(middle: Mapping[str, Place], sides: Mapping[str, Place]) -> dict[str, Place]:
    """Names of both sides, `{side}` being Left or Right."""
    out = dict(middle)
    for joint, place in sides.items():
        for letter, side in (("l", "Left"), ("r", "Right")):
            parts = [place] if isinstance(place, str) else place
            found = tuple(part.format(side=side) for part in parts)
            out[f"{letter}_{joint}"] = found[0] if len(found) == 1 else found
    return out


_SPINE: dict[str, Place] = {
    "pelvis": "Hips", "spine1": "Spine", "spine2": "Spine1", "spine3": "Spine2", "neck": "Neck", "head": "Head",
}  # fmt: skip
_LIMBS: dict[str, Place] = {
    "hip": "{side}UpLeg", "knee": "{side}Leg", "ankle": "{side}Foot", "foot": "{side}ToeBase",
    "collar": "{side}Shoulder", "shoulder": "{side}Arm", "elbow": "{side}ForeArm", "wrist": "{side}Hand",
}  # fmt: skip

#: Where joints of HumanML3D are in common files. Namespaces as 'mixamorig:' do not count when names are compared.
CONVENTIONS: dict[str, Mapping[str, Place]] = {
    "mixamo": _sides(_SPINE, _LIMBS),
    "lafan": _sides(_SPINE, {**_LIMBS, "foot": "{side}Toe"}),
    # The neck and the collars of CMU's files stand where Spine1 does, and LowerBack where the hips do.
    "cmu": _sides(
        {**_SPINE, "spine1": ("LowerBack", "Spine"), "spine2": "Spine", "spine3": "Spine1", "neck": "Neck1"},
        {**_LIMBS, "collar": ("{side}Shoulder", "{side}Arm")},
    ),
    # One spine joint fewer, collars at the neck, toes as End Sites.
    "mocapbank": _sides(
        {**_SPINE, "spine1": "Chest", "spine2": ("Chest", "Chest2"), "spine3": "Chest2"},
        {
            "hip": "{side}Hip", "knee": "{side}Knee", "ankle": "{side}Ankle", "foot": "{side}Ankle.end",
            "collar": ("{side}Collar", "{side}Shoulder"), "shoulder": "{side}Shoulder", "elbow": "{side}Elbow",
            "wrist": "{side}Wrist",
        },
    ),
}  # fmt: skip


def exported_names(skeleton: Skeleton) -> dict[str, Place]:
    """Where the joints of a skeleton are in files of `bvh_from_joints` and `bvh_from_features`."""
    out: dict[str, Place] = {skeleton.names[0]: skeleton.names[0]}
    for j, name in enumerate(skeleton.names[1:], 1):
        child = next((c for c, parent in enumerate(skeleton.parents) if parent == j), None)
        out[name] = f"bone_{name}.end" if child is None else f"bone_{skeleton.names[child]}"
    return out


def joints_from_bvh(
    bvh: Bvh,
    names: Mapping[str, Place] | None = None,
    skeleton: Skeleton = HUMANML3D,
    *,
    up: str = "y",
    scale: float = 1.0,
) -> np.ndarray:
    """The joints of a skeleton out of a file with other names.

    Args:
        bvh: the file.
        names: canonical joint to its name in the file, to '<name>.end' for an End Site, or to several names whose mean
            it is. Joints that are left out are looked for under the names of `CONVENTIONS`, those of the skeleton, and
            those of our own exports.
        skeleton: whose joints are wanted.
        up: 'y' or 'z', the axis that points up in the file.
        scale: wanted units per unit of the file: 0.01 reads centimetres as metres.

    Returns:
        [T, J, 3] fp64, Y up, at the file's frame rate.

    Raises:
        InputError: joints without a name that the file has; the message lists them.
    """
    if up not in ("y", "z"):
        raise InputError(f"up={show(up)}; 'y' or 'z' is needed")
    scale = scalar(scale, "scale", 1e-6, 1e6)
    places = _match(bvh, dict(names or {}), skeleton)
    positions = bvh.positions()
    p = np.stack([positions[:, where].mean(1) for where in places], axis=1) * scale
    # A quarter turn about X, not a swap: a swap would mirror left and right.
    return np.stack([p[..., 0], p[..., 2], -p[..., 1]], axis=-1) if up == "z" else p


def features_from_bvh(
    bvh: Bvh,
    names: Mapping[str, Place] | None = None,
    skeleton: Skeleton = HUMANML3D,
    *,
    up: str = "y",
    smoothing: float = SMOOTHING,
) -> np.ndarray:
    """Features of a file's motion at the skeleton's frame rate, [T, D] fp64, retargeted; its unit does not matter.

    Raises:
        InputError: as `joints_from_bvh` and `from_joints`; the skeleton has no bone lengths.
    """
    joints = joints_from_bvh(bvh.resample(skeleton.fps), names, skeleton, up=up)
    return from_joints(joints, skeleton, retarget=True, smoothing=smoothing)


def _lengths(lengths: str | Sequence[float] | np.ndarray, p: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    if isinstance(lengths, str):
        if lengths not in ("mean", "canonical"):
            raise InputError(f"lengths={show(lengths)}; 'mean', 'canonical' or one number for each joint is needed")
        return mean_lengths(p, skeleton) if lengths == "mean" else bone_lengths(None, skeleton)
    return bone_lengths(lengths, skeleton)


def _export(
    turns: np.ndarray, root: np.ndarray, skeleton: Skeleton, rate: float | None, lengths: np.ndarray, scale: float
) -> Bvh:
    scale = scalar(scale, "scale", 1e-6, 1e6)
    offsets = skeleton.axes * lengths[:, None] * scale
    joints = [BvhJoint(skeleton.names[0], -1, (0.0, 0.0, 0.0), (*POSITIONS, *ROTATIONS))]
    nodes, node_of = [0], {0: 0}

    def visit(parent: int) -> None:
        for j in range(1, skeleton.joints):
            if skeleton.parents[j] == parent:
                offset = offsets[parent] if parent else np.zeros(3)
                end = _triple(offsets[j]) if j in skeleton.leaves else None
                node_of[j] = len(joints)
                nodes.append(j)
                joints.append(BvhJoint(f"bone_{skeleton.names[j]}", node_of[parent], _triple(offset), ROTATIONS, end))
                visit(j)

    visit(0)
    values = [root * scale, np.degrees(to_euler(turns[:, 0], _ORDER))]
    for j in nodes[1:]:
        local = turns[:, skeleton.parents[j]].swapaxes(-1, -2) @ turns[:, j]
        values.append(np.degrees(to_euler(local, _ORDER)))
    rate = skeleton.fps if rate is None else fps(rate, "rate")
    return Bvh(tuple(joints), 1 / rate, np.concatenate(values, axis=1))


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    x, y, z = values.tolist()
    return x, y, z


def _bare(name: str) -> str:
    """Without namespaces, for comparison."""
    return name.rsplit(":", 1)[-1].lower()


def _match(bvh: Bvh, names: dict[str, Place], skeleton: Skeleton) -> list[list[int]]:
    """Per joint of the skeleton, indices into `bvh.names`."""
    index = {name: i for i, name in enumerate(bvh.names)}
    loose: dict[str, int] = {}
    for name, i in index.items():
        loose.setdefault(_bare(name), i)

    def find(place: Place) -> list[int] | None:
        wanted = [place] if isinstance(place, str) else list(place)
        found = [index.get(w, loose.get(_bare(w))) if isinstance(w, str) else None for w in wanted]
        return [f for f in found if f is not None] if found and None not in found else None

    given: dict[int, list[int]] = {}
    for joint, place in names.items():
        where = find(place)
        if where is None:
            raise InputError(f"names: {show(place)} for {show(joint)} is not in the file; it has {_listed(bvh.names)}")
        given[skeleton.joint(joint)] = where
    own: dict[str, Place] = {}
    for name in bvh.names:
        try:
            own[skeleton.names[skeleton.joint(_bare(name))]] = name
        except InputError:
            continue
    tables = {**CONVENTIONS, "the export of this package": exported_names(skeleton), "the skeleton": own}
    missing: list[int] = []
    closest = ""
    for title, table in tables.items():
        found = {j: find(table[name]) if name in table else None for j, name in enumerate(skeleton.names)}
        places = [given.get(j) or found[j] for j in range(skeleton.joints)]
        lost = [j for j, where in enumerate(places) if where is None]
        if not lost:
            return [where for where in places if where is not None]
        if not closest or len(lost) < len(missing):
            missing, closest = lost, title
    wanted = [f"{skeleton.names[j]} ({show(tables[closest].get(skeleton.names[j], 'no name'))})" for j in missing]
    raise InputError(
        f"no joint of the file is known as {', '.join(wanted)}; the names are closest to {closest}. "
        f"Pass names={{{skeleton.names[missing[0]]!r}: ...}}; the file has {_listed(bvh.names)}"
    )


def _listed(names: Sequence[str], most: int = 40) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
