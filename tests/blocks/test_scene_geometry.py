"""World coordinates, voxels, position codes, patches in boxes, and the boxes themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks.scene import (
    Voxels,
    average_coordinates,
    boxes_from_corners,
    check_boxes,
    check_coordinates,
    corners,
    iou,
    nearest_index,
    paired_iou,
    patches_in_boxes,
    position_code,
    position_tables,
    resize_coordinates,
    world_coordinates,
)
from engine.errors import InputError

PINHOLE = [[2.0, 0, 1.5], [0, 4.0, 0.5], [0, 0, 1]]


def turn(axis, angle, move=(0, 0, 0)):
    pose = np.eye(4)
    i, j = [k for k in range(3) if k != axis]
    pose[i, i] = pose[j, j] = math.cos(angle)
    pose[j, i], pose[i, j] = math.sin(angle), -math.sin(angle)
    pose[:3, 3] = move
    return pose


def room(height, width, frames=2, seed=0):
    """Coordinates of a wavy surface, smooth as a scene is: [T, H, W, 3] fp32."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[:height, :width] / max(height, width)
    out = []
    for _ in range(frames):
        a, b, c = rng.uniform(-3, 3, (3, 3))
        out.append(np.stack([a[k] + b[k] * u + c[k] * v + 0.2 * np.sin(5 * u * (k + 1)) for k in range(3)], -1))
    return np.array(out, np.float32)


# ---- nearest


def test_nearest_is_opencvs():
    assert nearest_index(4, 8).tolist() == [0, 2, 4, 6]
    assert nearest_index(3, 8).tolist() == [0, 2, 5]
    assert nearest_index(5, 3).tolist() == [0, 0, 1, 1, 2]
    # 480 to 384 is every 1.25th, 640 to 384 every 1.67th.
    assert nearest_index(384, 480)[:6].tolist() == [0, 1, 2, 3, 5, 6] and nearest_index(384, 480)[-1] == 478
    assert nearest_index(384, 640)[:6].tolist() == [0, 1, 3, 5, 6, 8] and nearest_index(384, 640)[-1] == 638
    # 17 * 6 / 34 is 3 and 49 * 2 / 98 is 1, but OpenCV (4.10 and 5.0) takes these.
    assert nearest_index(34, 6)[17] == 2 and nearest_index(98, 2)[49] == 0


@given(st.integers(1, 700), st.integers(1, 700))
@settings(max_examples=100, deadline=None)
def test_nearest_stays_inside(count, source):
    index = nearest_index(count, source)
    assert index[0] == 0 and index[-1] < source and (np.diff(index) >= 0).all()
    assert np.abs(index - np.arange(count) * source / count).max() <= 1


# ---- world coordinates


def test_world_coordinates_by_hand():
    # Pixel (v = 1, u = 3) at 2 m: x = (3 - 1.5) * 2 / 2 = 1.5, y = (1 - 0.5) * 2 / 4 = 0.25.
    depth = np.zeros((1, 2, 4), np.uint16)
    depth[0, 1, 3] = 2000
    at = [[10.0, 20.0, 30.0]]
    camera = turn(2, 0.0, at[0])
    got = world_coordinates(depth, PINHOLE, camera[None], size=(2, 4))
    assert got.shape == (1, 2, 4, 3) and got.dtype == np.float32
    assert got[0, 1, 3].tolist() == [11.5, 20.25, 32.0]
    assert (got[0, 0] == at).all(), "what was not measured is the camera's centre"
    # A quarter about Z: x to y, y to -x.
    got = world_coordinates(depth, PINHOLE, turn(2, math.pi / 2, at[0])[None], size=(2, 4))
    assert np.abs(got[0, 1, 3] - [10 - 0.25, 20 + 1.5, 32]).max() < 1e-6
    # The alignment comes after the pose: a half turn about Z and 1 up.
    got = world_coordinates(depth, PINHOLE, camera[None], turn(2, math.pi, (0, 0, 1)), size=(2, 4))
    assert np.abs(got[0, 1, 3] - [-11.5, -20.25, 33]).max() < 1e-5
    # Metres as floats, intrinsics as 4 x 4 and one for each frame.
    wide = np.eye(4)
    wide[:3, :3] = PINHOLE
    metres = depth.astype(np.float32) / 1000
    for camera_matrix in (wide, [PINHOLE], np.float32(PINHOLE)):
        again = world_coordinates(metres, camera_matrix, camera[None], size=(2, 4))
        assert (again == world_coordinates(depth, PINHOLE, camera[None], size=(2, 4))).all()


