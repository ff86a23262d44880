"""Two recorded motions in BVH files of others: read, written, brought to the canonical skeleton and back."""

from __future__ import annotations

import numpy as np
import pytest
from _peer_bvh import FILES, bvh_file

from engine.blocks.motion import (
    HUMANML3D,
    StartPose,
    bvh_from_features,
    bvh_from_joints,
    features_from_bvh,
    from_joints,
    glb_bytes,
    joints_from_bvh,
    parse_bvh,
    recover_from_rotations,
    recover_joints,
    retargeted,
)
from engine.blocks.motion.features import mean_lengths

pytestmark = pytest.mark.peer
TENTH_OF_A_MILLIMETRE = 1e-4
# Joints, End Sites, frames, and the file's own order of angles.
SIZES = {"test_mocapbank.bvh": (19, 5, 455, "ZXY"), "test_freebvh.bvh": (55, 15, 69, "ZYX")}
# The last frame by bvhtoolbox 0.1.3 (its CSV export, five decimals), in cm.
PEER = {
    "test_mocapbank.bvh": {
        "LeftWrist": (-40.08557, 93.54810, 249.25589),
        "RightAnkle": (-49.63011, 10.70914, 231.57909),
    },
    "test_freebvh.bvh": {
        "mixamorig:LeftHand": (-26.45921, 88.69091, 2.26111),
        "mixamorig:RightToeBase": (4.16179, 0.00004, -11.35717),
    },
}


@pytest.fixture(params=FILES)
def bvh(request):
    return parse_bvh(bvh_file(request.param), request.param)


@pytest.mark.parametrize("name", FILES)
def test_reads(name):
    bvh = parse_bvh(bvh_file(name), name)
    joints, ends, frames, order = SIZES[name]
    assert len(bvh.joints) == joints and len(bvh.names) == joints + ends and len(bvh.values) == frames and bvh.fps == 30
    assert "".join(c[0] for c in bvh.joints[1].channels) == order
    for joint, place in PEER[name].items():
        assert np.abs(bvh.positions()[-1, bvh.names.index(joint)] - place).max() < 1e-5


def test_written_again(bvh):
    again = parse_bvh(bvh.dumps())
    assert again.joints == bvh.joints
    assert np.abs(again.positions() - bvh.positions()).max() * 0.01 < TENTH_OF_A_MILLIMETRE / 100


def test_every_cut_is_noticed(bvh):
    text = bvh.dumps()
    for share in (0.001, 0.01, 0.1, 0.5, 0.9, 0.999):
        with pytest.raises(ValueError, match="line"):
            parse_bvh(text[: int(share * len(text))])


def test_resampled_twice(bvh):
    p = bvh.positions()
    up = bvh.resample(60)
    assert len(up.values) == 2 * len(p) - 1 and np.abs(up.positions()[::2] - p).max() < 1e-9
    assert np.abs(up.resample(30).positions() - p).max() < 1e-9


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_positions_there_and_back(bvh, scale):
    p = retargeted(joints_from_bvh(bvh, scale=0.01))
    back = joints_from_bvh(parse_bvh(bvh_from_joints(p, scale=scale, rate=30).dumps()), scale=1 / scale)
    assert np.abs(back - p).max() < TENTH_OF_A_MILLIMETRE / 100
    own = joints_from_bvh(bvh, scale=0.01)
    own_back = joints_from_bvh(parse_bvh(bvh_from_joints(own, rate=30).dumps()))
    moved = np.abs(own_back - own).max()
    assert moved < 0.05, "the person's own bones: those that stand for several joints of the file change a little"


def test_rotations_there_and_back(bvh):
    x = features_from_bvh(bvh)
    joints = recover_joints(x)
    assert np.abs(recover_from_rotations(x) - joints).max() < 1e-9
    start = StartPose((1, 2), 3.0)
    back = joints_from_bvh(parse_bvh(bvh_from_features(x, start=start).dumps()))
    assert np.abs(back - start.to_world(joints)).max() < TENTH_OF_A_MILLIMETRE / 100
    again = features_from_bvh(parse_bvh(bvh_from_features(x).dumps()), smoothing=0)
    assert np.abs(again - from_joints(joints, smoothing=0)).max() < 1e-3


def test_features_are_those_of_a_person(bvh):
    x = features_from_bvh(bvh)
    joints = recover_joints(x)
    assert len(x) == int((len(bvh.values) - 1) / 1.5)
    assert np.abs(mean_lengths(joints, HUMANML3D) - HUMANML3D.lengths).max() < 1e-9
    assert 0 <= joints[..., 1].min() < 0.05 and joints[..., 1].max() < 2.2
    assert joints[0, 20, 0] > 0 > joints[0, 21, 0], "the left hand is on the left of one who looks along +Z"
    assert joints[0, [10, 11], 2].mean() > joints[0, [7, 8], 2].mean(), "and the feet point ahead"
    assert x[:, HUMANML3D.layout.contacts].mean() > 0.5


def test_as_glb(bvh):
    assert glb_bytes(bvh, scale=0.01)[:4] == b"glTF"
