"""A Triton kernel with every argument bound: one node of a CUDA plan, compiled ahead of the capture.

`compile_program` needs no driver and no GPU. `interpret` runs the same program on host memory, for tests.
"""

from __future__ import annotations

import importlib
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import DispatchError
from engine.runtime.arena import Tensor

# Installed, and in a checkout. By name: the runtime knows that there are kernels, not which.
_HOMES = ("engine.triton_kernels", "triton_kernels")
_POINTERS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i32": "i32", "u64": "u64", "u8": "u8"}
_PARAM = {"i32": "i", "i64": "q", "fp32": "f"}  # struct codes; anything else is a pointer
_SCRATCH = 2  # null pointers that Triton 3.9 appends: global and profile scratch

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Program:
    """One launch.

    kernel: 'module.function' of engine.triton_kernels. args: the kernel's run-time parameters by name, in its order; a
    Tensor is a pointer to its dtype, an int an i64 or (|v| < 2^31) i32, a float an f32, None a null pointer constant.
    constants: its tl.constexpr parameters. warps, stages: as triton.compile takes them. fusion: may a*b + c round once.
    """

    kernel: str
    grid: Grid
    args: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, int | bool | str] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    fusion: bool = True

    def signature(self) -> tuple:
        """Equal for two programs that launch the same kernel on the same memory."""
        args = ((k, v.address if isinstance(v, Tensor) else v) for k, v in self.args.items())
        return self.kernel, self.grid, tuple(args), tuple(self.constants.items()), self.warps, self.stages, self.fusion

    def types(self) -> dict[str, str]:
        """Triton's type of each run-time argument that is not a null pointer."""
        return {name: _type(self.kernel, name, v) for name, v in self.args.items() if v is not None}

    def params(self) -> bytes:
        """The kernel's parameter buffer: arguments in order at their natural alignment, then the scratch pointers."""
        out = bytearray()
        for name, kind in self.types().items():
            value: Any = self.args[name]
            code = _PARAM.get(kind, "Q")
            size = struct.calcsize(code)
            out += bytes(-len(out) % size) + struct.pack(code, value.address if code == "Q" else value)
        return bytes(out + bytes(-len(out) % 8) + bytes(8 * _SCRATCH))

    def offsets(self) -> list[int]:
        """Where each parameter of `params()` begins."""
        out, at = [], 0
        for kind in [*self.types().values(), *["*"] * _SCRATCH]:
            size = struct.calcsize(_PARAM.get(kind, "Q"))
            at += -at % size
            out.append(at)
            at += size
        return out


@dataclass(frozen=True)
class Cubin:
    """What a driver needs to launch a program."""

    image: bytes
    name: str
    shared: int
    threads: int
    asm: Mapping[str, Any] = field(repr=False)  # 'ttgir', 'ptx', ...: for tests and the resource table


