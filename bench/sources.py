"""Weights that are made when they are read: full-size models without their files."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from types import TracebackType

import numpy as np

from engine.io.checkpoint import TensorInfo
from engine.models.nemotron.config import NemotronConfig
from engine.models.nemotron.weights import tensor_shapes

_POOL = 1 << 22


class RandomSource:
    """Tensors of given shapes as a Source of bf16 weights, N(0, 1/sqrt(fan_in)), the same for the same name.

    A matrix is a window into one pool of random numbers at an offset that depends on its name: cheap enough to make
    32 billion of them, and no two rows are equal. norm: what weights of norms lie around.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: str = "BF16", norm: float = 1.0
    ) -> None:
        self.dtype, self.norm = dtype, norm
        self._shapes = dict(shapes)
        rng = np.random.default_rng(seed)
        pool = rng.standard_normal(_POOL, np.float32)
        self._pool = np.concatenate([pool, pool[: 1 << 21]])
        self._scaled: dict[tuple[int, str], np.ndarray] = {}

    @classmethod
    def nemotron(cls, config: NemotronConfig, seed: int = 0, dtype: str = "BF16") -> RandomSource:
        """Under the names of the published checkpoint."""
        shapes = tensor_shapes(config)
        return cls({n if n.startswith("lm_head") else f"backbone.{n}": s for n, s in shapes.items()}, seed, dtype)

    def keys(self) -> list[str]:
        return sorted(self._shapes)

    def info(self, name: str) -> TensorInfo:
        shape = self._shapes[name]
        matrix = len(shape) >= 2 and "gate." not in name and not name.endswith("conv1d.weight")
        dtype = self.dtype if matrix else "F32"
        return TensorInfo(name, dtype, shape, int(np.prod(shape)) * (2 if dtype == "BF16" else 4))

    def _bits(self, fan_in: int, dtype: str) -> np.ndarray:
        key = (fan_in, dtype)
        if key not in self._scaled:
            scaled = (self._pool / fan_in**0.5).astype(np.float32)
            self._scaled[key] = (scaled.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else scaled
        return self._scaled[key]

    def read(self, name: str) -> np.ndarray:
        info = self.info(name)
        shape, h = info.shape, zlib.crc32(name.encode())
        rng = np.random.default_rng(h)
        if name.endswith("A_log"):
            return np.log(rng.uniform(1, 16, shape)).astype(np.float32)
        if name.endswith("dt_bias"):
            return rng.normal(-3, 1, shape).astype(np.float32)
        if "norm" in name and len(shape) == 1 and name.endswith("weight"):
            return (self.norm + 0.1 * rng.standard_normal(shape)).astype(np.float32)
        if name.endswith("conv1d.weight"):
            return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
        if len(shape) == 1:
            return (0.05 * rng.standard_normal(shape)).astype(np.float32)
        bits = self._bits(int(np.prod(shape[1:])), info.dtype)
        size = int(np.prod(shape))
        if size <= 1 << 21:
            start = h % _POOL
            return bits[start : start + size].reshape(shape)
        # Larger matrices take shifted windows row block by row block.
        out = np.empty(size, bits.dtype)
        step = 1 << 20
        for i in range(0, size, step):
            start = (h + i // step * 40503) % _POOL
            out[i : i + step] = bits[start : start + min(step, size - i)]
        return out.reshape(shape)

    def release(self, name: str) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> RandomSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


PUBLISHED = NemotronConfig(
    vocab_size=131072, hidden_size=2688, pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    num_attention_heads=32, num_key_value_heads=2, head_dim=128, mamba_num_heads=64, mamba_head_dim=64,
    ssm_state_size=128, n_groups=8, conv_kernel=4, n_routed_experts=128, num_experts_per_tok=6,
    moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712, intermediate_size=1856,
    routed_scaling_factor=2.5, max_position_embeddings=262144, eos_token_ids=(2, 11),
)  # fmt: skip
