"""Model families by the `model_type` (or `type`) of their config.json."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

FAMILIES = {
    "nemotron_h": ("engine.models.nemotron.model", "Nemotron"),
    "pi05": ("engine.models.pi05.model", "Pi05"),
    "xvla": ("engine.models.xvla.model", "XVLA"),
    "motok": ("engine.models.motok.model", "MoTok"),
    "llava_qwen": ("engine.models.vega3d.model", "Vega3D"),
    "llava": ("engine.models.vega3d.model", "Vega3D"),
    "qwen2_5_vl": ("engine.models.vega3d.model", "Vega3D"),
    "subjects": ("engine.models.dreambooth3d.model", "DreamBooth3D"),
    "generator": ("engine.models.vega3d.features", "GeneratorFeatures"),
}
GENERATORS = ("WanModel", "WanTransformer3DModel", "VaceWanModel", "WanVACETransformer3DModel")  # by _class_name
SUBJECTS = ("HunyuanVideo15Transformer3DModel", "HunyuanVideo_1_5_DiffusionTransformer")
OPENPI = "pi05"  # what a config.json with an action_horizon and no type belongs to
MOTIONS = "motok"  # and one with a dataset


def family_of(folder: Path) -> tuple[dict, Any]:
    """config.json of a folder (multimodal wrappers opened) and the class that loads it."""
    from engine.errors import ConfigError
    from engine.io.files import read_json

    path = folder / "config.json"
    if not path.exists() and (folder / "transformer" / "config.json").exists():
        path = folder / "transformer" / "config.json"  # a folder of diffusers
    if not path.exists():  # or one with several transformers
        path = next(iter(sorted(folder.glob("transformer/*/config.json"))), path)
    if not path.exists():
        raise ConfigError(
            f"{folder} has no config.json; give a folder in the published layout (for weights of openpi without one, "
            'write {"type": "pi05", "chunk_size": <actions of a chunk>} there)'
        )
    config = read_json(path, limit=32 << 20, error=ConfigError)
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not a JSON object")
    if config.get("_class_name") in GENERATORS:
        return config, family("generator")
    if config.get("_class_name") in SUBJECTS or "mm_double_blocks_depth" in config:
        return config, family("subjects")
    if "model_type" not in config and "type" not in config and "action_horizon" in config:
        return config, family(OPENPI)
    if "model_type" not in config and "type" not in config and "dataset" in config:
        return config, family(MOTIONS)
    for wrapper in ("llm_config", "text_config"):
        if isinstance(config.get(wrapper), dict):
            config = config[wrapper]
    return config, family(str(config.get("type", config.get("model_type"))))


def family(model_type: str) -> Any:
    """The class that loads checkpoints of this model_type."""
    from engine.errors import ConfigError

    if model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is not supported; this engine loads {', '.join(FAMILIES)}")
    module, name = FAMILIES[model_type]
    return getattr(importlib.import_module(module), name)
