"""Every Tensor that a public op takes is checked before a kernel sees its address."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from engine import _C
from engine.errors import InputError
from engine.ops.attention import KVCache, attention
from engine.ops.attention import workspace_bytes as attention_workspace
from engine.ops.channel_attention import channel_attention
from engine.ops.codebook import codebook_conv, codebook_search
from engine.ops.conv import conv_depthwise, conv_patches
from engine.ops.flow import FlowState, flow_begin, flow_end
from engine.ops.fuse import Code, Gate, fuse_product, gate_heads, gated_fuse, product_bytes
from engine.ops.gather import Sums, gather, gather_mean, gather_sum
from engine.ops.gemm import Modulation, PackedMatrix, Taps, Window, gemm, workspace_bytes
from engine.ops.guide import JointTargets, guide, guide_joints
from engine.ops.guide import workspace_bytes as guide_workspace
from engine.ops.moe import Routing, moe_down, moe_route, moe_up
from engine.ops.norm import norm
from engine.ops.pick import NextState, pick_masked, pick_next
from engine.ops.rng import rng
from engine.ops.sample import SamplerState, sample
from engine.ops.ssm import SsmShape, ssm
from engine.runtime.arena import Arena, Tensor

T, D, E, K, I, S = 3, 32, 4, 2, 16, 48  # noqa: E741


def new(*shape: int, dtype: str = "f32") -> Tensor:
    return Arena().alloc("x", shape, dtype)


def matrix(n: int, k: int, count: int = 1) -> PackedMatrix:
    return PackedMatrix.pack("w", np.zeros((count, n, k), np.float32), "f32")


ROWS = new(1, dtype="i32")
UP, DOWN, SHARED_UP, SHARED_DOWN = matrix(I, D, E), matrix(D, I, E), matrix(S, D), matrix(D, S)
ROUTING = Routing.empty(Arena(), "r", T, E, K)
UP_WS = new(_C.moe_up_workspace(T, K, D, 0, 1, 0, 1), dtype="u8")
DOWN_WS = new(_C.moe_down_workspace(T, K, I, S, 0, 1, 0, 1), dtype="u8")
CACHE = KVCache.empty(Arena(), "kv", 2, 8, 16, "f32")
SSM = SsmShape(4, 8, 2, 5, 3)
FLOW = FlowState.empty(Arena(), "flow", batch=2, steps=4, horizon=3, channels=5, dims=4, slots=6)
NEXT = NextState.empty(Arena(), "next", 5, 2)
# One valid call of each op, with every optional argument.
CALLS = {
    gemm: {"x": new(T, D), "w": matrix(8, D), "out": new(T, 8), "bias": new(8), "residual": new(T, 8), "norm": new(D),
           "gate": new(T, D), "norm_group": 16, "rows": ROWS, "ws": new(workspace_bytes(T, D), dtype="u8")},
    gather: {"table": new(9, D), "ids": new(T, dtype="i32"), "out": new(T, D), "rows": ROWS},
    ssm: {"shape": SSM, "xbc": new(T, SSM.channels), "dt": new(T, 4), "out": new(T, 32), "conv_w": new(3, SSM.channels),
          "conv_b": new(SSM.channels), "conv_state": new(2, SSM.channels), "a": new(4), "d_skip": new(4),
          "dt_bias": new(4), "state": new(*SSM.state), "u": new(T, SSM.channels), "rows": ROWS,
          "ticket": new(2, dtype="i32")},
    attention: {"q": new(T, 32), "k": new(T, 16), "v": new(T, 16), "cache": CACHE,
                "pos": new(1, dtype="i32"), "out": new(T, 32), "heads": 4, "rows": ROWS,
                "ws": new(attention_workspace(T, 4, 8, 16), dtype="u8")},
    moe_route: {"x": new(T, D), "norm": new(D), "gate": matrix(E, D), "bias": new(E), "to": ROUTING, "scale": 1.0,
                "rows": ROWS, "ws": new(workspace_bytes(T, D), dtype="u8")},
    moe_up: {"x": new(T, D), "norm": new(D), "up": UP, "routing": ROUTING, "h": new(T * K, I), "shared": SHARED_UP,
             "hs": new(T, S), "up_bias": new(E, I), "shared_bias": new(S), "rows": ROWS, "ws": UP_WS},
    moe_down: {"h": new(T * K, I), "down": DOWN, "routing": ROUTING, "out": new(T, D), "residual": new(T, D),
               "shared": SHARED_DOWN, "hs": new(T, S), "down_bias": new(E, D), "shared_bias": new(D), "rows": ROWS,
               "ws": DOWN_WS},
    sample: {"logits": new(50), "state": SamplerState.empty(Arena(), 50, 4)},
    norm: {"x": new(T, D), "out": new(T, D), "add": new(T, D), "weight": new(D), "bias": new(D), "rows": ROWS,
           "modulation": Modulation(new(5, 2 * D), new(T, dtype="i32"), 0, D)},
    gather_mean: {"x": new(4, D), "out": new(2, D)},
    gather_sum: {"x": new(4, D), "out": new(6, D), "sums": Sums(new(4, dtype="i32"), new(5, dtype="i32"), new(5), 2)},
    gated_fuse: {"s": new(6, D), "g": new(6, D), "out": new(8, D), "gate": Gate(*(new(D) for _ in range(6)), 0.0),
                 "code": Code(new(6, 3, dtype="i32"), *(new(4, D // 3) for _ in range(3))), "newline": new(D),
                 "period": 3, "order": new(8, dtype="i32"), "normed": new(8, D), "norm": new(D), "gates": new(6)},
    fuse_product: {"s": new(6, D), "g": new(6, D), "out": new(6, E), "gate": Gate(*(new(D) for _ in range(6)), 0.0),
                   "w": matrix(E, D), "code": Code(new(6, 3, dtype="i32"), *(new(4, D // 3) for _ in range(3))),
                   "norm": new(D), "bias": new(E), "ws": new(product_bytes(6, D), dtype="u8")},
    gate_heads: {"q": new(T, D), "dk": new(D), "u": new(4, D), "base": new(D), "x": new(T, D), "out": new(T, D),
                 "bias": 1.0},
    conv_patches: {"image": new(1, 4, 4, 3), "out": new(4, 12), "size": 2, "stride": 2, "scale": new(3),
                   "offset": new(3)},
    conv_depthwise: {"x": new(1, 4, 4, 8), "weight": new(9, 8), "bias": new(8), "out": new(1, 4, 4, 8)},
    channel_attention: {"qkv": new(4, 24), "out": new(4, 8), "groups": 2, "batch": 2},
    codebook_search: {"x": new(5, 6), "codes": new(4, 6), "norms": new(4), "ids": new(5, dtype="i32"),
                      "out": new(5, 6)},
    codebook_conv: {"ids": new(6, dtype="i32"), "table": new(4, 3, 8), "bias": new(8), "out": new(6, 8), "batch": 2},
    guide: {"x0": new(6, 35), "x": new(6, 35), "batch": 2, "noise": new(6, 35), "frames": new(2, dtype="i32"),
            "solver": "lbfgs", "targets": JointTargets(
                new(2, 2, dtype="i32"), new(2, 3, 2, 3), new(2, 3, 2), new(35), new(35), new(2, 4),
                new(guide_workspace(2, 3, 2), dtype="u8"))},
    guide_joints: {"x": new(6, 35), "mean": new(35), "std": new(35), "out": new(6, 3, 3), "batch": 2,
                   "frames": new(2, dtype="i32")},
    flow_begin: {"state": FLOW, "out": new(6, 16), "rows": new(6, dtype="i32"), "context": new(2, 3),
                 "times": new(7, 8), "hidden": new(5, dtype="i32")},
    flow_end: {"state": FLOW, "pred": new(6, 5), "squash": new(5, dtype="i32")},
    pick_masked: {"cond": new(4, 9), "ids": new(4, dtype="i32"), "uniforms": new(4), "counts": new(1, dtype="i32"),
                  "uncond": new(4, 9), "scale": new(1), "mask_id": 9, "topk": 3},
    pick_next: {"cond": new(1, 9), "state": NEXT, "uncond": new(1, 9), "scale": new(1)},
    rng: {"out": new(7), "seed": new(1, dtype="u64"), "offset": new(1, dtype="u64")},
}  # fmt: skip


def damaged(t: Tensor) -> list[Tensor]:
    """The same buffer with one element less in each direction, one axis more, and another dtype."""
    shapes = [tuple(n - (i == j) for j, n in enumerate(t.shape)) for i in range(len(t.shape))] + [(*t.shape, 1)]
    return [*(dataclasses.replace(t, shape=s) for s in shapes), dataclasses.replace(t, dtype="f16")]


def wrong_calls():
    for op, arguments in CALLS.items():
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                for i, bad in enumerate(damaged(value)):
                    yield pytest.param(op, {name: bad}, id=f"{op.__name__}-{name}-{i}")
            elif dataclasses.is_dataclass(value):
                for f in dataclasses.fields(value):
                    if isinstance(part := getattr(value, f.name), Tensor):
                        for i, bad in enumerate(damaged(part)):
                            changed = {name: dataclasses.replace(value, **{f.name: bad})}
                            yield pytest.param(op, changed, id=f"{op.__name__}-{name}.{f.name}-{i}")


# Where any length or shape is right.
FREE = {"gather-table-0", "gather-out-0", "rng-out-0", "rng-out-1", "sample-state.history-0", "gather_mean-out-0",
        "norm-modulation.table-0", "flow_begin-times-0", "flow_begin-state.ring-0",
        "flow_end-state.ring-0", "codebook_conv-table-0", "gated_fuse-code.x-0", "gated_fuse-code.y-0",
        "gated_fuse-code.z-0", "gated_fuse-out-0", *(f"fuse_product-code.{axis}-0" for axis in "xyz")}  # fmt: skip


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_the_valid_call_passes(op):
    op(**CALLS[op])


@pytest.mark.parametrize(("op", "changed"), [p for p in wrong_calls() if p.id not in FREE])
def test_wrong_tensor_is_refused(op, changed):
    with pytest.raises(InputError, match=re.escape(op.__name__)):
        op(**CALLS[op] | changed, label="here")


X, LONG = CALLS[gemm]["x"], new(T * D)


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        (gemm, {"out": new(T, 8, dtype="f16")}, r"gemm 'here': out is f16 \[3, 8\]; it must be f32\|bf16 \[3, 8\]"),
        (gemm, {"out": X, "w": matrix(D, D), "bias": None, "residual": X}, "out lies on x"),
        (gemm, {"act": "tanh"}, "act 'tanh' is not one of none, relu2"),
        (gemm, {"bias": new(1, 16).columns(0, 8)}, "bias is f32"),
        (gemm, {"norm": None}, "needs norm and a norm_group"),
        (gemm, {"taps": Taps(2), "x": new(T + 1, D // 2)}, "taps and prologue 'gated' exclude each other"),
        (gemm, {"taps": Window(2, 3, 3)}, "leaves its lines"),
        (gemm, {"taps": Window(2, 1, 1)}, "has no line of cells"),
        (gemm, {"x": new(T, D, dtype="bf16"), "norm": new(D)}, "x in bf16 and prologue 'gated' exclude each other"),
        (gemm, {"taps": Taps(2, dilation=2)}, r"x is f32 \[3, 32\]; it must be f32\|bf16 \[5, 16\]"),
        (gemm, {"taps": Taps(5)}, "do not divide K"),
        (gemm, {"taps": Taps(0)}, "do not divide K"),
        (gemm, {"w": dataclasses.replace(CALLS[gemm]["w"], format="i2")}, "the format of w 'i2' is not one of"),
        (gather, {"table": new(9, 2 * D).columns(0, D)}, "table is a column range"),
        (ssm, {"shape": SsmShape(4, 8, 3, 5, 3)}, "multiple of groups"),
        (ssm, {"shape": SsmShape(4, 8, 2, 5, 0)}, "positive"),
        (ssm, {"dt_bias": None}, "dt_bias is NoneType"),
        (attention, {"k": None}, "k and v belong together"),
        (attention, {"k": None, "v": None}, "rows have no positions"),
        (attention, {"heads": 3}, "3 heads are not a multiple of 2"),
        (attention, {"cache": KVCache.empty(Arena(), "kv", 1, 1025, 16, "f32")}, "1025 wide; the limit is 1024"),
        (attention, {"k": new(T, 64).columns(0, 16)}, "rows of k lie 64 apart"),
        (moe_up, {"hs": None}, "shared and hs belong together"),
        (moe_down, {"shared": None}, "shared and hs belong together"),
        (moe_up, {"act": "tanh"}, "act 'tanh'"),
        (moe_route, {"n_group": 3}, "n_group must divide"),
        (attention, {"longest": 17, "offsets": new(2, dtype="i32"), "rows": None}, "longest=17 does not fit ctx = 16"),
        (channel_attention, {"qkv": X.slice(0, (0, 24)), "out": X.slice(0, (0, 8))}, "0 rows are not"),
        (norm, {"x": X.slice(0, (0, D)), "out": X.slice(0, (0, D))}, "0 rows of 32 values"),
        (gather_mean, {"out": X.slice(0, (0, D))}, "4 rows are not 0 equal runs"),
        (conv_patches, {"image": X.slice(0, (0, 4, 4, 3))}, "does not fit"),
        (conv_depthwise, {"x": X.slice(0, (1, 0, 4, 8))}, "none may be 0"),
        (
            conv_patches,
            {"out": (image := CALLS[conv_patches]["image"]).slice(0, (4, 12)), "image": image},
            "lies on image",
        ),
        (gemm, {"x": LONG.slice(0, (T, D)), "out": LONG.slice(8, (T, 8))}, "out lies on x"),
        (gather_sum, {"out": new(5, D)}, "5 rows of out are not grids of 3"),
        (gated_fuse, {"period": 0}, "newline and period belong together"),
        (gated_fuse, {"norm": None}, "normed and norm belong together"),
        (gated_fuse, {"period": 4}, "6 rows are not lines of 4"),
        (gated_fuse, {"force": 1.5}, r"force=1\.5 is not in"),
        (gated_fuse, {"blend": "sum"}, "blend 'sum' is not one of"),
        (gate_heads, {"u": new(5, D)}, "5 heads do not divide 32 channels"),
        (norm, {"width": 2, "rows": None, "modulation": None}, "3 rows are not lines of 2 cells"),
        (norm, {"group": 5}, "rows of 32 values do not divide into groups of 5"),
        (norm, {"group": 8, "kind": "none", "weight": None, "bias": None, "modulation": None}, "a group needs kind"),
        (attention, {"queries": T + 1}, f"queries={T + 1} of at most {T} rows"),
        (norm, {"width": 3}, "a grid takes neither rows"),
        (guide, {"solver": "none"}, "solver 'none' and targets do not go together"),
        (guide, {"solver": "newton"}, "solver 'newton' is not one of"),
        (guide, {"history": 11}, r"history=11 is not in \[1, 10\]"),
        (guide, {"batch": 4}, "6 rows are not 4 equal motions"),
        (guide, {"x": None}, "noise goes into x"),
        (pick_masked, {"scale": None}, "uncond and scale belong together"),
        (pick_masked, {"mask_id": 8}, "mask_id=8 is one of the 9 codes"),
        (pick_masked, {"topk": 0}, "topk=0 must be at least 1"),
        (pick_masked, {"temperature": 0.0}, r"temperature=0\.0 must be above 0"),
        (pick_masked, {"cond": new(257, 9)}, "257 positions; 1 to 256"),
        (pick_masked, {"cond": new(4, 4097)}, "4097 codes; 1 to 4096"),
        (pick_masked, {"counts": (lap := new(4, dtype="i32")).slice(3, (1,)), "ids": lap}, "ids lies on counts"),
        (pick_next, {"uncond": None}, "uncond and scale belong together"),
        (pick_next, {"cond": new(1, 1)}, "1 codes; 2 to 4096 are possible, the last is END"),
        (
            pick_next,
            {"state": dataclasses.replace(NEXT, pos=ROWS)},
            r"state\.pos is i32 \[1\]; it must be i32 \[2\]",
        ),
        (pick_next, {"state": dataclasses.replace(NEXT, ids=new(9, dtype="i32"))}, "serves 9 passes; 1 to 8"),
        (rng, {"kind": "bits"}, "out is f32"),
        (rng, {"kind": "cauchy"}, "kind 'cauchy' is not one of bits"),
    ],
)
def test_the_message_names_it(op, changed, message):
    with pytest.raises(InputError, match=message):
        op(**CALLS[op] | changed, label="here")


def test_one_token_needs_its_rows_in_scratch():
    down = PackedMatrix.empty(None, "down", 16, 20000, "f32", 64)
    routing = Routing.empty(Arena(), "r", 1, 64, 64)
    with pytest.raises(
        InputError, match=r"top_k 64 rows of inner 20000 take \d+ bytes of scratch; the limit .* 3145728"
    ):
        moe_down(new(64, 20000), down, routing, new(1, 16), ws=new(6 << 20, dtype="u8"), label="here")
