"""Motions of people, without the network: skeletons, features, waypoints, files, pictures, metrics. numpy only."""

from engine.blocks.motion.bvh import Bvh, BvhJoint, parse_bvh, read_bvh
from engine.blocks.motion.constraints import Constraints, Residual, Waypoints
from engine.blocks.motion.draw import draw, save_animation
from engine.blocks.motion.exchange import (
    CONVENTIONS,
    bvh_from_features,
    bvh_from_joints,
    features_from_bvh,
    joints_from_bvh,
)
from engine.blocks.motion.features import (
    HUMANML3D_STATISTICS,
    FeatureStatistics,
    from_joints,
    recover_from_rotations,
    recover_joints,
    recover_root,
    retargeted,
)
from engine.blocks.motion.glb import glb_bytes, save_glb
from engine.blocks.motion.metrics import ControlError, control_error, foot_skate, jerk
from engine.blocks.motion.pose import StartPose
from engine.blocks.motion.resample import resample, resample_rotations
from engine.blocks.motion.skeleton import HUMANML3D, KIT, Layout, Skeleton, skeleton_of

__all__ = [
    "CONVENTIONS",
    "HUMANML3D",
    "HUMANML3D_STATISTICS",
    "KIT",
    "Bvh",
    "BvhJoint",
    "Constraints",
    "ControlError",
    "FeatureStatistics",
    "Layout",
    "Residual",
    "Skeleton",
    "StartPose",
    "Waypoints",
    "bvh_from_features",
    "bvh_from_joints",
    "control_error",
    "draw",
    "features_from_bvh",
    "foot_skate",
    "from_joints",
    "glb_bytes",
    "jerk",
    "joints_from_bvh",
    "parse_bvh",
    "read_bvh",
    "recover_from_rotations",
    "recover_joints",
    "recover_root",
    "resample",
    "resample_rotations",
    "retargeted",
    "save_animation",
    "save_glb",
    "skeleton_of",
]
