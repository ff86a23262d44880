"""Packed GEMM against torch.matmul over M and the matrix widths of the five models."""

from __future__ import annotations

import numpy as np

from bench.report import Report
from bench.roofs import Bandwidth, arithmetic
from bench.timing import interleave, ratio
from engine.ops.gemm import PackedMatrix, gemm, workspace_bytes
from engine.ops.registry import error
from engine.runtime import device
from engine.runtime.arena import Arena

# (N, K) as the specifications give them.
WIDTHS = {
    "nemotron in_proj": (10304, 2688), "nemotron out_proj": (2688, 4096), "nemotron expert up": (1856, 2688),
    "nemotron expert down": (2688, 1856), "pi0.5 paligemma mlp": (16384, 2048), "pi0.5 action mlp": (4096, 1024),
    "x-vla qkv": (3072, 1024), "vega llm mlp": (18944, 3584), "vega projector": (3584, 1536),
    "vega wan ffn": (8960, 1536), "3dreambooth ffn": (8192, 2048), "3dreambooth proj": (2048, 2048),
    "motok ffn": (1024, 384), "motok tokenizer": (768, 512),
}  # fmt: skip
GATE = {"f32": 5e-6, "bf16": 6e-3}  # against fp64 products of the unrounded operands
ROWS = (24, 96, 512, 2048, 8000)


def main(formats: tuple[str, ...] = ("f32", "bf16"), rows: tuple[int, ...] = ROWS) -> None:
    import torch

    torch.set_num_threads(device.threads())
    report, bandwidth, peaks = Report("gemm"), Bandwidth(), arithmetic()
    print(
        f"read bandwidth {bandwidth.measure():.1f} GB/s; peaks "
        + ", ".join(f"{k} {v:.0f}" for k, v in peaks.items())
        + " GOP/s"
    )
    rng = np.random.default_rng(0)
    for fmt in formats:
        dtype = torch.float32 if fmt == "f32" else torch.bfloat16
        for name, (n, k) in WIDTHS.items():
            weight = (rng.standard_normal((n, k), np.float32) / k**0.5).astype(np.float32)
            packed = PackedMatrix.pack(name, weight, fmt)
            wt = torch.from_numpy(weight).to(dtype).T
            for m in rows:
                # Static buffers of an arena, as in every plan; torch keeps its own allocator.
                arena = Arena()
                src, dst = arena.alloc("x", (m, k)), arena.alloc("out", (m, n))
                ws = arena.alloc("ws", (workspace_bytes(m, k),), "u8")
                x, out = src.numpy(), dst.numpy()
                x[...] = rng.standard_normal((m, k), np.float32)
                xt = torch.from_numpy(x).to(dtype).clone()
                calls = {"ours": lambda: gemm(src, packed, dst, ws=ws), "torch": lambda: torch.matmul(xt, wt)}  # noqa: B023
                calls["ours"]()
                head = slice(0, min(m, 16))
                err = error(out[head], x[head].astype(np.float64) @ weight.T.astype(np.float64))
                if err > GATE[fmt]:
                    print(f"{fmt:<5} {name:<21} M {m:<5} RED: error {err:.1e} > {GATE[fmt]:.0e}, no speed")
                    report.add(width=name, format=fmt, m=m, n=n, k=k, error=err, gate="RED")
                    continue
                times = interleave(calls, rounds=9, turn=0.01, limit=6, least=3)
                flops, won = 2 * m * n * k / times["ours"].median / 1e9, ratio(times["torch"], times["ours"])
                share = flops / peaks[fmt]
                row = {"width": name, "format": fmt, "m": m, "n": n, "k": k, "error": err}
                row |= {f"{who}_us": t.median * 1e6 for who, t in times.items()}
                report.add(**row, gflop_s=flops, of_peak=share, vs_torch=won)
                print(
                    f"{fmt:<5} {name:<21} M {m:<5} {times['ours'].median * 1e3:9.2f} ms {flops:6.0f} GFLOP/s "
                    f"({share:4.0%})  torch.matmul x{won:.2f}  error {err:.0e}",
                    flush=True,
                )
    report.data |= {"peaks_gop_s": peaks, "bandwidth_gb_s": bandwidth.gb_per_s}
    rows_ = report.data["rows"]
    for fmt in formats:
        r = [x["vs_torch"] for x in rows_ if x["format"] == fmt and "vs_torch" in x]
        print(f"{fmt}: x torch.matmul min {min(r):.2f} median {np.median(r):.2f} max {max(r):.2f} over {len(r)} shapes")
    print("written:", report.save())
