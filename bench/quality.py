"""Quality gates of nemotron-tiny: exact answers on held-out problems, divergence of each weight format."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples/tiny/nemotron"))

import data

from engine.models.nemotron.model import Nemotron

ANSWER_TOKENS = 160  # the longest worked solution has about 110


def load(quant: str | None = None, dtype: str = "bf16", **options: Any) -> Nemotron:
    import engine

    return engine.load("nemotron-tiny", dtype=dtype, quant=quant, context=1024, **options)  # type: ignore[return-value]


def answers(model: Nemotron, problems: list[data.Problem], thinking: bool) -> list[tuple[list[int], list[int], bool]]:
    """(prompt ids, new ids, right?) for each problem, greedy."""
    out = []
    for p in problems:
        prompt, _ = model._render(p.messages, p.tools, thinking)
        stream = model.stream(p.messages, tools=p.tools, thinking=thinking, max_new_tokens=ANSWER_TOKENS)
        for _ in stream:
            pass
        tokens = stream.result.tokens  # type: ignore[union-attr]
        text = model.tokenizer.decode(tokens)  # type: ignore[union-attr]
        out.append((prompt, tokens, bool(data.check(p, text))))
    return out


def accuracy(problems: list[data.Problem], results: list[tuple[list[int], list[int], bool]]) -> dict[str, float]:
    """Share of right answers by kind, and 'all'."""
    total, right = Counter(p.kind for p in problems), Counter(p.kind for p, r in zip(problems, results) if r[2])
    shares = {kind: right[kind] / total[kind] for kind in sorted(total)}
    return shares | {"all": sum(right.values()) / len(problems)}


def _log_probs(model: Nemotron, prompt: list[int], new: list[int]) -> np.ndarray:
    x = model.logits(prompt + new)[len(prompt) - 1 : -1].astype(np.float64)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def divergence(base: Nemotron, other: Nemotron, pairs: list[tuple[list[int], list[int]]]) -> tuple[float, float]:
    """Teacher-forced on (prompt, answer): mean KL(base || other) per token, share of equal top-1."""
    kl, same, total = 0.0, 0, 0
    for prompt, new in pairs:
        p, q = _log_probs(base, prompt, new), _log_probs(other, prompt, new)
        kl += float((np.exp(p) * (p - q)).sum())
        same += int((p.argmax(1) == q.argmax(1)).sum())
        total += len(new)
    return kl / total, same / total


def held_out(n: int) -> list[data.Problem]:
    return data.held_out(n)
