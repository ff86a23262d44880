"""The websocket server: openpi's protocol, streaming, errors, hostile frames, slow and many clients."""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket as plain
import threading
import time

import numpy as np
import pytest
from fakes import DIMS, HORIZON, FakePolicy
from test_protocol import malformed

from engine.errors import DeadlineError, InputError, ServerError
from engine.serve.client import PolicyClient
from engine.serve.server import PolicyServer
from engine.serve.wire import Limits, decode, encode

sync = pytest.importorskip("websockets.sync.client")
exceptions = pytest.importorskip("websockets.exceptions")
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def policy():
    return FakePolicy()


@pytest.fixture
def server(policy):
    with PolicyServer(policy, port=0, metadata={"name": "fake", "horizon": HORIZON}) as running:
        yield running


@pytest.fixture
def dial():
    """dial(server) -> (socket, metadata); closed after the test."""
    with contextlib.ExitStack() as open_:

        def connect(server, **options):
            socket = open_.enter_context(sync.connect(server.uri, compression=None, max_size=None, **options))
            return socket, decode(socket.recv(5))

        yield connect


def alive(server):
    with PolicyClient(server.uri) as client:
        return client.infer({"prompt": "x"})["actions"].shape == (HORIZON, DIMS)


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.005)


def test_plain_answers(dial, server):
    socket, metadata = dial(server)
    assert metadata == {"name": "fake", "horizon": HORIZON}
    for number in range(3):
        socket.send(encode({"prompt": "x", "delay": np.array(2), "action_prefix": np.zeros((2, DIMS))}))
        answer = decode(socket.recv(5))
        assert "type" not in answer and answer["actions"].shape == (HORIZON, DIMS) and answer["actions"][5, 0] == number
        assert answer["valid"].tolist() == [False] * 2 + [True] * (HORIZON - 2)
        assert answer["server_timing"]["infer_ms"] >= 0 and "infer_ms" in answer["policy_timing"]
        assert ("prev_total_ms" in answer["server_timing"]) == (number > 0)
    socket.close()


def test_streamed_answers(dial, server, policy):
    socket, _ = dial(server)
    socket.send(encode({"prompt": "x", "stream": True, "episode": "e1"}))
    frames = [decode(socket.recv(5))]
    while frames[-1]["type"] == "partial":
        frames.append(decode(socket.recv(5)))
    partial = frames[:-1]
    steps = [f["step"] for f in frames]
    assert steps == sorted(steps) and all(f["episode"] == "e1" for f in frames)
    assert all(len(f["actions"]) == len(f["indices"]) > 0 for f in partial), "no empty packets"
    got = np.concatenate([f["indices"] for f in partial] + [frames[-1]["new"]])
    assert got.tolist() == list(range(HORIZON)) and frames[-1]["valid"].all()
    assert "stream" not in policy.calls[0] and "episode" not in policy.calls[0]
    socket.close()


def test_early_stop_leaves_the_tail_invalid(server, policy):
    with PolicyClient(server.uri) as client:
        packets = list(client.stream({"prompt": "x"}, actions=3))
    assert np.concatenate([p.indices for p in packets]).tolist() == [0, 1, 2]
    assert packets[-1].chunk.valid.tolist() == [True] * 3 + [False] * (HORIZON - 3)
    assert policy.steps == len(packets) < 10


def test_server_side_streaming_modes(policy):
    with PolicyServer(policy, port=0, stream="always") as server, PolicyClient(server.uri) as client:
        client._socket.send(encode({"prompt": "x"}))
        assert decode(client._socket.recv(5))["type"] == "partial"
    with PolicyServer(policy, port=0, stream="always") as server, PolicyClient(server.uri) as client:
        for number in range(2, 4):  # whole answers, and none of the packets of the one before
            answer = client.infer({"prompt": "x"})
            assert answer["actions"].shape == (HORIZON, DIMS)
            assert (answer["actions"][:, 0] == number - 1).all()
    with PolicyServer(policy, port=0, stream="never") as server, PolicyClient(server.uri) as client:
        assert len(list(client.stream({"prompt": "x"}))) == 1


