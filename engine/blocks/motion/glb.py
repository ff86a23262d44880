"""Binary glTF 2.0 of an animated skeleton: one file that viewers, engines and Blender open.

The joints are nodes with animated rotations (and translations where they move), bound by a skin to one mesh with a thin
box for every bone, so that there is something to see and an armature to import. Source: glTF 2.0, Khronos.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from engine.blocks.motion.arrays import scalar
from engine.blocks.motion.bvh import Bvh, write_bytes
from engine.blocks.motion.rotations import between, continuous, to_quaternion, unit

_FLOAT, _U16, _U32 = 5126, 5123, 5125
_VERTICES, _INDICES = 34962, 34963
_TYPES = {1: "SCALAR", 3: "VEC3", 4: "VEC4", 16: "MAT4"}
_BOX = np.array([[x, y, z] for y in (0, 1) for z in (-1, 1) for x in (-1, 1)], np.float64)
# Two triangles a side, counter-clockwise from outside.
_SIDES = np.array(
    [0, 1, 3, 0, 3, 2, 4, 6, 7, 4, 7, 5, 0, 4, 5, 0, 5, 1, 2, 3, 7, 2, 7, 6, 0, 2, 6, 0, 6, 4, 1, 5, 7, 1, 7, 3]
)


def glb_bytes(bvh: Bvh, *, scale: float = 1.0) -> bytes:
    """The motion as a .glb file.

    Args:
        bvh: of a file, or of `bvh_from_joints` or `bvh_from_features`.
        scale: metres per unit of its positions: glTF is in metres. 0.01 for files in centimetres.

    Raises:
        InputError: scale is not a number above zero.
    """
    scale = scalar(scale, "scale", 1e-6, 1e6)
    file = _File()
    moves, turns = bvh.local
    moves = moves * scale
    rest = np.array([j.offset for j in bvh.joints]) * scale
    ends = {i: np.array(j.end) * scale for i, j in enumerate(bvh.joints) if j.end is not None}
    times = file.add((np.arange(len(moves)) * bvh.frame_time).astype(np.float32), bounds=True)
    nodes: list[dict[str, Any]] = []
    channels, samplers = [], []
    spins = continuous(to_quaternion(turns))
    for i, joint in enumerate(bvh.joints):
        children = [c for c, other in enumerate(bvh.joints) if other.parent == i]
        # Nodes start as frame 0, for viewers that do not play.
        node: dict[str, Any] = {"name": joint.name, "translation": _list(moves[0, i]), "rotation": _list(spins[0, i])}
        nodes.append(node | ({"children": children} if children else {}))
        for path, values, kinds in (("rotation", spins, "rotation"), ("translation", moves, "position")):
            if any(c.endswith(kinds) for c in joint.channels):
                samplers.append({"input": times, "output": file.add(values[:, i].astype(np.float32))})
                channels.append({"sampler": len(samplers) - 1, "target": {"node": i, "path": path}})
    bind = _bind(bvh, rest)
    points, owners, indices = _boxes(bvh, rest, ends, bind)
    weights = np.zeros((len(points), 4), np.float32)
    weights[:, 0] = 1
    belongs = np.zeros((len(points), 4), np.uint16)
    belongs[:, 0] = owners
    inverse = np.broadcast_to(np.eye(4, dtype=np.float32), (len(rest), 4, 4)).copy()
    inverse[:, 3, :3] = -bind  # columns one after the other, so the translation lies in the last four
    mesh = {
        "attributes": {
            "POSITION": file.add(points, _VERTICES, bounds=True),
            "JOINTS_0": file.add(belongs, _VERTICES),
            "WEIGHTS_0": file.add(weights, _VERTICES),
        },
        "indices": file.add(indices, _INDICES),
        "material": 0,
    }
    skin = {"joints": list(range(len(nodes))), "skeleton": 0, "inverseBindMatrices": file.add(inverse.reshape(-1, 16))}
    nodes.append({"name": "bones", "mesh": 0, "skin": 0})
    document: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": "quintet-engine"},
        "scene": 0,
        "scenes": [{"nodes": [0, len(nodes) - 1]}],
        "nodes": nodes,
        "meshes": [{"primitives": [mesh]}],
        "skins": [skin],
        "materials": [
            {
                "pbrMetallicRoughness": {"baseColorFactor": [0.85, 0.55, 0.25, 1], "metallicFactor": 0},
                "doubleSided": True,
            }
        ],
    }
    if channels:
        document["animations"] = [{"name": "motion", "channels": channels, "samplers": samplers}]
    return file.finish(document)


def save_glb(bvh: Bvh, path: str | os.PathLike[str], *, scale: float = 1.0) -> Path:
    """`glb_bytes` into a file.

    Raises:
        InputError: it cannot be written.
    """
    return write_bytes(path, glb_bytes(bvh, scale=scale))


class _File:
    """The binary chunk, and what describes it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []

    def add(self, array: np.ndarray, target: int | None = None, bounds: bool = False) -> int:
        """Append an array [n] or [n, components]; returns its accessor."""
        flat = np.ascontiguousarray(array).reshape(len(array), -1)
        raw = flat.astype(flat.dtype.newbyteorder("<")).tobytes()
        view: dict[str, Any] = {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(raw)}
        self.views.append(view | ({"target": target} if target else {}))
        self.data += raw + bytes(-len(raw) % 4)
        accessor: dict[str, Any] = {
            "bufferView": len(self.views) - 1,
            "componentType": {"float32": _FLOAT, "uint16": _U16, "uint32": _U32}[flat.dtype.name],
            "count": len(flat),
            "type": _TYPES[flat.shape[1]],
        }
        if bounds:
            accessor |= {"min": _list(flat.min(0)), "max": _list(flat.max(0))}
        self.accessors.append(accessor)
        return len(self.accessors) - 1

    def finish(self, document: dict[str, Any]) -> bytes:
        document |= {
            "buffers": [{"byteLength": len(self.data)}],
            "bufferViews": self.views,
            "accessors": self.accessors,
        }
        text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
        text += b" " * (-len(text) % 4)
        total = 12 + 8 + len(text) + 8 + len(self.data)
        return b"".join(
            [
                struct.pack("<4sII", b"glTF", 2, total),
                struct.pack("<I4s", len(text), b"JSON"),
                text,
                struct.pack("<I4s", len(self.data), b"BIN\0"),
                bytes(self.data),
            ]
        )


