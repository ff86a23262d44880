"""Joint positions to the features that motion models work on, and back. Source: HumanML3D.

A motion in features starts at the origin, faces +Z and stands on the floor y = 0. Positions are in the unit of the
skeleton. Rotations belong to bones, not to joints: that of joint j turns the bone that ends in j from its direction at
rest; they are no SMPL pose parameters, whose rest pose is another one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.blocks.motion.arrays import floats, poses, scalar
from engine.blocks.motion.pose import StartPose, forwards
from engine.blocks.motion.rotations import between, matrix_from_6d, matrix_to_6d, unit, yaw
from engine.blocks.motion.skeleton import HUMANML3D, Skeleton, skeleton_of
from engine.errors import ConfigError, InputError

#: Frames, the deviation of the Gaussian that HumanML3D smooths headings with.
SMOOTHING = 20.0


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Means and deviations of a data set.

    Attributes:
        mean, std: [D] fp32 of the features.
        joint_mean, joint_std: [J, 3] fp32 of joint positions in metres, for the input of a trajectory encoder.

    Raises:
        ConfigError: other shapes, a value that is not finite, a deviation that is not positive.
    """

    mean: np.ndarray
    std: np.ndarray
    joint_mean: np.ndarray
    joint_std: np.ndarray

    def __post_init__(self) -> None:
        for name in ("mean", "std", "joint_mean", "joint_std"):
            array = np.array(getattr(self, name), np.float32)
            shape = (len(self.mean),) if not name.startswith("joint") else ((len(self.mean) + 1) // 12, 3)
            if array.shape != shape or not np.isfinite(array).all() or (name.endswith("std") and not (array > 0).all()):
                raise ConfigError(f"statistics: {name} is not {list(shape)} finite numbers, deviations above zero")
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def normalize(self, features: Any) -> np.ndarray:
        """[..., D] to mean 0 and deviation 1."""
        return (floats(features, (len(self.mean),), "features") - self.mean) / self.std

    def denormalize(self, values: Any) -> np.ndarray:
        """The way back of `normalize`."""
        return floats(values, (len(self.mean),), "values") * self.std + self.mean

    def hint(self, target: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Targets [T, J, 3] m with mask [T, J] to the input of a trajectory encoder: [T, 3 J] fp32, 0 without mask.

        Source: OmniControl.
        """
        target = floats(target, self.joint_mean.shape, "target")
        hint = np.where(np.asarray(mask, bool)[..., None], (target - self.joint_mean) / self.joint_std, 0)
        return hint.reshape(*target.shape[:-2], -1).astype(np.float32)


def _humanml3d() -> FeatureStatistics:
    data = json.loads(Path(__file__).with_name("humanml3d.json").read_text("utf-8"))
    std = np.empty(HUMANML3D.dims)
    # One deviation for each group of features.
    for group, where in HUMANML3D.layout._asdict().items():
        std[where] = data["std"][group]
    mean, deviation = (np.reshape(data[key], (HUMANML3D.joints, 3)) for key in ("joint_mean", "joint_std"))
    return FeatureStatistics(np.array(data["mean"]), std, mean, deviation)


#: Of the HumanML3D data set itself; other projects store deviations divided by 5 or 25 for some groups.
HUMANML3D_STATISTICS = _humanml3d()


def recover_root(features: Any) -> tuple[np.ndarray, np.ndarray]:
    """The path of the root.

    Args:
        features: [..., T, D], not normalised.

    Returns:
        heading [..., T] rad about +Y, 0 in frame 0; position [..., T, 3], x = z = 0 in frame 0.
    """
    x = floats(features, (None, None), "features")
    heading, root = _root(x.astype(np.float64))
    return heading.astype(x.dtype), root.astype(x.dtype)


def recover_joints(features: Any, skeleton: Skeleton | None = None) -> np.ndarray:
    """Joint positions from the features of positions: what the models are judged by.

    Args:
        features: [..., T, D], not normalised.
        skeleton: default: the data set whose D it is.

    Returns:
        [..., T, J, 3] in the skeleton's unit, of the dtype of the features (fp64 inside).

    Raises:
        InputError: another D, a value that is not finite.
    """
    x, skeleton = _features(features, skeleton)
    wide = x.astype(np.float64)
    heading, root = _root(wide)
    local = wide[..., skeleton.layout.positions]
    local = local.reshape(*local.shape[:-1], skeleton.joints - 1, 3)
    turned = _turn(local, heading[..., None])
    turned[..., 0] += root[..., None, 0]
    turned[..., 2] += root[..., None, 2]
    return np.concatenate([root[..., None, :], turned], axis=-2).astype(x.dtype)


def recover_from_rotations(
    features: Any, skeleton: Skeleton | None = None, lengths: Sequence[float] | np.ndarray | None = None
) -> np.ndarray:
    """Joint positions from the features of rotations: bones keep their lengths.

    Guidance and edits change positions only, so after them use `recover_joints`.

    Args:
        features: [..., T, D], not normalised.
        skeleton: default: the data set whose D it is.
        lengths: [J] of the bones in the skeleton's unit; default: the data set's.

    Returns:
        [..., T, J, 3] in the skeleton's unit, of the dtype of the features.

    Raises:
        InputError: as `recover_joints`; no lengths are known.
    """
    x, skeleton = _features(features, skeleton)
    wide = x.astype(np.float64)
    heading, root = _root(wide)
    world = bone_rotations(wide, heading, skeleton)
    return place(world, root, skeleton, bone_lengths(lengths, skeleton)).astype(x.dtype)


def from_joints(
    positions: Any,
    skeleton: Skeleton = HUMANML3D,
    *,
    retarget: bool | None = None,
    smoothing: float = SMOOTHING,
) -> np.ndarray:
    """Features of a motion, for encoding.

    Args:
        positions: [T, J, 3], T >= 2, Y up, at the skeleton's frame rate; any start and heading. Any size and unit if
            retargeted, else the skeleton's unit.
        skeleton: of the model.
        retarget: give the bones the data set's lengths first; default: where it has any.
        smoothing: deviation in frames of a Gaussian over the headings. The data set has 20; 0 is none, then the
            features of recovered joints are the features again.

    Returns:
        [T - 1, D], of the dtype of the positions (fp64 inside). `recover_joints` of them gives the retargeted motion,
        less its last frame, from the origin.

    Raises:
        InputError: another shape, a value that is not finite, a first frame that faces nowhere, two joints in one
            place along a leg.
    """
    given = poses(positions, skeleton.joints, "positions", least=2)
    smoothing = scalar(smoothing, "smoothing", 0, 1000)
    p = given.astype(np.float64)
    if retarget or (retarget is None and skeleton.lengths is not None):
        p = retargeted(p, skeleton)
    p = StartPose.of(p, skeleton).to_model(p)
    p[..., 1] -= p[..., 1].min()
    heading = _headings(p, skeleton, smoothing)
    moves = np.diff(p, axis=0)
    root = p[:, :1] * [1, 0, 1]
    out = np.empty((len(p) - 1, skeleton.dims))
    at = skeleton.layout
    # Wrapped, so that a turn through the back is as small as it is; the data set's script turns the wrong way there.
    out[:, at.turn] = -0.5 * ((np.diff(heading) + np.pi) % (2 * np.pi) - np.pi)[:, None]
    out[:, at.travel] = _turn(moves[:, 0], -heading[1:])[:, [0, 2]]
    out[:, at.height] = p[:-1, 0, 1:2]
    out[:, at.positions] = _turn(p - root, -heading[:, None])[:-1, 1:].reshape(len(out), -1)
    out[:, at.rotations] = _rotation_features(p, heading, skeleton)[:-1]
    out[:, at.velocities] = _turn(moves, -heading[:-1, None]).reshape(len(out), -1)
    out[:, at.contacts] = (moves[:, list(skeleton.feet)] ** 2).sum(-1) < skeleton.contact
    return out.astype(given.dtype)


def retargeted(positions: Any, skeleton: Skeleton = HUMANML3D) -> np.ndarray:
    """The motion [T, J, 3] with the skeleton's bone lengths, paths scaled by the length of a leg; fp64.

    Directions of bones stay. A bone of no length takes its direction at rest.

    Raises:
        InputError: the skeleton has no lengths; a leg of frame 0 has none.
    """
    p = poses(positions, skeleton.joints, "positions").astype(np.float64)
    lengths = bone_lengths(None, skeleton)
    first = np.linalg.norm(_bones(p[:1], skeleton)[0], axis=-1)
    # By the joints at its end, as the data set names these bones.
    leg, wanted = (float(sum(values[j] for j in skeleton.legs)) for values in (first, lengths))
    if not leg > 1e-6:
        names = " and ".join(skeleton.names[j] for j in skeleton.legs)
        raise InputError(f"the bones to {names} have no length in frame 0, so the size of this person is not known")
    return place_along(_directions(p, skeleton), p[:, 0] * (wanted / leg), skeleton, lengths)


def bone_lengths(lengths: Sequence[float] | np.ndarray | None, skeleton: Skeleton) -> np.ndarray:
    """[J] fp64, checked; None: the skeleton's own."""
    if lengths is None:
        return np.linalg.norm(skeleton.offsets, axis=-1)
    array = floats(lengths, (skeleton.joints,), "lengths").astype(np.float64)
    if array.ndim != 1 or (array < 0).any():
        raise InputError(
            f"lengths has shape {list(array.shape)} or is negative; one for each of {skeleton.joints} joints"
        )
    return array


def mean_lengths(positions: Any, skeleton: Skeleton) -> np.ndarray:
    """[J] fp64: the mean length of each bone of a motion [T, J, 3], 0 for the root."""
    p = poses(positions, skeleton.joints).astype(np.float64)
    return np.linalg.norm(_bones(p, skeleton), axis=-1).mean(0)


def shortest_arcs(positions: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """[T, J, 3, 3]: the shortest rotation of each bone from its direction at rest; the identity for the root."""
    out = between(np.broadcast_to(skeleton.axes, positions.shape), _directions(positions, skeleton))
    out[..., 0, :, :] = np.eye(3)
    return out


def bone_rotations(features: np.ndarray, heading: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """[..., T, J, 3, 3]: rotations of the bones in the world, accumulated along the chains; that of the root is the
    heading [..., T]."""
    six = features[..., skeleton.layout.rotations]
    local = matrix_from_6d(six.reshape(*six.shape[:-1], skeleton.joints - 1, 6))
    # The root of the features turns the world to the heading: the inverse of what the person does.
    start = yaw(-heading)
    out = np.empty((*local.shape[:-3], skeleton.joints, 3, 3))
    out[..., 0, :, :] = yaw(heading)
    for chain in skeleton.chains:
        turn = start
        for j in chain[1:]:
            turn = turn @ local[..., j - 1, :, :]
            out[..., j, :, :] = turn
    return out


def place(world: np.ndarray, root: np.ndarray, skeleton: Skeleton, lengths: np.ndarray) -> np.ndarray:
    """Joints [..., J, 3] of bones with rotations [..., J, 3, 3] in the world, root [..., 3], lengths [J]."""
    return place_along((world @ skeleton.axes[:, :, None])[..., 0], root, skeleton, lengths)


def place_along(directions: np.ndarray, root: np.ndarray, skeleton: Skeleton, lengths: np.ndarray) -> np.ndarray:
    """As `place`, from the directions [..., J, 3] of the bones."""
    out = directions * lengths[:, None]
    out[..., 0, :] = root
    for j, parent in enumerate(skeleton.parents[1:], 1):
        out[..., j, :] += out[..., parent, :]
    return out


def _features(features: Any, skeleton: Skeleton | None) -> tuple[np.ndarray, Skeleton]:
    x = floats(features, (None, None if skeleton is None else skeleton.dims), "features")
    return x, skeleton or skeleton_of(x.shape[-1])


def _root(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    heading = np.zeros(x.shape[:-1])
    heading[..., 1:] = -2 * np.cumsum(x[..., :-1, 0], axis=-1)
    root = np.zeros((*x.shape[:-1], 3))
    root[..., 1:, 0], root[..., 1:, 2] = x[..., :-1, 1], x[..., :-1, 2]
    root = np.cumsum(_turn(root, heading), axis=-2)
    root[..., 1] = x[..., 3]
    return heading, root


def _turn(points: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """[..., 3] about +Y by [...]."""
    c, s = np.cos(angle), np.sin(angle)
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    return np.stack([c * x + s * z, y, c * z - s * x], axis=-1)


def _bones(p: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """[..., J, 3]: each joint less its parent, zero for the root."""
    return p - p[..., [max(parent, 0) for parent in skeleton.parents], :]


def _directions(p: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    out = unit(_bones(p, skeleton), (0, 0, 0))
    return np.where((out == 0).all(-1, keepdims=True), skeleton.axes, out)


def _headings(p: np.ndarray, skeleton: Skeleton, smoothing: float) -> np.ndarray:
    """[T] rad of poses that start facing +Z; a frame that faces nowhere keeps the heading before it."""
    forward = forwards(p, skeleton)[:, [0, 2]]
    if smoothing > 0:
        reach = int(4 * smoothing + 0.5)
        weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / smoothing) ** 2)
        weights /= weights.sum()
        padded = np.pad(forward, ((reach, reach), (0, 0)), mode="edge")
        forward = np.stack([np.convolve(column, weights, "valid") for column in padded.T], axis=-1)
    heading = np.arctan2(forward[:, 0], forward[:, 1])
    defined = np.hypot(forward[:, 0], forward[:, 1]) > 1e-6
    # What is recovered starts with heading 0, whatever the smoothing makes of frame 0.
    defined[0], heading[0] = True, 0.0
    return heading[np.maximum.accumulate(np.where(defined, np.arange(len(p)), 0))]


def _rotation_features(p: np.ndarray, heading: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    world = shortest_arcs(p, skeleton)
    world[:, 0] = yaw(-heading)
    before = world[:, list(skeleton.before[1:])]
    return matrix_to_6d(before.swapaxes(-1, -2) @ world[:, 1:]).reshape(len(p), -1)
