"""What users rely on besides the numbers: prefix reuse, sampling, streams, threads, bad input, static steps."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import threading
import weakref

import numpy as np
import pytest
from models import tiny

import engine
from engine.errors import (
    BusyError,
    CheckpointError,
    ClosedError,
    ConfigError,
    ContextError,
    DeviceError,
    DispatchError,
    EngineError,
    InputError,
    MemoryPlanError,
    TokenizerError,
)
from engine.io.checkpoint import save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder):
    with engine.load(folder, context=256, chunk=32) as m:
        yield m


PROMPT = list(range(5, 45))


def test_audit_decode_and_prefill(model):
    model.generate(PROMPT, max_new_tokens=3)
    audit = model.plans["decode"].audit(model.arena, budget=model.node_budget)
    assert audit.ok, audit.problems
    assert audit.allocations == 0
    assert len(model.plans["decode"]) == model.node_budget
    assert model.plans["prefill"].audit(model.arena).ok


def test_one_replay_per_token(model, monkeypatch):
    calls = dict.fromkeys(model.plans, 0)
    for name, plan in model.plans.items():

        def counted(name=name, replay=plan.replay):
            calls[name] += 1
            replay()

        monkeypatch.setattr(plan, "replay", counted)
    assert len(model.generate(PROMPT, max_new_tokens=20, ignore_eos=True).tokens) == 20
    # 40 prompt tokens in chunks of 32, the first token from the prompt's logits, one replay for each of the others
    assert calls == {"prefill": 2, "head": 1, "draw": 1, "decode": 19, "score": 0}


def test_two_captures_are_equal(folder):
    """Same arguments but for the addresses: nothing of a step depends on when it was captured."""
    with engine.load(folder, context=64, chunk=8) as a, engine.load(folder, context=64, chunk=8) as b:
        assert [(n.label, n.op, n.impl) for n in a.plans["decode"].nodes] == [
            (n.label, n.op, n.impl) for n in b.plans["decode"].nodes
        ]


def test_result_does_not_depend_on_threads(folder):
    from engine.runtime import device

    before = device.threads()
    results = []
    try:
        for n in (1, 2, 3):
            device.set_threads(n)
            with engine.load(folder, context=256) as m:
                results.append(m.logits(PROMPT))
    finally:
        device.set_threads(before)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_prefix_reuse_gives_the_same_logits(model):
    first = model.generate(PROMPT, max_new_tokens=6, ignore_eos=True)
    assert first.reused_tokens == 0
    longer = PROMPT + first.tokens[:5] + [9, 8, 7]
    second = model.generate(longer, max_new_tokens=1, ignore_eos=True)
    assert second.reused_tokens == len(PROMPT) + 5  # what was generated is a prefix of the new prompt
    reused = model.io.logits.numpy().copy()
    scratch = model.logits(longer)[-1]
    assert np.abs(reused - scratch).max() <= 2e-5 * np.abs(scratch).max()


def test_snapshot_before_a_rewritten_tail(model):
    """The template drops earlier reasoning: the live state misses, the snapshot at the boundary hits."""
    stream = model._tokens(
        PROMPT, 4, engine.blocks.sampling.SamplingOptions(), [30], engine.blocks.language.Timing(), True, None
    )
    list(stream)
    other = [*PROMPT[:30], 11, 12, 13]
    second = model.generate(other, max_new_tokens=1)
    assert second.reused_tokens == 30
    got = model.io.logits.numpy().copy()
    want = model.logits(other)[-1]
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


def test_snapshots_behind_a_divergence_are_dropped(model):
    model.generate(PROMPT, max_new_tokens=2, ignore_eos=True)
    model.generate([7, 7, 7, 7], max_new_tokens=2, ignore_eos=True)  # overwrites the KV of every longer snapshot
    again = model.generate(PROMPT, max_new_tokens=2, ignore_eos=True)
    assert again.reused_tokens == 0


def test_scoring_is_not_cut_by_snapshots(folder, monkeypatch):
    """Chunks that do not divide the distance between snapshots once left rows of another block."""
    ids = (PROMPT * 5)[:190]
    with engine.load(folder, context=256) as m:
        want = m.logits(ids)
    monkeypatch.setattr(engine.blocks.language, "SNAPSHOT_EVERY", 64)
    with engine.load(folder, context=256, chunk=24) as m:
        got = m.logits(ids)
        assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
        m.generate(ids, max_new_tokens=1)
        assert m.generate([*ids[:130], 7], max_new_tokens=1).reused_tokens == 128


def test_score_matches_logits(model):
    x = model.logits(PROMPT).astype(np.float64)
    lse = np.log(np.exp(x - x.max(1, keepdims=True)).sum(1)) + x.max(1)
    want = x[np.arange(len(PROMPT) - 1), PROMPT[1:]] - lse[:-1]
    score = model.score(PROMPT)
    np.testing.assert_allclose(score.logprobs, want, atol=1e-6)
    assert score.perplexity == pytest.approx(np.exp(-want.mean()))


def test_sampling_is_repeatable_and_seeded(model):
    a = model.generate(PROMPT, max_new_tokens=12, temperature=1.0, seed=3, ignore_eos=True).tokens
    b = model.generate(PROMPT, max_new_tokens=12, temperature=1.0, seed=3, ignore_eos=True).tokens
    c = model.generate(PROMPT, max_new_tokens=12, temperature=1.0, seed=4, ignore_eos=True).tokens
    assert a == b != c
    greedy = model.generate(PROMPT, max_new_tokens=12, ignore_eos=True).tokens
    assert model.generate(PROMPT, max_new_tokens=12, temperature=1.0, top_k=1, ignore_eos=True).tokens == greedy


def test_interrupted_generation_leaves_the_model_usable(model):
    want = model.generate(PROMPT, max_new_tokens=8, ignore_eos=True).tokens
    for stop_after in (1, 3):
        ids = model._tokens(
            PROMPT, 8, engine.blocks.sampling.SamplingOptions(), [], engine.blocks.language.Timing(), True, None
        )
        for _ in range(stop_after):
            next(ids)
        ids.close()
        assert model.generate(PROMPT, max_new_tokens=8, ignore_eos=True).tokens == want


def test_interrupted_prefill_is_forgotten(model, monkeypatch):
    want = model.generate(PROMPT, max_new_tokens=4, ignore_eos=True).tokens
    replay, calls = model.plans["prefill"].replay, []

    def interrupted():
        replay()
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(model.plans["prefill"], "replay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate([3, *PROMPT], max_new_tokens=4, ignore_eos=True)
    monkeypatch.undo()
    assert calls
    assert model.generate(PROMPT, max_new_tokens=4, ignore_eos=True).tokens == want


def test_second_thread_is_refused(model):
    errors = []
    ids = model._use()
    with ids:

        def other():
            try:
                model.generate(PROMPT, max_new_tokens=1)
            except BusyError as e:
                errors.append(str(e))

        t = threading.Thread(target=other)
        t.start()
        t.join()
    assert errors and "another caller" in errors[0]
    assert model.generate(PROMPT, max_new_tokens=1).tokens


def test_profile_leaves_no_trace(model):
    want = model.generate(PROMPT, max_new_tokens=6, ignore_eos=True).tokens
    for plan in model.plans:
        rows = model.profile(plan, repeats=3)
        assert [info.label for info, _ in rows] == [n.label for n in model.plans[plan].nodes]
    assert model.generate(PROMPT, max_new_tokens=6, ignore_eos=True).tokens == want
    with pytest.raises(InputError, match="decoed"):
        model.profile("decoed")


@pytest.fixture(scope="module")
def chatty():
    with engine.load("nemotron-tiny", context=512) as m:
        yield m


def test_dropping_a_stream_frees_the_model(chatty):
    for event in chatty.stream("What is", max_new_tokens=50, ignore_eos=True):
        assert event.kind == "answer"
        break
    assert chatty.generate("What is", max_new_tokens=2).tokens  # no BusyError


def test_closing_a_stream_keeps_what_was_made(chatty):
    stream = chatty.stream("What is", max_new_tokens=50, ignore_eos=True)
    next(stream)
    assert stream.result is None
    stream.close()
    assert stream.result.finish_reason == "cancelled" and stream.result.tokens
    assert list(stream) == []


def test_close_ends_an_open_stream():
    m = engine.load("nemotron-tiny", context=128)
    stream = m.stream("What is", max_new_tokens=20, ignore_eos=True)
    next(stream)
    m.close()
    assert list(stream) == []
    with pytest.raises(ClosedError):
        m.generate("x")


def test_stop_strings_and_budget(chatty):
    whole = chatty.generate("What is", max_new_tokens=30, ignore_eos=True).text
    cut = chatty.generate("What is", max_new_tokens=30, ignore_eos=True, stop=whole[8:11])
    assert cut.text == whole[: whole.index(whole[8:11])] and cut.finish_reason == "stop"
    assert chatty.generate("What is", max_new_tokens=3, stop=None).text
    off = chatty.chat([{"role": "user", "content": "What is 47 + 85?"}], thinking_budget=0, max_new_tokens=60)
    assert off.message.reasoning == ""


def test_closed_model(folder):
    m = engine.load(folder, context=64)
    memory = weakref.ref(m.arena)
    m.close()
    m.close()
    gc.collect()
    assert memory() is None, "close() must give the memory back"
    with pytest.raises(ClosedError):
        m.generate([1], max_new_tokens=1)
    assert "closed" in repr(m)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.generate([], max_new_tokens=1), InputError, "empty"),
        (lambda m: m.generate([300], max_new_tokens=1), InputError, "vocabulary"),
        (lambda m: m.generate(["a"]), InputError, "integer token ids"),
        (lambda m: m.generate([None]), InputError, "integer token ids"),
        (lambda m: m.generate([1.5]), InputError, "integer token ids"),
        (lambda m: m.generate([[1], [1, 2]]), InputError, "integer token ids|empty"),
        (lambda m: m.generate([1], stop=["x"]), InputError, "tokenizer"),
        (lambda m: m.stream([1]), TokenizerError, "tokenizer"),
        (lambda m: m.generate([-1], max_new_tokens=1), InputError, "vocabulary"),
        (lambda m: m.generate([1] * 256, max_new_tokens=1), ContextError, "context"),
        (lambda m: m.generate([1] * 250, max_new_tokens=100), ContextError, "max_new_tokens=100"),
        (lambda m: m.generate([1], max_new_tokens=0), InputError, "max_new_tokens"),
        (lambda m: m.generate([1], temperature=-1), InputError, "temperature"),
        (lambda m: m.generate([1], temperature=float("nan")), InputError, "temperature"),
        (lambda m: m.generate([1], top_p=0), InputError, "top_p"),
        (lambda m: m.generate([1], top_k=-5), InputError, "top_k"),
        (lambda m: m.generate([1], min_p=2), InputError, "min_p"),
        (lambda m: m.generate([1], repetition_penalty=0), InputError, "repetition_penalty"),
        (lambda m: m.generate([1], seed=-1), InputError, "seed"),
        (lambda m: m.generate([1], beams=4), InputError, "beams"),
        (lambda m: m.generate("text"), TokenizerError, "tokenizer.json"),
        (lambda m: m.chat([]), InputError, "non-empty"),
        (lambda m: m.chat([{"role": "user", "content": "hi"}]), TokenizerError, "template"),
    ],
)
def test_bad_calls(model, call, error, words):
    with pytest.raises(error, match=words):
        call(model)
    assert model.generate([1], max_new_tokens=1).tokens  # still usable


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"quant": "int3"}, InputError, "int3"),
        ({"dtype": "fp8"}, InputError, "fp8"),
        ({"dtype": "fp16"}, InputError, "float32 or bfloat16"),
        ({"context": 1 << 30}, InputError, "context"),
        ({"context": 0}, InputError, "context"),
        ({"chunk": 0}, InputError, "chunk"),
        ({"device": "cuda"}, DeviceError, "cuda"),
        ({"device": "tpu"}, InputError, "tpu"),
    ],
)
def test_bad_options(folder, options, error, words):
    with pytest.raises(error, match=words):
        engine.load(folder, **options)


def _changed(tmp_path, folder, change):
    t = tiny.tensors()
    out = tmp_path / "m"
    out.mkdir()
    shutil.copy(folder / "config.json", out)
    change(t)
    save(out / "model.safetensors", t)
    return out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("backbone.layers.0.mixer.D"), "layers.0.mixer.D"),
        (lambda t: t.update({"backbone.extra": ("F32", np.zeros(3, np.float32))}), "extra"),
        (lambda t: t.update({"lm_head.weight": ("F32", np.zeros((3, 64), np.float32))}), "lm_head"),
        (lambda t: t["backbone.layers.0.mixer.in_proj.weight"][1].__setitem__((3, 5), np.nan), "in_proj"),
        (
            lambda t: t["backbone.layers.1.mixer.experts.2.down_proj.weight"][1].__setitem__((0, 0), np.inf),
            "experts.2.down",
        ),
        (lambda t: t["backbone.layers.0.norm.weight"][1].__setitem__(0, np.inf), "norm"),
        (lambda t: t["backbone.embeddings.weight"][1].__setitem__((1, 1), np.nan), "embeddings"),
    ],
)
def test_bad_weights(tmp_path, folder, change, words):
    with pytest.raises(CheckpointError, match=words):
        engine.load(_changed(tmp_path, folder, change))


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_weights_beyond_the_scales_are_refused(tmp_path, folder, quant):
    def change(t):
        t["backbone.layers.0.mixer.in_proj.weight"][1][3, 5] = 3e7  # its fp16 scale would be infinite

    with pytest.raises(CheckpointError, match="in_proj"):
        engine.load(_changed(tmp_path, folder, change), quant=quant)


def test_a_log_that_overflows_is_refused(tmp_path, folder):
    with pytest.raises(CheckpointError, match="A_log"):
        engine.load(_changed(tmp_path, folder, lambda t: t["backbone.layers.0.mixer.A_log"][1].__setitem__(0, 100.0)))


def test_broken_logits_are_an_error(folder):
    with engine.load(folder, context=64) as m:
        m.weights.norm_f.numpy()[:] = np.nan
        for sampling in ({}, {"temperature": 1.0, "top_p": 0.9, "top_k": 5}):
            with pytest.raises(EngineError, match="no finite logit"):
                m.generate(PROMPT[:5], max_new_tokens=2, **sampling)


def test_plan_equals_what_a_load_takes(folder):
    config = json.loads((folder / "config.json").read_text())
    for options in ({}, {"quant": "int4", "context": 512, "chunk": 64, "snapshots": 1}):
        planned = engine.models.family("nemotron_h").plan(config, **options)
        with engine.load(folder, **options) as m:
            taken = m.memory().parts
        assert planned == taken


def test_mtp_tensors_are_skipped_and_listed(tmp_path, folder):
    out = _changed(tmp_path, folder, lambda t: t.update({"mtp.layers.0.norm.weight": ("F32", np.ones(4, np.float32))}))
    with engine.load(out, context=64) as m:
        assert "mtp.layers.0.norm.weight" in str(m.explain())


def test_fused_experts_and_prefix_spelling(tmp_path, folder, model):
    t = tiny.tensors()
    fused = {}
    for name, (dtype, value) in t.items():
        if ".experts." not in name or ".shared_experts." in name:
            fused[name.replace("backbone.", "model.")] = (dtype, value)
    for i, kind in enumerate(tiny.CONFIG.pattern):
        if kind == "E":
            for which in ("up", "down"):
                one = f"backbone.layers.{i}.mixer.experts.{{}}.{which}_proj.weight"
                stack = np.stack([t[one.format(e)][1] for e in range(8)])
                fused[f"model.layers.{i}.mixer.experts.{which}_proj"] = ("F32", stack)
    out = tmp_path / "fused"
    out.mkdir()
    shutil.copy(folder / "config.json", out)
    save(out / "model.safetensors", fused)
    with engine.load(out, context=256, chunk=32) as m:
        assert np.array_equal(m.logits(PROMPT), model.logits(PROMPT))


def test_unknown_family_and_missing_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="llama"):
        engine.load(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json"):
        engine.load(tmp_path / "..")


def test_memory_plan_refuses_before_work(tmp_path):
    huge = dataclasses.replace(tiny.CONFIG, hidden_size=16384, intermediate_size=65536, pattern="-" * 64)
    tmp_path.joinpath("config.json").write_text(json.dumps(huge.to_json()))
    from engine.blocks.weights import Shapes
    from engine.models.nemotron.model import Nemotron
    from engine.models.nemotron.weights import tensor_shapes

    with pytest.raises(MemoryPlanError, match="int4"):
        Nemotron(huge, source=Shapes(tensor_shapes(huge)))


def test_strict_refuses_a_slower_isa(folder):
    from engine.runtime import device

    if device.available_isas() == ["scalar"]:
        pytest.skip("this host has only scalar kernels")
    with device.use_isa("scalar"), pytest.raises(DispatchError, match="scalar"):
        engine.load(folder, context=64, strict=True)


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
def test_quantised_formats_run_and_are_explained(folder, quant):
    with engine.load(folder, context=64, dtype="bf16", quant=quant) as m:
        assert len(m.generate(PROMPT[:10], max_new_tokens=5, ignore_eos=True).tokens) == 5
        notes = str(m.explain())
        assert {None: "bf16 (as asked)", "int8": "i8 (as asked", "int4": "8 bits: feeds attention"}[quant] in notes
