"""The shipped checkpoint: held-out answers in every format, and how far each format is from fp32."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import engine
from bench import quality

PROBLEMS = 500


@functools.cache
def held():
    return quality.held_out(PROBLEMS)


@functools.cache
def model(name: str):
    dtype, quant = {"fp32": ("fp32", None), "bf16": ("bf16", None), "int8": ("bf16", "int8"), "int4": ("bf16", "int4")}[
        name
    ]
    return quality.load(quant, dtype)


@functools.cache
def own_answers():
    return quality.answers(model("fp32"), held(), thinking=True)


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4"])
def test_held_out_answers_with_thinking(name):
    results = own_answers() if name == "fp32" else quality.answers(model(name), held(), thinking=True)
    shares = quality.accuracy(held(), results)
    print(name, shares)
    assert shares["all"] >= 0.95, shares


def test_thinking_is_what_makes_it_right():
    shares = quality.accuracy(held(), quality.answers(model("bf16"), held(), thinking=False))
    print("direct", shares)
    assert shares["all"] <= quality.accuracy(held(), own_answers())["all"] - 0.2, shares


@pytest.mark.parametrize(("name", "kl", "top"), [("bf16", 1e-3, 0.99), ("int8", 2e-3, 0.98), ("int4", 1e-2, 0.96)])
def test_divergence_from_fp32(name, kl, top):
    pairs = [(prompt, new) for prompt, new, _ in own_answers()]
    got = quality.divergence(model("fp32"), model(name), pairs)
    print(name, got)
    assert got[0] <= kl and got[1] >= top, got


def test_checkpoint_is_small():
    folder = Path(engine.__file__).parent / "zoo/nemotron-tiny"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 5e6


def test_second_turn_reuses_the_first_and_equals_scratch():
    import numpy as np

    m = model("fp32")
    messages = [{"role": "user", "content": "What is 47 + 85?"}]
    first = m.chat(messages, max_new_tokens=160)
    messages += [first.message.to_dict(), {"role": "user", "content": "What is 31 + 16?"}]
    second = m.chat(messages, max_new_tokens=1)
    reused_logits = m.io.logits.numpy()[0].copy()
    prompt, _ = m._render(messages, None, True)
    # Everything before the rewritten assistant turn: only what follows the snapshot ran again.
    boundary = m._render(messages[:1], None, True)[1][0]
    assert second.reused_tokens == boundary
    assert second.prompt_tokens == len(prompt)
    scratch = m.logits(prompt)[-1]
    assert np.abs(reused_logits - scratch).max() <= 2e-5 * np.abs(scratch).max()


def test_thinking_budget_closes_the_reasoning():
    m = model("bf16")
    full = m.chat([{"role": "user", "content": "What is 347 + 285?"}], max_new_tokens=160)
    cut = m.chat([{"role": "user", "content": "What is 347 + 285?"}], max_new_tokens=160, thinking_budget=4)
    assert len(cut.message.reasoning) < len(full.message.reasoning)
    assert cut.message.content


def test_tool_call_is_parsed_with_types():
    def area(width: int, height: int) -> int:
        """The area of a rectangle."""
        raise NotImplementedError

    tool_problem = next(p for p in held() if p.kind == "tool")
    result = model("bf16").chat(tool_problem.messages, tools=tool_problem.tools, max_new_tokens=160)
    assert result.message.tool_calls and result.message.tool_calls[0].name == tool_problem.answer["name"]
