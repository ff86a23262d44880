"""Convolutions over channels-last grids: patches for a product, depthwise 3 x 3 (csrc/ops/conv)."""

from __future__ import annotations

import numpy as np

from engine.ops.checks import Check
from engine.ops.dispatch import call
from engine.ops.registry import Arrays, Case, Op, cases, guarded, register
from engine.runtime.arena import Tensor, as_tensor


def out_size(n: int, size: int, stride: int, pad: int) -> int:
    """Positions of a window of `size` on n cells."""
    return (n + 2 * pad - size) // stride + 1


def conv_patches(
    image: Tensor,
    out: Tensor,
    *,
    size: int,
    stride: int,
    pad: int = 0,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    label: str = "",
) -> None:
    """out [B*OH*OW, size*size*C] f32: the windows of image [B, H, W, C] (u8 or f32), rows (ky, kx, c), for a product
    with the kernel as [N, size*size*C]. scale, offset f32 [C]: value * scale + offset inside the grid, 0 outside.
    """
    check = Check("conv_patches", label)
    check.takes("image", image, (None, None, None, None), "u8|f32")
    b, h, w, c = image.shape
    if min(size, stride, b, c) < 1 or pad < 0 or min(h, w) + 2 * pad < size:
        check.fail(f"a window of {size} with stride {stride} and pad {pad} does not fit a grid of {h} x {w}")
    oh, ow = out_size(h, size, stride, pad), out_size(w, size, stride, pad)
    check.takes("out", out, (b * oh * ow, size * size * c), strided=True)
    check.apart("out", out, image=image)
    check.need((scale is None) == (offset is None), "scale and offset belong together")
    check.may_take("scale", scale, (c,))
    check.may_take("offset", offset, (c,))
    call("conv_patches", label, nbytes=0, image=image, kind=int(image.dtype == "u8"), scale=scale, offset=offset,
         out=out, ldo=out.ld, batch=b, height=h, width=w, channels=c, size=size, stride=stride, pad=pad)  # fmt: skip


def conv_depthwise(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, label: str = "") -> None:
    """out = x + depthwise 3 x 3 convolution of x with zero padding + bias; x, out f32 [B, H, W, C], weight [9, C]."""
    check = Check("conv_depthwise", label)
    check.takes("x", x, (None, None, None, None))
    b, h, w, c = x.shape
    check.need(min(b, h, w, c) > 0, f"x is {b} grids of {h} x {w} cells and {c} channels; none may be 0")
    check.takes("weight", weight, (9, c))
    check.takes("bias", bias, (c,))
    check.takes("out", out, (b, h, w, c))
    check.apart("out", out, x=x)
    call("conv_depthwise", label, nbytes=0, x=x, w=weight, bias=bias, out=out, batch=b, height=h, width=w,
         channels=c)  # fmt: skip


def _inputs(c: Case, rng: np.random.Generator) -> Arrays:
    f = np.float32
    shape = (c.b, c.h, c.w, c.c)
    if c.verb == "depthwise":
        return {"x": rng.standard_normal(shape).astype(f), "weight": rng.standard_normal((9, c.c)).astype(f),
                "bias": rng.standard_normal(c.c).astype(f)}  # fmt: skip
    out = {
        "x": rng.integers(0, 256, shape).astype(np.uint8) if c.dims.get("u8") else rng.standard_normal(shape).astype(f)
    }
    if c.dims.get("affine"):
        out |= {"scale": rng.standard_normal(c.c).astype(f), "offset": rng.standard_normal(c.c).astype(f)}
    return out