def test_world_coordinates_are_those_of_the_kept_pixels():
    rng = np.random.default_rng(1)
    depth = rng.integers(0, 6000, (3, 12, 16)).astype(np.uint16)
    poses = np.stack([turn(i, 0.3 + i, rng.normal(size=3)) for i in range(3)])
    each = np.stack([np.array(PINHOLE) * [[1 + i / 10], [1], [1]] for i in range(3)])
    align = turn(1, 0.2, (1, 2, 3))
    full = world_coordinates(depth, each, poses, align, size=(12, 16))
    small = world_coordinates(depth, each, poses, align, size=(6, 6))
    assert (small == full[:, ::2][:, :, [0, 2, 5, 8, 10, 13]]).all()
    # Kept height 6: 16 * 6 / 12 = 8 wide, every second; one column off at each side.
    crop = world_coordinates(depth, each, poses, align, size=(6, 6), rule="center_crop")
    assert (crop == full[:, ::2, 2:14:2]).all()
    assert (resize_coordinates(full, (6, 6)) == small).all()
    assert (resize_coordinates(full, (6, 6), "center_crop") == crop).all()
    # Point by point in fp64.
    for t, v, u in ((0, 0, 0), (1, 7, 9), (2, 11, 15)):
        z = depth[t, v, u] / 1000
        x = (u - each[t, 0, 2]) * z / each[t, 0, 0]
        y = (v - 0.5) * z / 4.0
        expected = (align @ poses[t] @ [x, y, z, 1])[:3]
        assert np.abs(full[t, v, u] - expected).max() < 2e-5


def test_published_unprojection_in_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    depth = rng.integers(0, 9000, (2, 48, 64)).astype(np.uint16)
    camera = torch.tensor([[57.8, 0, 31.9], [0, 57.9, 23.9], [0, 0, 1]])
    poses = torch.from_numpy(np.stack([turn(i, 1.1 + i, rng.normal(size=3)) for i in range(2)]))
    align = torch.from_numpy(turn(2, 0.4, (0.1, 0.2, 0.3)))
    v, u = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    z = torch.from_numpy(depth.astype(np.int32)).float() / 1000
    x, y = (u - camera[0, 2]) * z / camera[0, 0], (v - camera[1, 2]) * z / camera[1, 1]
    points = torch.stack([x, y, z, torch.ones_like(z)], -1).reshape(2, -1, 4)
    world = points @ (align @ poses).float().transpose(1, 2)
    world = (world[..., :3] / world[..., 3:]).reshape(2, 48, 64, 3).numpy()
    got = world_coordinates(depth, camera, poses, align, size=(48, 64))
    assert np.abs(got - world).max() < 4e-6


GOOD = {"depth": np.ones((2, 4, 6), np.uint16), "intrinsics": PINHOLE, "poses": np.stack([np.eye(4)] * 2)}


