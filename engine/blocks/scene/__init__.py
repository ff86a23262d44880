"""Scenes around a model, without the network: frames, world coordinates, voxels, boxes, metrics. numpy only."""

from engine.blocks.scene.boxes import boxes_from_corners, check_boxes, corners, iou, paired_iou
from engine.blocks.scene.captions import bleu, cider
from engine.blocks.scene.frames import SAMPLINGS, Frames, at_most, read_frames, uniform
from engine.blocks.scene.geometry import check_coordinates, nearest_index, resize_coordinates, world_coordinates
from engine.blocks.scene.metrics import (
    VSI_CHOICES,
    VSI_NUMBERS,
    AnswerScores,
    CaptionScores,
    assignment,
    mean_relative_accuracy,
    multi3drefer_f1,
    normalize_answer,
    scan2cap_scores,
    scanqa_scores,
    scanrefer_accuracy,
    sqa3d_accuracy,
    vsi_bench_accuracy,
)
from engine.blocks.scene.resizing import center_crop, check_frames, fit_width, resize, smart_resize
from engine.blocks.scene.voxels import (
    COORD_DTYPES,
    Voxels,
    average_coordinates,
    patches_in_boxes,
    position_code,
    position_tables,
)

__all__ = [
    "COORD_DTYPES",
    "SAMPLINGS",
    "VSI_CHOICES",
    "VSI_NUMBERS",
    "AnswerScores",
    "CaptionScores",
    "Frames",
    "Voxels",
    "assignment",
    "at_most",
    "average_coordinates",
    "bleu",
    "boxes_from_corners",
    "center_crop",
    "check_boxes",
    "check_coordinates",
    "check_frames",
    "cider",
    "corners",
    "fit_width",
    "iou",
    "mean_relative_accuracy",
    "multi3drefer_f1",
    "nearest_index",
    "normalize_answer",
    "paired_iou",
    "patches_in_boxes",
    "position_code",
    "position_tables",
    "read_frames",
    "resize",
    "resize_coordinates",
    "scan2cap_scores",
    "scanqa_scores",
    "scanrefer_accuracy",
    "smart_resize",
    "sqa3d_accuracy",
    "uniform",
    "vsi_bench_accuracy",
    "world_coordinates",
]
