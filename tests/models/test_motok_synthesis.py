"""What motok-tiny is trained on: people whose bones keep their lengths, on the floor, and sentences about them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples/tiny/motok"))

import synthesise
from synthesise import ACTIONS, GAITS, Script

from engine.blocks.motion import HUMANML3D, foot_skate, recover_joints


def script(action: str, turn: int = 0) -> Script:
    gait = action if action in GAITS else None
    return Script(gait, None if gait else action, 1, turn, 0)


@pytest.mark.parametrize("action", ACTIONS)
def test_bodies(action: str) -> None:
    joints = synthesise.joints_of(script(action), 100, np.random.default_rng(1))
    bones = np.linalg.norm(joints[:, 1:] - joints[:, list(HUMANML3D.parents[1:])], axis=-1)
    want = np.broadcast_to(np.linalg.norm(HUMANML3D.offsets, axis=-1)[1:], bones.shape)
    np.testing.assert_allclose(bones, want, atol=1e-9)
    lowest = joints[:, [10, 11], 1].min(1)
    assert lowest.min() > -0.05 and (lowest.max() < 0.12 or action == "jump")
    moved = np.linalg.norm(joints[-1, 0, [0, 2]] - joints[0, 0, [0, 2]])
    assert (moved > 2) == (action in GAITS)
    assert foot_skate(recover_joints(synthesise.features_of(joints))) < 0.15


@pytest.mark.parametrize("turn", [-1, 1])
def test_turns(turn: int) -> None:
    """Left is +X of somebody who looks along +Z."""
    joints = synthesise.joints_of(script("walk", turn), 120, np.random.default_rng(2))
    assert np.sign(joints[-1, 0, 0]) == turn


def test_clips_and_sentences() -> None:
    some, unseen = synthesise.clips(60, 3), synthesise.held_out(40)
    assert all(len(c.features) % 4 == 0 and 40 <= len(c.features) <= 196 for c in [*some, *unseen])
    assert all(c.text and c.text == c.text.strip() and "  " not in c.text for c in [*some, *unseen])
    assert not {c.text for c in some} & {c.text for c in unseen}
    assert all(synthesise.is_held_out(c.text) for c in unseen)
    again = synthesise.clips(3, 3)
    assert all(np.array_equal(a.features, b.features) and a.text == b.text for a, b in zip(some, again))
