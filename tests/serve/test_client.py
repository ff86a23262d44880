"""Buffers of the control loop on a simulated clock, and the clients against a real server."""

from __future__ import annotations

import asyncio
import heapq
import logging
import threading
import time

import numpy as np
import pytest
from fakes import DIMS, HORIZON, FakePolicy

from engine.blocks.schedule import HorizonSchedule
from engine.errors import ClosedError, DeadlineError, InputError, ProtocolError, ServerError
from engine.serve.client import AsyncPolicyClient, ControlClient, PolicyClient
from engine.serve.control import ControlBuffers, DelayEstimate
from engine.serve.server import PolicyServer
from engine.serve.wire import encode

pytestmark = pytest.mark.timeout(60)


class Simulation:
    """A robot and a server on one simulated clock, in milliseconds. Action of chunk n, place i is (n, i)."""

    def __init__(self, buffers, horizon, first, step, period=1000 / 30, alpha=0.7):
        self.buffers, self.schedule = buffers, HorizonSchedule(horizon, alpha=alpha)
        self.first, self.step, self.period = first, step, period
        self.events: list = []  # (time, order, what)
        self.requests: list = []
        self.ticks: list = []
        self.spike: dict[int, float] = {}

    def ask(self, now):
        request = self.buffers.request()
        if request is None:
            return
        self.requests.append((now, request))
        table = self.schedule.at(request.delay)
        late = self.spike.get(len(self.requests) - 1, 0)
        for step, indices in table.packets(request.actions):
            at = now + late + self.first + (step - 1) * self.step
            heapq.heappush(self.events, (at, len(self.events), (request, indices)))
            done = at
        heapq.heappush(self.events, (done, len(self.events) + 1000, (request, None)))

    def run(self, ticks, start=0.0):
        self.ask(start)
        for n in range(1, ticks + 1):
            now = start + n * self.period
            while self.events and self.events[0][0] <= now:
                at, _, (request, indices) = heapq.heappop(self.events)
                if indices is None:
                    self.buffers.finish(request)
                else:
                    self.buffers.push(request, indices, [[request.number, i] for i in indices])
                self.ask(at)
            self.ticks.append(self.buffers.tick())
            self.ask(now)
        return self.ticks


def executed(ticks):
    return [(t.number, t.index) for t in ticks if not t.missed]


@pytest.mark.parametrize(
    ("first", "step", "execute", "delay", "horizon"),
    [
        (62.1, 7.5, 3, 1, 50),
        (62.1, 7.5, 4, 3, 50),
        (238.6, 14.0, 10, 8, 50),
        (44.8, 7.4, 2, 1, 30),
        (129.2, 29.0, 8, 4, 30),
    ],
)
def test_no_stall_at_the_published_latencies(first, step, execute, delay, horizon):
    b = ControlBuffers(execute, horizon, delay=delay)
    sim = Simulation(b, horizon, first, step)
    ticks = sim.run(200)
    head = next(i for i, t in enumerate(ticks) if not t.missed)
    assert not any(t.missed for t in ticks[head:]), "only the wait for the very first action"
    # Every chunk gives s actions, from the first that is not committed.
    expected = [(n, i + (delay if n else 0)) for n in range(100) for i in range(execute)]
    assert executed(ticks) == expected[: len(executed(ticks))]


def test_the_prefix_is_the_tail_of_what_is_executed():
    b = ControlBuffers(5, 50, delay=2)
    sim = Simulation(b, 50, 50, 5)
    sim.run(40)
    (_, one), (_, two), (_, three) = sim.requests[:3]
    assert one.prefix is None and one.delay == 0
    assert two.delay == 2 and two.prefix.tolist() == [[0, 3], [0, 4]] and two.prefix.dtype == np.float32
    # Chunk 1 begins with two committed actions, so its five are places 2 to 6.
    assert three.prefix.tolist() == [[1, 5], [1, 6]]


def test_a_request_waits_for_all_actions_and_for_its_time():
    b = ControlBuffers(4, 50, delay=2)
    first = b.request()
    assert first.number == 0 and b.request() is None
    b.push(first, [0, 1, 2], np.zeros((3, 2)))
    b.tick(), b.tick()
    assert b.request() is None, "action 3 is missing: there is no complete prefix"
    b.push(first, [3], np.ones((1, 2)))
    second = b.request()
    assert second.prefix.tolist() == [[0, 0], [1, 1]] and b.request() is None
    early = ControlBuffers(4, 50, delay=2)
    first = early.request()
    early.push(first, range(4), np.zeros((4, 2)))
    early.tick()
    assert early.request() is None, "three are left, two are committed"
    early.tick()
    assert early.request().delay == 2