def _reference(c: Case, a: Arrays) -> Arrays:
    import torch
    import torch.nn.functional as F

    x = torch.from_numpy(a["x"]).double()
    if c.verb == "depthwise":
        w = torch.from_numpy(a["weight"]).double().T.reshape(c.c, 1, 3, 3)
        y = F.conv2d(x.permute(0, 3, 1, 2), w, torch.from_numpy(a["bias"]).double(), padding=1, groups=c.c)
        return {"out": (x + y.permute(0, 2, 3, 1)).numpy()}
    if "scale" in a:
        x = x * torch.from_numpy(a["scale"]).double() + torch.from_numpy(a["offset"]).double()
    rows = F.unfold(x.permute(0, 3, 1, 2), c.size, padding=c.pad, stride=c.stride)  # [B, C*k*k, L]
    rows = rows.reshape(c.b, c.c, c.size * c.size, -1).permute(0, 3, 2, 1)
    return {"out": rows.reshape(rows.shape[0] * rows.shape[1], -1).numpy()}


def _call(c: Case, a: Arrays, make):
    t = {k: as_tensor(v) for k, v in a.items()}
    if c.verb == "depthwise":
        out = make(c.b, c.h, c.w, c.c)
        return out, lambda: conv_depthwise(t["x"], t["weight"], t["bias"], as_tensor(out))
    cells = c.b * out_size(c.h, c.size, c.stride, c.pad) * out_size(c.w, c.size, c.stride, c.pad)
    out = make(cells, c.size * c.size * c.c)
    return out, lambda: conv_patches(t["x"], as_tensor(out), size=c.size, stride=c.stride, pad=c.pad,
                                     scale=t.get("scale"), offset=t.get("offset"))  # fmt: skip


def _run(c: Case, a: Arrays) -> Arrays:
    out, run = _call(c, a, guarded)
    run()
    return {"out": out}


def _torch(c: Case, a: Arrays):
    import torch
    import torch.nn.functional as F

    x = torch.from_numpy(a["x"]).float().permute(0, 3, 1, 2)
    if c.verb == "depthwise":
        w, bias = torch.from_numpy(a["weight"]).T.reshape(c.c, 1, 3, 3), torch.from_numpy(a["bias"])
        return lambda: F.conv2d(x, w, bias, padding=1, groups=c.c)
    return lambda: F.unfold(x, c.size, padding=c.pad, stride=c.stride)


def _cells(c: Case) -> int:
    return c.b * c.h * c.w * c.c


_P = {"verb": "patches"}
_D = {"verb": "depthwise"}
register(
    Op(
        name="conv",
        kernels=("conv_patches", "conv_depthwise"),
        cases=[
            *cases(
                "tiny",
                {**_P, "b": 2, "h": 28, "w": 28, "c": 3, "size": 14, "stride": 14, "pad": 0, "u8": 1, "affine": 1},
                {**_P, "b": 1, "h": 8, "w": 12, "c": 3, "size": 7, "stride": 4, "pad": 3, "affine": 1},
                {**_P, "b": 2, "h": 6, "w": 6, "c": 16, "size": 3, "stride": 2, "pad": 1},
                {**_D, "b": 2, "h": 7, "w": 7, "c": 32},
                {**_D, "b": 1, "h": 4, "w": 9, "c": 16},
            ),
            *cases(
                "odd",
                {**_P, "b": 1, "h": 5, "w": 3, "c": 7, "size": 3, "stride": 2, "pad": 1},
                {**_P, "b": 3, "h": 1, "w": 1, "c": 1, "size": 3, "stride": 1, "pad": 1, "u8": 1},
                {**_D, "b": 1, "h": 1, "w": 1, "c": 5},
                {**_D, "b": 2, "h": 3, "w": 2, "c": 19},
            ),
            *cases(
                "real",
                {**_P, "b": 3, "h": 224, "w": 224, "c": 3, "size": 14, "stride": 14, "pad": 0, "u8": 1, "affine": 1},
                {**_D, "b": 3, "h": 14, "w": 14, "c": 1024},
            ),
        ],
        inputs=_inputs,
        reference=_reference,
        run=_run,
        prepare=lambda c, a: _call(c, a, lambda *s: np.zeros(s, np.float32))[1],
        torch_eager=_torch,
        tolerance={"f32": 1e-6},
        bytes=lambda c: 8 * _cells(c),
        flops=lambda c: 18 * _cells(c) if c.verb == "depthwise" else 0,
        absent={"triton": "a window copy and nine taps need no tiles; the products around them are gemm's"},
    )
)
