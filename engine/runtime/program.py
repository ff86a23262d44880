"""A Triton kernel with every argument bound: one node of a CUDA plan, compiled ahead of the capture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.runtime.arena import Tensor


@dataclass(frozen=True)
class Program:
    """One launch.

    kernel: 'module.function' of engine.triton_kernels. args: the kernel's run-time parameters by name, in its order; a
    Tensor is a pointer to its dtype, an int an i64 or (|v| < 2^31) i32, a float an f32, None a null pointer constant.
    constants: its tl.constexpr parameters. warps, stages: as triton.compile takes them.
    """

    kernel: str
    grid: tuple[int, int, int]
    args: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, int | bool | str] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2

    def signature(self) -> tuple:
        """Equal for two programs that launch the same kernel on the same memory."""
        args = ((k, v.address if isinstance(v, Tensor) else v) for k, v in self.args.items())
        return self.kernel, self.grid, tuple(args), tuple(self.constants.items()), self.warps, self.stages