def changed(array, place, value):
    out = np.array(array, np.float64)
    out[place] = value
    return out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depth": np.ones((4, 6), np.uint16)}, r"uint16 \[4, 6\]; \[T, h, w\]"),
        ({"depth": np.ones((2, 4, 6), bool)}, "bool"),
        ({"depth": np.ones((0, 4, 6), np.uint16)}, "1 to 1024 maps"),
        ({"depth": np.ones((2, 0, 6), np.uint16)}, "pixels a side"),
        ({"depth": [[1, 2], [3]]}, "depth is not an array"),
        ({"depth": changed(GOOD["depth"], (1, 2, 3), np.nan)}, r"depth\[1\]\[2\]\[3\] is nan in float64"),
        ({"depth": changed(GOOD["depth"], (1, 2, 3), np.inf)}, r"depth\[1\]\[2\]\[3\] is inf"),
        ({"depth": changed(GOOD["depth"], (0, 0, 1), -0.5)}, r"depth\[0\]\[0\]\[1\] is -0.5"),
        ({"depth": GOOD["depth"] * 1500.0}, "floats are metres, integers millimetres"),
        ({"depth": GOOD["depth"].astype(np.int32) * -1}, "is -1 in int32"),
        ({"intrinsics": np.eye(2)}, r"intrinsics has shape \[2, 2\]"),
        ({"intrinsics": [PINHOLE] * 3}, r"intrinsics has shape \[3, 3, 3\].*each of 2 frames"),
        ({"intrinsics": changed(PINHOLE, (0, 0), 0)}, "focal length that is not positive"),
        ({"intrinsics": changed(PINHOLE, (0, 2), np.nan)}, r"intrinsics\[0, 2\] is nan"),
        ({"intrinsics": changed(PINHOLE, (0, 1), 0.5)}, "skew"),
        ({"intrinsics": "K"}, "intrinsics is <U1"),
        ({"poses": np.eye(4)}, r"poses has shape \[4, 4\]; \[T, 4, 4\]"),
        ({"poses": np.stack([np.eye(4)] * 3)}, "poses has 3 matrices for 2 depth maps"),
        ({"poses": changed(GOOD["poses"], (1, 0, 3), -np.inf)}, r"poses\[1\] is not finite; a camera that lost track"),
        ({"poses": changed(GOOD["poses"], (1, 0, 3), np.nan)}, r"poses\[1\] is not finite"),
        ({"poses": changed(GOOD["poses"], (0, 2, 2), 0)}, r"poses\[0\] is singular"),
        ({"poses": changed(GOOD["poses"], (0, slice(0, 3), slice(0, 3)), 0)}, r"poses\[0\] is singular"),
        ({"poses": changed(GOOD["poses"], (1, 3, 0), 2.0)}, r"poses\[1\] ends in \[2.0, 0.0, 0.0, 1.0\].*transposed"),
        ({"poses": [["a"]]}, "poses is not an array of numbers"),
        ({"axis_align": np.zeros((4, 4))}, r"axis_align\[0\] ends in"),
        ({"axis_align": np.eye(3)}, "axis_align has shape"),
        ({"axis_align": [[1], [1, 2]]}, "axis_align is not an array"),
        (
            {"depth": np.ones((5, 1, 1), int), "poses": [np.eye(4)] * 5, "size": (8192, 8192)},
            "5 frames of 8192 x 8192 pixels",
        ),
        ({"size": (0, 4)}, "size = "),
        ({"size": (4.0, 4)}, "size = "),
        ({"size": (4, 4, 4)}, "size = "),
        ({"rule": "pad"}, "rule = 'pad'; one of resize, center_crop"),
        ({"rule": "center_crop", "size": (4, 5)}, "squares"),
        ({"depth": np.ones((2, 6, 4), np.uint16), "rule": "center_crop", "size": (4, 4)}, "wider than high"),
    ],
)
def test_faults_of_world_coordinates(change, message):
    with pytest.raises(InputError, match=message):
        world_coordinates(**{**GOOD, **change})


def test_check_coordinates():
    points = np.zeros((2, 3, 4, 3))
    assert check_coordinates(points, 2, (3, 4)).dtype == np.float32
    for call, message in (
        (lambda: check_coordinates(points[0]), r"\[3, 4, 3\]; \[T, H, W, 3\]"),
        (lambda: check_coordinates(points[..., :2]), "coords is float64"),
        (lambda: check_coordinates(points, 3), "coords has 2 frames; there are 3 pictures"),
        (lambda: check_coordinates(points, 2, (4, 4)), "3 x 4 pixels; 4 x 4 are needed"),
        (lambda: check_coordinates(changed(points, (1, 0, 0, 2), np.nan)), r"coords\[1, 0, 0, 2\] is nan"),
        (lambda: check_coordinates(changed(points, (1, 0, 0, 2), 2e6)), "at most 1e"),
        (lambda: check_coordinates("points"), "coords is <U6"),
        (lambda: resize_coordinates(points, (2, 2), "crop"), "rule = 'crop'"),
    ):
        with pytest.raises(InputError, match=message):
            call()


