"""pi05-tiny and xvla-tiny as shipped: they load, act and stream, and FASTER catches what async and sync miss."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import engine
from engine.blocks.policy import FlowPolicy
from engine.blocks.schedule import HorizonSchedule
from engine.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples/tiny/reaction"))

import reaction_episodes as episodes
import reaction_task as task

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("pi05-tiny", "xvla-tiny")
ALPHA = {"pi05-tiny": 0.6, "xvla-tiny": 0.7}


@functools.cache
def loaded(name: str) -> FlowPolicy:
    model = engine.load(name, progress=False)
    assert isinstance(model, FlowPolicy)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_unknown_option(name: str) -> None:
    with pytest.raises(InputError, match=r"has no option 'context'; it takes alpha, batch"):
        engine.load(name, context=64)


@functools.cache
def moment() -> tuple[dict, np.ndarray]:
    """An observation three quarters down the flight, and where the ball will arrive."""
    flight = task.balls(1, np.random.default_rng(5))
    tick, paddle = np.floor(flight.turn + 6), np.array([[0.1, -0.05]])
    return task.observation(task.render(flight, tick, paddle)[0], paddle[0]), flight.hits[0]


def noise(model: FlowPolicy, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(model.flow.sizes[2:], np.float32)


# ---- the task -----------------------------------------------------------------------------------------------------


def test_without_latency_every_ball_can_be_caught():
    assert all(episodes.oracle(f).won for f in episodes.flights(500, 1))


def test_turns_cannot_be_seen_before_they_happen():
    flights = task.balls(50, np.random.default_rng(2))
    before = np.floor(flights.turn)
    turned = task.Balls(flights.wait, flights.turn, flights.start, flights.aims, -flights.hits)
    paddle = np.zeros((50, 2))
    assert np.array_equal(task.render(flights, before, paddle), task.render(turned, before, paddle))
    assert np.array_equal(flights.known(before), turned.known(before))


def test_same_seed_same_task():
    made = [task.samples(20, 30, 12, np.random.default_rng(7), draws=2) for _ in range(2)]
    for field in ("views", "state", "delay", "actions"):
        assert np.array_equal(*(getattr(s, field) for s in made)), field
    moves = np.abs(np.diff(made[0].actions, axis=2))
    assert moves.max() <= task.SPEED + 1e-9


@pytest.mark.parametrize(("name", "mode", "d", "s"), [
    ("pi05-tiny", 0, 0, 10), ("pi05-tiny", 1, 9, 10), ("pi05-tiny", 2, 7, 8),
    ("xvla-tiny", 0, 0, 12), ("xvla-tiny", 1, 11, 12), ("xvla-tiny", 2, 3, 6),
])  # fmt: skip
def test_latencies_of_the_paper(name, mode, d, s):
    mode = episodes.RTX4060[name][mode]
    schedule = loaded(name).schedule
    assert (mode.delay, mode.execute) == (d, s)
    more = episodes.executed(schedule, mode)
    assert s <= more and d + more <= schedule.horizon
    there = episodes.arrivals(schedule, mode, d)
    assert (there[d : d + more] <= (np.arange(d, d + more) + 1) * episodes.TICK + 1e-6).all() or mode.name == "sync"


# ---- the checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_folder(name):
    folder = Path(engine.__file__).parent / "zoo" / name
    files = {f.name for f in folder.iterdir()}
    assert {"config.json", "model.safetensors", "policy_preprocessor.json", "tokenizer.json", "faster.json",
            "README.md"} <= files  # fmt: skip
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 5e6
    side = json.loads((folder / "faster.json").read_text())
    assert (side["schedule"], side["alpha"], side["u0"], side["num_steps"]) == ("has", ALPHA[name], 0.9, 10)


@pytest.mark.parametrize("name", NAMES)
def test_acts_on_what_it_sees(name, recwarn):
    model, (obs, hit) = loaded(name), moment()
    assert model.options.dtype == "bf16"
    for schedule in (model.schedule, HorizonSchedule.constant(model.horizon, 10)):
        chunk = model.act(obs, noise=noise(model), schedule=schedule)
        assert chunk.actions.shape == (model.horizon, 2) and chunk.valid.all()
        assert np.abs(chunk.actions[-1] - hit).max() < task.HALF_WIDTH
        moves = np.abs(np.diff(chunk.actions, axis=0))
        assert np.median(moves.max(1)) < 2 * task.SPEED
    assert not [w for w in recwarn if issubclass(w.category, engine.errors.ScheduleWarning)]


@pytest.mark.parametrize("name", NAMES)
def test_streams_early_actions_first(name):
    model, (obs, _) = loaded(name), moment()
    d = 3
    prefix = task.plan(obs["observation.state"][None].astype(float), np.array([[0.4, 0.4]]), d)[0]
    request = obs | {"delay": d, "action_prefix": prefix}
    packets = list(model.act_stream(request, noise=noise(model), actions=6))
    assert packets[0].step == 1 and packets[0].indices[0] == d
    assert np.array_equal(np.concatenate([p.indices for p in packets]), np.arange(d, d + 6))
    assert packets[-1].step < 10
    whole = model.act(request, noise=noise(model))
    for p in packets:
        assert np.array_equal(p.actions, whole.actions[p.indices])
    # What comes first goes on from what is committed.
    assert np.abs(packets[0].actions[0] - prefix[-1]).max() < 3 * task.SPEED


@pytest.mark.parametrize("name", NAMES)
def test_matches_the_reference(name):
    torch = pytest.importorskip("torch")
    from engine.models.pi05.reference import Pi05Reference
    from engine.models.xvla.reference import XVLAReference

    model, (obs, _) = engine.load(name, dtype="float32", progress=False), moment()
    reference = (Pi05Reference if name == "pi05-tiny" else XVLAReference).from_folder(ROOT / "engine/zoo" / name)
    given, start = model.options.preprocess(obs), torch.from_numpy(noise(model))[None]
    images = torch.from_numpy(given.images).permute(0, 3, 1, 2)[None]
    mask, tokens = torch.from_numpy(given.image_mask)[None], torch.from_numpy(given.tokens.astype(np.int64))[None]
    tau = torch.from_numpy(model.schedule.at(0).tau.copy())
    with torch.no_grad():
        if isinstance(reference, Pi05Reference):
            want = reference(images, mask, tokens, torch.ones_like(tokens, dtype=torch.bool), start, tau)
        else:
            proprio, domain = torch.from_numpy(given.proprio)[None], torch.zeros(1, dtype=torch.long)
            context = reference.context(images, mask, tokens, domain)
            want = reference.steps(context, proprio, domain, start, tau)[-1]
    exact = HorizonSchedule(model.horizon, 10, model.schedule.alpha, model.schedule.u0, ready_threshold=0)
    got = model.act(obs, noise=noise(model), schedule=exact).actions
    scale, offset = model.options.preprocess.action_affine(given.state)
    assert np.abs(got - (want[0, :, :2].numpy() * scale + offset)).max() < 1e-3
    model.close()


# ---- reaction -----------------------------------------------------------------------------------------------------


@functools.cache
def caught(name: str, count: int) -> dict[str, int]:
    model = loaded(name)
    ask, flights = episodes.policy(model), episodes.flights(count, 11)
    out = {}
    for mode in episodes.RTX4060[name]:
        played = [episodes.play(ask, model.schedule, mode, f, i) for i, f in enumerate(flights)]
        assert mode.name == "sync" or sum(e.stalls for e in played) == 0
        out[mode.name] = sum(e.won for e in played)
    print(name, out, "of", count)
    return out


def test_xvla_faster_beats_async_beats_sync():
    got = caught("xvla-tiny", 50)
    assert got["FASTER"] >= got["async"] + 4 and got["async"] > got["sync"], got


def test_pi05_faster_beats_async_beats_sync():
    got = caught("pi05-tiny", 60)
    assert got["FASTER"] > got["async"] > got["sync"], got


# ---- the trainers -------------------------------------------------------------------------------------------------

MICRO = {
    "pi05": {"vision_hidden_size": 12, "vision_num_hidden_layers": 1, "vision_intermediate_size": 16, "hidden_size": 16,
             "num_hidden_layers": 2, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8,
             "expert_hidden_size": 16, "expert_intermediate_size": 16},
    "xvla": {"hidden_size": 24, "depth": 1, "mlp_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["pi05", "xvla"])
def test_trainer_resumes_where_it_was_killed(kind, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location(f"{kind}_train", ROOT / "examples/tiny" / kind / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    import reaction_train

    module.CONFIG.update(MICRO[kind])
    monkeypatch.setattr(reaction_train, "quiz", lambda *_: {})
    monkeypatch.setattr(reaction_train, "statistics", functools.partial(reaction_train.statistics, count=64))
    saved = reaction_train.save_checkpoint

    def run(folder: str, *, resume: bool = False) -> Path:
        args = argparse.Namespace(out=tmp_path / folder, work=tmp_path / "work" / folder.split("-")[0], steps=4, seed=0,
                                  observations=4, draws=2, lr=1e-3, threads=1, resume=resume)  # fmt: skip
        threads = torch.get_num_threads()
        try:
            reaction_train.train(module.RECIPE, args)
        finally:
            torch.set_num_threads(threads)
        return args.out

    whole = run("whole")

    class Killed(Exception):
        pass

    def often(file, n, *rest):
        saved(file, n, *rest)
        raise Killed

    # Killed after the second step, with a checkpoint just written.
    monkeypatch.setattr(reaction_train, "SAVE", 2)
    monkeypatch.setattr(reaction_train, "save_checkpoint", often)
    with pytest.raises(Killed):
        run("cut-1")
    monkeypatch.setattr(reaction_train, "save_checkpoint", saved)
    resumed = run("cut-2", resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    with engine.load(resumed, progress=False) as model:
        chunk = model.act(moment()[0])  # type: ignore[attr-defined]
        assert np.isfinite(chunk.actions).all()


def test_training_times_are_those_of_the_schedule():
    torch = pytest.importorskip("torch")
    import reaction_train

    schedule = HorizonSchedule(30, 10, 0.7, 0.9)
    for d in (0, 3, 12, 29):
        rho = 1 - torch.arange(11) / 10
        delay, yes = torch.full((11,), d), torch.ones(11, dtype=torch.bool)
        tau = reaction_train.local_times(rho, delay, schedule, yes)
        assert np.allclose(tau.numpy(), schedule.at(d).tau, atol=2e-6)
        const = reaction_train.local_times(rho, delay, schedule, ~yes)
        assert np.allclose(const.numpy(), HorizonSchedule.constant(30, 10).at(d).tau, atol=2e-6)
