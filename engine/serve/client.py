"""Clients of a policy server: one request at a time (blocking or asyncio), and a streaming control client.

>>> with PolicyClient("ws://127.0.0.1:8000") as policy:
...     policy.infer(obs)["actions"]
...     for packet in policy.stream(obs): ...
>>> with ControlClient(policy, execute=10, horizon=50, observe=camera_and_state) as robot:
...     robot.tick()          # every control period
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Self

from engine.blocks.packets import ActionPacket
from engine.errors import ClosedError, DeadlineError, EngineError, InputError, ServerError
from engine.serve.control import ChunkRequest, ControlBuffers, Tick
from engine.serve.protocol import EARLY_STOP, EPISODE, STREAM, ReplyReader, read_map
from engine.serve.wire import LIMITS, Limits, encode

log = logging.getLogger(__name__)


class PolicyClient:
    """Blocking client of one connection; one caller at a time.

    Args:
        uri: ws://host:port, or wss://.
        token: sent as `Authorization: Api-Key <token>`.
        timeout: seconds to wait for the connection and for each frame.
        limits: of the server's frames.

    Raises:
        ServerError: no connection, or the server refuses it.

    Attributes:
        metadata: the server's first frame.
    """

    def __init__(self, uri: str, *, token: str | None = None, timeout: float = 60.0, limits: Limits = LIMITS):
        sync = _websockets("websockets.sync.client")
        self._timeout, self._limits = timeout, limits
        options = _options(token, timeout, limits)
        with contextlib.ExitStack() as opened, _translated(uri):
            self._socket = opened.enter_context(sync.connect(uri, **options))
            self.metadata: Mapping[str, Any] = read_map(self._socket.recv(timeout), limits)
            self._opened = opened.pop_all()

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        """The plain answer: `actions` [H, A], `valid` [H], timings.

        Raises:
            DeadlineError: `deadline_ms` of the observation is missed; the connection stays.
            ServerError: the server reports an error or does not answer in time; the connection is closed.
            ProtocolError: the answer is malformed.
        """
        reader, whole = ReplyReader(_delay(obs), self._limits), False
        try:
            with _translated("the server"):
                self._socket.send(encode({**obs, STREAM: False}))
            while True:
                with _translated("the server"):
                    frame = self._socket.recv(self._timeout)
                # Servers that always stream send packets in front of the answer.
                whole = True
                fields = read_map(frame, self._limits)
                whole = fields.get("type") != "partial"
                if reader.check(fields).packet.final:
                    return fields
        finally:
            if not whole:  # what comes late must not answer the next request
                self.close()

    def stream(self, obs: Mapping[str, Any], *, actions: int | None = None) -> Iterator[ActionPacket]:
        """Packets as they arrive, the last one with the whole chunk; `actions`: stop after that many valid ones.

        Leaving the iterator early closes the connection: packets of an old request must not answer a new one.
        Errors as in `infer`.
        """
        reader = ReplyReader(_delay(obs), self._limits)
        done = False
        try:
            with _translated("the server"):
                self._socket.send(encode(_streamed(obs, actions)))
            while not done:
                with _translated("the server"):
                    reply = reader.read(self._socket.recv(self._timeout))
                if reply.episode not in (None, obs.get(EPISODE)):
                    continue  # of an earlier request; servers without episodes send none
                done = reply.packet.final
                yield reply.packet
        except DeadlineError:
            done = True  # the server has said all it will
            raise
        finally:
            if not done:
                self.close()

    def close(self) -> None:
        """Close the connection; a blocked call on another thread ends with ServerError."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncPolicyClient:
    """The same for asyncio: `async with AsyncPolicyClient(uri) as policy: await policy.infer(obs)`.

    Arguments and errors as in `PolicyClient`.
    """

    def __init__(self, uri: str, *, token: str | None = None, timeout: float = 60.0, limits: Limits = LIMITS):
        self._module = _websockets("websockets.asyncio.client")
        self._uri, self._token, self._timeout, self._limits = uri, token, timeout, limits
        self._socket: Any = None
        self.metadata: Mapping[str, Any] = {}

    async def __aenter__(self) -> Self:
        options = _options(self._token, self._timeout, self._limits)
        async with contextlib.AsyncExitStack() as opened:
            with _translated(self._uri):
                self._socket = await opened.enter_async_context(self._module.connect(self._uri, **options))
                self.metadata = read_map(await self._receive(), self._limits)
            self._opened = opened.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._opened.aclose()

    async def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        """The plain answer; see `PolicyClient.infer`."""
        reader, whole = ReplyReader(_delay(obs), self._limits), False
        try:
            with _translated("the server"):
                await self._socket.send(encode({**obs, STREAM: False}))
            while True:
                with _translated("the server"):
                    frame = await self._receive()
                # Servers that always stream send packets in front of the answer.
                whole = True
                fields = read_map(frame, self._limits)
                whole = fields.get("type") != "partial"
                if reader.check(fields).packet.final:
                    return fields
        finally:
            if not whole:  # what comes late must not answer the next request
                await self._socket.close()

    async def stream(self, obs: Mapping[str, Any], *, actions: int | None = None) -> AsyncIterator[ActionPacket]:
        """Packets as they arrive; see `PolicyClient.stream`."""
        reader = ReplyReader(_delay(obs), self._limits)
        done = False
        try:
            with _translated("the server"):
                await self._socket.send(encode(_streamed(obs, actions)))
            while not done:
                with _translated("the server"):
                    reply = reader.read(await self._receive())
                if reply.episode not in (None, obs.get(EPISODE)):
                    continue  # of an earlier request; servers without episodes send none
                done = reply.packet.final
                yield reply.packet
        except DeadlineError:
            done = True  # the server has said all it will
            raise
        finally:
            if not done:
                await self._socket.close()

    async def _receive(self) -> Any:
        return await asyncio.wait_for(self._socket.recv(), self._timeout)


