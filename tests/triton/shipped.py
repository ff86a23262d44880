"""The programs that a large hybrid model records for a chunk of 512 rows, and the flow policies for an observation and
a step, and what they compile to. No GPU needed.

`python tests/triton/shipped.py [sm ...] [kernel ...]` prints registers, spills, shared memory and instruction counts.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.ops.attention import KVCache, Pads, attention
from engine.ops.attention import workspace_bytes as attention_workspace
from engine.ops.codebook import codebook_search
from engine.ops.flow import FlowState, flow_begin, flow_end
from engine.ops.fuse import Code, Gate, fuse_product, product_bytes
from engine.ops.gemm import Modulation, PackedMatrix, Window, gemm, workspace_bytes
from engine.ops.moe import Routing, moe_down, moe_route, moe_up, moe_workspace
from engine.ops.ssm import SsmShape, ssm
from engine.runtime import cuda, device
from engine.runtime.arena import DTYPES, Arena, Tensor
from engine.runtime.program import Cubin, Program, compile_program, key

SM = (80, 86, 89, 90, 100, 120)
FORMATS = ("f32", "bf16", "i8", "i4")
SHARED_LIMIT = 99 << 10  # of a block on sm_86, sm_89 and sm_120


class Recorder(cuda.Recorder):
    """Keeps every program of ops that are called outside a plan."""

    def __init__(self) -> None:
        self.programs: list[Program] = []

    def cuda_run(self, op: int, ordinal: int, values: dict) -> None:
        pass

    def cuda_run_program(self, program: Program, ordinal: int) -> None:
        self.programs.append(program)


class Addresses:
    """An arena of aligned addresses without memory."""

    def __init__(self) -> None:
        self.next = 1 << 32

    def alloc(
        self, name: str, shape: tuple[int, ...], dtype: str = "f32", part: str = "workspace", mapped: bool = False
    ) -> Tensor:
        nbytes = DTYPES[dtype][0]
        for n in shape:
            nbytes *= n
        at, self.next = self.next, self.next + (nbytes + 255) // 256 * 256
        return Tensor(at, tuple(shape), dtype, None, "cuda")

    def matrix(self, n: int, k: int, format: str, count: int = 1) -> PackedMatrix:
        return PackedMatrix.empty(self, "w", n, k, format, count)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Shipped:
    """A program, where it is used and in which weight format."""

    use: str
    format: str
    program: Program


def _gemms(m: int, use: Callable) -> None:
    d, proj, inner, heads = 2688, 10304, 4096, 4608
    for f in FORMATS:
        a = Addresses()
        x, rows = a.alloc("x", (m, d)), a.alloc("rows", (1,), "i32")
        ws = a.alloc("ws", (workspace_bytes(m, inner),), "u8")
        norm, wide, norm2 = a.alloc("norm", (d,)), a.alloc("wide", (m, proj)), a.alloc("norm2", (inner,))
        y, qkv = a.alloc("y", (m, inner)), a.alloc("qkv", (m, heads))
        some = {"rows": rows, "ws": ws}
        use("in_proj", f, gemm, x, a.matrix(proj, d, f), wide, norm=norm, **some)
        gated = {"norm": norm2, "gate": wide.columns(0, inner), "norm_group": 512}
        use("out_proj", f, gemm, y, a.matrix(d, inner, f), x, residual=x, **gated, **some)
        use("qkv", f, gemm, x, a.matrix(heads, d, f), qkv, norm=norm, **some)
        use("o_proj", f, gemm, y, a.matrix(d, inner, f), x, residual=x, **some)


def _moes(m: int, use: Callable) -> None:
    d, inner, wide, experts, top_k = 2688, 1856, 3712, 128, 6
    for f in FORMATS:
        a = Addresses()
        x, norm, rows = a.alloc("x", (m, d)), a.alloc("norm", (d,)), a.alloc("rows", (1,), "i32")
        up, down = a.matrix(inner, d, f, experts), a.matrix(d, inner, f, experts)
        shared_up, shared_down = a.matrix(wide, d, f), a.matrix(d, wide, f)
        to = Routing.empty(a, "to", m, experts, top_k)  # type: ignore[arg-type]
        h, hs, bias = a.alloc("h", (m * top_k, inner)), a.alloc("hs", (m, wide)), a.alloc("bias", (experts,))
        with cuda.use(Recorder()), device.on("cuda"):
            ws = a.alloc("ws", (moe_workspace(m, d, up, top_k, shared_up),), "u8")
        some = {"hs": hs, "rows": rows, "ws": ws}
        if f == "f32":
            gate = a.matrix(experts, d, "f32")
            use("route", f, moe_route, x, norm, gate, bias, to, scale=2.5, rows=rows, ws=ws)
        use("moe_up", f, moe_up, x, norm, up, to, h, shared=shared_up, **some)
        use("moe_down", f, moe_down, h, down, to, x, residual=x, shared=shared_down, **some)


def _ssms(m: int, use: Callable) -> None:
    a, s = Addresses(), SsmShape(64, 64, 8, 128, 4)
    wide, rows, out = a.alloc("wide", (m, 10304)), a.alloc("rows", (1,), "i32"), a.alloc("out", (m, 4096))
    u, ticket = a.alloc("u", (m, s.channels)), a.alloc("ticket", (s.groups,), "i32")
    vectors = {name: a.alloc(name, (s.heads,)) for name in ("a", "d_skip", "dt_bias")}
    conv = {"conv_w": a.alloc("w", (4, s.channels)), "conv_b": a.alloc("b", (s.channels,))}
    states = {"conv_state": a.alloc("c", (3, s.channels)), "state": a.alloc("state", s.state)}
    xbc, dt = wide.columns(4096, s.channels), wide.columns(10240, 64)
    use("ssm", "f32", ssm, s, xbc, dt, out, u=u, ticket=ticket, rows=rows, **vectors, **conv, **states)


def _attentions(m: int, use: Callable) -> None:
    heads, kv, d, ctx = 32, 2, 128, 8192
    for f in ("f32", "bf16"):
        a = Addresses()
        qkv, out = a.alloc("qkv", (m, (heads + 2 * kv) * d)), a.alloc("out", (m, heads * d))
        cache = KVCache.empty(a, "kv", kv, d, ctx, f)  # type: ignore[arg-type]
        pos, rows = a.alloc("pos", (1,), "i32"), a.alloc("rows", (1,), "i32")
        ws = a.alloc("ws", (attention_workspace(m, heads, d, ctx),), "u8")
        q, k, v = (qkv.columns(at * d, n * d) for at, n in ((0, heads), (heads, kv), (heads + kv, kv)))
        use("attention", f, attention, q, k, v, cache, pos, out, heads=heads, rows=rows, ws=ws)


def _tower(use: Callable, name: str, f: str, m: int, d: int, mlp: int, act: str) -> None:
    """The products of a pre-norm layer with biases."""
    a = Addresses()
    x, norm, bias = a.alloc("x", (m, d)), a.alloc("norm", (d,)), a.alloc("bias", (max(3 * d, mlp),))
    ws = a.alloc("ws", (workspace_bytes(m, mlp),), "u8")
    normed = {"prologue": "layer", "norm": norm, "norm_bias": norm, "ws": ws}
    for what, n, more in (("qkv", 3 * d, {}), ("fc1", mlp, {"act": act})):
        out = a.alloc(what, (m, n))
        use(f"{name} {what}", f, gemm, x, a.matrix(n, d, f), out, bias=bias.slice(0, (n,)), **normed, **more)
    hidden = a.alloc("hidden", (m, mlp))
    use(f"{name} fc2", f, gemm, hidden, a.matrix(d, mlp, f), x, bias=norm, residual=x, ws=ws)


def _policies(m: int, use: Callable) -> None:
    """A vision-language trunk, its action expert and a soft-prompted transformer (FASTER on π0.5 and X-VLA)."""
    del m
    for f in ("f32", "bf16", "i8"):
        _tower(use, "vision", f, 768, 1152, 4304 if f != "i8" else 4352, "gelu_tanh")
        a = Addresses()
        for name, rows, d, mlp, adaptive in (("trunk", 968, 2048, 16384, False), ("expert", 50, 1024, 4096, True)):
            x, wide = a.alloc("x", (rows, d)), a.alloc("wide", (rows, 2 * mlp))
            ws, live = a.alloc("ws", (workspace_bytes(rows, mlp),), "u8"), a.alloc("rows", (1,), "i32")
            table, ids = a.alloc("table", (1224, 111 * d), "bf16"), a.alloc("ids", (rows,), "i32")
            before = {"modulation": Modulation(table, ids, 0, d)} if adaptive else {"rows": live}
            after = {"modulation": Modulation(table, ids, gate=2 * d)} if adaptive else {"rows": live}
            use(f"{name} gate_up", f, gemm, x, a.matrix(2 * mlp, d, f), wide, prologue="rms", ws=ws, **before)
            use(f"{name} down", f, gemm, wide.columns(0, mlp), a.matrix(d, mlp, f), x, prologue="glu",
                gate=wide.columns(mlp, mlp), pro_act="gelu_tanh", residual=x, ws=ws, **after)  # fmt: skip
    for f in ("f32", "bf16"):
        for name, t, past, batch, heads, kv, d, more in (
            ("vision", 256, 0, 3, 16, 16, 72, ""), ("trunk", 968, 0, 1, 8, 1, 256, "rope"),
            ("expert", 50, 968, 1, 8, 1, 256, "rope"), ("policy", 276, 0, 1, 16, 16, 64, ""),
            ("window", 144, 0, 12, 32, 32, 32, "windows"),
        ):  # fmt: skip
            a, ctx = Addresses(), (t + past + 15) // 16 * 16
            cache = KVCache.empty(a, "kv", kv, d, ctx, f, batch)  # type: ignore[arg-type]
            q, out = a.alloc("q", (t * batch, heads * d)), a.alloc("out", (t * batch, heads * d))
            k, v = (a.alloc(n, (t * batch, kv * d)) for n in "kv")
            i32 = {n: a.alloc(n, (s,), "i32") for n, s in (
                ("pos", batch), ("offsets", batch + 1), ("order", t * batch), ("count", batch))}  # fmt: skip
            extra: dict[str, Any] = {"rope": a.alloc("rope", (ctx, d))} if more == "rope" else {}
            if more == "windows":
                bias = a.alloc("bias", (kv * d,))
                extra = {"offsets": i32["offsets"], "longest": t, "order": i32["order"],
                         "pads": Pads(bias, bias, i32["count"])}  # fmt: skip
            ws = a.alloc("ws", (attention_workspace(t, heads, d, ctx),), "u8")
            use(f"{name} attention", f, attention, q, k, v, cache, i32["pos"], out, heads=heads, causal=False, ws=ws,
                **extra)  # fmt: skip
    a = Addresses()
    for rule, h, channels, dims, context, times in (
        ("euler", 50, 32, 14, 0, 0), ("renoise", 30, 20, 20, 20, 32), ("implied", 30, 20, 20, 20, 32),
    ):  # fmt: skip
        state = FlowState.empty(a, rule, 1, 10, h, channels, dims, 4)  # type: ignore[arg-type]
        parts = {n: a.alloc(n, s) for n, s in (("context", (1, context)), ("times", (306, times))) if s[1]}
        hidden, rows = a.alloc("hidden", (channels,), "i32"), a.alloc("rows", (h,), "i32")
        seen = a.alloc("seen", (h, channels + context + times))
        use(f"{rule} begin", "f32", flow_begin, state, seen, rows, rule=rule, hidden=hidden, **parts)
        use(f"{rule} end", "f32", flow_end, state, a.alloc("said", (h, channels)), rule=rule, squash=hidden)


def _codebooks(m: int, use: Callable) -> None:
    a, k, d = Addresses(), 1024, 768
    x, codes, norms = a.alloc("x", (m, d)), a.alloc("codes", (k, d)), a.alloc("norms", (k,))
    use("codebook search", "f32", codebook_search, x, codes, norms, a.alloc("ids", (m,), "i32"), a.alloc("q", (m, d)))


def _convolutions(m: int, use: Callable) -> None:
    """3 x 3 over a bordered grid in bf16, as it lies: first and last level of an encoder, and one that halves."""
    del m
    for name, height, width, stride, cin, cout in (("first", 480, 832, 1, 96, 96), ("halving", 480, 832, 2, 96, 96),
                                                   ("last", 60, 104, 1, 384, 384)):  # fmt: skip
        a, line = Addresses(), width + 2
        window = Window(3, width // stride, line, stride)
        out = a.alloc("out", (height * width // stride**2, cout))
        x = a.alloc("x", (window.rows(out.shape[0]), cin), "bf16")
        use(f"{name} convolution", "bf16", gemm, x, a.matrix(cout, 9 * cin, "bf16"), out, bias=a.alloc("b", (cout,)),
            residual=out, taps=window)  # fmt: skip


def _fusions(m: int, use: Callable) -> None:
    """Two streams of visual tokens, gated, into the first product of a language model."""
    d, n = 3584, 4608
    for f in ("f32", "bf16"):
        a = Addresses()
        gate = Gate.fold(Arena("cuda", dry=True), "gate", (np.zeros(d),) * 4, np.zeros(2 * d), 0.0)
        s, g, out = a.alloc("s", (m, d), f), a.alloc("g", (m, d), f), a.alloc("out", (m, n))
        code = Code(a.alloc("voxels", (m, 3), "i32"), *(a.alloc(x, (301, d // 3), f) for x in "xyz"))
        ws = a.alloc("ws", (product_bytes(m, d),), "u8")
        use("fusion", f, fuse_product, s, g, gate, a.matrix(n, d, f), out, norm=a.alloc("norm", (d,)), code=code,
            bias=a.alloc("bias", (n,)), ws=ws)  # fmt: skip


def shipped_programs(m: int = 512) -> list[Shipped]:
    """Recorded by calling the public ops at the widths of the model, in a step of m rows."""
    out: list[Shipped] = []

    def use(name: str, format: str, op: Callable, *args: Any, **named: Any) -> None:
        driver = Recorder()
        with cuda.use(driver), device.on("cuda"):
            op(*args, **named)
        out.extend(Shipped(name, format, p) for p in driver.programs)

    for ops in (_gemms, _moes, _ssms, _attentions, _policies, _codebooks, _convolutions, _fusions):
        with cuda.use(Recorder()), device.on("cuda"):  # workspaces differ
            ops(m, use)
    return out


@dataclass(frozen=True)
class Resources:
    """What cuobjdump and the SASS say of a cubin."""

    registers: int
    spill: int  # bytes of local memory per thread
    shared: int  # bytes, static and dynamic
    threads: int
    params: tuple[tuple[int, int], ...]  # (offset, size)
    sass: str

    def __str__(self) -> str:
        reads = f"mma {self.mma:4} wide {self.wide:3} ldg {self.count('LDG'):3} copies {self.count('LDGSTS'):3}"
        return f"reg {self.registers:3} spill {self.spill:4} shared {self.shared:6} threads {self.threads:3} {reads}"

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))

    @property
    def mma(self) -> int:
        return self.count(r"\b(HMMA|IMMA|QGMMA|HGMMA|IGMMA|UTCHMMA|UTCIMMA)\b")

    @property
    def wide(self) -> int:
        """128-bit reads of global memory, straight or copied to shared memory."""
        return self.count(r"LDG(STS)?\.\S*128")

    @property
    def narrow(self) -> int:
        """Copies into shared memory of less than 128 bits."""
        return self.count(r"LDGSTS") - self.count(r"LDGSTS\.\S*128")


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def resources(cubin: Cubin) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.cubin"
        path.write_bytes(cubin.image)
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True)
        elf = subprocess.run([_tool("cuobjdump"), "-elf", path], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([_tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True).stdout
    text = usage.stdout + usage.stderr
    number = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    params = sorted(
        (int(o, 16), int(s, 16)) for o, s in re.findall(r"Ordinal.*?Offset\s*:\s*(0x\w+)\s+Size\s*:\s*(0x\w+)", elf)
    )
    return Resources(number["REG"], number["STACK"] + number["LOCAL"], cubin.shared + number["SHARED"], cubin.threads,
                     tuple(params), sass)  # fmt: skip


def main() -> None:
    sms = [int(a) for a in sys.argv[1:] if a.isdigit()] or list(SM)
    names = [a for a in sys.argv[1:] if not a.isdigit()]
    done = set()
    for s in shipped_programs():
        p = s.program
        if key(p, 0) in done:
            continue
        done.add(key(p, 0))
        if names and not any(n in f"{s.use}/{p.kernel}/{s.format}" for n in names):
            continue
        for sm in sms:
            start = time.perf_counter()
            try:
                cubin = compile_program(p, sm)
            except Exception as e:
                print(f"{s.use:10} {p.kernel:18} {s.format:5} sm_{sm:<4} FAILED {str(e)[-600:]}")
                continue
            seconds = time.perf_counter() - start
            print(f"{s.use:10} {p.kernel:18} {s.format:5} sm_{sm:<4} {resources(cubin)} {seconds:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
