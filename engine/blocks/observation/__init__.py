"""Preprocessing of robot observations, explicit and printable: profiles, images, prompts, normalisation, actions."""

from engine.blocks.observation.actions import XVLA_SPACES, ActionMap, ActionSpace, xvla_action_space
from engine.blocks.observation.images import RESIZES, ImageRule, bilinear
from engine.blocks.observation.normalization import Normalizer
from engine.blocks.observation.preprocess import ModelInput, Preprocessor
from engine.blocks.observation.profile import (
    PROFILES,
    InputProfile,
    View,
    lerobot_pi05,
    lerobot_xvla,
    openpi_pi05,
    profile,
    relative_mask,
)
from engine.blocks.observation.prompt import TextEncoder, digitize, padded_tokens, prompt_tokens, text_encoder

__all__ = [
    "PROFILES",
    "RESIZES",
    "XVLA_SPACES",
    "ActionMap",
    "ActionSpace",
    "ImageRule",
    "InputProfile",
    "ModelInput",
    "Normalizer",
    "Preprocessor",
    "TextEncoder",
    "View",
    "bilinear",
    "digitize",
    "lerobot_pi05",
    "lerobot_xvla",
    "openpi_pi05",
    "padded_tokens",
    "profile",
    "prompt_tokens",
    "relative_mask",
    "text_encoder",
    "xvla_action_space",
]
