"""Motions in files: BVH both ways, glTF, pictures, other frame rates."""

from __future__ import annotations

import contextlib
import json
import re
import struct
import sys

import numpy as np
import pytest
from _motion_clips import clip
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks.motion import (
    CONVENTIONS,
    HUMANML3D,
    KIT,
    Bvh,
    BvhJoint,
    Constraints,
    StartPose,
    Waypoints,
    bvh_from_features,
    bvh_from_joints,
    draw,
    features_from_bvh,
    from_joints,
    glb_bytes,
    joints_from_bvh,
    parse_bvh,
    read_bvh,
    recover_joints,
    recover_root,
    resample,
    resample_rotations,
    retargeted,
    save_animation,
    save_glb,
)
from engine.blocks.motion import rotations as rot
from engine.blocks.motion.bvh import POSITIONS, ROTATIONS
from engine.blocks.motion.features import mean_lengths
from engine.errors import InputError

TENTH_OF_A_MILLIMETRE = 1e-4
SEEDS = st.integers(0, 2**32 - 1)

SMALL = """HIERARCHY
ROOT Hips
{
  OFFSET 0 1 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT Upper Leg
  {
    OFFSET 1 0 0
    CHANNELS 3 Yrotation Zrotation Xrotation
    End Site
    {
      OFFSET 0 -2 0
    }
  }
  JOINT Arm
  {
    OFFSET 0 2 0
    CHANNELS 1 Xrotation
  }
}
MOTION
Frames: 2
Frame Time: 0.05
0 1 0 0 0 0 0 0 0 0
5 6 7 90 0 0 0 0 90 -90
"""


def random_bvh(seed: int) -> Bvh:
    """A tree of up to twelve joints, each with some channels in some order."""
    random = np.random.default_rng(seed)
    joints: list[BvhJoint] = []
    path: list[int] = []
    for i in range(int(random.integers(1, 13))):
        path = path[: int(random.integers(1, len(path) + 1))] if path else []
        channels = [*POSITIONS, *ROTATIONS]
        random.shuffle(channels)
        channels = channels[: int(random.integers(0, 7))]
        end = tuple(random.normal(size=3).round(3).tolist()) if random.random() < 0.4 else None
        offset = tuple(random.normal(size=3).round(3).tolist())
        joints.append(BvhJoint(f"joint {i}", path[-1] if path else -1, offset, tuple(channels), end))
        path.append(i)
    width = sum(len(j.channels) for j in joints)
    return Bvh(tuple(joints), 1 / 24, random.uniform(-400, 400, (3, width)))


def slow_positions(bvh: Bvh) -> np.ndarray:
    """Joints, then End Sites, by 4 x 4 matrices, one frame and one channel after the other."""
    out = []
    for row in bvh.values:
        values, worlds, ends = iter(row.tolist()), [], []
        for joint in bvh.joints:
            shift, turn = np.eye(4), np.eye(4)
            shift[:3, 3] = joint.offset
            for channel in joint.channels:
                axis, value = "XYZ".index(channel[0]), next(values)
                if channel.endswith("position"):
                    shift[axis, 3] = value
                    continue
                a, b = (axis + 1) % 3, (axis + 2) % 3
                one = np.eye(4)
                one[a, a] = one[b, b] = np.cos(np.deg2rad(value))
                one[b, a] = np.sin(np.deg2rad(value))
                one[a, b] = -one[b, a]
                turn = turn @ one
            up = worlds[joint.parent] if joint.parent >= 0 else np.eye(4)
            worlds.append(up @ shift @ turn)
            if joint.end is not None:
                ends.append((worlds[-1] @ [*joint.end, 1])[:3])
        out.append([w[:3, 3] for w in worlds] + ends)
    return np.array(out)


# ---- BVH: reading