def test_no_delay_asks_when_everything_is_executed():
    b = ControlBuffers(2, 8, delay=0)
    first = b.request()
    b.push(first, [0, 1], np.zeros((2, 1)))
    b.tick()
    assert b.request() is None
    b.tick()
    second = b.request()
    assert second.delay == 0 and second.prefix is None
    b.push(second, [0], np.full((1, 1), 7))
    assert b.tick().action.tolist() == [7]


def test_misses():
    for mode, expected in (("hold", [5.0]), ("none", None)):
        b = ControlBuffers(2, 8, delay=1, on_miss=mode)
        assert b.tick().action is None and b.misses == 1, "nothing to hold yet"
        b.push(b.request(), [0], [[5]])
        assert b.tick().action.tolist() == [5]
        late = b.tick()
        action = None if late.action is None else late.action.tolist()
        assert late.missed and (late.index, late.number) == (-1, -1) and action == expected and b.misses == 2
    b = ControlBuffers(2, 8, on_miss="raise")
    with pytest.raises(DeadlineError, match="has not arrived"):
        b.tick()


def test_a_late_action_is_executed_later_not_skipped():
    b = ControlBuffers(2, 8, delay=0)
    first = b.request()
    assert b.tick().missed
    b.push(first, [0, 1], [[1], [2]])
    assert [b.tick().action.tolist() for _ in range(2)] == [[1], [2]]


def test_stale_packets_are_dropped():
    b = ControlBuffers(2, 8, delay=1)
    old = b.request()
    b.reset()
    assert not b.push(old, [0], [[9]]) and b.stale == 1 and b.tick().missed
    new = b.request()
    assert new.episode == old.episode + 1 and new.number == 0 and new.prefix is None
    b.finish(old)  # no effect
    assert b.push(new, [0], [[1]]) and b.tick().action.tolist() == [1]


def test_what_arrived_first_is_executed():
    b = ControlBuffers(2, 8, delay=0)
    first = b.request()
    b.push(first, [0], [[1]])
    b.push(first, [0, 1, 2, 3], [[9], [2], [3], [4]])
    assert [b.tick().action.tolist() for _ in range(2)] == [[1], [2]]
    second = b.request()
    assert second is not None, "two of a chunk are executed, not four"
    with pytest.raises(InputError, match="2 indices"):
        b.push(second, [0, 1], [[1]])


def test_a_short_or_failed_answer_does_not_stall():
    b = ControlBuffers(4, 16, delay=1)
    first = b.request()
    b.push(first, [0, 1], [[1], [2]])
    b.finish(first)
    b.tick()
    second = b.request()
    assert second.prefix.tolist() == [[2]]
    b.finish(second)
    assert b.request().number == 2, "nothing came: ask again"
    b = ControlBuffers(4, 16)
    b.finish(b.request())
    again = b.request()
    assert again.number == 1 and again.prefix is None


def test_delay_estimate():
    e = DelayEstimate()
    assert e.value == 0
    e.add(40)
    assert e.value == 40, "better than nothing"
    e.add(3)
    assert e.value == 3, "the warm-up no longer counts"
    for ticks in (3, 2, 3, 3, 9, 3, 3):
        e.add(ticks)
    assert e.value == 3, "one spike is ignored"
    for _ in range(4):
        e.add(5)
    assert e.value == 5, "a change is not"
    assert DelayEstimate(margin=1).value == 1


def test_measured_delay_converges_and_stops_missing():
    b = ControlBuffers(8, 50, max_delay=6)
    sim = Simulation(b, 50, 80, 8)
    sim.spike = {0: 3000.0, 12: 200.0}
    ticks = sim.run(300)
    delays = [request.delay for _, request in sim.requests]
    assert delays[0] == 0 and delays[1] == 6, "bounded, whatever the warm-up took"
    assert set(delays[4:]) == {2}, "80 ms are two periods of 33.3 ms"
    late = [i for i, t in enumerate(ticks) if t.missed]
    spike = sim.requests[12][0] / sim.period
    assert all(i < 120 or spike < i < spike + 12 for i in late), late


@pytest.mark.parametrize(
    "bad",
    [
        {"execute": 0}, {"execute": 51}, {"delay": 11}, {"delay": -1}, {"delay": 5}, {"delay": 1.0}, {"on_miss": "x"},
        {"horizon": 0}, {"max_delay": -1}, {"execute": True}, {"execute": 48, "delay": 3},
    ],
)  # fmt: skip
def test_bad_buffers(bad):
    with pytest.raises(InputError):
        ControlBuffers(**{"execute": 4, "horizon": 50, **bad})


