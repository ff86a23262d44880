"""Horizon-aware schedules: golden tables, properties, packets, and the reference samplers on toy networks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks.schedule import HorizonSchedule, euler, implied, renoise, warn_untrained
from engine.errors import InputError, ScheduleWarning

GOLDEN = json.loads((Path(__file__).parents[1] / "data/faster/has_schedules.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_tables(name):
    g = GOLDEN[name]
    d = g["delay"]
    schedule = HorizonSchedule(g["H"], g["N"], g["alpha"], g["u0"])
    table = schedule.at(d)
    assert table.tau.dtype == table.delta.dtype == np.float32
    assert np.abs(table.tau - np.array(g["tau"])).max() < 1e-7
    assert np.abs(table.hit - np.array(g["u"])).max() < 1e-15
    # The golden files count committed actions as ready after step 1; here they never leave.
    assert table.ready_step[d:].tolist() == g["ready_step_thr001"][d:]
    assert schedule.replace(ready_threshold=0).at(d).ready_step[d:].tolist() == g["ready_step_exact"][d:]
    assert not table.ready_step[:d].any()


@pytest.mark.parametrize(
    ("h", "n", "alpha", "u0", "d", "new"),
    [
        (50, 10, 0.6, 0.9, 0, "1 1 3 4 4 6 7 7 9 8"),
        (50, 10, 0.6, 0.9, 3, "1 1 2 4 5 5 6 7 8 8"),
        (50, 10, 0.6, 0.9, 4, "1 1 2 4 4 6 6 7 7 8"),
        (50, 10, 0.6, 0.9, 8, "1 1 2 3 4 5 6 6 7 7"),
        (50, 10, 0.6, 0.9, 10, "1 1 2 3 4 4 6 6 6 7"),
        (30, 10, 0.6, 0.9, 0, "1 0 2 2 3 4 4 4 5 5"),
        (30, 10, 0.7, 0.9, 0, "1 1 2 3 3 3 4 4 4 5"),
        (30, 10, 0.6, 0.9, 3, "1 0 2 2 2 3 4 4 4 5"),
        (10, 10, 0.6, 0.9, 0, "1 0 0 1 1 1 1 2 1 2"),
        (50, 5, 0.6, 0.8, 0, "1 5 10 16 18"),
    ],
)
def test_newly_ready_per_step(h, n, alpha, u0, d, new):
    table = HorizonSchedule(h, n, alpha, u0).at(d)
    assert [len(table.emitted(j)) for j in range(1, n + 1)] == [int(x) for x in new.split()]
    assert np.concatenate([table.emitted(j) for j in range(1, n + 1)]).tolist() == list(range(d, h))


def test_early_stop_steps():
    at = HorizonSchedule(50).at
    assert (at(3).steps_for(4), at(0).steps_for(1), at(4).steps_for(10), at(0).steps_for()) == (3, 1, 5, 10)


def test_last_packet_is_cut():
    table = HorizonSchedule(50).at(3)
    packets = list(table.packets(5))
    assert [(step, x.tolist()) for step, x in packets] == [(1, [3]), (2, [4]), (3, [5, 6]), (4, [7])]
    # Steps that emit nothing give no packet.
    assert [step for step, _ in HorizonSchedule(10).at(0).packets()] == [1, 4, 5, 6, 7, 8, 9, 10]


def test_row_sums():
    sums = HorizonSchedule(50).at(0).tau.sum(axis=1, dtype=np.float64)
    assert sums == pytest.approx(
        [50, 40.383952, 31.836729, 24.165556, 17.614970, 12.149008, 7.737846, 4.346886, 1.948562, 0.508732, 0], abs=2e-6
    )


@given(
    h=st.integers(1, 64),
    n=st.integers(1, 20),
    alpha=st.floats(0, 1),
    u0=st.floats(0, 0.99),
    d=st.integers(0, 63),
    threshold=st.sampled_from([0, 0.01]),
)
@settings(max_examples=150, deadline=None)
def test_properties(h, n, alpha, u0, d, threshold):
    d = min(d, h - 1)
    t = HorizonSchedule(h, n, alpha, u0, threshold).at(d)
    assert (t.tau[0, d:] == 1).all() and (t.tau[n] == 0).all() and (t.tau[:, :d] == 0).all()
    assert (t.delta <= 0).all() and np.abs(-t.delta.sum(0)[d:] - 1).max() < 1e-6 and not t.delta[:, :d].any()
    assert (np.diff(t.tau[:, d:], axis=1) >= 0).all(), "later actions are never ahead"
    assert (np.diff(t.ready_step) >= 0).all(), "they leave in the order of their indices"
    if threshold == 0:
        steps = n * (1 - t.hit[d:])
        near = np.abs(steps - np.round(steps)) < 1e-4
        assert (near | (t.ready_step[d:] == np.ceil(steps))).all()
    assert (t.values[t.rows] == t.tau[:n]).all() and len(np.unique(t.values)) == len(t.values)
    assert t.steps_for() == t.ready_step[-1] <= n


def test_first_action_takes_one_step_at_every_alpha():
    for alpha in (0.1, 0.4, 0.6, 1.0):
        assert HorizonSchedule(50, 10, alpha, 0.9).at(4).ready_step[4] == 1


def test_smaller_alpha_refines_the_middle_longer():
    early, late = (HorizonSchedule(50, 10, alpha).at(0) for alpha in (0.9, 0.4))
    assert (late.hit[1:-1] < early.hit[1:-1]).all() and (late.tau >= early.tau).all()


@pytest.mark.parametrize(
    "constant", [HorizonSchedule.constant(50), HorizonSchedule(50, u0=0), HorizonSchedule(50, alpha=0)]
)
def test_constant_is_a_special_case(constant):
    t = constant.at(4)
    assert constant.is_constant
    assert (t.tau[:, 4:] == np.linspace(1, 0, 11, dtype=np.float32)[:, None]).all()
    assert t.ready_step[4:].tolist() == [10] * 46 and len(t.values) == 11  # ten times, and 0 for what is committed


def test_last_delay_leaves_one_action():
    t = HorizonSchedule(50).at(49)
    assert t.valid == t.steps_for() == 1 and t.emitted(1).tolist() == [49]


def test_distinct_times():
    at = HorizonSchedule(50).at
    # One row for the committed actions is shared with those that are finished.
    assert [len(at(d).values) for d in (0, 3, 4)] == [306, 287, 282]


def test_tables_are_kept_and_cannot_be_changed():
    s = HorizonSchedule(50)
    assert s.at(4) is HorizonSchedule(50).at(4)
    for array in (s.at(4).tau, s.at(4).delta, s.at(4).rows, s.at(4).values, s.at(4).ready_step):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize(
    "bad",
    [
        {"u0": 1.0}, {"u0": -0.1}, {"u0": float("nan")}, {"u0": "0.9"}, {"alpha": 1.1}, {"alpha": True}, {"horizon": 0},
        {"horizon": 50.0}, {"horizon": 5000}, {"steps": 0}, {"steps": 2000}, {"ready_threshold": 1}, {"steps": True},
    ],
)  # fmt: skip
def test_bad_schedules(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        HorizonSchedule(**{"horizon": 50, **bad})


@pytest.mark.parametrize("delay", [50, 51, -1, 1.5, True, None])
def test_bad_delays(delay):
    with pytest.raises(InputError, match="delay"):
        HorizonSchedule(50).at(delay)


@pytest.mark.parametrize("count", [0, 48, -1, 2.0])
def test_bad_counts(count):
    with pytest.raises(InputError, match="47"):
        HorizonSchedule(50).at(3).steps_for(count)


def velocity(x, tau):
    i = np.arange(len(x))[:, None]
    return 2 * x - i + 3 * tau[:, None].astype(x.dtype) + 0.1 * x.mean()


def clean(x, tau):
    i = np.arange(len(x))[:, None]
    return 0.5 * x + 0.1 * i - 0.2 * tau[:, None].astype(x.dtype) + 0.05 * x.mean()


TOY = HorizonSchedule(5, 4, 0.5, 0.75)


@pytest.mark.parametrize(
    ("schedule", "prefix", "expected"),
    [
        (TOY, [], [-4.1, -0.158553, 0.370955, 0.874033, 1.348678]),
        (HorizonSchedule.constant(5, 4), [], [-0.555613, -0.086863, 0.381887, 0.850637, 1.319387]),
        (
            HorizonSchedule(8, 10, 0.6, 0.9),
            [0.25, -0.5],
            [0.25, -0.5, -2.071875, 0.858837, 1.340531, 1.799228, 2.248446, 2.693866],
        ),
    ],
)
def test_euler_on_a_toy(schedule, prefix, expected):
    prefix = np.array(prefix).reshape(-1, 1)
    trace = euler(velocity, np.ones((schedule.horizon, 1)), schedule.at(len(prefix)), prefix)
    assert trace[-1, :, 0] == pytest.approx(expected, abs=3e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (TOY, [-0.7, -0.081554, 0.271810, 0.495033, 0.755667]),
        (HorizonSchedule.constant(5, 4), [-0.358938, -0.081008, 0.196922, 0.474852, 0.752781]),
    ],
)
def test_renoise_on_a_toy(schedule, expected):
    trace = renoise(clean, np.linspace(-1, 1, 5)[:, None], schedule.at())
    assert trace[-1, :, 0] == pytest.approx(expected, abs=2e-6)


def test_renoise_freezes_what_is_finished_and_what_is_committed():
    table, prefix = HorizonSchedule(8).at(2), np.array([[0.25], [-0.5]])
    trace = renoise(clean, np.linspace(-1, 1, 8)[:, None], table, prefix)
    assert (trace[:, :2] == prefix).all()
    assert (trace[1:, 2] == trace[0, 2]).all()


def test_implied_is_renoise_with_another_path():
    """Equal where actions end in one step, and where the prediction does not depend on the sample; else not."""
    table, prefix = HorizonSchedule(8).at(2), np.array([[0.25], [-0.5]])
    noise = np.linspace(-1, 1, 8)[:, None]
    other, trace = renoise(clean, noise, table, prefix), implied(clean, noise, table, prefix)
    assert (trace[:, :2] == prefix).all() and (trace[1:, 2] == trace[0, 2]).all()
    assert trace[0, 2] == pytest.approx(other[0, 2], abs=1e-7)
    assert np.abs(trace[-1] - other[-1]).max() > 1e-3
    still = np.arange(8.0)[:, None]
    fixed = [s(lambda x, tau: still, noise, table, prefix)[-1] for s in (renoise, implied)]
    assert fixed[0] == pytest.approx(fixed[1], abs=1e-12)


def test_samplers_check_their_arrays():
    table = HorizonSchedule(8).at(2)
    with pytest.raises(InputError, match=r"\[2, 1\]"):
        euler(velocity, np.ones((8, 1)), table)
    with pytest.raises(InputError, match=r"floats \[8, A\]"):
        renoise(clean, np.ones((7, 1)), table, np.ones((2, 1)))


def test_warns_of_a_schedule_that_was_not_trained():
    asked = HorizonSchedule(50)
    with pytest.warns(ScheduleWarning, match="nothing says"):
        assert warn_untrained(asked, None)
    with pytest.warns(ScheduleWarning, match=r"alpha 0\.7"):
        assert warn_untrained(asked, HorizonSchedule(50, alpha=0.7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not warn_untrained(asked, HorizonSchedule(50, steps=5))
        assert not warn_untrained(HorizonSchedule.constant(50), None)
