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
EVIDENCE = ROOT / "tests/evidence/records"


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def evidence(name: str) -> dict[str, dict[str, Any]]:
    """The records of a room by layer (tests/evidence); nothing where there is no record."""
    path = EVIDENCE / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _failed(result: dict[str, Any]) -> str:
    n = sum(len(part["failures"]) for part in result.values())
    return f", **{n} failed**" if n else ""


def _interpreted(result: dict[str, Any]) -> str:
    return f"{len(result)} runs{_failed(result)}"


def _emulated(result: dict[str, Any]) -> str:
    plain, failed = result["plain"], _failed(result)
    return f"{plain['cases']} cases × {plain['schedules']} schedules, ASan + UBSan, races{failed}"


def _mutants(result: dict[str, Any]) -> str:
    killed = sum(m["killed"] for m in result.values())
    explained = sum(not m["killed"] and "reason" in m for m in result.values())
    return f"{killed} of {len(result)}" + (f" ({explained} explained)" if explained else "") + _failed(result)


def _compiled(result: dict[str, Any]) -> str:
    kinds = [f"{n} {c}" for c in ("cuda", "triton") if (n := max(part[c] for part in result.values()))]
    return f"sm_{', '.join(result)} ({' + '.join(kinds)} kernels){_failed(result)}"


def _ran(name: str) -> str:
    """Device and date of the newest GPU result in which the op was green."""
    data = newest("gpu")
    rows = [r for r in data["rows"] if r["op"] == name]
    if not rows:
        return "not run"
    red = sum(r["gate"] != "green" for r in rows)
    return f"{data['device']['name']}, {data['date'][:10]}" + (f", **{red} of {len(rows)} red**" if red else "")