def test_small_file():
    bvh = parse_bvh(SMALL)
    assert bvh.names == ("Hips", "Upper Leg", "Arm", "Upper Leg.end") and bvh.fps == 20
    p = bvh.positions()
    assert p[0].tolist() == [[0, 1, 0], [1, 1, 0], [0, 3, 0], [1, -1, 0]]
    # The hips turn +X to +Y; the leg then bends about X, so that its -Y becomes -Z.
    want = [[5, 6, 7], [5, 7, 7], [3, 6, 7], [5, 7, 5]]
    assert np.abs(p[1] - want).max() < 1e-12


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace("\n", "\r\n"),
        lambda t: t.replace("\n", "\r"),
        lambda t: "\ufeff" + t,
        lambda t: t.replace(" ", "\t").replace("Upper\tLeg", "Upper Leg"),
        lambda t: re.sub(r"\n\s*\{", " {", t),
        lambda t: t.replace("\n", "\n\n  "),
        lambda t: t.rstrip(),
        lambda t: t.replace("Frames:", "FRAMES :").replace("rotation", "Rotation").replace("End Site", "End site"),
        lambda t: t.replace("Upper Leg", "J\u00e4ger").encode("latin-1"),
    ],
)
def test_ways_to_write_it(change):
    data = change(SMALL)
    bvh = parse_bvh(data if isinstance(data, bytes) else data.encode())
    assert (bvh.values == parse_bvh(SMALL).values).all() and len(bvh.joints) == 3


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_any_tree_and_channel_order(seed):
    bvh = random_bvh(seed)
    p = bvh.positions()
    assert np.abs(p - slow_positions(bvh)).max() < 1e-9
    again = parse_bvh(bvh.dumps())
    assert again.joints == bvh.joints and abs(again.frame_time - bvh.frame_time) < 1e-9
    assert again.values.shape == bvh.values.shape and np.abs(again.positions() - p).max() < 1e-4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("HIERARCHY", "HELLO", "line 1: HIERARCHY"),
        ("ROOT", "JOINT", "line 2: JOINT is not allowed"),
        ("ROOT Hips\n{", "ROOT Hips\nOFFSET 0 0 0", "line 3: '{'"),
        ("ROOT Hips", "ROOT", "line 2: a name"),
        ("ROOT Hips", "ROOT " + "x" * 201, "line 2: a name"),
        ("JOINT Arm", "JOINT Hips", "line 15: there are two joints 'Hips'"),
        ("JOINT Arm", "ROOT Arm", "line 15: ROOT is not allowed"),
        ("OFFSET 0 2 0", "OFFSET 0 2", "line 17: 3 numbers are needed, not 2"),
        ("OFFSET 0 2 0", "OFFSET 0 2 x", "line 17: 'x' is no number"),
        ("OFFSET 0 2 0", "OFFSET 0 2 1_0", "line 17: '1_0' is no number"),
        ("OFFSET 0 2 0", "OFFSET 0 2 nan", "line 17: 'nan' is not finite"),
        ("OFFSET 0 2 0", "OFFSET 0 2 1e7", "line 17: '1e7' is not finite or beyond"),
        ("    OFFSET 0 2 0\n", "", "line 18: this part has no OFFSET"),
        ("      OFFSET 0 -2 0\n", "", "line 12: this part has no OFFSET"),
        ("OFFSET 0 2 0", "OFFSET 0 2 0\nOFFSET 0 2 0", "line 18: a second OFFSET"),
        ("CHANNELS 1 X", "CHANNELS 2 X", "line 18: CHANNELS '2 Xrotation': a count"),
        ("CHANNELS 1 X", "CHANNELS -1 X", "line 18: CHANNELS"),
        ("CHANNELS 1 X", "CHANNELS 99999999999999999999 X", "line 18: CHANNELS"),
        ("CHANNELS 1 Xrotation", "CHANNELS", "line 18: CHANNELS"),
        ("CHANNELS 1 Xrotation", "CHANNELS 1 Wrotation", "line 18: CHANNELS '1 Wrotation': each of"),
        ("CHANNELS 1 Xrotation", "CHANNELS 2 Xrotation Xrotation", "at most once"),
        ("CHANNELS 1 Xrotation", "CHANNELS 1 Xrotation\nCHANNELS 1 Yrotation", "line 19: a second CHANNELS"),
        ("CHANNELS 1 Xrotation", "SPEED 1", "line 18: 'SPEED 1' is not understood"),
        ("OFFSET 0 -2 0", "OFFSET 0 -2 0\nCHANNELS 0", "line 13: 'CHANNELS 0' is not understood"),
        ("OFFSET 0 -2 0", "OFFSET 0 -2 0\nJOINT a", "line 13: JOINT is not allowed"),
        ("OFFSET 0 -2 0", "OFFSET 0 -2 0\nEnd Site", "line 13: End Site is not allowed"),
        ("OFFSET 0 1 0", "OFFSET 0 1 0 {", "3 numbers|'{' is not allowed"),
        ("}\nMOTION", "}\n}\nMOTION", "line 21: MOTION is needed"),
        ("}\nMOTION", "}\nROOT b", "line 21: MOTION is needed behind the hierarchy; a file has one ROOT"),
        ("}\nMOTION", "MOTION", "line 20: 'MOTION' is not understood"),
        ("Frames: 2", "Frames: two", "line 22: 'Frames: <number>'"),
        ("Frames: 2", "Frames: 0", "line 22: 0 frames"),
        ("Frames: 2", "Frames: -2", "line 22: 'Frames"),
        ("Frames: 2", "Frames: 999999999", "line 22: 999999999 frames"),
        ("Frames: 2", "Frames: 3", "line 26: the file ends after 2 of 3 frames"),
        ("Frames: 2", "Frames: 1", "line 25: more than the 1 frames"),
        ("Frame Time: 0.05", "Frame Time: fast", "line 23: 'fast' is no number"),
        ("Frame Time: 0.05", "Frame Time: 0", "line 23: a frame time of 0"),
        ("Frame Time: 0.05", "Frame Time: inf", "line 23: 'inf'"),
        ("Frame Time: 0.05", "", "line 24: 'Frame Time"),
        ("5 6 7 90", "5 6 7", "line 25: frame 1 has 9 values, the hierarchy has 10"),
        ("5 6 7 90", "5 6 nan 90", "line 25: 'nan' is not finite"),
        ("5 6 7 90", "5 6 7e 90", "line 25: '7e' is no number"),
        (SMALL[SMALL.index("JOINT Arm") :], "", "line 15: the file ends here"),
        (SMALL[60:], "", "line 5: CHANNELS '6 Xposition': a count"),
        (SMALL, "", "line 1: the file ends here"),
    ],
)  # fmt: skip
def test_damage_is_named_by_line(old, new, message):
    assert old in SMALL
    with pytest.raises(InputError, match="walk.bvh, .*" + message):
        parse_bvh(SMALL.replace(old, new, 1), "walk.bvh")