# ---- voxels


def test_voxels_by_hand():
    v = Voxels()
    assert v.counts == (301, 301, 101)
    points = [[-15, -15, -5], [15, 15, 5], [-99, 99, 99], [0, 0, 0], [-14.94, -14.96, -4.75]]
    expected = [[0, 0, 0], [300, 300, 100], [0, 300, 100], [150, 150, 50], [1, 0, 2]]
    assert v.of(points, "fp32").tolist() == expected and v.of(points, "fp32").dtype == np.int32
    # bf16 has 8 significant bits. -4.75 is one of its numbers: (-4.75 + 5) / 0.1 = 2.5, half to even.
    assert v.of([0, 0, -4.75]).tolist() == [150, 150, 2]
    # -14.94 becomes -14.9375, less the low 0.0625, over 0.1 is 0.625.
    assert v.of([-14.94, 0, 0])[0] == 1
    # 10.93 becomes 10.9375; plus 15 is 25.9375, which becomes 26; over 0.1 is 260. In fp32 it is 259.3.
    assert v.of([10.93, 0, 0])[0] == 260 and v.of([10.93, 0, 0], "fp32")[0] == 259
    # 10.81 becomes 10.8125; 25.8125 becomes 25.75; 257.5 becomes 258 (257.5 lies between 256 and 258).
    assert v.of([10.81, 0, 0])[0] == 258 and v.of([10.81, 0, 0], "fp32")[0] == 258
    assert (v.of(np.random.default_rng(0).uniform(-20, 20, (1000, 3)))[:, :2] <= 300).all()
    # Tables must reach the highest index of either dtype: 30.7 / 0.1 is 307 in fp32, 308 in bf16 (30.75 / 0.1).
    assert Voxels(low=(0, 0, 0), high=(30.7, 1, 1)).counts == (309, 11, 11)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_voxels_are_those_of_torch(dtype):
    torch = pytest.importorskip("torch")
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    coords = room(384, 384, 3) * [4, 4, 2]
    c = torch.from_numpy(coords.astype(np.float32)).to(kind)
    mean = torch.nn.functional.avg_pool2d(c[:, :378, :378].permute(0, 3, 1, 2), 27, 27).permute(0, 2, 3, 1)
    low, high = torch.tensor([-15, -15, -5]), torch.tensor([15, 15, 5])
    voxels = ((torch.minimum(torch.maximum(mean, low), high) - low) / 0.1).round()
    got = average_coordinates(coords, coord_dtype=dtype)
    assert got.shape == (3, 14, 14, 3) and (got == mean.float().numpy()).all()
    assert (Voxels().of(got, dtype) == voxels.float().numpy()).all()
    assert len(np.unique(voxels.float().numpy())) > 50, "the scene spans many voxels"


@given(st.integers(0, 2**31), st.sampled_from(["bf16", "fp32"]), st.floats(0.05, 1.0))
@settings(max_examples=30, deadline=None)
def test_voxels_of_any_size_are_those_of_torch(seed, dtype, size):
    torch = pytest.importorskip("torch")
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    points = np.random.default_rng(seed).uniform(-20, 20, (50, 3)).astype(np.float32)
    low, high = torch.tensor([-15, -15, -5]), torch.tensor([15, 15, 5])
    p = torch.from_numpy(points).to(kind)
    expected = ((torch.minimum(torch.maximum(p, low), high) - low) / size).round().float().numpy()
    voxels = Voxels(size=size)
    assert (voxels.of(points, dtype) == expected).all()
    assert (voxels.of(points, dtype) < voxels.counts).all()