def op_table() -> str:
    """What each op has been shown to do, from the records; an absence gives its reason."""
    head = ("op", "cases", "reference", "CPU (scalar, AVX2, AVX-512)", "Triton interpreted", "CUDA emulated",
            "mutants killed", "compiled for", "ran on")  # fmt: skip
    rows = [_row(*head), "|---" * len(head) + "|"]
    cells = {"interpreted": _interpreted, "emulated": _emulated, "mutants": _mutants, "compiled": _compiled}
    for name, op in ops().items():
        state = {thing: s for thing, _, s in room(name, ROOT)}
        needs = {"interpreted": state["triton"], "emulated": state["cuda"], "mutants": state["cuda"]}
        found = evidence(name)
        shown = {}
        for layer, cell in cells.items():
            absent = needs.get(layer, "there")
            shown[layer] = (
                absent if absent != "there" else cell(found[layer]["result"]) if layer in found else "no record"
            )
        tested = sum(c.kind != "real" for c in op.cases)
        cases = f"{tested} tested, {len(op.cases) - tested} real widths"
        rows.append(_row(f"[{name}](csrc/ops/{name}/README.md)", cases, "fp64 torch", "tested", *shown.values(),
                         _ran(name)))  # fmt: skip
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
    for kind, name in (("pi05", "π0.5"), ("xvla", "X-VLA")):
        for quant in (None, "int8"):
            data = newest("-".join(["flow", kind, *([quant] if quant else [])]))
            label = f"{name}, full size, random weights"
            for r in data["rows"]:
                if r["what"] == "step":
                    gate = f"golden actions: {data['golden_error_fp32']:.0e} in fp32, cosine {data['cosine']:.5f} here"
                    rows.append(_row(f"{label}, one flow step", quant or "bf16", f"{r['ms']:.0f} ms", "-", gate,
                                     f"lerobot eager bf16 ×{r['ratio']:.2f}", data["file"]))  # fmt: skip
                elif r["what"] != "load":
                    versus = f"lerobot's chunk ×{r['ratio_first']:.2f} (arithmetic ×{r['ratio_of_arithmetic']:.2f})"
                    rows.append(_row(f"{label}, first action, {r['what']}", quant or "bf16", f"{r['first_ms']:.0f} ms",
                                     "-", "as above", versus, data["file"]))  # fmt: skip
    data = newest("motok")
    golden = next(r["error"] for r in data["rows"] if r["what"] == "golden")
    near = {r["kind"]: f"motion within {r['rms_to_fp32']:.0e} of fp32" for r in data["rows"] if r["what"] == "load"}
    near["fp32"] = f"golden motion within {golden:.0e}"
    for r in data["rows"]:
        if r["what"] == "request":
            versus = f"eager torch ×{r['ratio']:.2f}, fp32 ×{r['ratio_fp32']:.2f}"
            figure = f"{r['seconds']:.2f} s, guidance {r['guidance_share']:.1%} of it"
            what = "MoTok, full size, random weights, text and 3 joints to 196 frames"
            rows.append(_row(what, r["kind"], figure, "-", near[r["kind"]], versus, data["file"]))
        elif r["what"] == "loop":
            roof = f"{r['gflop_s'] / r['matmul_gflop_s']:.0%} of torch.matmul's best"
            rows.append(_row("the same, 27 denoising steps alone", r["kind"], f"{r['seconds']:.2f} s", roof, "as above",
                             f"{r['opponent']} torch ×{r['ratio']:.2f}", data["file"]))  # fmt: skip
    for r in newest("vega3d")["rows"]:
        if r["what"] == "features":
            quality = f"rms {r['rms']:.0e}, cosine {r['cosine']:.5f} of fp32 (3 blocks)"
            rows.append(_row("VEGA-3D's generator, 1.3B, random weights, a frame 832 x 480 to block 20", r["kind"],
                             f"{r['seconds']:.1f} s", "-", quality, f"diffusers bf16 ×{r['ratio']:.2f} (arithmetic "
                             f"×{r['ratio_of_arithmetic']:.2f})", newest("vega3d")["file"]))  # fmt: skip
        elif r["what"] == "questions":
            cold = f"cold ×{r['cold_s'] / r['second_s']:.0f}, logits within {r['error']:.0e}"
            what = f"VEGA-3D, full width, {r['layers']} layers, random weights, second question about a scene"
            figure = f"{r['second_s'] * 1e3:.0f} ms for {r['tokens']} of {r['prompt']} tokens"
            rows.append(_row(what, r["kind"], figure, "-", "as tests", cold, newest("vega3d")["file"]))
        else:
            rows.append(_row(f"gated_fuse, {r['rows']} x {r['width']}", "bf16", f"{r['ms']:.1f} ms",
                             f"{r['share']:.0%} of read bandwidth", f"error {r['error']:.0e}",
                             f"eager torch ×{r['ratio']:.0f}", newest("vega3d")["file"]))  # fmt: skip
    data = newest("dreambooth3d")
    for r in data["rows"]:
        what, roof = f"3DreamBooth, 4 blocks of full width, {r.get('tokens')} tokens and two texts", "-"
        if r["what"] == "attention":
            what, versus = f"joint attention, {r['tokens']} tokens, 16 heads of 128", f"torch SDPA ×{r['ratio']:.2f}"
        elif r["what"] == "step":
            versus = f"published structure, eager torch ×{r['ratio']:.2f}"
        elif r["what"] == "personalisation":
            what, versus = "3DreamBooth, a step of personalisation, 4 blocks of full width", f"peft ×{r['ratio']:.2f}"
        else:
            versus = f"diffusers ×{r['ratio']:.2f}"
        if "gflop_s" in r:
            roof = f"{r['gflop_s']:.0f} GFLOP/s"
        rows.append(_row(what, r.get("kind", "bf16"), f"{r['seconds']:.1f} s", roof, "as tests", versus, data["file"]))
    data = newest("subjects")
    for r in data["rows"]:
        gate = f"colours {r['similarity']:.3f}, unseen sides {r['consistency']:.2f} dB"
        if r["what"] == "ablation":
            what, versus = f"dreambooth3d-tiny, {r['subjects']} unseen solids: {r['arm']}", "-"
            if r["arm"] != "both":
                versus = f"both better from there on {r['both_better']} of {r['subjects']}"
            rows.append(_row(what, "fp32", "-", "-", gate, versus, data["file"]))
        elif r["name"] != "exact":
            near = f"latent within {r['latent']:.2f}" + (f", {r['psnr']:.1f} dB" if r["psnr"] else "")
            rows.append(_row(f"the same, {r['name']}", "fp32", f"×{r['speed']:.2f} the exact speed", "-",
                             f"{near}; {gate}", "exact", data["file"]))  # fmt: skip
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


def predicted_table() -> str:
    """Of bench/predict.py; never beside a measurement."""
    head = ("predicted, not measured", "step, ms", "tokens/s", "floor, ms", "predicted / floor", "largest kernels, µs")
    rows = [_row(*head), "|---" * len(head) + "|"]
    for p in json.loads((ROOT / "bench/predicted.json").read_text()):
        largest = sorted(p["kernels"].items(), key=lambda item: -item[1]["us"])[:3]
        words = ", ".join(f"{name} ×{k['launches']}: {k['us']:.0f}" for name, k in largest)
        what = f"{p['card']}, {p['quant']}, {p['context']} tokens, {p['launches']} launches"
        rows.append(_row(what, f"{p['ms']:.2f}", f"{1e3 / p['ms']:.0f}", f"{p['floor_ms']:.2f}",
                         f"{p['ms'] / p['floor_ms']:.2f}", words))  # fmt: skip
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

    text = put(put(text, "ops", op_table()), "predicted", predicted_table())
    return put(text, "figures", figure_table()) if figures else text


def main() -> None:
    README.write_text(render(README.read_text()))
    print("written:", README)
