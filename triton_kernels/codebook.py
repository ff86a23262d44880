"""codebook: the nearest code of each vector, for many vectors.

layout   csrc/ops/codebook/codebook.h: all row-major f32
mapping  a program per BM rows; codes BK at a time, products in fp32
moves    codes once per BM rows, from L2
tried    csrc/ops/codebook/README.md
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def search(
    x, codes, norms, ids, out, ldx, ldo, m,
    D: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(m / BM))."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    best = tl.full([BM], float("inf"), tl.float32)
    at = tl.zeros([BM], tl.int32)
    i = tl.arange(0, BD)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        sums = tl.zeros([BM, BK], tl.float32)
        for d0 in range(0, D, BD):
            inside = d0 + i < D
            a = tl.load(x + row[:, None].to(tl.int64) * ldx + d0 + i[None, :],
                        mask=(row < m)[:, None] & inside[None, :], other=0.0)  # fmt: skip
            b = tl.load(codes + k[:, None] * D + d0 + i[None, :], mask=(k < K)[:, None] & inside[None, :], other=0.0)
            sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
        distance = tl.load(norms + k, mask=k < K, other=float("inf"))[None, :] - 2.0 * sums
        least = tl.min(distance, axis=1)
        # The lowest of those that are as near.
        first = tl.min(tl.where(distance == least[:, None], k[None, :], K), axis=1)
        closer = least < best
        best = tl.where(closer, least, best)
        at = tl.where(closer, first, at)
    tl.store(ids + row, at, mask=row < m)
    if out is not None:
        for d0 in range(0, D, BD):
            inside = (row < m)[:, None] & (d0 + i < D)[None, :]
            v = tl.load(codes + at[:, None] * D + d0 + i[None, :], mask=inside, other=0.0)
            tl.store(out + row[:, None].to(tl.int64) * ldo + d0 + i[None, :], v, mask=inside)
