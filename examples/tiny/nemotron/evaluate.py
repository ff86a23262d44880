"""Accuracy of nemotron-tiny on the held-out problems, and what quantisation does to it.

python examples/tiny/nemotron/evaluate.py [--n 500] [--folder engine/zoo/nemotron-tiny]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import data
import quant
import torch
import torch.nn.functional as F
from tokenizer import Template
from tokenizers import Tokenizer

from engine.models.nemotron.reference import NemotronReference

ROOT = Path(__file__).resolve().parents[3]
STOP = (2, 11)


def answers(model, tok: Tokenizer, template: Template, problems: list[data.Problem], thinking: bool, limit: int = 160):
    """Greedy answers: a list of (prompt ids, new ids), in the order of the problems."""
    prompts = [tok.encode(template.render(p.messages, p.tools, thinking)).ids for p in problems]
    by_length = defaultdict(list)
    for i, ids in enumerate(prompts):
        by_length[len(ids)].append(i)
    out: list = [None] * len(problems)
    for rows in by_length.values():  # equal lengths only: the reference knows no padding
        new = model.generate(torch.tensor([prompts[i] for i in rows]), limit, STOP)
        for i, row in zip(rows, new.tolist(), strict=True):
            end = next((j for j, t in enumerate(row) if t in STOP), len(row) - 1)
            out[i] = (prompts[i], row[: end + 1])
    return out


def accuracy(model, tok, template, problems, thinking) -> dict[str, tuple[int, int]]:
    """Right answers and problems for each kind, and for "all"."""
    score: dict = defaultdict(lambda: [0, 0])
    for p, (_, new) in zip(problems, answers(model, tok, template, problems, thinking), strict=True):
        ok = data.check(p, tok.decode(new, skip_special_tokens=True))
        for kind in (p.kind, "all"):
            score[kind][0] += ok
            score[kind][1] += 1
    return {k: tuple(v) for k, v in score.items()}


@torch.no_grad()
def divergence(model, modes: list[str], pairs: list[tuple[list[int], list[int]]]) -> dict[str, tuple[float, float]]:
    """Teacher-forced on (prompt, answer) pairs: mean KL(fp32 || mode) and the share of equal top-1 tokens."""
    total, kl, same = 0, dict.fromkeys(modes, 0.0), dict.fromkeys(modes, 0)
    for prompt, new in pairs:
        ids, first = torch.tensor(prompt + new), len(prompt) - 1
        base = F.log_softmax(model(ids)[first:-1].double(), -1)
        total += len(new)
        for mode in modes:
            originals = quant.convert(model, mode)
            other = F.log_softmax(model(ids)[first:-1].double(), -1)
            quant.restore(model, originals)
            kl[mode] += float((base.exp() * (base - other)).sum())
            same[mode] += int((base.argmax(-1) == other.argmax(-1)).sum())
    return {m: (kl[m] / total, same[m] / total) for m in modes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "engine/zoo/nemotron-tiny")
    parser.add_argument("--n", type=int, default=500)
    args = parser.parse_args()
    model = NemotronReference.from_folder(args.folder)
    tok = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    template = Template(args.folder / "chat_template.jinja")
    problems = data.held_out(args.n)
    kinds = ["add", "sub", "mul", "word", "tool", "all"]
    print("| weights, thinking | " + " | ".join(kinds) + " |\n|---" + "|---" * len(kinds) + "|")
    for mode, thinking in [("bf16", True), ("int8", True), ("int4", True), ("bf16", False), ("int4", False)]:
        originals = quant.convert(model, mode)
        score = accuracy(model, tok, template, problems, thinking)
        quant.restore(model, originals)
        cells = [f"{100 * score[k][0] / score[k][1]:.1f} % ({score[k][0]}/{score[k][1]})" for k in kinds]
        print(f"| {mode}, {'on' if thinking else 'off'} | " + " | ".join(cells) + " |", flush=True)
    own = answers(model, tok, template, problems[:100], True)
    for mode, (kl, same) in divergence(model, ["bf16", "int8", "int4"], own).items():
        print(f"{mode}: mean KL {kl:.2e}, same top-1 {100 * same:.2f} %")


if __name__ == "__main__":
    main()
