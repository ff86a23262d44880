"""Writes the generated tables of README.md: ops from the registry, figures from the newest result files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

from bench.report import RESULTS
from engine.ops.registry import ops, room

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def op_table() -> str:
    """What each op has; an absence gives its reason."""
    rows = [_row("op", "cases", "reference", "CPU (scalar, AVX2, AVX-512)", "CUDA", "Triton"), "|---" * 6 + "|"]
    there = {"cuda": "compiled, not run on a device", "triton": "interpreted"}
    for name, op in ops().items():
        state = {thing: s for thing, _, s in room(name, ROOT)}
        cuda, triton = (there[k] if state[k] == "there" else state[k] for k in ("cuda", "triton"))
        tested = sum(c.kind != "real" for c in op.cases)
        cases = f"{tested} tested, {len(op.cases) - tested} real widths"
        rows.append(_row(f"[{name}](csrc/ops/{name}/README.md)", cases, "fp64 torch", "tested", cuda, triton))
    return "\n".join(rows)


def newest(suite: str) -> dict[str, Any]:
    """The last result file of a suite; no rows where there is none."""
    files = sorted(RESULTS.glob(f"*-{suite}.json"))
    return json.loads(files[-1].read_text()) | {"file": files[-1].name} if files else {"rows": []}


def figure_table() -> str:
    """Speeds with gate and opponent; only what a result file holds."""
    head = ("what", "format", "figure", "of the run's roof", "quality gate", "opponent, same run", "result file")
    rows = [_row(*head), "|---" * len(head) + "|"]
    data = newest("slice")
    for r in data["rows"]:
        if r["what"] == "decode":
            roof = f"{r['of_bandwidth']:.0%} of read bandwidth"
            versus = f"transformers fp32 ×{r['vs_transformers_fp32']:.2f}"
            rows.append(_row("five layers at real widths, decode", r["format"], f"{r['ms']:.2f} ms per token", roof,
                             f"KL {r['mean_kl']:.1e} (random weights)", versus, data["file"]))  # fmt: skip
        else:
            versus = f"transformers bf16 ×{r['vs_transformers_bf16']:.2f}"
            rows.append(_row("the same, prompt of 512", r["format"], f"{r['ms']:.0f} ms", f"{r['of_peak']:.0%} of peak",
                             "as above", versus, data["file"]))  # fmt: skip
    data = newest("model")
    for r in data["rows"]:
        gate = f"{r['exact_thinking']:.1%} exact, KL {r['mean_kl']:.1e}, same top-1 {r['same_top']:.2%}"
        figure = f"{r['p50_us']:.0f} µs p50, {r['p99_us']:.0f} µs p99"
        rows.append(_row("nemotron-tiny, decode", r["format"], figure, "-", gate, "-", data["file"]))
    data = newest("full")
    for r in data["rows"]:
        figure = f"{r['tokens_per_s']:.1f} tokens/s, peak RSS {r['peak_rss_gb']:.1f} GB"
        roof = f"{r['gb_s'] / max(data['bandwidth_gb_s']):.0%} of read bandwidth"
        rows.append(_row("30B-A3B configuration, random weights", r["quant"], figure, roof, "-", "-", data["file"]))
    data = newest("gemm")
    for fmt in ("f32", "bf16"):
        mine = [r for r in data["rows"] if r["format"] == fmt and "vs_torch" in r]
        if mine:
            won, rows_of = [r["vs_torch"] for r in mine], sorted({r["m"] for r in mine})
            what = f"packed GEMM, M {rows_of[0]} to {rows_of[-1]}, {len(mine)} shapes"
            error = max(r["error"] for r in mine)
            versus = f"torch.matmul, worst ×{min(won):.2f}"
            figure, gate = f"×{median(won):.2f} median", f"error ≤ {error:.0e}"
            rows.append(_row(what, fmt, figure, "-", gate, versus, data["file"]))
    return "\n".join(rows)


def render(text: str, figures: bool = True) -> str:
    """README text with fresh tables between their markers."""

    def put(text: str, name: str, table: str) -> str:
        return re.sub(
            rf"<!-- {name} -->.*?<!-- /{name} -->",
            lambda _: f"<!-- {name} -->\n{table}\n<!-- /{name} -->",
            text,
            flags=re.S,
        )

    text = put(text, "ops", op_table())
    return put(text, "figures", figure_table()) if figures else text


def main() -> None:
    README.write_text(render(README.read_text()))
    print("written:", README)
