"""Waypoints in the user's world, what they become for the model, and what a motion is measured by."""

from __future__ import annotations

import contextlib
import json
import math

import numpy as np
import pytest
from _motion_clips import clip
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks.motion import (
    HUMANML3D,
    KIT,
    Constraints,
    StartPose,
    Waypoints,
    control_error,
    foot_skate,
    from_joints,
    jerk,
    recover_joints,
)
from engine.errors import InputError

GOOD = {"joint": "pelvis", "frames": [0, 20], "positions": [[1, 0.9, 2], [1, 0.9, 3.5]]}


# ---- start pose


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(-7, 7))
@settings(max_examples=30, deadline=None)
def test_start_pose_there_and_back(x, z, heading):
    pose = StartPose((x, z), heading)
    points = np.random.default_rng(0).normal(size=(4, 5, 3))
    assert np.abs(pose.to_model(pose.to_world(points)) - points).max() < 1e-12
    assert (pose.to_world(points)[..., 1] == points[..., 1]).all()
    ahead = pose.to_world([0.0, 0.0, 1.0]) - [x, 0, z]
    assert np.abs(ahead - [math.sin(heading), 0, math.cos(heading)]).max() < 1e-9


def test_start_pose_of_a_motion():
    """The features of a motion, recovered and put back, are the motion."""
    p = clip(40, seed=1)
    p[..., 1] -= p[..., 1].min()
    start = StartPose.of(p)
    assert np.abs(start.to_world(recover_joints(from_joints(p))) - p[:-1]).max() < 1e-9


def test_bad_start_poses():
    for change in (
        {"origin": (1,)},
        {"origin": 3},
        {"origin": (np.nan, 0)},
        {"origin": (0, True)},
        {"heading": np.inf},
    ):
        with pytest.raises(InputError, match=next(iter(change))):
            StartPose(**change)


# ---- waypoints


def test_target_in_the_frame_of_the_model():
    c = Constraints.from_json({"waypoints": [GOOD, {"joint": 20, "frames": [5], "positions": [[2, 1, 2]]}]})
    assert c.start == StartPose((1, 2), 0.0) and len(c) == 3 and c.joints == (0, 20) and c.frames == 21
    target, mask = c.target(40)
    assert target.shape == (40, 22, 3) and target.dtype == np.float32 and mask.shape == (40, 22) and mask.sum() == 3
    assert target[0, 0].tolist() == np.float32([0, 0.9, 0]).tolist() and target[20, 0, 2] == 1.5
    assert target[5, 20].tolist() == [1, 1, 0] and not target[~mask].any()


def test_given_start():
    c = Constraints([Waypoints("root", 0, [1, 0.9, 2])], origin=(1, 1), heading=math.pi / 2)
    target, _ = c.target(1)
    assert np.abs(target[0, 0] - [-1, 0.9, 0]).max() < 1e-6, "a metre to the right of one who looks along +X"
    assert Constraints([Waypoints("head", [3], [[1, 2, 3]])]).start == StartPose()


def test_heading_of_a_whole_first_pose():
    p = clip(30, seed=2)
    mask = np.zeros((30, 22), bool)
    mask[[0, 29]] = True
    c = Constraints.dense(np.where(mask[..., None], p, np.nan), mask)
    want = StartPose.of(p)
    assert np.abs(np.array([*c.start.origin, c.start.heading]) - [*want.origin, want.heading]).max() < 1e-12
    assert len(c) == 44 and c.joints == tuple(range(22))
    target, got = c.target(30)
    assert (got == mask).all()
    assert np.abs(c.to_world(target)[mask] - p[mask]).max() < 1e-5 and c.to_world(target).dtype == np.float32


def test_residuals():
    p = clip(30, seed=3)
    c = Constraints(
        [
            Waypoints(0, [0, 7], p[[0, 7], 0]),
            Waypoints("l_wrist", [3, 9], p[[3, 9], 20] + np.array([[0, 0, 0], [0, 3, 4]])),
        ]
    )
    pelvis, wrist = c.residuals(p)
    assert (pelvis.joint, pelvis.count, pelvis.max) == ("pelvis", 2, 0)
    assert (wrist.joint, wrist.worst) == ("l_wrist", 9) and abs(wrist.max - 5) < 1e-12 and abs(wrist.mean - 2.5) < 1e-12
    assert "l_wrist: 2 waypoints, mean 2.5000 m, max 5.0000 m (frame 9)" in str(wrist)
    with pytest.raises(InputError, match=r"waypoints\[1\].frames\[1\] = 9 \(l_wrist\)"):
        c.residuals(p[:9])