def test_averages_of_small_grids():
    # 4 x 4 patches of 14 pixels of a 56 pixel picture; and what lies beyond the grid is left out.
    coords = np.zeros((1, 6, 7, 3), np.float32)
    coords[0, :4, :6] = np.arange(24).reshape(4, 6)[..., None] * [1, 10, 100]
    coords[0, 4:] = coords[0, :, 6:] = 1e5
    got = average_coordinates(coords, (2, 3), 2, "fp32")
    # Of the first patch 0, 1, 6, 7.
    assert got[0, ..., 0].tolist() == [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]
    assert (got[..., 2] == 100 * got[..., 0]).all()
    assert average_coordinates(room(56, 56), (4, 4), 14).shape == (2, 4, 4, 3)
    # 350 and 550 take 9 bits; bf16 has 8 and rounds to 350 and 552 (steps of 2 and 4).
    assert average_coordinates(coords, (2, 3), 2)[0, 0, :2, 2].tolist() == [350.0, 552.0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: average_coordinates(room(50, 50)), "14 x 14 patches of 27 pixels do not fit into coords of 50 x 50"),
        (lambda: average_coordinates(room(8, 8), (2, 2), 0), "patch = 0"),
        (lambda: average_coordinates(room(8, 8), (2,), 2), "grid = "),
        (lambda: average_coordinates(room(8, 8), (2, 2), 2, "fp16"), "coord_dtype = 'fp16'; one of bf16, fp32"),
        (lambda: Voxels().of([1, 2]), "points is int64"),
        (lambda: Voxels().of([1, 2, np.nan]), r"points\[2\] is nan"),
        (lambda: Voxels(low=(0, 0, 0), high=(1, 1, 0)), "lows below three highs"),
        (lambda: Voxels(low=(0, 0, np.nan)), "lows below three highs"),
        (lambda: Voxels(size=0), "voxels of 0 m"),
        (lambda: Voxels(size=math.nan), "voxels of nan m"),
        (lambda: Voxels(size=0.0001), "at most 32767 of them"),
        (lambda: Voxels(size="small"), "voxels: "),
        (lambda: position_tables(2, (1, 1, 1)), "dims = 2"),
        (lambda: position_tables(9, (1, 1)), "counts = "),
        (lambda: position_tables(9, (1, 1, 0)), "counts = "),
        (lambda: position_code([[1, 2, -3]], 9), "of at least 0"),
        (lambda: position_code([[1.0, 2, 3]], 9), "float64"),
        (lambda: position_code([[1, 2]], 9), r"\[1, 2\]; integers"),
    ],
)
def test_faults_of_voxels(call, message):
    with pytest.raises(InputError, match=message):
        call()


# ---- position codes


def test_position_code_by_hand():
    # D = 14: 4 for each axis, angles v and v / 100, two zeros at the end.
    got = position_code([[3, 0, 250]], 14)
    expected = [
        *(math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)),
        *(0, 1, 0, 1),
        *(math.sin(250), math.cos(250), math.sin(2.5), math.cos(2.5)),
        *(0, 0),
    ]
    assert got.shape == (1, 14) and got.dtype == np.float32 and np.abs(got - expected).max() < 1e-7
    # D = 9 has 3 for each axis: sin v, cos v, sin of v / 10000^(2/3).
    assert np.abs(position_code([5, 0, 0], 9)[2] - math.sin(5 / 464.1588834)) < 1e-7


@pytest.mark.parametrize("dims", [3, 9, 60, 64, 3584])
def test_position_tables_are_the_code(dims):
    counts, width = (31, 30, 11), dims // 3
    tables = position_tables(dims, counts)
    assert [t.shape for t in tables] == [(n, width) for n in counts] and all(t.dtype == np.float32 for t in tables)
    voxels = np.random.default_rng(0).integers(0, counts, (2, 5, 3))
    code = position_code(voxels, dims)
    joined = np.concatenate([table[voxels[..., axis]] for axis, table in enumerate(tables)], -1)
    assert code.shape == (2, 5, dims) and (code[..., : 3 * width] == joined).all() and not code[..., 3 * width :].any()