def test_limits():
    deep = "HIERARCHY\n" + "".join(
        f"{'JOINT' if i else 'ROOT'} j{i}\n{{\nOFFSET 0 0 0\nCHANNELS 0\n" for i in range(200)
    )
    with pytest.raises(InputError, match="128 levels"):
        parse_bvh(deep)
    wide = "HIERARCHY\nROOT r\n{\nOFFSET 0 0 0\nCHANNELS 1 Xrotation\n" + "".join(
        f"JOINT j{i}\n{{\nOFFSET 0 0 0\n}}\n" for i in range(1100)
    )
    with pytest.raises(InputError, match="more than 1024 joints"):
        parse_bvh(wide)
    # Ten lines that would ask for gigabytes.
    few = wide.split("JOINT j1000\n")[0] + "}\nMOTION\nFrames: 99999\nFrame Time: 0.01\n0\n"
    with pytest.raises(InputError, match="99999 frames of 1001 joints; 4000000 together"):
        parse_bvh(few)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_read_or_refused(data):
    raw = bytearray(SMALL.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "drop", "twice"]))
        if kind == "set":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            raw = raw[: at + 1]
        elif kind == "drop":
            del raw[at : at + data.draw(st.integers(1, 9))]
        else:
            raw[at:at] = raw[max(at - 20, 0) : at]
        raw = raw or bytearray(b"H")
    with contextlib.suppress(InputError):
        assert np.isfinite(parse_bvh(bytes(raw)).positions()).all()


def test_files(tmp_path):
    bvh = parse_bvh(SMALL)
    path = bvh.save(tmp_path / "new" / "a.bvh")
    assert read_bvh(path).joints == bvh.joints
    with pytest.raises(InputError, match="missing"):
        read_bvh(tmp_path / "b.bvh")
    with pytest.raises(InputError, match="cannot be written"):
        bvh.save(path / "c.bvh")