def test_json_there_and_back(tmp_path):
    c = Constraints(
        [Waypoints("Left Wrist", np.array([4, 2]), np.array([[1, 2, 3], [4, 5, 6.5]]))], origin=[3, 4], heading=0.5
    )
    again = Constraints.from_json(c.to_json())
    assert again.start == c.start and again.joints == (20,)
    assert (again.waypoints[0].frames == [4, 2]).all() and (
        again.waypoints[0].positions == c.waypoints[0].positions
    ).all()
    assert set(json.loads(Constraints([Waypoints(0, 0, [0, 1, 0])]).to_json())) == {"waypoints"}
    path = tmp_path / "way.json"
    path.write_text(json.dumps([GOOD]))
    assert len(Constraints.read(path)) == 2 == len(Constraints.from_json(path.read_bytes()))
    with pytest.raises(InputError, match="missing"):
        Constraints.read(tmp_path / "none.json")


def test_other_skeletons():
    c = Constraints.from_json([{"joint": "LW", "frames": [1], "positions": [[0, 1, 0]]}], KIT)
    assert c.joints == (7,) and c.target(4)[0].shape == (4, 21, 3)


def test_no_waypoints():
    c = Constraints([])
    assert len(c) == 0 == c.frames and c.joints == () and c.residuals(clip(3)) == [] and not c.target(5)[1].any()


def item(**change):
    return [GOOD, {**{"joint": "head", "frames": [1], "positions": [[0, 1, 0]]}, **change}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{", "constraints is not usable JSON"),
        ('{"waypoints": [], "waypoints": []}', "twice"),
        ("[" * 100_000, "not usable JSON"),
        ("3", "a list is needed"),
        ({}, "'waypoints' is missing"),
        ({"waypoints": [], "start": 1}, "unknown key 'start'"),
        ({"waypoints": {}}, "waypoints is not a list"),
        ({"waypoints": [], "origin": [1, 2, 3]}, r"origin = \[1, 2, 3\]"),
        ({"waypoints": [], "origin": [1, "2"]}, r"origin\[1\] = 2"),
        ({"waypoints": [], "heading": True}, "heading = True"),
        ('{"waypoints": [], "heading": NaN}', "heading = nan"),
        ([GOOD, 3], r"waypoints\[1\] is 3"),
        ([{}] * 1025, "at most 1024"),
        (item(weight=1), r"waypoints\[1\]: unknown key 'weight'"),
        ([{"joint": 0, "frames": [0]}], r"waypoints\[0\]: 'positions' is missing"),
        (item(joint="tail"), r"waypoints\[1\]: joint 'tail'"),
        (item(joint=22), r"waypoints\[1\]: joint '22'"),
        (item(frames=[0] * 100_001), r"waypoints\[1\].frames has 100001 entries"),
        (item(positions=[[0, 0, 0]] * 100_001), r"waypoints\[1\].positions has 100001 entries"),
        (item(frames=3), r"waypoints\[1\].frames is 3"),
        (item(frames=[]), r"waypoints\[1\].frames"),
        (item(frames=[1.0]), r"waypoints\[1\].frames\[0\] = 1.0"),
        (item(frames=[True]), r"waypoints\[1\].frames\[0\] = True"),
        (item(frames=[-1]), r"waypoints\[1\].frames\[0\] = -1"),
        (item(frames=[10**30]), r"waypoints\[1\].frames\[0\] = 1000"),
        (item(frames=[1, 2]), r"waypoints\[1\].positions has shape \[1, 3\]; 2 frames need"),
        (item(frames=[2, 5, 2], positions=[[0, 1, 0]] * 3), r"waypoints\[1\].frames\[2\] = 2 is there twice"),
        (item(joint="root", frames=[20]), r"waypoints\[1\]: pelvis at frame 20 is also in waypoints\[0\]"),
        (item(positions="abc"), r"waypoints\[1\].positions is 'abc'"),
        (item(positions=[[0, 1]]), r"waypoints\[1\].positions has shape \[1, 2\]"),
        (item(positions=[[0, 1, None]]), r"waypoints\[1\].positions\[0\]\[2\] = None"),
        (item(positions=[[0, 1, "2"]]), r"waypoints\[1\].positions\[0\]\[2\] = '2'"),
        (item(positions=[[0, True, 1]]), r"waypoints\[1\].positions\[0\]\[1\] = True"),
        (item(positions=[[0, 1, 0], [1]]), r"waypoints\[1\].positions is not a list of"),
        (item(positions=[[0, float("nan"), 0]]), r"waypoints\[1\].positions\[0, 1\] is nan"),
        (item(positions=[[0, 1, 1e5]]), r"waypoints\[1\].positions\[0\]\[2\] = 100000"),
        (item(positions=[[10**400, 0, 0]]), r"waypoints\[1\].positions"),
        (item(positions=[[[0, 1, 0]]]), r"waypoints\[1\].positions"),
    ],
)  # fmt: skip
def test_bad_json(source, message):
    with pytest.raises(InputError, match=message) as fault:
        Constraints.from_json(source)
    assert len(str(fault.value)) < 700


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["pelvis", "head"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["joint", "frames", "positions", "waypoints", "origin", "heading"]), inner)
    ),
    max_leaves=12,
)


