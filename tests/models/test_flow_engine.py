"""pi0.5 and X-VLA as plans: golden outputs, lerobot, exact savings, batches, streams, deadlines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _faster import DATA, PI05_JSON, XVLA_JSON, golden, small_folder, small_pi05, small_xvla, write_folder, xvla_golden
from _flow_engine import ANY, KINDS, given_times, load, peer_sample, request, sample, stream
from _peer_faster import CASES, TOLERANCE, compare, flow_cases

from engine.blocks.observation import ActionSpace, View
from engine.blocks.policy import FlowPolicy
from engine.blocks.schedule import HorizonSchedule, implied
from engine.errors import BusyError, ClosedError, ConfigError, DeadlineError, EngineError, InputError, ScheduleWarning
from engine.models.pi05.config import Pi05Config
from engine.models.pi05.model import Pi05
from engine.models.xvla.model import XVLA
from engine.runtime.plan import Plan

TINY = {"pi05": PI05_JSON, "xvla": XVLA_JSON}
LIMIT = {"pi05": 5e-5, "xvla": 1e-6}  # of golden outputs, fp32
CONSTANT = {"pi05": HorizonSchedule.constant(50), "xvla": HorizonSchedule.constant(30)}


def features(count: int, size: tuple[int, int], state: int, action: int) -> dict:
    """Cameras, state and action as lerobot's config.json lists them."""
    views = {f"observation.images.cam{i}": {"type": "VISUAL", "shape": [3, *size]} for i in range(count)}
    return {"input_features": views | {"observation.state": {"type": "STATE", "shape": [state]}},
            "output_features": {"action": {"type": "ACTION", "shape": [action]}},
            "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"}}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The golden checkpoints as folders."""
    out = {}
    for kind, raw in TINY.items():
        out[kind] = home = tmp_path_factory.mktemp(kind)
        more = features(3, (224, 224), 14 if kind == "pi05" else 20, 32 if kind == "pi05" else 20)
        if kind == "xvla":
            more |= {"max_state_dim": 20, "num_image_views": 3}
        write_folder(home, raw | more, {})
        (home / "model.safetensors").write_bytes((DATA / f"{kind}_tiny.safetensors").read_bytes())
    return out


@pytest.fixture(scope="module", params=["pi05", "xvla"])
def tiny(request, folders) -> FlowPolicy:
    return load(request.param, folders[request.param])


def kind_of(model: FlowPolicy) -> str:
    return "pi05" if isinstance(model, Pi05) else "xvla"


def golden_request(model: FlowPolicy, delay: int = 0, absent: bool = True):
    kind = kind_of(model)
    io = golden(kind)
    tokens = io["tokens"][0][io["token_mask"][0]] if kind == "pi05" else io["tokens"][0]
    prefix = io["action_prefix" if kind == "pi05" else "action_prefix_d3"][0, :delay] if delay else None
    more = {} if kind == "pi05" else {"state": io["state"][0], "domain": int(io["domain_id"][0])}
    mask = io["image_mask"][0].numpy() if absent else np.ones(3, bool)
    return request(model, io["images"][0], mask, tokens, prefix=prefix, **more)


def noise_of(model: FlowPolicy) -> np.ndarray:
    return golden(kind_of(model))["noise"][0].numpy()


GOLDEN = {
    "pi05": [("out_const", None, 0), ("out_const_d4", None, 4), ("out_has", 0.6, 0), ("out_has_d4", 0.6, 4)],
    "xvla": [("out_const", None, 0), ("out_has_a06", 0.6, 0), ("out_has_a07", 0.7, 0), ("out_has_a06_d3", 0.6, 3)],
}


def schedule_of(model: FlowPolicy, alpha: float | None) -> HorizonSchedule:
    base = CONSTANT[kind_of(model)]
    return base if alpha is None else base.replace(alpha=alpha, u0=0.9)


# ------------------------------------------------------------------------------------------ against golden data
@pytest.mark.parametrize("number", range(4))
@pytest.mark.filterwarnings("ignore::engine.errors.ScheduleWarning")
def test_golden_chunks(tiny: FlowPolicy, number: int) -> None:
    kind = kind_of(tiny)
    name, alpha, delay = GOLDEN[kind][number]
    x = sample(tiny, golden_request(tiny, delay), noise_of(tiny), schedule_of(tiny, alpha))
    got = x if kind == "pi05" else tiny.profile_of_inputs.action.finish(x)
    assert np.abs(got - golden(kind)[name][0].numpy())[delay:].max() <= LIMIT[kind]


@pytest.mark.filterwarnings("ignore::engine.errors.ScheduleWarning")
def test_golden_stream(folders) -> None:
    """Which rows leave after which step, and their values at that time."""
    model = load("pi05", folders["pi05"])
    io, schedule = golden("pi05"), schedule_of(model, 0.6)
    seen = dict.fromkeys(range(10), ())
    for packet in stream(model, golden_request(model, 4), noise_of(model), schedule):
        want = io["stream_x_d4"][packet.step - 1, 0].numpy()
        assert np.abs(packet.actions - want[packet.indices]).max() <= LIMIT["pi05"]
        seen[packet.step - 1] = tuple(packet.indices)
    new = io["stream_new_d4"][:, 0].numpy()
    assert seen == {j: tuple(np.flatnonzero(new[j])) for j in range(10)}


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.filterwarnings("ignore::engine.errors.ScheduleWarning")
def test_bf16_is_near(folders, kind: str) -> None:
    model = load(kind, folders[kind], dtype="bf16")
    name, alpha, delay = GOLDEN[kind][2]
    x = sample(model, golden_request(model, delay), noise_of(model), schedule_of(model, alpha))
    got = (x if kind == "pi05" else model.profile_of_inputs.action.finish(x)).ravel()
    want = golden(kind)[name][0].numpy().ravel()
    assert got @ want / np.linalg.norm(got) / np.linalg.norm(want) >= 0.999


@pytest.mark.peer
@pytest.mark.parametrize("number", range(CASES))
@pytest.mark.parametrize("kind", TINY)
def test_lerobot(kind: str, number: int) -> None:
    """Random checkpoints of lerobot, odd sizes, every action mode: constant, horizon-aware, with a prefix."""
    case = flow_cases(kind)[number]
    model = load(kind, case.folder, num_steps=len(case.io["tau_const"]) - 1)
    errors = compare(case, lambda case, name: peer_sample(model, case, name))
    assert max(errors.values()) <= TOLERANCE, errors


# ------------------------------------------------------------------------------------------ exact savings
def fresh(model: FlowPolicy, given, schedule=None) -> np.ndarray:
    model.reset()
    return sample(model, given, noise_of(model), schedule or schedule_of(model, None))


def test_an_unchanged_camera_is_not_looked_at_again(tiny: FlowPolicy, monkeypatch) -> None:
    given, looked = golden_request(tiny, absent=False), []
    want = fresh(tiny, given)
    for n in (1, 2, 3):
        plan = tiny.plans[f"vision_{n}"]
        monkeypatch.setitem(tiny.plans, f"vision_{n}", _Counted(plan, lambda n=n: looked.append(n)))
    assert np.array_equal(sample(tiny, given, noise_of(tiny), schedule_of(tiny, None)), want)
    assert looked == []
    images = given.images.copy()
    images[1] = images[1, ::-1]
    moved = golden_request(tiny, absent=False)
    object.__setattr__(moved, "images", images)
    other = sample(tiny, moved, noise_of(tiny), schedule_of(tiny, None))
    assert looked == [1]
    assert not np.array_equal(other, want)
    assert np.array_equal(fresh(tiny, moved), other)
    assert looked == [1, 3]


def test_a_camera_that_goes_and_comes_back(tiny: FlowPolicy) -> None:
    """An absent camera leaves nothing behind."""
    with_two, with_three = golden_request(tiny), golden_request(tiny, absent=False)
    two, three = fresh(tiny, with_two), fresh(tiny, with_three)
    assert not np.allclose(two, three, atol=1e-4)
    order = [(with_three, three), (with_two, two), (with_three, three), (with_two, two)]
    for given, want in order:
        assert np.array_equal(sample(tiny, given, noise_of(tiny), schedule_of(tiny, None)), want)


@pytest.mark.filterwarnings("ignore::engine.errors.ScheduleWarning")
@pytest.mark.parametrize("kind", TINY)
def test_tables_of_times_are_kept_and_replaced(folders, kind: str) -> None:
    """More delays than slots: every result is what it was with an empty table."""
    tiny = load(kind, folders[kind])
    schedule, filled = schedule_of(tiny, 0.6), []
    fill = tiny._fill_times
    tiny._fill_times = lambda slot, table: (filled.append(table.delay), fill(slot, table))
    want: dict[int, np.ndarray] = {}
    for d in (0, 1, 2, 3, 5, 0, 5):
        got = fresh(tiny, golden_request(tiny, d), schedule)
        assert d not in want or np.array_equal(got, want[d])
        want[d] = got
    assert filled.count(0) == 2  # made room for the fifth
    assert filled.count(5) == 1


def test_text_length_is_free(folders) -> None:
    """Tokens that are not there take no part: a prompt alone, and in front of what another one left."""
    model = load("pi05", folders["pi05"])
    io = golden("pi05")
    tokens = io["tokens"][0][io["token_mask"][0]].numpy()
    short = request(model, io["images"][0], io["image_mask"][0], tokens[:7])
    alone = fresh(model, short)
    fresh(model, request(model, io["images"][0], io["image_mask"][0], np.tile(tokens, 6)))
    assert np.array_equal(sample(model, short, noise_of(model), schedule_of(model, None)), alone)


class _Counted:
    def __init__(self, plan: Plan, seen) -> None:
        self._plan, self._seen = plan, seen

    def replay(self) -> None:
        self._seen()
        self._plan.replay()

    def wait(self) -> None:
        self._seen()
        self._plan.wait()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.filterwarnings("ignore::engine.errors.ScheduleWarning")
@torch.no_grad()
def test_the_other_sampler_of_xvla(folders, delay: int) -> None:
    """Euler on the velocity that predictions imply: the plain sampler around the plain network."""
    io, reference = golden("xvla"), xvla_golden()
    schedule = schedule_of_kind("xvla")
    model = load("xvla", folders["xvla"], sampler="euler", schedule=schedule)
    noise = noise_of(model)
    got = sample(model, golden_request(model, delay), noise, schedule)
    context = reference.context(*(io[k][:1] for k in ("images", "image_mask", "tokens", "domain_id")))

    def net(x: np.ndarray, tau: np.ndarray) -> np.ndarray:
        x, tau = (torch.from_numpy(a.copy())[None].float() for a in (x, tau))
        return reference.predict(x, io["state"][:1], tau, context, io["domain_id"][:1])[0].numpy()

    prefix = io["action_prefix_d3"][0, :delay].numpy() if delay else None
    want = implied(net, noise, schedule.at(delay), prefix)[-1]
    assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()
    other = sample(load("xvla", folders["xvla"], schedule=schedule), golden_request(model, delay), noise, schedule)
    assert np.abs(other - got)[delay + 2 :].max() > 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "ddim"}, "sampler='ddim' is not one of"),
        ({"schedule": "const", "alpha": 0.6}, "schedule 'const' has no alpha"),
        ({"schedule": "const", "u0": 0.9}, "schedule 'const' has no u0"),
        ({"alpha": 0.6}, "needs alpha= and u0="),
    ],
)
def test_options_that_do_nothing_are_refused(folders, options, message) -> None:
    with pytest.raises(InputError, match=message):
        XVLA.load(folders["xvla"], statistics=ANY, **options)


# ------------------------------------------------------------------------------------------ batches and steps
@pytest.mark.parametrize("kind", TINY)
@pytest.mark.filterwarnings("ignore::engine.errors.ScheduleWarning")
def test_a_batch_is_its_chunks_alone(folders, kind: str) -> None:
    """Four chunks with delays 0, 3, 4 and 10, different images and noise; in one plan."""
    one, four = (load(kind, folders[kind], batch=b) for b in (1, 4))
    schedule, r = schedule_of(one, 0.6), np.random.default_rng(0)
    h, a = noise_of(one).shape
    noise = r.standard_normal((4, h, a)).astype(np.float32)
    givens = []
    for i, delay in enumerate((0, 3, 4, 10)):
        given = golden_request(one, 0, absent=i % 2 == 0)
        object.__setattr__(given, "images", given.images * (1 - 0.2 * i))
        object.__setattr__(given, "prefix", r.standard_normal((delay, a)).astype(np.float32))
        object.__setattr__(given, "delay", delay)
        givens.append(given)
    alone = [fresh_with(one, g, n, schedule) for g, n in zip(givens, noise)]
    tables = [four._begin(b, g, noise[b], None, schedule) for b, g in enumerate(givens)]
    for _ in range(schedule.steps):
        four._step_plan(4).replay()
    together = four.flow.x.read()
    for b, want in enumerate(alone):
        assert np.abs(together[b] - want)[tables[b].delay :].max() <= 2e-6 * np.abs(want).max()


def fresh_with(model: FlowPolicy, given, noise, schedule) -> np.ndarray:
    model.reset()
    return sample(model, given, noise, schedule)


class _Told(_Counted):
    """A plan that says when it is started, waited for and drained."""

    def __init__(self, plan: Plan, told: list[str]) -> None:
        super().__init__(plan, lambda: told.append("wait"))
        self._told = told

    def start(self) -> None:
        self._told.append("start")

    def drain(self) -> None:
        self._told.append("drain")


@pytest.mark.filterwarnings("ignore::engine.errors.ScheduleWarning")
def test_the_next_step_is_queued_before_rows_are_read(tiny: FlowPolicy, monkeypatch) -> None:
    told: list[str] = []
    monkeypatch.setitem(tiny.plans, "step", _Told(tiny.plans["step"], told))
    read = tiny._rows_of
    monkeypatch.setattr(tiny, "_rows_of", lambda b: told.append("read") or read(b))
    schedule = schedule_of(tiny, 0.6)
    noise = noise_of(tiny)
    stream = tiny._stream(golden_request(tiny, 0), noise, schedule.at(0).valid, None, schedule)
    next(stream)
    told.remove("read")  # a request begins with zeros in its rows
    assert told == ["start", "start", "wait", "read"]
    told.clear()
    stream.close()
    assert told == ["drain"]  # what runs ahead is not left running
    told.clear()
    sample(tiny, golden_request(tiny, 0), noise, schedule)
    assert told.count("start") == told.count("wait") == schedule.steps and told[-1] == "drain"


@pytest.mark.filterwarnings("ignore::engine.errors.ScheduleWarning")
def test_network_calls_and_early_stop(tiny: FlowPolicy, monkeypatch) -> None:
    """One call before the first action, as many as the schedule says before the s-th, and not one more."""
    calls: list[int] = []
    monkeypatch.setitem(tiny.plans, "step", _Counted(tiny.plans["step"], lambda: calls.append(1)))
    schedule = schedule_of(tiny, 0.6)
    for delay, wanted in ((0, 1), (0, 4), (3, 4), (4, 10), (0, schedule.horizon)):
        calls.clear()
        packets = stream(tiny, golden_request(tiny, delay), noise_of(tiny), schedule, wanted)
        assert len(calls) == schedule.at(delay).steps_for(wanted)
        assert [i for p in packets for i in p.indices] == list(range(delay, delay + wanted))
        assert packets[0].step == 1
        chunk = packets[-1].chunk
        assert list(np.flatnonzero(chunk.valid)) == list(range(delay, delay + wanted))
        assert not chunk.actions[~chunk.valid].any()
        assert len(chunk.timing) >= 4


def test_steps_are_static_plans(tiny: FlowPolicy) -> None:
    """One replay per step, no allocation, bit-identical to the kernels called one by one; every other plan too."""
    fresh(tiny, golden_request(tiny))
    for name, plan in tiny.plans.items():
        audit = plan.audit(tiny.arena, tiny.node_budget if name == "step" else None, replays=4)
        assert not audit.problems, (name, audit.problems)


def test_same_noise_same_actions(tiny: FlowPolicy) -> None:
    given = golden_request(tiny)
    assert np.array_equal(fresh(tiny, given), fresh(tiny, given))
    tiny.seed(3)
    one = tiny._noise(None, 1)
    tiny.seed(3)
    assert np.array_equal(tiny._noise(None, 1), one)
    assert not np.array_equal(tiny._noise(None, 1), one)


def test_any_table_of_times(tiny: FlowPolicy) -> None:
    """Equal times as a table of their own are the constant schedule."""
    want = fresh(tiny, golden_request(tiny))
    tau = np.repeat(np.linspace(1, 0, 11, dtype=np.float32)[:, None], tiny.horizon, 1)
    assert np.abs(fresh(tiny, golden_request(tiny), given_times(tau)) - want).max() <= 1e-6 * np.abs(want).max()


# ------------------------------------------------------------------------------------------ small random models
@pytest.mark.parametrize("kind", TINY)
def test_int8_stays_near(tmp_path: Path, kind: str) -> None:
    model = small_pi05(3, hidden_size=64, expert_hidden_size=64) if kind == "pi05" else small_xvla(3)
    folder = small_folder(tmp_path, model)
    exact, near = (load(kind, folder, quant=q) for q in (None, "int8"))
    r = np.random.default_rng(1)
    given, noise = small_request(exact, r), r.standard_normal(exact.flow.sizes[2:]).astype(np.float32)
    schedule = exact.schedule
    a, b = (sample(m, given, noise, schedule).ravel() for m in (exact, near))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= 0.999


def small_request(model: FlowPolicy, r: np.random.Generator):
    c = model.config
    size = c.vision.image_size if isinstance(c.vision.image_size, tuple) else (c.vision.image_size,) * 2
    views = len(model.profile_of_inputs.views)
    images = r.uniform(-1, 1, (views, 3, *size)).astype(np.float32)
    count = 9 if model.rule == "euler" else c.tokenizer_max_length
    vocab = c.vocab_size if model.rule == "euler" else c.language.vocab_size
    state = None if model.rule == "euler" else r.standard_normal(c.proprio_dim)
    return request(model, images, np.ones(views, bool), r.integers(0, vocab, count), state=state)


# ------------------------------------------------------------------------------------------ what users meet
def observation(model: FlowPolicy, **more: Any) -> dict:
    io, profile = golden(kind_of(model)), model.profile_of_inputs
    r = np.random.default_rng(0)
    obs = {v.key: r.integers(0, 256, (224, 224, 3), dtype=np.uint8) for v in profile.views}
    obs |= {profile.state_keys[0]: r.uniform(-1, 1, 14 if kind_of(model) == "pi05" else 20)}
    return obs | {"tokens": io["tokens"][0].numpy()[: profile.max_tokens]} | more


def test_act_and_stream_agree(tiny: FlowPolicy) -> None:
    obs, noise = observation(tiny), noise_of(tiny)
    chunk = tiny.act(obs, noise=noise)
    assert chunk.actions.shape == (tiny.horizon, tiny.options.dims)
    assert chunk.valid.all()
    packets = list(tiny.act_stream(obs, noise=noise))
    assert np.array_equal(np.concatenate([p.actions for p in packets]), chunk.actions)
    assert [p.final for p in packets] == [False] * (len(packets) - 1) + [True]
    assert {"first_ms", "enough_ms", "last_ms", "vision_ms", "prefix_ms"} <= set(chunk.timing)
    assert "view cam0" in str(tiny.profile_of_inputs)
    assert "flow_end" in str(tiny.explain())


def test_limits_clamp(folders) -> None:
    profile = load("pi05", folders["pi05"]).profile_of_inputs
    limits = (tuple([-0.1] * 32), tuple([0.2] * 32))
    model = load("pi05", folders["pi05"], profile=profile.replace(limits=limits))
    chunk = model.act(observation(model), noise=noise_of(model))
    assert chunk.actions.min() == np.float32(-0.1)
    assert chunk.actions.max() == np.float32(0.2)


def test_broken_weights_do_not_move_a_robot(tmp_path: Path, folders) -> None:
    model = load("pi05", folders["pi05"])
    model.weights.action_out_bias.write(np.full(32, np.nan, np.float32))
    with pytest.raises(EngineError, match="not finite"):
        model.act(observation(model), noise=noise_of(model))
    model.weights.action_out_bias.write(np.zeros(32, np.float32))
    assert np.isfinite(model.act(observation(model), noise=noise_of(model)).actions).all()


def test_a_deadline_is_kept_or_refused(tiny: FlowPolicy, monkeypatch) -> None:
    obs = observation(tiny)
    tiny.act(obs)
    assert tiny.act(obs, deadline_ms=60_000).valid.all()
    with pytest.raises(DeadlineError, match=r"within 0\.01 ms"):
        tiny.act(obs, deadline_ms=0.01)
    plan = tiny.plans["step"]
    monkeypatch.setitem(tiny.plans, "step", _Counted(plan, lambda: time.sleep(0.2)))
    tiny.clock.usual["step"] = 0.0
    start = time.perf_counter()
    with pytest.raises(DeadlineError, match="within 120 ms"):
        tiny.act(obs, deadline_ms=120)
    assert time.perf_counter() - start < 1  # one step too long, not ten
    for _ in range(10):  # once that is usual, it is known before the step is run
        with pytest.raises(DeadlineError) as refused:
            tiny.act(obs, deadline_ms=120)
    assert "step usually takes" in str(refused.value)
    monkeypatch.setitem(tiny.plans, "step", plan)
    tiny.clock.usual.clear()
    assert tiny.act(obs, deadline_ms=60_000).valid.all()


def test_a_slow_moment_is_forgotten(tiny: FlowPolicy) -> None:
    """Refused requests measure nothing: what they are refused by must fade, or it would refuse for ever."""
    obs = observation(tiny)
    tiny.act(obs)
    tiny.clock.usual["step"] = 60_000.0
    for _ in range(60):
        try:
            tiny.act(obs, deadline_ms=30_000)
            break
        except DeadlineError:
            pass
    else:
        pytest.fail("refused for ever")
    tiny.clock.usual.clear()


def test_each_amount_of_work_has_its_own_time(tiny: FlowPolicy) -> None:
    """Cameras that stood still say nothing about cameras that move."""
    tiny.clock.usual.clear()
    tiny.reset()
    obs = observation(tiny)
    for _ in range(4):
        tiny.act(obs)
    usual = tiny.clock.usual
    assert usual["vision_3"] > 5 * usual["vision_0"]
    tiny.clock.usual.clear()


def test_preprocessing_counts(folders) -> None:
    model = load("pi05", folders["pi05"])
    real = model.options.preprocess

    def slow(obs):
        time.sleep(0.15)
        return real(obs)

    slow.profile, slow.action_affine = real.profile, real.action_affine
    object.__setattr__(model.options, "preprocess", slow)
    timing = model.act(observation(model)).timing
    assert timing["first_ms"] > timing["preprocess_ms"] >= 150
    with pytest.raises(DeadlineError, match="within 100 ms"):
        model.act(observation(model), deadline_ms=100)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.filterwarnings("ignore::engine.errors.ScheduleWarning")
def test_act_batch_is_act(folders, kind: str) -> None:
    """Other cameras, delays and noise per chunk, in any order, and between requests that end half way."""
    one, four = (load(kind, folders[kind], batch=b, schedule=schedule_of_kind(kind)) for b in (1, 4))
    r, dims = np.random.default_rng(0), one.options.dims
    noise = r.standard_normal((4, *one.flow.sizes[2:])).astype(np.float32)
    asked = []
    for i, d in enumerate((0, 3, 4, 10)):
        obs = observation(one)
        for view in one.profile_of_inputs.views:
            obs[view.key] = r.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        if i in (1, 2):
            del obs[f"observation.images.cam{i}"]
        if d:
            obs |= {"delay": d, "action_prefix": r.standard_normal((d, dims)).astype(np.float32)}
        asked.append(obs)
    want = []
    for obs, start in zip(asked, noise):
        one.reset()
        want.append(one.act(obs, noise=start))
    for order in ([0, 1, 2, 3], [2, 0, 3, 1], [3, 1]):
        got = four.act_batch([asked[i] for i in order], noise=noise[order])
        for i, chunk in zip(order, got):
            assert np.array_equal(chunk.valid, want[i].valid)
            error = np.abs(chunk.actions - want[i].actions)[chunk.valid].max()
            assert error <= 1e-5 * np.abs(want[i].actions).max()
            assert {"preprocess_ms", "first_ms", "last_ms"} <= set(chunk.timing)
        stream = four.act_stream(asked[order[-1]], actions=2)
        next(stream)
        stream.close()
        with pytest.raises(DeadlineError):
            four.act(asked[0], deadline_ms=1e-3)
    assert np.abs(four.act(asked[1], noise=noise[1]).actions - want[1].actions)[3:].max() <= 1e-5


def schedule_of_kind(kind: str) -> HorizonSchedule:
    return CONSTANT[kind].replace(alpha=0.6, u0=0.9)


@pytest.mark.parametrize("kind", TINY)
def test_a_batch_is_refused_before_any_work(folders, kind: str, monkeypatch) -> None:
    model = load(kind, folders[kind], batch=2, max_delay=3)
    obs = observation(model)
    late = obs | {"delay": 4, "action_prefix": np.zeros((4, model.options.dims))}
    monkeypatch.setattr(model, "_begin", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(InputError, match="above max_delay = 3"):
        model.act_batch([obs, late])
    if kind == "xvla":
        with pytest.raises(InputError, match="share a domain"):
            model.act_batch([obs, obs | {"domain_id": 1}])
        with pytest.raises(InputError, match="domain_id 9 is outside"):
            model.act_stream(obs | {"domain_id": 9})


@pytest.mark.filterwarnings("ignore::engine.errors.ScheduleWarning")
def test_one_caller_and_close(folders) -> None:
    model = load("xvla", folders["xvla"])
    running = model.act_stream(observation(model), schedule=schedule_of(model, 0.7))
    next(running)
    with pytest.raises(BusyError):
        model.act(observation(model))
    running.close()
    model.warmup()
    model.act(observation(model))
    model.close()
    with pytest.raises(ClosedError):
        model.act({})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"noise": np.zeros((3, 3), np.float32)}, "noise is float32"),
        ({"noise": np.full((50, 32), np.nan, np.float32)}, "NaN"),
        ({"noise": np.full((50, 32), 1e300)}, "NaN or infinity"),
        ({"actions": 0}, "actions=0"),
        ({"actions": 51}, "actions=51"),
        ({"deadline_ms": 0}, "deadline_ms=0"),
        ({"deadline_ms": "soon"}, "deadline_ms='soon'"),
        ({"schedule": HorizonSchedule(49)}, "49 actions in 10 steps does not fit"),
        ({"schedule": HorizonSchedule(50, 9)}, "load with num_steps="),
    ],
)
def test_bad_arguments(folders, change: dict, text: str) -> None:
    model = load("pi05", folders["pi05"])
    with pytest.raises(InputError, match=text):
        model.act_stream(observation(model), **change)
    assert not model._lock.locked()


def test_domains(folders) -> None:
    """Weights of another domain are other weights, and the first come back."""
    model = load("xvla", folders["xvla"])
    zero, one = (model.act(observation(model, domain_id=d), noise=noise_of(model)).actions for d in (0, 1))
    assert np.abs(zero - one).max() > 1e-3
    assert np.array_equal(model.act(observation(model, domain_id=0), noise=noise_of(model)).actions, zero)
    with pytest.raises(InputError, match="domain_id 4 is outside"):
        model.act(observation(model, domain_id=4))


def test_untrained_schedules_warn_once(folders) -> None:
    model = load("pi05", folders["pi05"])
    schedule = schedule_of(model, 0.6)
    with pytest.warns(ScheduleWarning, match="alpha 0.6"):
        model.act(observation(model), schedule=schedule)
    with pytest.raises(ConfigError, match="q01"):
        model.load(folders["pi05"], profile=model.profile_of_inputs.replace(action_norm="quantile"))


def test_numbers_beyond_fp32_are_the_senders_fault(folders) -> None:
    pi05, xvla = (load(kind, folders[kind]) for kind in ("pi05", "xvla"))
    with pytest.raises(InputError, match="action_prefix holds"):
        pi05.act(observation(pi05, delay=1, action_prefix=np.full((1, 32), 1e300)))
    with pytest.raises(InputError, match=r"observation\.state holds"):
        xvla.act(observation(xvla) | {"observation.state": np.full(20, 1e300)})


# ------------------------------------------------------------------------------------------ profiles
@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        ("pi05", {"max_tokens": 201}, "tokens 201"),
        ("pi05", {"proprio_dim": 7}, "state vector 7"),
        ("pi05", {"prompt": "padded"}, "prompt padded"),
        ("xvla", {"max_tokens": 10}, "tokens 10"),
        ("xvla", {"proprio_dim": 1}, "state vector 1"),
        ("xvla", {"action": ActionSpace("other", 20, 7)}, r"gripper channels \(\)"),
        ("xvla", {"action": ActionSpace("other", 24, 7, (9, 19))}, "channels of an action 24"),
    ],
)
def test_a_profile_of_another_model_is_refused_at_load(folders, kind: str, change: dict, text: str) -> None:
    model = KINDS[kind]
    config = model.config_of(folders[kind])
    own = model.default_profile(config)
    with pytest.raises(ConfigError, match=text):
        model.options_of(config, folders[kind], profile=own.replace(**change))
    views = (*own.views, View("more", "more"))
    with pytest.raises(ConfigError, match="image slots 4"):
        model.options_of(config, folders[kind], profile=own.replace(views=views))


def test_a_profile_as_argument_wins_over_the_sidecar(tmp_path: Path, folders) -> None:
    model = KINDS["pi05"]
    config = model.config_of(folders["pi05"])
    (tmp_path / "faster.json").write_text('{"resize": "stretch", "norm": "identity"}')
    own = model.default_profile(config)
    for asked, want in ((None, "stretch"), (own, "pad-torch")):
        made = model.options_of(config, tmp_path, profile=asked)
        assert made.preprocess.profile.image.resize == want


def test_what_config_json_says_about_inputs() -> None:
    """Relative joints are honoured, unknown normalisations refused, files of openpi prepared as openpi does."""
    names = [*(f"joint_{i}" for i in range(6)), "gripper"]
    raw = {"type": "pi05"} | features(1, (224, 224), 7, 7)
    relative = {"use_relative_actions": True, "action_feature_names": names}
    for more, want in (({}, ()), (relative, (True,) * 6 + (False,)),
                       (relative | {"relative_exclude_joints": []}, (True,) * 7)):  # fmt: skip
        config = Pi05Config.from_json(raw | more)
        assert KINDS["pi05"].default_profile(config).delta_mask == want
    for kind, base in (("pi05", raw), ("xvla", XVLA_JSON | features(1, (224, 224), 20, 20))):
        model = KINDS[kind]
        odd = base | {"normalization_mapping": {"ACTION": "QUANTILE10"}}
        with pytest.raises(ConfigError, match=r"ACTION = QUANTILE10 is not supported"):
            model.default_profile(model.parse(odd))
    openpi = KINDS["pi05"].default_profile(Pi05Config.from_json({"action_horizon": 10, "action_dim": 32}))
    assert (openpi.convention, openpi.image.resize, openpi.missing_last) == ("openpi", "pad-pil", False)
    assert (openpi.state_keys, openpi.prompt_keys, openpi.action_norm) == (("state",), ("prompt",), "quantile")


def test_an_interrupted_change_of_domain_is_made_again(folders, monkeypatch) -> None:
    model = load("xvla", folders["xvla"])
    want = model.act(observation(model, domain_id=0), noise=noise_of(model)).actions
    decoder = type(model.weights.action_decoder)
    choose, calls = decoder.choose, []

    def interrupted(self, domain: int) -> None:
        calls.append(domain)
        if len(calls) == 2:
            raise KeyboardInterrupt
        choose(self, domain)

    monkeypatch.setattr(decoder, "choose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.act(observation(model, domain_id=1))
    assert np.array_equal(model.act(observation(model, domain_id=0), noise=noise_of(model)).actions, want)


def test_the_largest_horizon_is_laid_out_at_once(folders) -> None:
    """Tables for every delay of a constant schedule are not made to know how long they are."""
    model = KINDS["pi05"]
    config = Pi05Config.from_json({"type": "pi05", "chunk_size": 4096, "num_inference_steps": 1000})
    start = time.perf_counter()
    own = model.default_profile(config).replace(state_norm="identity", action_norm="identity")
    made = model.options_of(config, None, profile=own)
    assert made.time_rows == 1001
    assert time.perf_counter() - start < 5
    small = model.options_of(model.config_of(folders["pi05"]), folders["pi05"], schedule="const", profile=None)
    assert small.time_rows == max(len(small.schedule.at(d).values) for d in range(small.max_delay + 1))