def test_bvh_objects_are_checked():
    root = BvhJoint("a", -1, (0, 0, 0), ())
    for joints, values, message in (
        ((), np.zeros((1, 0)), "0 joints"),
        ((root, BvhJoint("a", 0, (0, 0, 0), ())), np.zeros((1, 0)), "one name"),
        ((root, BvhJoint("b", 1, (0, 0, 0), ())), np.zeros((1, 0)), "depth first"),
        ((root, BvhJoint("b", -1, (0, 0, 0), ())), np.zeros((1, 0)), "depth first"),
        ((BvhJoint("a\nb", -1, (0, 0, 0), ()),), np.zeros((1, 0)), "cannot be written"),
        ((BvhJoint("a", -1, (0, 0, 0), ("Xrotation", "Xrotation")),), np.zeros((1, 2)), "channels"),
        ((root,), np.zeros((1, 1)), r"\[T, 0\]"),
        ((BvhJoint("a", -1, (0, 0, 0), ("Xrotation",)),), np.full((1, 1), np.nan), "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            Bvh(joints, 0.05, values)
    with pytest.raises(InputError, match="frame_time"):
        Bvh((root,), 0, np.zeros((1, 0)))


@pytest.mark.parametrize(
    ("time", "rate"), [(0.033333, 30), (0.0333333, 30), (0.05, 20), (0.008333, 120), (1 / 29.97, 29.97)]
)
def test_frame_times_are_rounded_in_files(time, rate):
    assert abs(Bvh((BvhJoint("a", -1, (0, 0, 0), ()),), time, np.zeros((1, 0))).fps - rate) < 1e-9


# ---- BVH: motions


@given(SEEDS, st.sampled_from([1.0, 100.0]))
@settings(max_examples=10, deadline=None)
def test_positions_there_and_back(seed, scale):
    p = clip(15, seed)
    text = bvh_from_joints(p, scale=scale).dumps()
    back = joints_from_bvh(parse_bvh(text), scale=1 / scale)
    assert np.abs(back - p).max() < TENTH_OF_A_MILLIMETRE / 10


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_rotations_there_and_back(seed):
    x = from_joints(clip(15, seed))
    start = StartPose((3, -2), 1.0)
    back = joints_from_bvh(parse_bvh(bvh_from_features(x, start=start).dumps()))
    assert np.abs(back - start.to_world(recover_joints(x))).max() < TENTH_OF_A_MILLIMETRE / 10


def test_export_is_the_documented_tree():
    bvh = bvh_from_joints(clip(3), rate=30)
    by = {j.name: j for j in bvh.joints}
    assert len(bvh.joints) == 22 and bvh.joints[0].name == "pelvis" and bvh.fps == 30
    assert bvh.joints[0].channels == (*POSITIONS, *ROTATIONS) and by["bone_head"].channels == ROTATIONS
    assert bvh.joints[by["bone_l_collar"].parent].name == "bone_spine3"
    assert by["bone_l_hip"].offset == (0, 0, 0) and by["bone_l_knee"].offset[0] == pytest.approx(0.10307)
    assert {j.name for j in bvh.joints if j.end} == {f"bone_{HUMANML3D.names[j]}" for j in HUMANML3D.leaves}
    assert (bvh.values[:, 3:6] == 0).all(), "positions say nothing of the root's rotation"
    x = from_joints(clip(20))
    turned = bvh_from_features(x).world[1][:, 0]
    assert np.abs(turned - rot.yaw(recover_root(x)[0])).max() < 1e-12, "the root carries the heading"


def test_bones_that_change_their_length():
    p = clip(30, seed=7)
    stretched = p.copy()
    stretched[:, 20] += 0.05 * np.sin(np.arange(30))[:, None] * (p[:, 20] - p[:, 18])
    mean, canonical = (joints_from_bvh(bvh_from_joints(stretched, lengths=n)) for n in ("mean", "canonical"))
    assert np.abs(canonical - p).max() < 1e-9, "only the stretched bone pointed elsewhere, and it did not"
    assert np.abs((mean - stretched)[:, :20]).max() < 1e-9 and np.abs(mean - stretched).max() < 0.02
    own = bvh_from_joints(stretched, lengths=np.array(HUMANML3D.lengths) * 2)
    assert np.abs(mean_lengths(joints_from_bvh(own), HUMANML3D) - 2 * np.array(HUMANML3D.lengths)).max() < 1e-9
    for lengths, message in (("short", "lengths='short'"), ([1, 2], "lengths has shape"), (-np.ones(22), "negative")):
        with pytest.raises(InputError, match=message):
            bvh_from_joints(p, lengths=lengths)


def test_kit_both_ways():
    p = clip(10, seed=8, skeleton=KIT) * 1000
    bvh = bvh_from_joints(p, KIT, scale=0.001)
    assert bvh.fps == 12.5
    assert np.abs(joints_from_bvh(parse_bvh(bvh.dumps()), skeleton=KIT, scale=1000) - p).max() < 0.1
    x = from_joints(p, KIT)
    with pytest.raises(InputError, match="no bone lengths"):
        bvh_from_features(x)
    back = joints_from_bvh(bvh_from_features(x, lengths="mean"), skeleton=KIT)
    assert np.abs(back - recover_joints(x)).max() < 1e-8


def named(places: dict[str, str], p: np.ndarray) -> Bvh:
    """A file whose joints have these names and stand where the canonical ones do, moved by position channels."""
    joints = [BvhJoint(name, -1 if i == 0 else 0, (0, 0, 0), POSITIONS) for i, name in enumerate(places.values())]
    index = [HUMANML3D.joint(j) for j in places]
    moves = p[:, index] - np.concatenate([np.zeros((len(p), 1, 3)), p[:, index[:1]].repeat(len(index) - 1, 1)], axis=1)
    return Bvh(tuple(joints), 0.05, moves.reshape(len(p), -1))


@pytest.mark.parametrize("prefix", ["", "mixamorig:", "mixamorig7:", "a:b:"])
@pytest.mark.parametrize("style", ["mixamo", "lafan", "L_Hip", "left_hip", "leftHip"])
def test_names_of_common_files(style, prefix):
    p = clip(4, seed=9)
    if style in CONVENTIONS:
        names = dict(CONVENTIONS[style])
    elif style == "leftHip":
        names = {j: re.sub("^(l|r)_(.)", lambda m: {"l": "left", "r": "right"}[m[1]] + m[2].upper(), j)
                 for j in HUMANML3D.names}  # fmt: skip
    else:
        long = {"l": "left", "r": "right"}
        names = {j: re.sub("^(l|r)_", lambda m: long[m[1]] + "_", j) if style == "left_hip" else j.title()
                 for j in HUMANML3D.names}  # fmt: skip
    bvh = named({j: prefix + n for j, n in names.items()}, p)
    assert np.abs(joints_from_bvh(bvh) - p).max() < 1e-9


def test_names_of_cmu():
    """CMU's files have joints without length between the hips, the chest and the shoulders."""
    p = clip(4, seed=10)
    spine = {"pelvis": "Hips", "spine2": "Spine", "spine3": "Spine1", "neck": "Neck1", "head": "Head"}
    limbs = {j: n for j, n in CONVENTIONS["mixamo"].items() if j[:2] in ("l_", "r_") and "collar" not in j}
    bvh = named({**spine, **limbs}, p)
    extra = [("LowerBack", 0), ("LeftShoulder", 9), ("RightShoulder", 9)]
    joints = [*bvh.joints, *(BvhJoint(n, 0, (0, 0, 0), POSITIONS) for n, _ in extra)]
    values = np.concatenate([bvh.values, *(p[:, j] - p[:, 0] for _, j in extra)], axis=1)
    got = joints_from_bvh(Bvh(tuple(joints), 0.05, values))
    want = p.copy()
    want[:, 3] = (p[:, 0] + p[:, 6]) / 2
    want[:, 13], want[:, 14] = (p[:, 9] + p[:, 16]) / 2, (p[:, 9] + p[:, 17]) / 2
    assert np.abs(got - want).max() < 1e-9


def test_names_that_are_not_there():
    p = clip(4, seed=11)
    names = {**CONVENTIONS["mixamo"], "l_foot": "LeftPaw", "spine2": "Middle"}
    bvh = named(names, p)
    with pytest.raises(InputError, match=r"spine2 \('Spine1'\), l_foot \('LeftToeBase'\).*closest to mixamo.*LeftPaw"):
        joints_from_bvh(bvh)
    with pytest.raises(InputError, match=r"no joint of the file is known as spine2 \("):
        joints_from_bvh(bvh, {"l_foot": "LeftPaw"})
    got = joints_from_bvh(bvh, {"Left Foot": "LeftPaw", 6: ("Spine", "Spine2")})
    want = p.copy()
    want[:, 6] = (p[:, 3] + p[:, 9]) / 2
    assert np.abs(got - want).max() < 1e-9
    with pytest.raises(InputError, match="names: 'LeftHoof' for 'l_foot' is not in the file"):
        joints_from_bvh(bvh, {"l_foot": "LeftHoof"})
    with pytest.raises(InputError, match="joint 'tail'"):
        joints_from_bvh(bvh, {"tail": "LeftPaw"})
    with pytest.raises(InputError, match="and 60 more"):
        joints_from_bvh(Bvh(tuple(BvhJoint(f"j{i}", i - 1, (0, 0, 0), ()) for i in range(100)), 0.05, np.zeros((1, 0))))


def test_files_whose_z_points_up():
    p = clip(20, seed=12)
    turned = np.stack([p[..., 0], -p[..., 2], p[..., 1]], axis=-1)
    bvh = bvh_from_joints(turned)
    assert np.abs(joints_from_bvh(bvh, up="z") - p).max() < 1e-9
    assert np.abs(features_from_bvh(bvh, up="z") - from_joints(p)).max() < 1e-6
    with pytest.raises(InputError, match="up='x'"):
        joints_from_bvh(bvh, up="x")


def test_features_out_of_a_file():
    p = clip(61, seed=13)
    at_60 = bvh_from_joints(p * 17).resample(60)
    assert at_60.fps == 60 and len(at_60.values) == 181
    assert np.abs(features_from_bvh(parse_bvh(at_60.dumps())) - from_joints(p)).max() < 1e-4


# ---- other frame rates


def test_resampling_positions():
    p = clip(21, seed=14)
    assert (resample(p, 20, 20) == p).all() and resample(p, 20, 30).shape == (31, 22, 3)
    up = resample(p, 20, 60)
    assert np.abs(up[::3] - p).max() < 1e-9 and np.abs(up[1] - (2 * p[0] + p[1]) / 3).max() < 1e-12
    assert np.abs(resample(up, 60, 20) - p).max() < 1e-9
    assert resample(p.astype(np.float32), 20, 30).dtype == np.float32 and len(resample(p[:1], 20, 60)) == 1
    down = resample(p, 20, 12.5)
    assert len(down) == 13 and np.abs(down[-1] - (0.8 * p[19] + 0.2 * p[20])).max() < 0.1
    for rate in (0, -1, np.nan, 1e9, "20"):
        with pytest.raises(InputError, match="to = "):
            resample(p, 20, rate)
    with pytest.raises(InputError, match="1 to 100000"):
        resample(np.zeros((1000, 1)), 1, 1000)


def test_resampling_rotations():
    angle = np.array([3.0, 3.5, 2.0, 2.0])
    got = resample_rotations(rot.yaw(angle), 10, 20)
    assert np.abs(got - rot.yaw(np.array([3, 3.25, 3.5, 2.75, 2, 2, 2]))).max() < 1e-9
    many = resample_rotations(rot.yaw(np.zeros((5, 3))), 20, 30)
    assert many.shape == (7, 3, 3, 3)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_resampling_files(seed):
    bvh = random_bvh(seed)
    up = bvh.resample(bvh.fps * 4)
    assert len(up.values) == 9
    assert np.abs(up.positions()[::4] - bvh.positions()).max() < 1e-6
    for i, joint in enumerate(bvh.joints):
        if joint.parent >= 0 and not any(c.endswith("position") for c in joint.channels):
            bone = up.world[0][:, i] - up.world[0][:, joint.parent]
            assert np.abs(np.linalg.norm(bone, axis=-1) - np.linalg.norm(joint.offset)).max() < 1e-9, "bones are stiff"


# ---- glTF

SIZES = {5121: 1, 5123: 2, 5125: 4, 5126: 4}
DTYPES = {5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC3": 3, "VEC4": 4, "MAT4": 16}


def parse_glb(data: bytes):
    """The document and a reader of accessors, with every bound of the container checked."""
    magic, version, total = struct.unpack_from("<4sII", data)
    assert (magic, version, total) == (b"glTF", 2, len(data))
    size, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON" and size % 4 == 0
    document = json.loads(data[20 : 20 + size])
    at = 20 + size
    length, kind = struct.unpack_from("<I4s", data, at)
    assert kind == b"BIN\0" and length % 4 == 0 and at + 8 + length == total
    binary = data[at + 8 :]
    assert document["buffers"] == [{"byteLength": length}] and document["asset"]["version"] == "2.0"
    ends = 0
    for view in document["bufferViews"]:
        assert view["buffer"] == 0 and view["byteOffset"] % 4 == 0 and view["byteLength"] > 0
        assert view["byteOffset"] >= ends, "views do not overlap"
        ends = view["byteOffset"] + view["byteLength"]
        assert ends <= length

    def read(index: int) -> np.ndarray:
        a = document["accessors"][index]
        view = document["bufferViews"][a["bufferView"]]
        width = WIDTHS[a["type"]]
        assert a["count"] * width * SIZES[a["componentType"]] == view["byteLength"], "an accessor fills its view"
        out = np.frombuffer(binary, DTYPES[a["componentType"]], a["count"] * width, view["byteOffset"])
        out = out.reshape(a["count"], width)
        if "min" in a:
            assert a["min"] == out.min(0).tolist() and a["max"] == out.max(0).tolist()
        return out

    return document, read


def glb_worlds(document, read, frames: int) -> np.ndarray:
    """[frames, nodes, 4, 4] as a viewer plays the animation."""
    nodes = document["nodes"]
    local = np.tile(np.eye(4), (frames, len(nodes), 1, 1))
    for i, node in enumerate(nodes):
        local[:, i, :3, 3] = node.get("translation", [0, 0, 0])
        local[:, i, :3, :3] = rot.from_quaternion(np.array(node.get("rotation", [0, 0, 0, 1])))
    for animation in document.get("animations", ()):
        for channel in animation["channels"]:
            sampler = animation["samplers"][channel["sampler"]]
            values, at = read(sampler["output"]).astype(np.float64), channel["target"]["node"]
            assert len(values) == len(read(sampler["input"])) == frames
            if channel["target"]["path"] == "rotation":
                assert np.abs(np.linalg.norm(values, axis=-1) - 1).max() < 1e-6
                assert ((values[1:] * values[:-1]).sum(-1) >= 0).all(), "neighbours take the short way"
                local[:, at, :3, :3] = rot.from_quaternion(values)
            else:
                local[:, at, :3, 3] = values
    worlds = local.copy()
    for i, node in enumerate(nodes):
        for child in node.get("children", ()):
            assert child > i, "a parent is done before its children"
            worlds[:, child] = worlds[:, i] @ local[:, child]
    return worlds


def test_glb_plays_the_motion(tmp_path):
    p = clip(12, seed=15)
    bvh = bvh_from_joints(p, scale=100, rate=25)
    data = glb_bytes(bvh, scale=0.01)
    document, read = parse_glb(data)
    for index in range(len(document["accessors"])):
        read(index)
    worlds = glb_worlds(document, read, 12)
    assert np.abs(worlds[:, :22, :3, 3] - bvh.positions()[:, :22] / 100).max() < 1e-5
    sampler = document["animations"][0]["samplers"][0]
    assert document["accessors"][sampler["input"]]["min"] == [0]
    assert np.abs(read(sampler["input"])[:, 0] - np.arange(12) / 25).max() < 1e-6
    # The skinned boxes reach from joint to joint, so the ends of the middle lines are where the bones are.
    mesh = document["meshes"][0]["primitives"][0]
    points, owner = (read(mesh["attributes"][k]) for k in ("POSITION", "JOINTS_0"))
    assert (read(mesh["attributes"]["WEIGHTS_0"]) == [1, 0, 0, 0]).all()
    skin = document["skins"][document["nodes"][-1]["skin"]]
    inverse = read(skin["inverseBindMatrices"]).reshape(-1, 4, 4).transpose(0, 2, 1)
    assert len(inverse) == len(skin["joints"]) == 22 and owner.max() < 22
    for t in (0, 7):
        moved = worlds[t, :22] @ inverse
        at = (moved[owner[:, 0]] @ np.concatenate([points, np.ones((len(points), 1))], 1)[..., None])[:, :3, 0]
        middles = at.reshape(-1, 2, 4, 3).mean(2)  # of the four corners at each end
        bones = {tuple(np.round([*p[t, parent], *p[t, j]], 3)) for j, parent in enumerate(HUMANML3D.parents) if j}
        drawn = {tuple(np.round(np.concatenate(pair), 3)) for pair in middles}
        gap = max(min(np.abs(np.subtract(a, b)).max() for b in drawn) for a in bones)
        assert gap < 2e-3, "every bone of the skeleton is drawn"
    triangles = read(mesh["indices"])[:, 0]
    assert len(triangles) == 36 * len(points) // 8 and triangles.max() < len(points)
    assert (triangles.reshape(-1, 36) // 8 == np.arange(len(points) // 8)[:, None]).all()
    path = save_glb(bvh, tmp_path / "a" / "walk.glb", scale=0.01)
    assert path.read_bytes() == data
    with pytest.raises(InputError, match="scale = 0"):
        glb_bytes(bvh, scale=0)


def test_boxes_are_seen_from_outside():
    document, read = parse_glb(glb_bytes(bvh_from_joints(clip(2))))
    mesh = document["meshes"][0]["primitives"][0]
    points = read(mesh["attributes"]["POSITION"]).astype(np.float64)
    a, b, c = points[read(mesh["indices"])[:, 0].reshape(-1, 3)].transpose(1, 0, 2)
    middle = points.reshape(-1, 8, 3).mean(1).repeat(12, 0)
    assert (((a + b + c) / 3 - middle) * np.cross(b - a, c - a)).sum(-1).min() > 0


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_glb_of_any_file(seed):
    bvh = random_bvh(seed)
    document, read = parse_glb(glb_bytes(bvh))
    worlds = glb_worlds(document, read, 3)
    reach = 1 + np.abs(bvh.positions()).max()
    assert np.abs(worlds[:, : len(bvh.joints), :3, 3] - bvh.world[0]).max() < 1e-5 * reach
    assert ("animations" in document) == bool(bvh.values.shape[1])


# ---- pictures


def test_pictures():
    pytest.importorskip("PIL")
    p = clip(8, seed=16)
    p[..., 1] -= p[..., 1].min()
    plain = draw(p, size=(90, 120))
    assert len(plain) == 8 and plain[0].shape == (90, 120, 3) and plain[0].dtype == np.uint8
    assert (plain[0] != plain[7]).any() and (draw(p, size=(90, 120))[3] == plain[3]).all()
    way = Constraints([Waypoints("l_wrist", [2, 6], p[[2, 6], 20] + 0.2)])
    pictures = draw(p, way, size=(90, 120), title="a wave")
    red = [((q[..., 0] > 150) & (q[..., 1] < 90) & (q[..., 2] < 80)).sum() for q in pictures]
    assert min(red[2], red[6]) > 3 * max(red[0], red[4]), "the waypoint of the frame is marked"
    assert draw(clip(2, skeleton=KIT), skeleton=KIT)[0].shape == (360, 480, 3)
    for change, message in (
        ({"size": (10, 20)}, "size"),
        ({"size": (100.0, 100)}, "size"),
        ({"joints": np.tile(p, (20, 1, 1)), "size": (4096, 4096)}, "160 pictures"),
        ({"turn": np.nan}, "turn"),
        ({"constraints": Constraints([Waypoints(0, 8, [0, 1, 0])])}, r"waypoints\[0\].frames\[0\] = 8"),
        ({"joints": p[0]}, "joints"),
    ):
        with pytest.raises(InputError, match=message):
            draw(**{"joints": p, **change})


@pytest.mark.parametrize("rate", [8, 20, 60])
def test_gif(tmp_path, rate):
    image = pytest.importorskip("PIL.Image")
    p = clip(31, seed=17)
    path = save_animation(p, tmp_path / "new" / "a.gif", rate=rate, size=(64, 64))
    with image.open(path) as film:
        times = []
        for i in range(film.n_frames):
            film.seek(i)
            times.append(film.info["duration"])
    assert abs(sum(times) / 1000 - 31 / rate) <= 1 / min(rate, 25) and min(times) >= 40


def test_mp4(tmp_path):
    av = pytest.importorskip("av")
    pytest.importorskip("PIL")
    path = save_animation(clip(9), tmp_path / "a.mp4", rate=30, size=(65, 99))
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        assert (stream.height, stream.width, stream.average_rate, stream.frames) == (66, 100, 30, 9)


def test_pictures_need_packages(tmp_path, monkeypatch):
    p = clip(3)
    with pytest.raises(InputError, match=r"\.gif or \.mp4"):
        save_animation(p, tmp_path / "a.avi")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install av, or write a \.gif"):
        save_animation(p, tmp_path / "a.mp4")
    if "PIL" in sys.modules:
        (tmp_path / "b.gif").mkdir()
        with pytest.raises(InputError, match="cannot be written"):
            save_animation(p, tmp_path / "b.gif", size=(32, 32))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"quintet-engine\[robot\]"):
        draw(p)
    assert np.isfinite(retargeted(p)).all(), "nothing else needs them"
