"""Websocket server of a robot policy: the event loop stays free, the policy runs in one thread of its own.

>>> with PolicyServer(policy) as server:       # in the background
...     print(server.uri)
>>> PolicyServer(policy, port=8000).run()      # until Ctrl-C
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any, Protocol

from engine.blocks.packets import ActionPacket
from engine.errors import DeadlineError, EngineError, InputError, ProtocolError, ServerError
from engine.serve.protocol import Request, late_text, partial_frame, read_request, result_frame
from engine.serve.wire import Limits, encode

log = logging.getLogger(__name__)
STREAMS = {"ask": None, "always": True, "never": False}


class Policy(Protocol):
    """What the server serves."""

    def act_stream(
        self, obs: Mapping[str, Any], *, actions: int | None = None, deadline_ms: float | None = None
    ) -> Iterator[ActionPacket]:
        """Packets of one observation, the last one with its chunk; `actions`: stop after that many valid ones.

        `deadline_ms`: `DeadlineError` where the first action would leave later than this. An option that no client uses
        is not passed.

        Called in the server's one worker thread, never twice at once. The iterator is closed between two packets when
        the client has gone. An `EngineError` is reported to the client by its message, anything else without details.
        """
        ...


class _SlowClientError(Exception):
    """A client took nothing for too long."""


class PolicyServer:
    """Serves one policy to several robots in turn.

    Each connection has at most one request in work; requests wait in the order in which they came, so no client can
    push another aside. GET /healthz answers 200. Pages of a web browser (requests with an Origin) are refused.

    Args:
        policy: see `Policy`.
        host: interface; anything but this machine needs a token.
        port: 0 takes a free one.
        token: clients must send `Authorization: Api-Key <token>` or `Bearer <token>`.
        metadata: first frame of every connection.
        stream: 'ask' (by the observation's `stream`), 'always' (FASTER's own clients) or 'never' (openpi's server).
        limits: of the clients' frames.
        connections: most clients at once; more are answered 503.
        send_timeout: seconds after which a client that takes nothing is dropped.

    Raises:
        InputError: an option out of range, no token for a public interface, or the package websockets is missing.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        stream: str = "ask",
        limits: Limits | None = None,
        connections: int = 16,
        send_timeout: float = 10.0,
    ):
        check_options(host, port, token, stream)
        if type(connections) is not int or connections < 1 or not send_timeout > 0:
            raise InputError("connections must be at least 1, and send_timeout above 0")
        self.policy, self.host, self.port = policy, host, port
        self._token, self._stream = token, STREAMS[stream]
        self._limits, self._send_timeout, self._connections = limits or Limits(), send_timeout, connections
        self._metadata = encode(dict(metadata or {}))
        self._listen, self._disconnected = _websockets()
        self._open = 0
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    @property
    def uri(self) -> str:
        """Address for clients; after the start with the real port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ws://{host}:{self.port}"

    def run(self) -> None:
        """Serve until interrupted.

        Raises:
            ServerError: the address is taken or cannot be used.
        """
        try:
            with contextlib.suppress(KeyboardInterrupt):
                asyncio.run(self.serve())
        except OSError as fault:
            raise self._unusable(fault) from fault

    async def serve(self, ready: threading.Event | None = None) -> None:
        """Serve until cancelled or closed; `ready` is set when clients can connect."""
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        worker = ThreadPoolExecutor(1, "policy")
        try:
            async with self._listen(
                lambda connection: self._connection(connection, worker),
                self.host,
                self.port,
                process_request=self._admit,
                origins=[None],
                compression=None,
                max_size=self._limits.size,
                max_queue=2,
                server_header=None,
            ) as server:
                self.port = server.sockets[0].getsockname()[1]
                log.info("serving a policy on %s", self.uri)
                if ready is not None:
                    ready.set()
                await self._stop.wait()
        finally:
            # The policy may be in the middle of a chunk; the loop must not end before its thread has.
            await asyncio.to_thread(worker.shutdown, True, cancel_futures=True)

    def start(self) -> PolicyServer:
        """Serve in a background thread; returns when clients can connect.

        Raises:
            ServerError: the address is taken or cannot be used.
        """
        ready, failed = threading.Event(), []

        def work() -> None:
            try:
                asyncio.run(self.serve(ready))
            except BaseException as fault:
                failed.append(fault)
            finally:
                ready.set()

        self._thread = threading.Thread(target=work, name="policy-server", daemon=True)
        self._thread.start()
        ready.wait()
        if failed:
            self._thread.join()
            raise self._unusable(failed[0]) from failed[0]
        return self

    def _unusable(self, fault: BaseException) -> ServerError:
        return ServerError(f"cannot serve on {self.uri}: {fault}; choose another host or port")

    def close(self) -> None:
        """End the background thread; connections are closed, work in progress ends at its next packet."""
        thread, self._thread = self._thread, None
        if thread is not None and self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
            thread.join()

    def __enter__(self) -> PolicyServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- one connection

    def _admit(self, connection: Any, request: Any) -> Any:
        """None, or the HTTP answer that replaces the websocket."""
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if self._token is not None:
            sent = request.headers.get_all("Authorization")
            kind, _, secret = sent[0].partition(" ") if len(sent) == 1 else ("", "", "")
            known = hmac.compare_digest(secret.strip().encode(errors="surrogateescape"), self._token.encode())
            if kind.lower() not in ("api-key", "bearer") or not known:
                return connection.respond(HTTPStatus.UNAUTHORIZED, "send Authorization: Api-Key <token>\n")
        if self._open >= self._connections:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{self._connections} clients are connected\n")
        return None

    async def _connection(self, connection: Any, worker: ThreadPoolExecutor) -> None:
        if self._open >= self._connections:  # admitted together with others
            await connection.close(1013, "too many clients")
            return
        self._open += 1
        previous: float | None = None
        try:
            await self._send(connection, self._metadata)
            async for frame in connection:
                begun = time.perf_counter()
                request = read_request(frame, stream=self._stream, limits=self._limits)
                await self._answer(connection, worker, request, begun, previous)
                previous = 1e3 * (time.perf_counter() - begun)
        except self._disconnected:
            pass
        except _SlowClientError:
            log.warning("a client took nothing for %g s and was dropped", self._send_timeout)
            connection.transport.abort()
        except Exception as fault:
            await self._fail(connection, fault)
        finally:
            self._open -= 1

    async def _answer(
        self, connection: Any, worker: ThreadPoolExecutor, request: Request, begun: float, previous: float | None
    ) -> None:
        """Run the policy in its thread and send what it yields as it comes."""
        loop = asyncio.get_running_loop()
        # A chunk has a bounded number of packets, so this never grows with a slow client.
        packets: asyncio.Queue[tuple[ActionPacket | None, BaseException | None, float]] = asyncio.Queue()
        gone = threading.Event()

        def put(packet: ActionPacket | None, fault: BaseException | None = None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                loop.call_soon_threadsafe(packets.put_nowait, (packet, fault, time.perf_counter()))

        work = loop.run_in_executor(worker, _run, self.policy, request, put, gone, begun)
        closed = asyncio.ensure_future(connection.wait_closed())

        def leave(_: object) -> None:
            gone.set()
            packets.put_nowait((None, None, 0.0))

        closed.add_done_callback(leave)
        try:
            while True:
                packet, fault, made = await packets.get()
                if isinstance(fault, DeadlineError):
                    log.warning("late: %s", fault)
                    await self._send(connection, late_text(fault))
                    return
                if fault is not None:
                    raise fault
                if packet is None:
                    return
                if packet.final:
                    timing = {"infer_ms": 1e3 * (made - begun)}
                    if previous is not None:
                        timing["prev_total_ms"] = previous
                    await self._send(connection, result_frame(packet, timing, request.episode, stream=request.stream))
                    return
                if request.stream and len(packet.indices):
                    await self._send(connection, partial_frame(packet, request.episode))
        finally:
            gone.set()
            closed.cancel()
            # The next request of this client must not overtake the end of this one.
            await asyncio.wait([work])

    async def _send(self, connection: Any, frame: bytes | str) -> None:
        try:
            await asyncio.wait_for(connection.send(frame), self._send_timeout)
        except TimeoutError as fault:  # of its own type: a policy may raise TimeoutError too
            raise _SlowClientError from fault

    async def _fail(self, connection: Any, fault: Exception) -> None:
        """Tell the client what it can act on; the rest stays in the log."""
        if isinstance(fault, EngineError):
            text = f"{type(fault).__name__}: {fault}"
            log.warning("request refused: %s", text)
        else:
            text = "InternalError: the policy failed; the log of the server has the details"
            log.error("the policy failed", exc_info=fault)
        reason = "protocol error" if isinstance(fault, ProtocolError) else "error"
        with contextlib.suppress(self._disconnected, _SlowClientError):
            await self._send(connection, text)
            await connection.close(1011, reason)


def _run(policy: Policy, request: Request, put: Any, gone: threading.Event, begun: float) -> None:
    """In the worker thread: one request, until its final packet, an error, or nobody listens."""
    if gone.is_set():
        return
    try:
        options: dict[str, Any] = {} if request.actions is None else {"actions": request.actions}
        if request.deadline_ms is not None:  # waiting for another client's request counts
            waited = 1e3 * (time.perf_counter() - begun)
            if waited >= request.deadline_ms:
                raise DeadlineError(f"the request waited {waited:.1f} of {request.deadline_ms:g} ms for other clients")
            options["deadline_ms"] = request.deadline_ms - waited
        stream = policy.act_stream(request.observation, **options)
        try:
            for packet in stream:
                put(packet)
                if packet.final or gone.is_set():
                    return
        finally:
            close = getattr(stream, "close", None)
            if close is not None:
                close()
        raise RuntimeError("the policy ended without a final packet")
    except Exception as fault:
        put(None, fault)


def check_options(host: str, port: int, token: str | None, stream: str) -> None:
    """InputError for options that no server can have: said before a policy is loaded."""
    if not _loopback(host) and not token:
        raise InputError(f"host {host!r} is reachable from outside; pass token=, or host='127.0.0.1'")
    if token is not None and not (token.isascii() and token.isprintable() and token and token == token.strip()):
        raise InputError("token must be printable ASCII, not empty, and without spaces around it")
    if stream not in STREAMS:
        raise InputError(f"stream={stream!r} is not known; there are {', '.join(STREAMS)}")
    if type(port) is not int or not 0 <= port <= 65535:
        raise InputError(f"port={port!r} is not an integer from 0 to 65535")
    _websockets()


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _websockets() -> tuple[Any, type[Exception]]:
    """The function that listens, and the exception of a connection that is gone."""
    try:
        from websockets.asyncio.server import serve
        from websockets.exceptions import ConnectionClosed
    except ImportError as fault:
        raise InputError("serving needs the package websockets: pip install 'quintet-engine[serve]'") from fault
    return serve, ConnectionClosed
