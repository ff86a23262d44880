"""Configuration of the nemotron_h family (Nemotron-Cascade 2, Nemotron 3 Nano)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.io.files import member, read_json
from engine.io.values import choice, flag, infinite, integer, number, show, token_ids

MAX_CONFIG_BYTES = 32_000_000
MAX_LAYERS = 1024

_KINDS = {
    "mamba": "M",
    "linear_attention": "M",
    "moe": "E",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
}
_ALIASES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "mamba_dt_limit": "time_step_limit",
    "num_local_experts": "n_routed_experts",
    "dtype": "torch_dtype",
}
_WRAPPERS = ("llm_config", "text_config")

# Allowed range of each integer: far above any published model, low enough that no product of them is absurd.
_RANGES = {
    "vocab_size": (1, 1 << 22),
    "hidden_size": (1, 1 << 17),
    "num_attention_heads": (1, 1 << 12),
    "num_key_value_heads": (1, 1 << 12),
    "head_dim": (1, 1 << 12),
    "mamba_num_heads": (1, 1 << 12),
    "mamba_head_dim": (1, 1 << 12),
    "ssm_state_size": (1, 1 << 12),
    "n_groups": (1, 1 << 12),
    "conv_kernel": (1, 64),
    "n_routed_experts": (1, 1 << 14),
    "num_experts_per_tok": (1, 1 << 8),
    "moe_intermediate_size": (1, 1 << 18),
    "moe_shared_expert_intermediate_size": (0, 1 << 18),
    "n_shared_experts": (0, 64),
    "intermediate_size": (1, 1 << 20),
    "n_group": (1, 1 << 12),
    "topk_group": (1, 1 << 12),
    "chunk_size": (1, 1 << 16),
    "max_position_embeddings": (1, 1 << 28),
    "num_nextn_predict_layers": (0, 64),
}
# Keys that only one kind of layer reads: needed and checked where the pattern has that kind.
_NEEDED = {
    "M": ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"),
    "E": (
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
    "*": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "-": ("intermediate_size",),
}
_OWNER = {key: kind for kind, keys in _NEEDED.items() for key in keys}
_FLAGS = (
    "norm_topk_prob",
    "use_conv_bias",
    "use_bias",
    "mlp_bias",
    "attention_bias",
    "tie_word_embeddings",
)
_ACTIVATIONS = {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu"}
_DTYPES = ("bfloat16", "float16", "float32")
MAX_WIDTH = 1 << 20  # of a projection
MAX_PARAMETERS = 1 << 42


@dataclass(frozen=True)
class NemotronConfig:
    """Architecture values, read from a checkpoint's config.json (names as in the published file).

    `pattern` has one character per layer: M Mamba-2, E mixture of experts, * attention, - dense MLP.
    Values that no layer of the pattern reads may be missing or odd in the file; they are then 1 or their default.
    """

    vocab_size: int
    hidden_size: int
    pattern: str
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    n_shared_experts: int = 1
    intermediate_size: int = 0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    layer_norm_epsilon: float = 1e-5
    use_conv_bias: bool = True
    use_bias: bool = False
    mlp_bias: bool = False
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    chunk_size: int = 128
    max_position_embeddings: int = 4096
    num_nextn_predict_layers: int = 0
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    torch_dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    extra: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def mamba_inner(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        return self.mamba_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def shared_width(self) -> int:
        return self.moe_shared_expert_intermediate_size * self.n_shared_experts

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> NemotronConfig:
        """Read `config.json` and, if there is one, the stop ids of `generation_config.json`.

        Raises:
            ConfigError: a file is missing or damaged, or a value is not usable.
        """
        home = Path(folder)
        if not home.is_dir():
            raise ConfigError(f"{home} is not a folder; give a checkpoint folder with config.json")
        raw = read_json(member(home, "config.json", ConfigError), limit=MAX_CONFIG_BYTES, error=ConfigError)
        config = cls.from_json(raw)
        generation = member(home, "generation_config.json", ConfigError)
        if generation.exists():
            more = read_json(generation, limit=MAX_CONFIG_BYTES, error=ConfigError)
            if not isinstance(more, dict):
                raise ConfigError(f"{generation} is not a JSON object; fetch it again or delete it")
            ids = token_ids("generation_config.json: eos_token_id", more.get("eos_token_id"), config.vocab_size)
            config = replace(config, eos_token_ids=tuple(sorted({*config.eos_token_ids, *ids})))
        return config

    @classmethod
    def from_json(cls, raw: Any) -> NemotronConfig:
        """Check a parsed config.json in any published spelling, also inside a multimodal wrapper.

        Raises:
            ConfigError: names the key, its value and what is allowed.
        """
        values = _canonical(raw)
        _refuse_unsupported(values)
        made: dict[str, Any] = {"pattern": _pattern(values)}
        for key, (low, high) in _RANGES.items():
            kind, value = _OWNER.get(key), values.get(key)
            if kind is None or kind in made["pattern"]:
                if value is not None:
                    made[key] = integer(key, value, low, high)
            elif type(value) is int and low <= value <= high:
                made[key] = value  # no layer reads it: kept if sane, never an error
            elif kind in "M*":
                made[key] = 1  # these fields have no default
        if "*" in made["pattern"]:
            _attention_defaults(values, made)
        required = ["vocab_size", "hidden_size", *(k for kind in dict.fromkeys(made["pattern"]) for k in _NEEDED[kind])]
        for key in required:
            if key not in made:
                raise ConfigError(f"config key {key} is missing; this layer pattern needs it ({made['pattern'][:60]})")
        made |= {key: flag(key, values[key]) for key in _FLAGS if values.get(key) is not None}
        for key, most in (("routed_scaling_factor", 1e4), ("layer_norm_epsilon", 1.0)):
            if values.get(key) is not None:
                made[key] = number(key, values[key], 0.0, most)
        if values.get("time_step_limit") is not None:
            made["time_step_limit"] = _limits(values["time_step_limit"])
        if values.get("torch_dtype") is not None:
            name = values["torch_dtype"]
            name = name.removeprefix("torch.") if isinstance(name, str) else name
            made["torch_dtype"] = choice("torch_dtype", name, _DTYPES)
        for key in ("bos_token_id", "pad_token_id"):
            if values.get(key) is not None and values[key] != -1:  # -1: none, in older files
                made[key] = integer(key, values[key], 0, made["vocab_size"] - 1)
        made["eos_token_ids"] = token_ids("eos_token_id", values.get("eos_token_id"), made["vocab_size"])
        spelled = {"eos_token_id", "num_hidden_layers", "hybrid_override_pattern", "layers_block_type", "layer_types"}
        made["extra"] = {k: v for k, v in values.items() if k not in made and k not in spelled}
        config = cls(**made)
        _check_shapes(config)
        return config

    def to_json(self) -> dict[str, Any]:
        """The published spelling of config.json; `from_json` of it gives an equal configuration."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        extra, eos, limit = own.pop("extra"), own.pop("eos_token_ids"), own.pop("time_step_limit")
        out = {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", **_ACTIVATIONS, **extra}
        out["hybrid_override_pattern"] = own.pop("pattern")
        out["num_hidden_layers"] = len(self.pattern)
        out |= own
        out["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
        if limit != (0.0, math.inf):  # the default is left out: infinity is no strict JSON
            out["time_step_limit"] = list(limit)
        return out


def _canonical(raw: Any) -> dict[str, Any]:
    """Unwrap, and give every key its published name."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"config.json holds {type(raw).__name__}, not an object; give a model configuration")
    values = dict(raw)
    for wrapper in _WRAPPERS:
        if isinstance(values.get(wrapper), Mapping) and "hidden_size" not in values:
            inner = dict(values[wrapper])
            for names in (("torch_dtype", "dtype"), ("bos_token_id",), ("eos_token_id",), ("pad_token_id",)):
                if all(inner.get(key) is None for key in names):
                    inner |= {key: values[key] for key in names if key in values}
            values = inner
            break
    for alias, name in _ALIASES.items():
        if values.get(alias) is None:
            values.pop(alias, None)
            continue
        value = values.pop(alias)
        if values.get(name) is not None and values[name] != value:
            raise ConfigError(f"config keys {alias} = {show(value)} and {name} = {show(values[name])} disagree")
        values[name] = value
    return values


def _refuse_unsupported(values: dict[str, Any]) -> None:
    kind = values.get("model_type")
    if kind is not None and kind != "nemotron_h":
        raise ConfigError(f"model_type is {show(kind)}; this model reads nemotron_h checkpoints")
    if values.get("moe_latent_size") is not None:
        raise ConfigError(
            f"moe_latent_size = {show(values['moe_latent_size'])}: latent mixture of experts (Nemotron Super) "
            "is not supported; use a Nano or Cascade-2 checkpoint, where it is absent or null"
        )
    if values.get("sliding_window") is not None:
        raise ConfigError(f"sliding_window = {show(values['sliding_window'])} is not supported; only null is")
    for key, only in _ACTIVATIONS.items():
        if values.get(key) is not None and values[key] != only:
            raise ConfigError(f"{key} = {show(values[key])} is not supported; only {only!r} is")


def _pattern(values: dict[str, Any]) -> str:
    """One character per layer, from any of the three spellings; all that are given must agree."""
    found: dict[str, str] = {}
    for key in ("hybrid_override_pattern", "layers_block_type", "layer_types"):
        given = values.get(key)
        if given is None:
            continue
        if key == "hybrid_override_pattern":
            if not isinstance(given, str):
                raise ConfigError(f"{key} is {show(given)}; a string of M, E, * and - is needed")
            kinds, allowed = list(given), list("ME*-")
        else:
            if not isinstance(given, list):
                raise ConfigError(f"{key} is {show(given)}; a list of layer kinds is needed")
            kinds, allowed = given, list(_KINDS)
        if not 1 <= len(kinds) <= MAX_LAYERS:
            raise ConfigError(f"{key} names {len(kinds)} layers; 1 to {MAX_LAYERS} are allowed")
        for i, kind in enumerate(kinds):
            if not isinstance(kind, str) or kind not in allowed:
                raise ConfigError(f"{key}: layer {i} is of unknown kind {show(kind)}; known are {', '.join(allowed)}")
        found[key] = "".join(_KINDS.get(kind, kind) for kind in kinds)
    if not found:
        raise ConfigError("config has neither hybrid_override_pattern nor layers_block_type; one names the layer kinds")
    (first, pattern), *others = found.items()
    for key, other in others:
        if other != pattern:
            raise ConfigError(f"{first} and {key} describe different layers ({pattern[:60]} and {other[:60]})")
    if values.get("num_hidden_layers") is not None:
        count = integer("num_hidden_layers", values["num_hidden_layers"], 1, MAX_LAYERS)
        if count != len(pattern):
            raise ConfigError(f"num_hidden_layers = {count}, but {first} names {len(pattern)} layers; they must agree")
    return pattern


def _attention_defaults(values: dict[str, Any], made: dict[str, Any]) -> None:
    """A key that is present and null has a meaning of its own here; an absent one is an error later."""
    heads = made.get("num_attention_heads")
    if heads and "num_key_value_heads" in values:
        made.setdefault("num_key_value_heads", heads)
    if heads and "head_dim" in values and "hidden_size" in made:
        made.setdefault("head_dim", max(1, made["hidden_size"] // heads))


def _check_shapes(c: NemotronConfig) -> None:
    """Relations between values; single values are in range by now."""

    def divides(whole: str, part: str, kind: str) -> None:
        a, b = getattr(c, whole), getattr(c, part)
        if kind in c.pattern and a % b:
            raise ConfigError(f"{whole} = {a} is not a multiple of {part} = {b}")

    divides("num_attention_heads", "num_key_value_heads", "*")
    divides("mamba_num_heads", "n_groups", "M")
    divides("n_routed_experts", "n_group", "E")
    if "E" in c.pattern:
        if c.topk_group > c.n_group:
            raise ConfigError(f"topk_group = {c.topk_group} is more than n_group = {c.n_group}")
        per_group = c.n_routed_experts // c.n_group
        if c.n_group > 1 and per_group < 2:
            raise ConfigError(f"n_group = {c.n_group} leaves {per_group} expert per group; group scores need 2")
        if c.num_experts_per_tok > per_group * c.topk_group:
            raise ConfigError(
                f"num_experts_per_tok = {c.num_experts_per_tok} is more than the {per_group * c.topk_group} experts "
                f"of topk_group = {c.topk_group} groups"
            )
    for kind, name, width in (
        ("M", "mamba_num_heads x mamba_head_dim + 2 n_groups x ssm_state_size", c.conv_dim),
        ("*", "num_attention_heads x head_dim", c.num_attention_heads * c.head_dim),
        ("E", "moe_shared_expert_intermediate_size x n_shared_experts", c.shared_width),
    ):
        if kind in c.pattern and width > MAX_WIDTH:
            raise ConfigError(f"{name} = {width}; at most {MAX_WIDTH} is allowed")
    per_layer = {
        "M": c.hidden_size * (2 * c.mamba_inner + c.conv_dim + c.mamba_num_heads),
        "E": c.hidden_size * (2 * c.n_routed_experts * c.moe_intermediate_size + 2 * c.shared_width),
        "*": 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads),
        "-": 2 * c.hidden_size * c.intermediate_size,
    }
    total = 2 * c.vocab_size * c.hidden_size + sum(per_layer[kind] for kind in c.pattern)
    if total > MAX_PARAMETERS:
        raise ConfigError(f"these values describe {total:.3g} parameters; at most {MAX_PARAMETERS:.3g} are allowed")


def _limits(value: Any) -> tuple[float, float]:
    """`[low, high]`, where infinity is a bare Infinity or {"__float__": "Infinity"}."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ConfigError(f"time_step_limit = {show(value)}; two numbers, low and high, are needed")
    low, high = (infinite(item) for item in value)
    # Zero is the one bound that may be touched.
    low = 0.0 if type(low) in (int, float) and low == 0 else number("time_step_limit[0]", low, 0.0, 1e6)
    return low, number("time_step_limit[1]", high, low, math.inf)
