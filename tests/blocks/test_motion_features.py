"""Rotations, skeletons, and features of motions both ways."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from _motion_clips import clip, uniform
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks.motion import (
    HUMANML3D,
    HUMANML3D_STATISTICS,
    KIT,
    FeatureStatistics,
    Layout,
    StartPose,
    from_joints,
    recover_from_rotations,
    recover_joints,
    recover_root,
    retargeted,
    skeleton_of,
)
from engine.blocks.motion import rotations as rot
from engine.blocks.motion.features import mean_lengths
from engine.errors import ConfigError, InputError

AT = HUMANML3D.layout
SEEDS = st.integers(0, 2**32 - 1)


def random_rotations(seed: int, n: int) -> np.ndarray:
    q = np.random.default_rng(seed).normal(size=(n, 4))
    return rot.from_quaternion(q / np.linalg.norm(q, axis=-1, keepdims=True))


def is_rotation(m: np.ndarray) -> bool:
    return np.abs(m @ m.swapaxes(-1, -2) - np.eye(3)).max() < 1e-12 and bool((np.linalg.det(m) > 0.99).all())


# ---- rotations


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_ways_to_write_a_rotation(seed):
    m = random_rotations(seed, 40)
    assert np.abs(rot.from_quaternion(rot.to_quaternion(m)) - m).max() < 1e-12
    assert np.abs(rot.matrix_from_6d(rot.matrix_to_6d(m)) - m).max() < 1e-12
    for axes in itertools.permutations(range(3)):
        assert np.abs(rot.from_euler(rot.to_euler(m, axes), axes) - m).max() < 1e-12


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("off", [0, 1e-15, 1e-9, 1e-7, 1e-4])
def test_angles_at_the_poles(axes, off):
    """Where two of the three axes fall together the angles are not unique, but what they make is."""
    sides = np.random.default_rng(0).uniform(-3, 3, (20, 3))
    sides[:, 1] = np.where(np.arange(20) % 2, 1, -1) * (np.pi / 2 - off)
    m = rot.from_euler(sides, axes)
    assert np.abs(rot.from_euler(rot.to_euler(m, axes), axes) - m).max() < 1e-12


def test_half_turns_as_quaternions():
    for axis in range(3):
        m = rot.axis_rotation(np.array([np.pi, -np.pi, 0.0]), axis)
        assert np.abs(rot.from_quaternion(rot.to_quaternion(m)) - m).max() < 1e-12


@given(SEEDS, st.sampled_from([0, 1e-12, 1e-9, 1e-8, 1e-6, 1e-3, 1]))
@settings(max_examples=40, deadline=None)
def test_shortest_arcs(seed, off):
    random = np.random.default_rng(seed)
    source = rot.unit(random.normal(size=(20, 3)), (1, 0, 0))
    target = rot.unit(random.choice([-1, 1], (20, 1)) * source + off * random.normal(size=(20, 3)), (1, 0, 0))
    m = rot.between(source, target)
    assert is_rotation(m)
    assert np.abs((m @ source[..., None])[..., 0] - target).max() < 2e-7
    # No turn is shorter: its angle is the one between the vectors.
    angle = np.arccos(np.clip((np.trace(m, axis1=-2, axis2=-1) - 1) / 2, -1, 1))
    assert np.abs(angle - np.arccos(np.clip((source * target).sum(-1), -1, 1))).max() < 1e-6


def test_six_numbers_that_span_no_plane_give_a_rotation():
    six = np.array([[0, 0, 0, 0, 0, 0], [1, 0, 0, 2, 0, 0], [0, 1, 0, 0, -1, 0], [0, 0, 0, 1, 2, 3.0]])
    assert is_rotation(rot.matrix_from_6d(six))


def test_slerp_goes_the_short_way_round():
    a, b = rot.to_quaternion(rot.yaw(np.array([3.0, -3.0])))
    middle = rot.from_quaternion(rot.slerp(a, b, np.array(0.5)))
    assert np.abs(middle - rot.yaw(np.pi)).max() < 1e-12
    share = np.linspace(0, 1, 7)
    turns = rot.slerp(np.tile(a, (7, 1)), np.tile(-a, (7, 1)), share)
    assert np.abs(rot.from_quaternion(turns) - rot.yaw(3.0)).max() < 1e-12, "a quaternion and its negative are one"


# ---- skeletons


def test_layout():
    assert [tuple(s.indices(263)[:2]) for s in AT] == [
        (0, 1), (1, 3), (3, 4), (4, 67), (67, 193), (193, 259), (259, 263),
    ]  # fmt: skip
    assert KIT.layout.rotations == slice(64, 184) and KIT.layout.contacts == slice(247, 251)
    for joints in (2, 5, 52):
        assert Layout.of(joints).contacts.stop == 12 * joints - 1
    assert (HUMANML3D.dims, KIT.dims) == (263, 251) and skeleton_of(251) is KIT and skeleton_of(263) is HUMANML3D
    with pytest.raises(InputError, match="264 features"):
        skeleton_of(264)


def test_skeletons():
    assert HUMANML3D.leaves == (10, 11, 15, 20, 21) and KIT.leaves == (4, 7, 10, 15, 20)
    assert HUMANML3D.before[13] == 0 and HUMANML3D.parents[13] == 9, "arms accumulate from the root, not from joint 9"
    assert HUMANML3D.offsets[4].tolist() == [0, -0.39362, 0] and HUMANML3D.unit == "m" and KIT.unit == "mm"
    assert not HUMANML3D.offsets.flags.writeable and not HUMANML3D.axes.flags.writeable
    with pytest.raises(InputError, match="KIT-ML has no bone lengths"):
        _ = KIT.offsets


@pytest.mark.parametrize(
    ("which", "index"),
    [("pelvis", 0), ("root", 0), (20, 20), (np.int64(7), 7), ("l_wrist", 20), ("Left Wrist", 20), ("RightHip", 2),
     ("R_Hip", 2), ("right-elbow", 19), (" head ", 15)],
)  # fmt: skip
def test_joint_names(which, index):
    assert HUMANML3D.joint(which) == index


@pytest.mark.parametrize("which", ["", "left", "wrist", 22, -1, 1.0, True, None, "x" * 500, [1]])
def test_joint_names_that_are_none(which):
    with pytest.raises(InputError, match="20 l_wrist") as fault:
        HUMANML3D.joint(which)
    assert len(str(fault.value)) < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": (-1, 0, 2)}, "after its parent"),
        ({"names": ("a", "a", "c")}, "one name"),
        ({"chains": ((0, 1),)}, "every bone once"),
        ({"directions": ("", "+x", "up")}, "point along"),
        ({"lengths": (0.0, 1.0)}, "one name"),
    ],
)
def test_skeletons_are_checked(change, message):
    good = {
        "name": "small", "names": ("a", "b", "c"), "parents": (-1, 0, 1), "chains": ((0, 1, 2),),
        "directions": ("", "+y", "+y"), "lengths": None, "feet": (1, 2, 1, 2), "facing": (1, 2, 1, 2), "legs": (1, 2),
        "skating": (2,), "fps": 20.0, "metre": 1.0, "contact": 0.1,
    }  # fmt: skip
    assert type(HUMANML3D)(**good).dims == 35
    with pytest.raises(ConfigError, match=message):
        type(HUMANML3D)(**{**good, **change})


# ---- positions out of features


def slow_joints(x: np.ndarray) -> np.ndarray:
    """One frame after the other, from the formulas."""
    joints = (x.shape[1] + 1) // 12
    out = np.zeros((len(x), joints, 3))
    theta = px = pz = 0.0
    for t in range(len(x)):
        if t:
            theta += x[t - 1, 0]
        c, s = math.cos(2 * theta), math.sin(2 * theta)
        if t:
            vx, vz = x[t - 1, 1:3]
            px, pz = px + vx * c - vz * s, pz + vx * s + vz * c
        out[t, 0] = px, x[t, 3], pz
        for j in range(1, joints):
            a, b, d = x[t, 1 + 3 * j : 4 + 3 * j]
            out[t, j] = a * c - d * s + px, b, a * s + d * c + pz
    return out


@pytest.mark.parametrize("skeleton", [HUMANML3D, KIT], ids=lambda s: s.name)
def test_recover_is_the_formula(skeleton):
    x = np.random.default_rng(1).normal(size=(2, 3, 20, skeleton.dims)) * 0.3
    got = recover_joints(x)
    assert got.shape == (2, 3, 20, skeleton.joints, 3) and got.dtype == np.float64
    assert np.abs(got[1, 2] - slow_joints(x[1, 2])).max() < 1e-12
    single = recover_joints(x[0, 0].astype(np.float32))
    assert single.dtype == np.float32 and np.abs(single - got[0, 0]).max() < 1e-5
    heading, root = recover_root(x)
    assert (root == got[..., 0, :]).all() and (heading[..., 0] == 0).all() and (root[..., 0, [0, 2]] == 0).all()
    last = x[0, 0].copy()
    last[-1, :3] += 1
    assert (recover_joints(last) == got[0, 0]).all(), "the last frame's turn and travel lead nowhere"


def test_golden_joints():
    """Values of an independent implementation (in fp64, from HumanML3D's own code)."""
    assert uniform("test", 2).tolist() == [0.32296541100367904, 0.9392699846066535]
    std, mean = np.empty(263), np.zeros(263)
    for where, value in zip(AT, (0.0128, 0.0169, 0.1538, 0.1222, 0.2997, 0.0195, 0.3559), strict=True):
        std[where] = value
    mean[3] = 0.9
    p = recover_joints(math.sqrt(3) * uniform("guide.x", 64, 263) * std + mean)
    assert np.abs(p.ravel()[:4] - [0, 0.9771312362, 0, -0.01674554259]).max() < 1e-10
    assert abs(p.sum() - 21.67555546) < 1e-7 and abs((p**2).sum() - 132.8608247) < 1e-6
    assert np.abs(p[63, 0] - [-0.17665579775, 1.04595747783, -0.00045931160]).max() < 1e-10
    assert np.abs(p[63, 20] - [-0.00758727282, 0.00537974818, 0.11939210044]).max() < 1e-8
    assert np.abs(p[63, 20, 1:] - [0.00537974818, 0.11939210044]).max() < 1e-10


def test_bad_features():
    good = np.zeros((4, 263))
    for bad, message in (
        (np.zeros((4, 262)), "262 features"),
        (np.zeros(263), "features is float64"),
        (np.full((4, 263), np.nan), "finite"),
        (np.array([["a"] * 263]), "numbers"),
    ):
        with pytest.raises(InputError, match=message):
            recover_joints(bad)
    with pytest.raises(InputError, match="251"):
        recover_joints(good, KIT)


# ---- features out of positions


def slow_features(p: np.ndarray, smoothing: float) -> np.ndarray:
    """By other means than the package: complex numbers for headings, Rodrigues' formula for arcs, loops."""
    skeleton, frames = HUMANML3D, len(p)
    lengths = [0.0] + [float(np.linalg.norm(p[0, j] - p[0, skeleton.parents[j]])) for j in range(1, 22)]
    size = (skeleton.lengths[5] + skeleton.lengths[8]) / (lengths[5] + lengths[8])
    q = np.zeros_like(p)
    for t in range(frames):
        q[t, 0] = p[t, 0] * size
        for chain in skeleton.chains:
            for a, b in itertools.pairwise(chain):
                way = p[t, b] - p[t, a]
                q[t, b] = q[t, a] + skeleton.lengths[b] * way / np.linalg.norm(way)
    q -= [q[0, 0, 0], q[..., 1].min(), q[0, 0, 2]]
    facing = []
    for t in range(frames):
        across = q[t, 2] - q[t, 1] + q[t, 17] - q[t, 16]
        facing.append(np.cross([0, 1, 0], across / np.linalg.norm(across)))
    planar = np.array([complex(f[2], f[0]) for f in facing])
    start = planar[0] / abs(planar[0])
    flat = (q[..., 2] + 1j * q[..., 0]) / start
    q = np.stack([flat.imag, q[..., 1], flat.real], axis=-1)
    planar /= start
    if smoothing:
        reach = int(4 * smoothing + 0.5)
        weights = [math.exp(-(k**2) / (2 * smoothing**2)) for k in range(-reach, reach + 1)]
        at = [[min(max(t + k, 0), frames - 1) for k in range(-reach, reach + 1)] for t in range(frames)]
        planar = np.array([np.dot(weights, planar[rows]) for rows in at])
    planar /= np.abs(planar)
    planar[0] = 1
    flat = q[..., 2] + 1j * q[..., 0]

    def level(numbers: np.ndarray, heights: np.ndarray) -> np.ndarray:
        return np.stack([numbers.imag, heights, numbers.real], axis=-1)

    def arc(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        axis = np.cross(a, b)
        k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
        return np.eye(3) + k + k @ k / (1 + a @ b)

    out = []
    for t in range(frames - 1):
        step = (flat[t + 1, 0] - flat[t, 0]) / planar[t + 1]
        local = level((flat[t] - flat[t, 0]) / planar[t], q[t, :, 1])
        turns, h = {}, np.angle(planar[t])
        root = np.array([[math.cos(h), 0, -math.sin(h)], [0, 1, 0], [math.sin(h), 0, math.cos(h)]])
        for chain in skeleton.chains:
            so_far = root
            for a, b in itertools.pairwise(chain):
                way = q[t, b] - q[t, a]
                turns[b] = np.linalg.inv(so_far) @ arc(skeleton.axes[b], way / np.linalg.norm(way))
                so_far = so_far @ turns[b]
        moves = q[t + 1] - q[t]
        out.append(
            [-np.angle(planar[t + 1] / planar[t]) / 2, step.imag, step.real, q[t, 0, 1], *local[1:].ravel()]
            + [v for j in range(1, 22) for v in (*turns[j][:, 0], *turns[j][:, 1])]
            + [*level((flat[t + 1] - flat[t]) / planar[t], moves[:, 1]).ravel()]
            + [float((moves[j] ** 2).sum() < 0.002) for j in (7, 10, 8, 11)]
        )
    return np.array(out)


@pytest.mark.parametrize("smoothing", [0, 3, 20])
def test_features_are_the_definition(smoothing):
    p = clip(40, seed=3) * 1.3
    p[20:30] = p[20]  # feet that stand
    x = from_joints(p, smoothing=smoothing)
    assert x.shape == (39, 263)
    assert np.abs(x - slow_features(p, smoothing)).max() < 1e-10
    assert 0 < x[:, AT.contacts].mean() < 1


@given(SEEDS, st.sampled_from([0, 5, 20]))
@settings(max_examples=15, deadline=None)
def test_both_recoveries_undo_it(seed, smoothing):
    p = clip(50, seed)
    x = from_joints(p, smoothing=smoothing)
    want = StartPose.of(p).to_model(retargeted(p))[:-1]
    want[..., 1] -= p[..., 1].min()
    assert np.abs(recover_joints(x) - want).max() < 1e-10
    assert np.abs(recover_from_rotations(x) - want).max() < 1e-10


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_features_of_recovered_joints_are_the_features(seed):
    p = clip(50, seed)
    p[-1, :, 1] += 1  # the floor is not set by the frame that is lost
    x = from_joints(p, smoothing=0)
    again = from_joints(recover_joints(x), smoothing=0)
    assert np.abs(again - x[:-1]).max() < 1e-9


@given(SEEDS, st.floats(0.01, 100), st.floats(-10, 10))
@settings(max_examples=10, deadline=None)
def test_size_place_and_heading_do_not_matter(seed, size, turn):
    p = clip(30, seed)
    moved = StartPose((3, -7), turn).to_world(p * size + np.array([0, 5, 0]))
    assert np.abs(from_joints(moved) - from_joints(p)).max() < 1e-9


def test_turning_through_the_back():
    """Three whole turns: the heading wraps, the motion must not notice."""
    p = clip(120, seed=1, spin=np.pi)
    for smoothing in (0, 2):
        x = from_joints(p, smoothing=smoothing)
        assert np.abs(x[:, AT.turn]).max() < 0.3
        want = StartPose.of(p).to_model(p)[:-1]
        assert np.abs((recover_joints(x) - want)[..., [0, 2]]).max() < 1e-9
        assert np.abs(recover_from_rotations(x) - recover_joints(x)).max() < 1e-9


def test_retargeting():
    p = clip(20, seed=2) * 2
    p[:, 18] += 0.3 * (p[:, 18] - p[:, 16])  # longer arms
    r = retargeted(p)
    assert np.abs(mean_lengths(r, HUMANML3D) - HUMANML3D.lengths).max() < 1e-12
    assert np.abs(r[:, 0] - p[:, 0] / 2).max() < 1e-9, "ways shrink with the legs"
    ways = [rot.unit(q[:, 18] - q[:, 16], (0, 0, 0)) for q in (p, r)]
    assert np.abs(ways[0] - ways[1]).max() < 1e-12
    kept = from_joints(p, retarget=False)
    assert np.abs(mean_lengths(recover_joints(kept), HUMANML3D) - mean_lengths(p[:-1], HUMANML3D)).max() < 1e-9


def test_bones_of_no_length_take_their_rest():
    p = clip(20, seed=4)
    p[:, 13] = p[:, 9]
    p[5:9, 15] = p[5:9, 12]
    x = from_joints(p)
    assert np.isfinite(x).all()
    assert np.abs(recover_joints(x) - recover_from_rotations(x)).max() < 1e-9


def test_kit():
    p = clip(30, seed=5, skeleton=KIT) * 1000
    x = from_joints(p, KIT)
    assert x.shape == (29, 251)
    want = StartPose.of(p, KIT).to_model(p)[:-1]
    want[..., 1] -= p[..., 1].min()
    assert np.abs(recover_joints(x) - want).max() < 1e-8
    assert np.abs(recover_from_rotations(x, lengths=mean_lengths(p, KIT)) - want).max() < 1e-8
    with pytest.raises(InputError, match="no bone lengths"):
        recover_from_rotations(x)
    with pytest.raises(InputError, match="no bone lengths"):
        from_joints(p, KIT, retarget=True)


def test_precision_is_that_of_the_input():
    p = clip(196, seed=6)
    single = from_joints(p.astype(np.float32))
    assert single.dtype == np.float32
    assert np.abs(recover_joints(single) - recover_joints(from_joints(p))).max() < 1e-4


def test_bad_positions():
    p = clip(5)
    fallen = p.copy()
    fallen[0] = np.arange(22)[:, None] * [0, 1.0, 0]
    legless = p.copy()
    legless[0, [5, 8]] = legless[0, 2]
    broken = p.copy()
    broken[3, 7, 1] = np.inf
    for bad, message in (
        (p[:1], "with 2 to 100000 frames"),
        (p[:, :21], r"has shape \[5, 21, 3\]"),
        (p[None], "is needed"),
        (p.astype(str), "numbers"),
        (fallen, "faces nowhere"),
        (legless, "r_knee and r_ankle have no length"),
        (broken, r"positions\[3, 7, 1\] is inf"),
        ([[1, 2], [3]], "not an array"),
    ):
        with pytest.raises(InputError, match=message):
            from_joints(bad)
    for smoothing in (-1, np.nan, "20"):
        with pytest.raises(InputError, match="smoothing"):
            from_joints(p, smoothing=smoothing)


# ---- statistics


def test_statistics():
    s = HUMANML3D_STATISTICS
    assert s.mean.shape == s.std.shape == (263,) and s.joint_mean.shape == s.joint_std.shape == (22, 3)
    assert [float(s.mean[i]) for i in (0, 3, 66, 262)] == [
        np.float32(v) for v in (-5.6525e-06, 0.93855, 0.1046, 0.86107)
    ]
    assert (s.std[AT.positions] == np.float32(0.122243591)).all() and s.std[259] == np.float32(0.355932653)
    assert s.joint_mean[21].tolist() == np.float32([-0.19848, 0.98228, 0.39418]).tolist()
    assert s.joint_std[0].tolist() == np.float32([0.52543, 0.15379, 0.92579]).tolist()
    x = from_joints(clip(20)).astype(np.float32)
    assert np.abs(s.denormalize(s.normalize(x)) - x).max() < 1e-5


def test_mean_pose_is_a_person():
    """A value in the wrong place would lift a foot over a knee, or take the left hand to the right."""
    for pose in (recover_joints(HUMANML3D_STATISTICS.mean[None])[0], HUMANML3D_STATISTICS.joint_mean):
        for chain in HUMANML3D.chains[:2]:
            assert (np.diff(pose[list(chain), 1]) < 0).all()
        assert (np.diff(pose[list(HUMANML3D.chains[2]), 1]) > 0).all()
        for j, name in enumerate(HUMANML3D.names):
            side = {"l_": 1, "r_": -1}.get(name[:2], 0)
            assert abs(pose[j, 0]) < 0.01 if side == 0 else side * pose[j, 0] > 0.04
        other = [HUMANML3D.joint({"l": "r", "r": "l"}[n[0]] + n[1:]) if n[1] == "_" else j
                 for j, n in enumerate(HUMANML3D.names)]  # fmt: skip
        assert np.abs(pose[other] * [-1, 1, 1] - pose).max() < 0.03


def test_hint():
    target, mask = np.full((4, 22, 3), np.float32(0.5)), np.zeros((4, 22), bool)
    mask[1, 20] = True
    hint = HUMANML3D_STATISTICS.hint(target, mask)
    assert hint.shape == (4, 66) and hint.dtype == np.float32 and np.count_nonzero(hint) == 3
    s = HUMANML3D_STATISTICS
    assert np.abs(hint[1, 60:63] - (0.5 - s.joint_mean[20]) / s.joint_std[20]).max() < 1e-6


def test_statistics_are_checked():
    s = HUMANML3D_STATISTICS
    with pytest.raises(ConfigError, match="std"):
        FeatureStatistics(s.mean, np.zeros(263), s.joint_mean, s.joint_std)
    with pytest.raises(ConfigError, match="joint_mean"):
        FeatureStatistics(s.mean, s.std, s.joint_mean[:21], s.joint_std)
    with pytest.raises(InputError, match="263"):
        s.normalize(np.zeros((3, 251)))
