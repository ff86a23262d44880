"""Benches, one verb a suite: ./run bench --help. Alone: ops."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__)
    verbs = parser.add_subparsers(dest="suite")
    ops = verbs.add_parser("ops", help="every op at real widths against torch eager and torch.compile")
    ops.add_argument("names", nargs="*")
    ops.add_argument("--no-compile", action="store_true")
    gemm = verbs.add_parser("gemm", help="packed GEMM against torch.matmul, M = 24..8000")
    gemm.add_argument("--formats", nargs="+", default=["f32", "bf16"])
    gemm.add_argument("--rows", nargs="+", type=int)
    sl = verbs.add_parser("slice", help="five layers at real widths against transformers (./run peers first)")
    sl.add_argument("--rounds", type=int, default=9)
    full = verbs.add_parser("full", help="the published configuration, random weights, peak memory")
    full.add_argument("--quant", default="int4")
    flow = verbs.add_parser("flow", help="pi0.5 and X-VLA at full size against lerobot (./run peers first)")
    flow.add_argument("models", nargs="*", choices=["pi05", "xvla", []], default=[])
    flow.add_argument("--rounds", type=int, default=3)
    flow.add_argument("--quant", choices=["int8"])
    motok = verbs.add_parser("motok", help="MoTok at full size against plain torch with autograd guidance")
    motok.add_argument("--dtype", choices=["fp32", "bf16"], help="only this format (default: fp32, bf16 and int8)")
    motok.add_argument("--quant", choices=["int8"])
    motok.add_argument("--rounds", type=int, default=5)
    vega3d = verbs.add_parser("vega3d", help="VEGA-3D's generator at full size against diffusers, and its fusion")
    vega3d.add_argument("kinds", nargs="*", choices=["bf16", "int8", []], default=[])
    vega3d.add_argument("--rounds", type=int, default=3)
    dream = verbs.add_parser(
        "dreambooth3d", help="3DreamBooth's transformer on a slice at real width against torch and diffusers"
    )
    dream.add_argument("kinds", nargs="*", choices=["bf16", "int8", []], default=[])
    dream.add_argument("--rounds", type=int, default=3)
    subjects = verbs.add_parser("subjects", help="dreambooth3d-tiny: the ablation on unseen solids, and approximations")
    subjects.add_argument("--subjects", type=int, default=20)
    reaction = verbs.add_parser("reaction", help="pi05-tiny and xvla-tiny: balls caught under sync, async and FASTER")
    reaction.add_argument("models", nargs="*", choices=["pi05-tiny", "xvla-tiny", []], default=[])
    reaction.add_argument("--episodes", type=int, default=200)
    model = verbs.add_parser("model", help="nemotron-tiny: quality of each format beside its speed")
    model.add_argument("--problems", type=int, default=100)
    verbs.add_parser("plan", help="overhead of a replay per node")
    verbs.add_parser("readme", help="write the generated tables of README.md")
    verbs.add_parser("predict", help="predicted decode times of cards that are not here, see predict --help")
    verbs.add_parser("gpu", help="on a machine with a GPU: every check and speed of every op, see gpu --help")
    words = (sys.argv[1:] if argv is None else argv) or ["ops"]
    if words[0] == "gpu":
        from bench.gpu import main as run_gpu

        sys.exit(run_gpu(words[1:]))
    if words[0] == "predict":
        from bench.predict import main as run_predict

        return run_predict(words[1:])
    a = parser.parse_args(words)
    if a.suite == "ops":
        from bench.ops import main as run

        run(a.names, not a.no_compile)
    elif a.suite == "gemm":
        from bench.gemm import ROWS
        from bench.gemm import main as run_gemm

        run_gemm(tuple(a.formats), tuple(a.rows or ROWS))
    elif a.suite == "slice":
        from bench.slice import main as run_slice

        run_slice(a.rounds)
    elif a.suite == "plan":
        from bench.plan import main as run_plan

        run_plan()
    elif a.suite == "readme":
        from bench.readme import main as run_readme

        run_readme()
    elif a.suite == "flow":
        from bench.flow import main as run_flow

        run_flow(a.models or ["xvla", "pi05"], a.rounds, a.quant)
    elif a.suite == "motok":
        from bench.motok import main as run_motok

        if a.quant and a.dtype == "fp32":
            parser.error("quantised weights are computed with in bf16; leave --dtype fp32 out")
        kind = a.quant or a.dtype
        run_motok([kind] if kind else None, a.rounds)
    elif a.suite == "vega3d":
        from bench.vega3d import main as run_vega3d

        run_vega3d(a.kinds or ["bf16"], a.rounds)
    elif a.suite == "dreambooth3d":
        from bench.dreambooth3d import main as run_dreambooth3d

        run_dreambooth3d(a.kinds or ["bf16"], a.rounds)
    elif a.suite == "subjects":
        from bench.subjects import main as run_subjects

        run_subjects(a.subjects)
    elif a.suite == "reaction":
        from bench.reaction import main as run_reaction

        run_reaction(a.models, a.episodes)
    elif a.suite == "full":
        from bench.full import main as run_full

        run_full(a.quant)
    else:
        from bench.model import main as run_model

        run_model(a.problems)


if __name__ == "__main__":
    main()