@given(JSON | st.lists(st.fixed_dictionaries({"joint": JSON, "frames": JSON, "positions": JSON}), max_size=2))
@settings(max_examples=300, deadline=None)
def test_anything_is_read_or_refused(source):
    with contextlib.suppress(InputError):
        Constraints.from_json(json.dumps(source))


def test_bad_calls():
    with pytest.raises(InputError, match="list of Waypoints"):
        Constraints([GOOD])
    with pytest.raises(InputError, match=r"waypoints of 'head'.positions has shape"):
        Waypoints("head", [1], np.zeros((2, 3)))
    with pytest.raises(InputError, match=r"waypoints of 'head'.frames is float64"):
        Waypoints("head", np.array([1.0]), np.zeros((1, 3)))
    with pytest.raises(InputError, match="mask is float64"):
        Constraints.dense(np.zeros((4, 22, 3)), np.zeros((4, 22)))
    with pytest.raises(InputError, match="target has shape"):
        Constraints.dense(np.zeros((4, 21, 3)), np.zeros((4, 22), bool))
    with pytest.raises(InputError, match="frames = 0"):
        Constraints([]).target(0)
    with pytest.raises(InputError, match="or 1000000 waypoints"):
        Constraints([Waypoints(i % 22, np.arange(99_999), np.zeros((99_999, 3))) for i in range(11)])


# ---- metrics


def test_control_error():
    p = np.zeros((2, 5, 22, 3))
    target, mask = np.full((2, 5, 22, 3), np.nan), np.zeros((2, 5, 22), bool)
    for b, t, j, far in ((0, 0, 0, 0.6), (0, 0, 20, 0.2), (0, 3, 20, 0.9), (1, 2, 0, 0.1)):
        target[b, t, j], mask[b, t, j] = [far, 0, 0], True
    e = control_error(p, target, mask)
    assert abs(e.average - (0.4 + 0.9 + 0.1) / 3) < 1e-12 and e.max == 0.9
    assert e.location == 1 / 3 and e.trajectory == 0.5
    assert [(n, round(a, 9), m) for n, a, m in e.joints] == [("pelvis", 0.35, 0.6), ("l_wrist", 0.55, 0.9)]
    strict = control_error(p, target, mask, limit=0.05)
    assert strict.location == 1 and strict.trajectory == 1
    assert control_error(p[1], target[1], mask[1]).average == 0.1
    with pytest.raises(InputError, match="empty"):
        control_error(p, target, mask & False)
    with pytest.raises(InputError, match="do not fit"):
        control_error(p[0], target, mask)
    with pytest.raises(InputError, match="target"):
        control_error(p, target, ~mask)


def test_control_error_agrees_with_residuals():
    p = clip(30, seed=4)
    c = Constraints([Waypoints("r_wrist", [1, 4, 8], p[[1, 4, 8], 21] + 0.1)], origin=(1, 2), heading=1.0)
    e = control_error(c.start.to_model(p), *c.target(30))
    assert abs(e.average - c.residuals(p)[0].mean) < 1e-6 and abs(e.max - c.residuals(p)[0].max) < 1e-6


def test_foot_skate():
    p = np.zeros((21, 22, 3))
    p[:, 10, 1] = 1  # the left foot is up
    assert foot_skate(p) == 0
    p[:, 11, 0] = np.arange(21) * 0.05  # the right one slides at 1 m/s
    assert foot_skate(p) == 1, "at the ends too, where the mean of five has two zeros: 0.6 m/s"
    assert foot_skate(p, 8.0) == 0, "the same steps in more time"
    p[10:, 11, 1] = 0.06
    assert foot_skate(p) == 9 / 20, "both frames of a step must be low"
    q = np.zeros((21, 22, 3))
    q[10:, 11, 0] = 0.06
    assert foot_skate(q) == 0, "one quick step is 1.2 m/s, but 0.24 on average"
    assert foot_skate(np.stack([p, q])).tolist() == [9 / 20, 0]
    kit = np.zeros((21, 21, 3))
    kit[:, 20, 2] = np.arange(21) * 0.08
    assert foot_skate(kit, 12.5, skeleton=KIT) == 1
    with pytest.raises(InputError, match="at least 2"):
        foot_skate(p[:1])


def test_jerk():
    t = np.arange(30)[:, None, None] / 20
    p = np.tile(t**3 * [1, 0, 0], (1, 22, 1))
    assert abs(jerk(p) - 6) < 1e-6, "the third derivative of t^3"
    assert jerk(np.tile(t**2 * [1, 2, 0], (1, 22, 1))) < 1e-6
    assert abs(jerk(p[::2], 10.0) - 6) < 1e-6
    with pytest.raises(InputError, match="at least 4"):
        jerk(p[:3])
    assert HUMANML3D.skating == (10, 11)