def _list(values: np.ndarray) -> list[float]:
    # Rounded as the file holds them, so that bounds are exact.
    return [float(v) for v in values.astype(np.float32)]


def _bind(bvh: Bvh, rest: np.ndarray) -> np.ndarray:
    """[N, 3] joints with no rotation anywhere, the root at its offset."""
    out = rest.copy()
    for i, joint in enumerate(bvh.joints):
        if joint.parent >= 0:
            out[i] += out[joint.parent]
    return out


def _boxes(
    bvh: Bvh, rest: np.ndarray, ends: dict[int, np.ndarray], bind: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corners [V, 3] fp32, their joints [V], triangles [3 F]: a box from each joint to each child and End Site."""
    spans = [(joint.parent, rest[i]) for i, joint in enumerate(bvh.joints) if joint.parent >= 0] + list(ends.items())
    # Coinciding joints have nothing between them, and a mesh must not be empty.
    spans = [s for s in spans if np.linalg.norm(s[1]) > 1e-9] or [(0, np.array([0, 1e-3, 0]))]
    points, owners = [], []
    for owner, span in spans:
        length = np.linalg.norm(span)
        width = min(0.08 * length, 0.03)
        turn = between(np.array([0, 1.0, 0]), unit(span, (0, 1, 0)))
        points.append((_BOX * [width, length, width]) @ turn.T + bind[owner])
        owners += [owner] * len(_BOX)
    indices = (np.arange(len(spans))[:, None] * len(_BOX) + _SIDES).reshape(-1)
    kind = np.uint16 if len(owners) < 65535 else np.uint32
    return np.concatenate(points).astype(np.float32), np.array(owners), indices.astype(kind)