def test_delay_never_leaves_the_horizon():
    b = ControlBuffers(12, 16, max_delay=10)
    for _ in range(5):
        b._estimate.add(9)
    assert b.delay == 4


# ---- against a server


@pytest.fixture
def server():
    pytest.importorskip("websockets")
    with PolicyServer(FakePolicy(step_s=0.002), port=0, metadata={"horizon": HORIZON}) as running:
        yield running


def test_infer_and_stream(server):
    with PolicyClient(server.uri) as client:
        assert client.metadata == {"horizon": HORIZON}
        assert client.infer({"prompt": "x"})["actions"].shape == (HORIZON, DIMS)
        packets = list(client.stream({"prompt": "x", "episode": 3}, actions=6))
        assert [p.final for p in packets] == [False] * (len(packets) - 1) + [True]
        assert np.concatenate([p.indices for p in packets]).tolist() == list(range(6))


def test_leaving_a_stream_closes_the_connection(server):
    with PolicyClient(server.uri) as client:
        stream = client.stream({"prompt": "x"})
        next(stream)
        stream.close()
        with pytest.raises(ServerError):
            client.infer({"prompt": "x"})


def test_async_client(server):
    async def use():
        async with AsyncPolicyClient(server.uri) as one, AsyncPolicyClient(server.uri) as two:
            plain, packets = await asyncio.gather(
                one.infer({"prompt": "x"}),
                collect(two.stream({"prompt": "x", "delay": 2, "action_prefix": np.zeros((2, DIMS))})),
            )
            assert plain["valid"].all()
            assert packets[-1].chunk.valid.tolist() == [False] * 2 + [True] * (HORIZON - 2)
            with pytest.raises(ServerError, match="no camera"):
                await one.infer({"fail": "input"})

    async def collect(stream):
        return [packet async for packet in stream]

    logging.getLogger("engine.serve.server").setLevel(logging.CRITICAL)
    asyncio.run(use())


def test_nobody_there():
    pytest.importorskip("websockets")
    with pytest.raises(ServerError, match="is the server running"):
        PolicyClient("ws://127.0.0.1:9", timeout=2)
    with pytest.raises(ServerError):
        PolicyClient("http://127.0.0.1:9")


def test_a_server_that_answers_nonsense():
    server_module = pytest.importorskip("websockets.sync.server")
    answers = [encode({"hello": 1}), b"\xc1", encode([1]), encode({"actions": 3})]

    def handler(socket):
        socket.send(encode({}))
        for frame in answers:
            socket.recv()
            socket.send(frame)
        socket.recv()
        time.sleep(0.5)

    with server_module.serve(handler, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with PolicyClient(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", timeout=0.2) as client:
            for _ in answers:
                with pytest.raises(ProtocolError):
                    client.infer({"prompt": "x"})
            with pytest.raises(ServerError, match="in time"):
                client.infer({"prompt": "x"})
            with pytest.raises(ServerError):
                client.infer({"prompt": "x"})  # closed: a late answer must not answer this one
        server.shutdown()


def test_control_client(server):
    with (
        PolicyClient(server.uri) as client,
        ControlClient(client, lambda: {"prompt": "x"}, execute=6, horizon=HORIZON, delay=3) as robot,
    ):
        done = []
        while len(done) < 40:
            tick = robot.tick()
            if not tick.missed:
                done.append((tick.number, tick.index, *tick.action))
            time.sleep(0.01)
        # Chunk n, place i is (n, i, delay): what is executed is what the server sent for it.
        assert [(n, i) for n, i, *_ in done] == [(n, i + 3 * (n > 0)) for n in range(7) for i in range(6)][:40]
        assert all((a, b, d) == (n, i, 3 * (n > 0)) for n, i, a, b, d in done)
        robot.reset()
        while (tick := robot.tick()).missed:
            time.sleep(0.005)
        assert tick.index == 0 and tick.number == 0
    calls = server.policy.calls
    assert "action_prefix" not in calls[0] and calls[1]["action_prefix"].tolist() == [[0, i, 0] for i in (3, 4, 5)]
    with pytest.raises(ClosedError):
        robot.tick()


def test_errors_reach_the_control_loop(server):
    logging.getLogger("engine.serve.server").setLevel(logging.CRITICAL)
    for observe, text in ((lambda: {"fail": "input"}, "no camera"), (lambda: 1 / 0, "ZeroDivision")):
        with (
            PolicyClient(server.uri) as client,
            ControlClient(client, observe, execute=6, horizon=HORIZON, delay=3) as robot,
            pytest.raises(ServerError, match=text),
        ):
            for _ in range(500):
                robot.tick()
                time.sleep(0.005)