def _type(kernel: str, name: str, value: object) -> str:
    if isinstance(value, Tensor):
        if value.dtype not in _POINTERS:
            raise DispatchError(f"{kernel}: {name} points to {value.dtype}; use one of {', '.join(_POINTERS)}")
        return "*" + _POINTERS[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise DispatchError(f"{kernel}: {name} is {type(value).__name__}; pass a Tensor, int, float or None")


def function(kernel: str) -> Any:
    """The jit function 'module.function'."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise DispatchError(f"program {kernel!r} needs Triton; install the package with its extra 'triton'") from None
    module, _, name = kernel.partition(".")
    for home in _HOMES:
        try:
            return getattr(importlib.import_module(f"{home}.{module}"), name)
        except ModuleNotFoundError as e:
            if e.name not in (home, home.split(".")[0], f"{home}.{module}"):
                raise
    raise DispatchError(f"no module {module!r} in {' or '.join(_HOMES)}; kernels are named 'module.function'")


# -------------------------------------------------------------------------------------------------- ahead of time
_compiled: dict[tuple, Cubin] = {}


def _aligned(program: Program) -> tuple[str, ...]:
    def divides(v: object) -> bool:
        return (v.address if isinstance(v, Tensor) else v if isinstance(v, int) else 1) % 16 == 0

    return tuple(name for name, v in program.args.items() if v is not None and divides(v))


def key(program: Program, sm: int) -> tuple:
    """Equal for programs that one cubin serves."""
    types, constants = tuple(program.types().items()), tuple(program.constants.items())
    return program.kernel, types, _aligned(program), constants, program.warps, program.stages, program.fusion, sm


def compile_program(program: Program, sm: int) -> Cubin:
    """The program for compute capability sm (80, 90, ...). Kept in memory, and by Triton on disk."""
    known = _compiled.get(key(program, sm))
    if known is None:
        known = _compiled[key(program, sm)] = _compile(program, sm)
    return known


def _compile(program: Program, sm: int) -> Cubin:
    fn = function(program.kernel)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise DispatchError(f"program {program.kernel!r}: TRITON_INTERPRET is set; unset it to compile")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, types = list(fn.arg_names), program.types()
    given = {*program.args, *program.constants}
    if given != set(names) or [n for n in names if n in program.args] != list(program.args):
        raise DispatchError(f"{program.kernel} takes {names}; the program binds {sorted(given)}, arguments in order")
    source = ASTSource(
        fn,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={**program.constants, **{n: None for n, v in program.args.items() if v is None}},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in _aligned(program)},
    )
    options = {"num_warps": program.warps, "num_stages": program.stages, "enable_fp_fusion": program.fusion}
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    meta = built.metadata
    if meta.global_scratch_size or meta.profile_scratch_size:
        raise DispatchError(f"{program.kernel} for sm_{sm} asks for scratch memory, which a plan does not give")
    return Cubin(built.asm["cubin"], meta.name, meta.shared, meta.num_warps * 32, built.asm)


# ---------------------------------------------------------------------------------------------------- interpreter
def interpret(program: Program, order: Callable[[list[Grid]], Iterable[Grid]] | None = None) -> None:
    """Runs the program on host memory in Triton's interpreter; `order` rearranges the grid."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise DispatchError(f"program {program.kernel!r} can be interpreted only in a process with TRITON_INTERPRET=1")
    fn = function(program.kernel)
    from triton.runtime import interpreter as host

    _repair(host)
    args: dict[str, Any] = dict(program.constants)
    for name, value in program.args.items():
        args[name] = None if value is None else _argument(_type(program.kernel, name, value), value)
    if set(args) != set(fn.arg_names):
        raise DispatchError(f"{program.kernel} takes {fn.arg_names}; the program binds {sorted(args)}")
    x, y, z = program.grid
    grid = list(itertools.product(range(x), range(y), range(z)))
    host.interpreter_builder.set_grid_dim(*program.grid)
    for index in order(grid) if order else grid:
        host.interpreter_builder.set_grid_idx(*index)
        fn(**args)


def _argument(kind: str, value: Any) -> Any:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if kind.startswith("*"):
        # An address is enough: the interpreter reads and writes host memory.
        pointer = tl.pointer_type(tl.str_to_ty(kind[1:], None))
        return tl.tensor(TensorHandle(np.array([value.address], np.uint64), pointer), pointer)
    dtype = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}[kind]
    scalar = tl.str_to_ty(kind, None)
    return tl.tensor(TensorHandle(np.array([value], dtype), scalar), scalar)


def _repair(host: Any) -> None:
    """The interpreter keeps bf16 as uint16 bits, truncates where a GPU rounds to nearest even, and multiplies the bits
    as integers in a dot. Mended here, once, so that kernels need no second form for it."""
    if getattr(host, "_repaired_by_engine", False):
        return
    host._repaired_by_engine = True
    import numpy as np
    import triton.language as tl

    builder, handle = host.InterpreterBuilder, host.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def widened(data: Any) -> Any:
        return (data.astype(np.uint32) << 16).view(np.float32)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        a, b = src.dtype.scalar, dst_type.scalar
        if a == tl.bfloat16 and b == tl.float32:
            return handle(widened(src.data), b)
        if a == tl.float32 and b == tl.bfloat16:
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
            return handle(np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded), b)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        x, y = a.data, b.data
        if a.dtype.scalar == tl.bfloat16:
            x, y = widened(x), widened(y)
        elif np.issubdtype(x.dtype, np.integer):  # exact in fp64, and a BLAS call
            x, y = x.astype(np.float64), y.astype(np.float64)
        else:
            return dot(self, a, b, d, *options)
        return handle(np.matmul(x, y).astype(d.data.dtype) + d.data, d.dtype.scalar)

    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The language is patched for good, once per module that a kernel sees it in; for each call it would be slow.
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            host._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    builder.create_fp_to_fp = lambda self, src, dst_type, rounding: self.cast_impl(src, dst_type)
    host.InterpretedFunction.__call__ = call
