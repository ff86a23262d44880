"""The nearest code of vectors, a convolution over codes (csrc/ops/codebook; van den Oord et al. 2017, section 3.1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.ops.checks import Check
from engine.ops.dispatch import call, many_rows
from engine.ops.gemm import power_of_two
from engine.ops.registry import Arrays, Case, GuardedArena, Op, cases, register
from engine.runtime.arena import Tensor, as_tensor
from engine.runtime.program import Program

MAX_D = 2048  # four vectors lie in a block's shared memory
TAPS = 3


def codebook_search(
    x: Tensor, codes: Tensor, norms: Tensor, ids: Tensor, out: Tensor | None = None, *, label: str = ""
) -> None:
    """ids i32 [M]: of each row of x [M, D] the nearest of codes [K, D], the lowest where several are as near.

    norms [K]: squares of the codes' lengths. out [M, D]: the chosen codes. f32; distances in fp32.
    """
    check = Check("codebook_search", label)
    check.takes("codes", codes, (None, None))
    k, d = codes.shape
    check.takes("x", x, (None, d), strided=True)
    m = x.shape[0]
    check.need(m >= 1 and k >= 1 and 1 <= d <= MAX_D, f"{m} vectors of {d} and {k} codes; 1 and more, D up to {MAX_D}")
    check.takes("norms", norms, (k,))
    check.takes("ids", ids, (m,), "i32")
    check.may_take("out", out, (m, d), strided=True)
    if out is not None:
        check.apart("out", out, x=x, codes=codes)

    def programs() -> list[Program]:
        blocks = {"BM": 16, "BK": 32, "BD": max(16, min(32, power_of_two(d)))}
        return [Program("codebook.search", (-(-m // blocks["BM"]), 1, 1),
                        {"x": x, "codes": codes, "norms": norms, "ids": ids, "out": out, "ldx": x.ld,
                         "ldo": out.ld if out else 0, "m": m}, {"D": d, "K": k, **blocks})]  # fmt: skip

    call("codebook_search", label, nbytes=0, programs=programs if many_rows(m) else None, x=x, ldx=x.ld, codes=codes,
         norms=norms, ids=ids, out=out, ldo=out.ld if out else 0, m=m, d=d, k=k)  # fmt: skip


def codebook_conv(
    ids: Tensor, table: Tensor, bias: Tensor, out: Tensor, *, batch: int = 1, relu: bool = True, label: str = ""
) -> None:
    """out [B*N, C] = act(bias + sum of table[ids[n + j - taps // 2], j]): a convolution over embedded codes.

    ids i32 [B*N]: B sequences of N; positions outside one, and ids outside [0, K), add nothing. table [K, taps, C]: of
    each code its embedding times the weights of each tap. bias [C]. f32. relu: act is max(., 0), else the identity.
    """
    check = Check("codebook_conv", label)
    check.takes("table", table, (None, None, None))
    k, taps, c = table.shape
    check.takes("out", out, (None, c), strided=True)
    m = out.shape[0]
    check.need(0 < batch <= m and m % batch == 0, f"{m} rows are not {batch} equal sequences")
    check.need(taps % 2 == 1, f"{taps} taps have no middle")
    check.takes("ids", ids, (m,), "i32")
    check.takes("bias", bias, (c,))
    call("codebook_conv", label, nbytes=0, ids=ids, table=table, bias=bias, out=out, ldo=out.ld, batch=batch,
         n=m // batch, k=k, taps=taps, c=c, relu=int(relu))  # fmt: skip


# ---------------------------------------------------------------------------------------------------- contract
# A case searches, then convolves over what it found.
def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    f = np.float32
    codes = rng.standard_normal((c.k, c.d)).astype(f)
    if c.dims.get("twins"):
        codes[c.k // 2 :] = codes[: c.k - c.k // 2]  # every code twice: the first must win
    return {"x": rng.standard_normal((c.b * c.n, c.d)).astype(f), "codes": codes,
            "table": rng.standard_normal((c.k, c.dims.get("taps", TAPS), c.c)).astype(f),
            "bias": rng.standard_normal(c.c).astype(f)}  # fmt: skip


def _reference(c: Case, a: Arrays) -> Arrays:
    import torch

    x, codes, table, bias = (torch.from_numpy(a[n]).double() for n in ("x", "codes", "table", "bias"))
    distances = ((codes**2).sum(1) - 2 * x @ codes.T).numpy()
    near = distances <= distances.min(1, keepdims=True) + 1e-9  # the same code twice may round apart
    ids = torch.from_numpy(near.argmax(1))  # the first
    taps = table.shape[1]
    padded = torch.cat([table, torch.zeros_like(table[:1])])
    rows = torch.full((c.b, c.n + taps - 1), c.k)
    rows[:, taps // 2 : taps // 2 + c.n] = ids.reshape(c.b, c.n)
    sums = bias + sum(padded[rows[:, j : j + c.n], j] for j in range(taps))
    if c.dims.get("relu", 1):
        sums = sums.clamp_min(0)
    return {"ids": ids.numpy(), "nearest": codes[ids].numpy(), "features": sums.flatten(0, 1).numpy()}


def _call(c: Case, a: Arrays) -> tuple[Any, dict[str, Tensor]]:
    arena, t, m = GuardedArena(), {k: as_tensor(v) for k, v in a.items()}, c.b * c.n
    norms = as_tensor((a["codes"].astype(np.float64) ** 2).sum(1).astype(np.float32))
    out = {"ids": arena.alloc("ids", (m,), "i32", "io"), "nearest": arena.alloc("nearest", (m, c.d), "f32", "io"),
           "features": arena.alloc("features", (m, c.c), "f32", "io")}  # fmt: skip

    def run() -> None:
        codebook_search(t["x"], t["codes"], norms, out["ids"], out["nearest"])
        codebook_conv(out["ids"], t["table"], t["bias"], out["features"], batch=c.b, relu=bool(c.dims.get("relu", 1)))

    return run, out


def _run(c: Case, a: Arrays) -> Arrays:
    run, out = _call(c, a)
    run()
    return {name: tensor.read() for name, tensor in out.items()}


def _torch(c: Case, a: Arrays) -> Any:
    import torch

    x, codes = torch.from_numpy(a["x"]), torch.from_numpy(a["codes"])
    norms = (codes**2).sum(1)
    return lambda: codes[(norms - 2 * x @ codes.T).argmin(1)]


register(
    Op(
        name="codebook",
        kernels=("codebook_search", "codebook_conv"),
        cases=[
            *cases(
                "tiny",
                {"b": 1, "n": 5, "k": 64, "d": 32, "c": 24},
                {"b": 3, "n": 16, "k": 100, "d": 48, "c": 300, "relu": 0},
                {"b": 1, "n": 49, "k": 33, "d": 768, "c": 16, "taps": 5},
                {"b": 2, "n": 9, "k": 48, "d": 64, "c": 8, "twins": 1},
            ),
            *cases(
                "odd",
                {"b": 1, "n": 1, "k": 1, "d": 1, "c": 1},
                {"b": 2, "n": 3, "k": 7, "d": 19, "c": 5, "taps": 7},
                {"b": 1, "n": 7, "k": 13, "d": 33, "c": 17, "twins": 1, "taps": 1},
            ),
            *cases("real", {"b": 1, "n": 49, "k": 1024, "d": 768, "c": 512}),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, a)[0],
        torch_eager=_torch,
        tolerance={"f32": 1e-6},
        bytes=lambda c: 4 * (c.k * c.d + 2 * c.b * c.n * c.d + 4 * c.b * c.n * c.c),
        flops=lambda c: 2 * c.b * c.n * c.k * c.d,
    )
)  # fmt: skip
