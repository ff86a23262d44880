"""Every program at the widths of a large model, for every architecture: compiles, fits, keeps its promises. No GPU."""

from __future__ import annotations

import os
import struct
from dataclasses import replace

import pytest
from shipped import SHARED_LIMIT, SM, resources, shipped_programs

from engine.errors import DispatchError
from engine.runtime import cuda
from engine.runtime.arena import Tensor
from engine.runtime.program import Program, compile_program, interpret, key

pytest.importorskip("triton.language")  # where triton is missing, this folder answers to its name
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set", allow_module_level=True)

PROGRAMS = {key(s.program, 0): s for s in shipped_programs()}
PRODUCTS = {"gemm.matmul", "moe.grouped", "attention.attend"}
NAMES = [f"{s.use}-{s.program.kernel}-{s.format}" for s in PROGRAMS.values()]


@pytest.mark.parametrize("sm", SM)
@pytest.mark.parametrize("shipped", PROGRAMS.values(), ids=NAMES)
def test_program(shipped, sm):
    program = shipped.program
    cubin = compile_program(program, sm)
    assert cubin.image[:4] == b"\x7fELF" and cubin.threads == 32 * program.warps
    found = resources(cubin)
    assert found.spill == 0, f"{found.spill} bytes of local memory per thread: {found}"
    assert found.shared <= SHARED_LIMIT, f"{found.shared} bytes of shared memory: {found}"
    assert [at for at, _ in found.params] == program.offsets(), "the kernel takes other parameters than are packed"
    assert sum(found.params[-1]) == len(program.params())
    if program.kernel in PRODUCTS:
        # f32 runs on FMA by contract; everything else on tensor cores.
        assert (found.mma > 0) == (program.constants["FORMAT"] != 0), found
        assert found.wide > 0  # weights and caches come 16 bytes at a time
        assert found.narrow == 0, f"{found.narrow} copies into shared memory are narrower than 16 bytes: {found}"


def test_one_cubin_serves_all_layers():
    program = next(iter(PROGRAMS.values())).program
    assert compile_program(program, 90) is compile_program(program, 90)


def test_errors_name_the_program():
    with pytest.raises(DispatchError, match="no module 'nothing'"):
        compile_program(Program("nothing.at_all", (1, 1, 1), {}), 90)
    with pytest.raises(DispatchError, match="TRITON_INTERPRET=1"):
        interpret(Program("gemm.rows", (1, 1, 1), {}))
    with pytest.raises(DispatchError, match=r"gemm.rows takes \['x'"):
        compile_program(Program("gemm.rows", (1, 1, 1), {"n": 4}), 90)


@pytest.mark.parametrize("act", range(5))
def test_every_activation_compiles(act):
    shipped = next(s for s in PROGRAMS.values() if s.program.kernel == "gemm.matmul" and s.format == "bf16")
    program = replace(shipped.program, constants={**shipped.program.constants, "ACT": act})
    for sm in (80, 90, 120):
        assert resources(compile_program(program, sm)).spill == 0


class Module:
    """What the compiled module takes of a program (python/bind_cuda.cpp), kept instead of launched."""

    cuda = True

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def cuda_device_count(self) -> int:
        return 1

    def cuda_capability(self, ordinal: int) -> int:
        return 90

    def cuda_missing(self) -> str:
        return ""

    def CudaTape(self, ordinal: int) -> Module:
        return self

    def push_program(self, **call) -> None:
        self.calls.append(call)

    cuda_run_program = push_program


def test_what_the_module_is_handed(monkeypatch):
    """The real driver gets the cubin and the packed arguments; a graph capture then only launches."""
    module = Module()
    monkeypatch.setattr(cuda, "_C", module)
    program = next(s.program for s in PROGRAMS.values() if s.program.kernel == "gemm.rows")
    with cuda.use(module):
        cuda.tape("cuda").push_program("a label", program)
        cuda.run_program(program, "cuda")
    pushed, run = module.calls
    assert pushed.pop("label") == "a label" and run.pop("device") == 0 and pushed == run
    assert run["image"] == compile_program(program, 90).image and run["grid"] == program.grid
    values = [v for v in program.args.values() if v is not None]
    assert len(run["offsets"]) == len(values) + 2  # Triton's scratch pointers, null
    for at, value in zip(run["offsets"], values):
        code = "Q" if isinstance(value, Tensor) else "i" if isinstance(value, int) else "f"
        (packed,) = struct.unpack_from(code, run["params"], at)
        assert packed == pytest.approx(value.address if isinstance(value, Tensor) else value, rel=1e-6)
    assert run["params"][run["offsets"][-2] :] == bytes(16)