def test_position_code_is_the_published_one():
    torch = pytest.importorskip("torch")
    voxels = np.random.default_rng(3).integers(0, (301, 301, 101), (64, 3))
    index = torch.arange(1194, dtype=torch.float32)
    divisor = 10000 ** (2 * (index // 2) / 1194)
    parts = []
    for axis in range(3):
        angle = torch.from_numpy(voxels[:, axis]).float()[:, None] / divisor
        parts.append(torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1))
    published = torch.cat(parts, 1).numpy()
    # The published one divides in fp32: at 300 rad that is up to 3e-5.
    assert np.abs(position_code(voxels, 3584)[:, :3582] - published).max() < 5e-5


# ---- patches in boxes


def test_patches_by_hand():
    # One frame of 4 x 5 pixels, two patches of 2 x 2 across, the fifth column unused; points (u, v, 0).
    v, u = np.mgrid[:4, :5]
    coords = np.stack([u, v, 0 * u], -1)[None].astype(np.float32)
    boxes = [
        [0.5, 0.5, 0, 1, 1, 1],  # all of the first patch, faces included
        [0, 0.5, 0, 1, 1, 1],  # half of it
        [0, 0, 0, 1, 1, 1],  # a quarter of it
        [1.5, 1.5, 0, 9, 9, 1],  # everything
        [1.5, 1.5, 9, 9, 9, 1],  # beside everything
    ]
    got = patches_in_boxes(coords, boxes, (2, 2), 2)
    assert got.shape == (5, 1, 2, 2) and got.dtype == bool
    assert got[:, 0].tolist() == [
        [[True, False], [False, False]],
        [[True, False], [False, False]],
        [[False, False], [False, False]],
        [[True, True], [True, True]],
        [[False, False], [False, False]],
    ]
    assert patches_in_boxes(coords, boxes, (2, 2), 2, share=0.25)[2, 0].tolist() == [[True, False], [False, False]]
    assert not patches_in_boxes(coords, boxes, (2, 2), 2, share=1)[1].any()
    # Half of 3 x 3 points is int(4.5) = 4 of them.
    assert patches_in_boxes(coords, [[0.5, 0.5, 0, 1, 1, 1]], (1, 1), 3).all()
    assert patches_in_boxes(coords, np.zeros((0, 6)), (2, 2), 2).shape == (0, 1, 2, 2)
    assert not patches_in_boxes(coords, [[50, 0, 0, 1, 1, 1]], (4, 5), 1).any(), "one point is the least"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_patches_are_the_published_ones(dtype):
    torch = pytest.importorskip("torch")
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    coords = room(384, 384, 3, seed=4)
    rng = np.random.default_rng(5)
    centres = coords[rng.integers(0, 3, 12), rng.integers(0, 378, 12), rng.integers(0, 378, 12)]
    boxes = np.concatenate([centres, rng.uniform(0.2, 1.5, (12, 3))], 1)
    got = patches_in_boxes(coords, boxes, coord_dtype=dtype)
    c, b = torch.from_numpy(coords).to(kind), torch.from_numpy(boxes).float().to(kind)
    c = c[:, :378, :378].reshape(-1, 27, 14, 27, 14, 3).transpose(2, 3).flatten(3, 4)
    for k in range(12):
        low, high = b[k, :3] - b[k, 3:] / 2, b[k, :3] + b[k, 3:] / 2
        inside = torch.all((low <= c) & (c <= high), dim=-1).sum(dim=3) >= 98
        assert (got[k] == inside.numpy()).all()
    assert 500 < got.sum() < 0.5 * got.size


def test_faults_of_patches():
    for change, message in (
        ({"share": 0}, "share = 0"),
        ({"share": 1.5}, "share = 1.5"),
        ({"boxes": [[0, 0, 0, 1, 1, 0]]}, "a size is positive"),
        ({"grid": (5, 2)}, "do not fit"),
        ({"coord_dtype": "f32"}, "coord_dtype"),
    ):
        given_ = {"coords": room(8, 8), "boxes": [[0, 0, 0, 1, 1, 1]], "grid": (2, 2), "patch": 2, **change}
        with pytest.raises(InputError, match=message):
            patches_in_boxes(**given_)


# ---- boxes


def test_iou_by_hand():
    unit = [0, 0, 0, 2, 2, 2]
    others = [
        unit,
        [1, 0, 0, 2, 2, 2],  # half of each: 4 of 12
        [1, 1, 1, 2, 2, 2],  # a corner: 1 of 15
        [2, 0, 0, 2, 2, 2],  # a face
        [5, 0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],  # inside: 1 of 8
    ]
    got = iou([unit], others)
    assert got.shape == (1, 6) and np.abs(got[0] - [1, 4 / 12, 1 / 15, 0, 0, 1 / 8]).max() < 1e-15
    assert (paired_iou([unit] * 6, others) == got[0]).all()
    assert iou(np.zeros((0, 6)), others).shape == (0, 6) and iou([], []).shape == (0, 0)
    low, high = corners(others)
    assert low[1].tolist() == [0, -1, -1] and high[1].tolist() == [2, 1, 1]
    assert (boxes_from_corners(low, high) == others).all()
    assert boxes_from_corners([0, 0, 0], [1, 2, 4]).tolist() == [[0.5, 1, 2, 1, 2, 4]]


BOX = st.tuples(*[st.floats(-5, 5)] * 3, *[st.floats(0.01, 5)] * 3)


@given(st.lists(BOX, min_size=1, max_size=4), st.lists(BOX, min_size=1, max_size=4), st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_iou_properties(a, b, move):
    got = iou(a, b)
    assert got.shape == (len(a), len(b)) and ((got >= 0) & (got <= 1 + 1e-12)).all()
    assert np.allclose(got, iou(b, a).T, atol=1e-12) and np.allclose(np.diag(iou(a, a)), 1)
    shift = np.array([move, -move, 2 * move, 0, 0, 0])
    assert np.allclose(got, iou(np.array(a) + shift, np.array(b) + shift), atol=1e-6)


@pytest.mark.parametrize(
    "values, message",
    [
        ([[0, 0, 0, 1, 1]], r"int64 \[1, 5\]; numbers \[K, 6\]"),
        (np.ones((1, 2, 6)), r"\[1, 2, 6\]"),
        ([[0, 0, 0, 1, 0, 1]], "a size is positive along every axis"),
        ([[0, 0, 0, 1, -1, 1]], r"boxes\[0\] has size"),
        ([[0, 0, 0, 1, 1, 1], [0, np.nan, 0, 1, 1, 1]], r"boxes\[1\]\[1\] is nan"),
        ([[0, 0, np.inf, 1, 1, 1]], r"boxes\[0\]\[2\] is inf"),
        ([[0, 0, 2e6, 1, 1, 1]], "at most 1e"),
        ([["a"] * 6], "<U1"),
        ([[1, 2], [3]], "boxes is not an array"),
        (np.ones((4097, 6)), "4097 boxes; 0 to 4096"),
    ],
)
def test_faults_of_boxes(values, message):
    with pytest.raises(InputError, match=message):
        check_boxes(values)


def test_more_faults_of_boxes():
    one = [0, 0, 0, 1, 1, 1]
    with pytest.raises(InputError, match="proposals has 0 boxes; 1 to 50"):
        check_boxes([], "proposals", least=1, limit=50)
    with pytest.raises(InputError, match="proposals has 51 boxes; 1 to 50"):
        check_boxes([one] * 51, "proposals", least=1, limit=50)
    with pytest.raises(InputError, match="2 boxes cannot be paired with 1"):
        paired_iou([one, one], [one])
    with pytest.raises(InputError, match="axis 1 has no extent"):
        boxes_from_corners([0, 1, 0], [1, 1, 1])
    with pytest.raises(InputError, match="shapes"):
        boxes_from_corners([0, 1, 0], [[1, 1, 1]] * 2)
    with pytest.raises(InputError, match="corners are not"):
        boxes_from_corners("low", "high")