def get(server, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_healthz(server):
    assert get(server, "/healthz") == (200, b"OK\n")


def test_the_loop_stays_free_while_the_policy_works(dial):
    policy = FakePolicy(step_s=0.05)
    with PolicyServer(policy, port=0) as server, PolicyClient(server.uri) as client:
        stream = client.stream({"prompt": "x"})
        next(stream)
        begun = time.monotonic()
        assert get(server, "/healthz")[0] == 200
        other, _ = dial(server)
        assert time.monotonic() - begun < 0.25 and policy.inside == 1
        other.close()
        assert list(stream)[-1].final
    assert len(policy.threads) == 1 and threading.get_ident() not in policy.threads


@pytest.mark.parametrize(
    ("fail", "text"),
    [
        ("input", "InputError: no camera image"),
        ("late", "InternalError"),
        ("timeout", "InternalError"),
        ("no end", "InternalError"),
    ],
)
def test_errors_are_text_without_a_traceback(dial, server, fail, text, caplog):
    caplog.set_level(logging.CRITICAL, "engine.serve.server")
    socket, _ = dial(server)
    socket.send(encode({"prompt": "x", "fail": fail}))
    answer = socket.recv(5)
    assert isinstance(answer, str) and answer.startswith(text)
    assert "Traceback" not in answer and "secret" not in answer and ".py" not in answer
    with pytest.raises(exceptions.ConnectionClosed):
        socket.recv(5)
    assert socket.close_code == 1011
    with PolicyClient(server.uri) as client, pytest.raises(ServerError, match=text):
        client.infer({"prompt": "x", "fail": fail})
    assert alive(server)


def test_a_thousand_malformed_frames_leave_the_server_alive(dial, server, policy):
    for frame in malformed(1000):
        socket, _ = dial(server)
        socket.send(frame)
        answer = socket.recv(5)
        assert isinstance(answer, str) and answer.startswith("ProtocolError: "), answer
        socket.close()
    assert not policy.calls and alive(server)


def test_text_frames_are_refused(dial, server):
    socket, _ = dial(server)
    socket.send("hello")
    assert socket.recv(5).startswith("ProtocolError: a text frame")
    assert alive(server)


def test_large_frames_are_refused_before_they_are_read(dial, policy):
    with PolicyServer(policy, port=0, limits=Limits(size=10_000)) as server:
        socket, _ = dial(server)
        socket.send(b"\x00" * 20_000)
        with pytest.raises(exceptions.ConnectionClosed):
            socket.recv(5)
        assert socket.close_code == 1009 and alive(server)


def test_token(dial):
    with pytest.raises(InputError, match="token"):
        PolicyServer(FakePolicy(), host="0.0.0.0")
    with PolicyServer(FakePolicy(), port=0, token="s3cret") as server:
        for headers in (
            None,
            {"Authorization": "Api-Key wrong"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": "s3cret"},
        ):
            with pytest.raises(exceptions.InvalidStatus, match="401"):
                dial(server, additional_headers=headers)
        for kind in ("Api-Key", "Bearer"):
            dial(server, additional_headers={"Authorization": f"{kind} s3cret"})
        PolicyClient(server.uri, token="s3cret").close()
        with pytest.raises(ServerError, match="token"):
            PolicyClient(server.uri)
        assert get(server, "/healthz")[0] == 200


def test_browsers_are_refused(dial, server):
    with pytest.raises(exceptions.InvalidStatus, match="403"):
        dial(server, origin="http://evil.example")


@pytest.mark.parametrize(
    "bad",
    [
        {"port": -1},
        {"port": "x"},
        {"stream": "x"},
        {"connections": 0},
        {"token": "a\nb"},
        {"token": " a"},
        {"send_timeout": 0},
    ],
)
def test_bad_options(bad):
    with pytest.raises(InputError):
        PolicyServer(FakePolicy(), **bad)


def test_a_taken_port_is_a_clear_error(server):
    with pytest.raises(ServerError, match="choose another"):
        PolicyServer(FakePolicy(), port=server.port).start()
    with pytest.raises(ServerError, match="choose another"):
        PolicyServer(FakePolicy(), port=server.port).run()


def test_too_many_clients(dial, policy):
    with PolicyServer(policy, port=0, connections=2) as server:
        first, _ = dial(server)
        dial(server)
        with pytest.raises(exceptions.InvalidStatus, match="503"):
            dial(server)
        first.close()
        wait_for(lambda: server._open < 2)
        assert alive(server)


def test_clients_take_turns():
    """A client that always has a request waiting does not push another aside."""
    policy = FakePolicy(step_s=0.002)
    order, lock = [], threading.Lock()

    def robot(name, server):
        with PolicyClient(server.uri) as client:
            for _ in range(5):
                client.infer({"prompt": name})
                with lock:
                    order.append(name)

    with PolicyServer(policy, port=0) as server:
        robots = [threading.Thread(target=robot, args=(name, server)) for name in "abc"]
        for r in robots:
            r.start()
        for r in robots:
            r.join()
    served = [call["prompt"] for call in policy.calls]
    assert sorted(served) == sorted("abc" * 5) and len(order) == 15
    for i in range(3, 12):
        assert len(set(served[i : i + 3])) >= 2, served


def test_a_missed_deadline_leaves_the_connection():
    policy = FakePolicy(prefill_s=0.05)
    with PolicyServer(policy, port=0) as server, PolicyClient(server.uri) as client:
        for ask in (client.infer, lambda obs: list(client.stream(obs))):
            with pytest.raises(DeadlineError, match="no action in time"):
                ask({"prompt": "x", "deadline_ms": 20})
            assert client.infer({"prompt": "x", "deadline_ms": 1000})["actions"].shape == (HORIZON, DIMS)
        assert 0 < policy.deadlines[-1] < 1000  # what passed before the policy began counts


def test_waiting_for_another_client_counts():
    policy = FakePolicy(prefill_s=0.3)
    with PolicyServer(policy, port=0) as server, PolicyClient(server.uri) as slow, PolicyClient(server.uri) as other:
        first = threading.Thread(target=slow.infer, args=({"prompt": "x"},))
        first.start()
        wait_for(lambda: policy.inside)
        with pytest.raises(DeadlineError, match="for other clients"):
            other.infer({"prompt": "y", "deadline_ms": 50})
        first.join()
        assert [call["prompt"] for call in policy.calls] == ["x"]


def test_the_policy_is_closed_when_its_client_leaves():
    policy = FakePolicy(step_s=0.05)
    with PolicyServer(policy, port=0) as server:
        client = PolicyClient(server.uri)
        next(client.stream({"prompt": "x"}))
        client.close()
        wait_for(lambda: policy.closed == 1)
        assert policy.steps < 10 and alive(server)


def test_a_slow_client_does_not_hold_the_others(caplog):
    """A client that takes nothing is dropped; meanwhile others are served."""
    caplog.set_level(logging.CRITICAL, "engine.serve.server")
    policy = FakePolicy()
    with PolicyServer(policy, port=0, send_timeout=0.3, metadata={"fill": np.zeros(1_000_000)}) as server:
        slow = plain.create_connection(("127.0.0.1", server.port))
        slow.setsockopt(plain.SOL_SOCKET, plain.SO_RCVBUF, 4096)
        slow.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        wait_for(lambda: server._open == 1)
        assert alive(server)
        wait_for(lambda: server._open == 0)
        slow.close()


def test_close_in_the_middle_of_a_chunk():
    policy = FakePolicy(step_s=0.05)
    server = PolicyServer(policy, port=0).start()
    client = PolicyClient(server.uri)
    stream = client.stream({"prompt": "x"})
    next(stream)
    server.close()
    assert policy.closed == 1 and policy.steps < 10
    with pytest.raises(ServerError):
        list(stream)
    server.close()