class ControlClient:
    """Streams chunks into the buffers of a control loop: one thread infers, the caller ticks.

    The connection belongs to this object while it runs. An error of the server or of `observe` is raised by the next
    `tick`; after that nothing is requested any more.

    Args:
        client: connected; not closed by this object.
        observe: called on the inference thread for every request; its observation without delay and prefix.
        buffers: ready-made; or `execute`, `horizon` and the options of `ControlBuffers`.
    """

    def __init__(
        self,
        client: PolicyClient,
        observe: Callable[[], Mapping[str, Any]],
        buffers: ControlBuffers | None = None,
        **options: Any,
    ):
        if (buffers is None) != bool(options):
            raise InputError("pass either buffers or the options of ControlBuffers (execute, horizon, ...)")
        self.buffers = buffers if buffers is not None else ControlBuffers(**options)
        self._client, self._observe = client, observe
        self._changed = threading.Condition()
        self._fault: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="policy-client", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tick(self) -> Tick:
        """The action of this control period; never blocks on the network.

        Raises:
            DeadlineError: a miss with on_miss='raise'.
            EngineError: what stopped the inference thread.
        """
        with self._changed:
            if self._closed:
                raise ClosedError("this control client is closed; make another")
            if self._fault is not None:
                raise self._fault
            try:
                return self.buffers.tick()
            finally:
                self._changed.notify_all()

    def reset(self) -> None:
        """Begin a new episode; packets on their way are dropped when they arrive."""
        with self._changed:
            self.buffers.reset()
            self._changed.notify_all()

    def close(self) -> None:
        """End the inference thread; a request in work is read to its end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        try:
            while (request := self._await_request()) is not None:
                self._serve(request)
        except BaseException as fault:
            with self._changed:
                self._fault = fault if isinstance(fault, EngineError) else ServerError(f"inference stopped: {fault!r}")
            log.warning("the control client stopped: %r", fault)

    def _await_request(self) -> ChunkRequest | None:
        with self._changed:
            while not self._closed:
                request = self.buffers.request()
                if request is not None:
                    return request
                self._changed.wait()
        return None

    def _serve(self, request: ChunkRequest) -> None:
        obs = dict(self._observe())
        obs[EPISODE] = request.episode
        if request.prefix is not None:
            obs |= {"delay": request.delay, "action_prefix": request.prefix}
        with contextlib.suppress(DeadlineError):  # nothing came: the loop misses, and asks anew
            for packet in self._client.stream(obs, actions=request.actions):
                with self._changed:
                    self.buffers.push(request, packet.indices, packet.actions)
        with self._changed:
            self.buffers.finish(request)


def _streamed(obs: Mapping[str, Any], actions: int | None) -> dict[str, Any]:
    return {**obs, STREAM: True} | ({} if actions is None else {EARLY_STOP: actions})


def _delay(obs: Mapping[str, Any]) -> int:
    return int(obs.get("delay") or 0)


def _options(token: str | None, timeout: float, limits: Limits) -> dict[str, Any]:
    headers = None if token is None else {"Authorization": f"Api-Key {token}"}
    return {
        "additional_headers": headers,
        "compression": None,
        "max_size": limits.size,
        "open_timeout": timeout,
    }


@contextlib.contextmanager
def _translated(where: str) -> Iterator[None]:
    """Errors of the network as `ServerError`."""
    from websockets.exceptions import WebSocketException

    try:
        yield
    except TimeoutError as fault:
        raise ServerError(f"{where} did not answer in time; raise timeout=") from fault
    except (OSError, WebSocketException) as fault:
        raise ServerError(f"{where}: {fault}; is the server running, and the token right?") from fault


def _websockets(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as fault:
        raise InputError("a policy client needs the package websockets: pip install 'quintet-engine[serve]'") from fault
