"""What vega3d-tiny is trained on: pictures, depth and poses that agree, questions whose answers follow from them."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples/tiny/vega3d"))

import rooms
from questions import ANGLE, KINDS, NUMBERS, RATIO
from room_data import Sample, dataset

from engine.blocks.scene import world_coordinates


@functools.cache
def samples() -> tuple[Sample, ...]:
    return tuple(dataset(0, 40, held_out=True))


def coordinates(s: Sample) -> np.ndarray:
    v = s.scene
    return world_coordinates(v.depth, v.intrinsics, v.poses, size=(rooms.SIZE, rooms.SIZE))


def test_the_same_again_and_sets_apart() -> None:
    again, other = next(dataset(0, 1, held_out=True)), next(dataset(0, 1))
    np.testing.assert_array_equal(again.scene.rgb, samples()[0].scene.rgb)
    assert again.questions == samples()[0].questions
    assert next(dataset(0, 1, held_out=True, start=7)).questions == samples()[7].questions
    assert (other.scene.rgb != again.scene.rgb).any()


@pytest.mark.parametrize("shape", rooms.SHAPES)
def test_points_lie_on_their_solid(shape: str) -> None:
    """Depth, intrinsics and poses bring each pixel of a solid onto its surface."""
    found = 0
    for s in samples():
        world = coordinates(s)
        for k, solid in enumerate(s.scene.room.solids):
            if solid.shape != shape:
                continue
            at = world[s.scene.which == k] - [solid.x, solid.y, 0]
            found += len(at)
            flat, z = np.hypot(at[:, 0], at[:, 1]), at[:, 2]
            r, h = solid.radius, solid.height
            if shape == "ball":
                off = np.abs(np.hypot(flat, z - r) - r)
            elif shape == "cone":
                off = np.abs(flat - r * (1 - z / h))
            elif shape == "pillar":
                off = np.minimum(np.abs(flat - 0.75 * r), np.abs(z - h))
            else:
                cos, sin = np.cos(solid.turn), np.sin(solid.turn)
                local = np.abs(at @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) - [0, 0, h / 2])
                off = np.abs(local.max(1) - h / 2)
            assert off.max() < 6e-3  # depth is in whole millimetres
            half = solid.box[3:] / 2 + 6e-3
            assert (np.abs(world[s.scene.which == k] - solid.box[:3]) <= half).all()
    assert found > 1000


def test_rooms() -> None:
    for s in samples():
        v = s.scene
        assert 3 <= len(v.room.solids) <= 4 and len({o.colour for o in v.room.solids}) == len(v.room.solids)
        assert v.seen.any(0).all() and (v.depth > 0).all()
        world = coordinates(s)
        assert (world >= rooms.LOW - 0.01).all() and (world <= rooms.HIGH + 0.01).all()
        assert all(((v.which == k).sum((1, 2)) <= v.whole[:, k]).all() for k in range(len(v.room.solids)))


def test_answers() -> None:
    """Answers, worked out a second time from pixels and poses."""
    sides, kinds = Counter(), Counter()
    for s in samples():
        v = s.scene
        names = [o.name for o in v.room.solids]
        for q in s.questions:
            kinds[q.kind] += 1
            if q.kind == "count":
                shape = q.text.split()[2].rstrip("s")
                assert q.answer == NUMBERS[sum(n.endswith(shape) for n in names)]
            elif q.kind == "shape":
                assert f"{q.text.split()[3]} {q.answer}" in names
            elif q.kind == "colour":
                assert names.count(f"{q.answer} {q.text.split()[-1].rstrip('?')}") == 1
            else:
                pair = [n.strip() for n in q.text.split(", the ")[1].rstrip("?").split(" or the ")]
                one, two = (names.index(n) for n in pair)
                sides[q.kind, q.answer == pair[0]] += 1
                if q.kind == "first":
                    frame = v.seen.argmax(0)
                    assert (frame[one] < frame[two]) == (q.answer == pair[0]) and frame[one] != frame[two]
                    continue
                middle = [np.array([o.x, o.y, o.height / 2]) for o in v.room.solids]
                if q.kind == "nearer":
                    far = [np.linalg.norm(middle[i] - v.poses[:, :3, 3].mean(0)) for i in (one, two)]
                    assert max(far) > RATIO * min(far) and (far[0] < far[1]) == (q.answer == pair[0])
                else:
                    for pose in v.poses:  # from every place of the camera, by the camera's own right
                        a, b = (np.linalg.inv(pose) @ [*middle[i], 1] for i in (one, two))
                        turn = np.degrees(np.arctan2(a[0], a[2]) - np.arctan2(b[0], b[2]))
                        assert (turn < 0) == (q.answer == pair[0])
                    around = v.poses[:, :2, 3].mean(0)
                    a, b = (np.degrees(np.arctan2(*(middle[i][:2] - around))) for i in (one, two))
                    assert abs(a - b) > ANGLE
    assert set(kinds) == set(KINDS)
    for kind in ("nearer", "left", "first"):  # whether the first named is the answer tells nothing
        assert 0.3 < sides[kind, True] / (sides[kind, True] + sides[kind, False]) < 0.7
