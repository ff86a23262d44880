"""Frames between a robot and a policy server: openpi's protocol with streamed packets.

One connection: the server sends a frame of metadata; then, over and over, the client sends an observation and the
server answers. A plain answer is one frame. A streamed one (the observation holds `stream: true`) is any number of
{type: 'partial', actions [k, A], step, indices [k]} and one {type: 'final', ...} with the fields of a plain answer. A
text frame is an error, and the server closes after it, unless only the observation's `deadline_ms` was missed. Source:
openpi's websocket policy; FASTER's streaming server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.blocks.packets import ActionChunk, ActionPacket
from engine.errors import DeadlineError, ProtocolError, ServerError
from engine.serve.wire import LIMITS, Limits, decode, encode

#: Keys of an observation that are for the server and not for the policy.
EPISODE, STREAM, EARLY_STOP, DEADLINE = "episode", "stream", "early_stop", "deadline_ms"
MAX_HORIZON = 65_536
_LATE = "DeadlineError: "


@dataclass(frozen=True, eq=False)
class Request:
    """One observation as it came.

    Attributes:
        observation: what the policy gets: everything but the server's keys. Its keys are str.
        episode: an integer or short text that every answer repeats, so that a client can tell stale ones; or None.
        stream: answer with partial frames.
        actions: `early_stop` of the observation: stop when that many valid actions have left; None: all.
        deadline_ms: the first action is of use for so long after the frame has come; None: whenever it comes.
    """

    observation: Mapping[str, Any]
    episode: int | str | None = None
    stream: bool = False
    actions: int | None = None
    deadline_ms: float | None = None


def read_request(frame: bytes | str, *, stream: bool | None = None, limits: Limits = LIMITS) -> Request:
    """The request of a client's frame.

    Args:
        frame: as received; text is refused.
        stream: overrides what the frame asks for.
        limits: of the frame.

    Raises:
        ProtocolError: not a map with text keys, or a server's key of a wrong type.
    """
    if isinstance(frame, str):
        raise ProtocolError("a text frame; observations are binary MessagePack frames")
    value = decode(frame, limits)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ProtocolError("an observation is a map with text keys")
    episode, wanted = value.pop(EPISODE, None), value.pop(STREAM, False)
    if isinstance(episode, np.integer):
        episode = int(episode)
    good = isinstance(episode, str) and len(episode) <= 64
    if not (episode is None or good or type(episode) is int):
        raise ProtocolError(f"{EPISODE} is an integer or a text of at most 64 characters")
    if not isinstance(wanted, bool | np.bool_):
        raise ProtocolError(f"{STREAM} is true or false")
    actions = value.pop(EARLY_STOP, None)
    if actions is not None and (isinstance(actions, bool) or not isinstance(actions, int | np.integer) or actions < 1):
        raise ProtocolError(f"{EARLY_STOP} is a number of actions, at least 1")
    deadline = value.pop(DEADLINE, None)
    number = isinstance(deadline, int | float | np.integer | np.floating) and not isinstance(deadline, bool)
    if deadline is not None and not (number and 0 < deadline < 1e9):
        raise ProtocolError(f"{DEADLINE} is a number of milliseconds above 0")
    return Request(
        value, episode, bool(wanted) if stream is None else stream, None if actions is None else int(actions),
        None if deadline is None else float(deadline),
    )  # fmt: skip


def partial_frame(packet: ActionPacket, episode: int | str | None = None) -> bytes:
    """The frame of a packet that is not the last."""
    return encode({"type": "partial", **_packet(packet), **_echo(episode)})


def result_frame(
    packet: ActionPacket, server_timing: Mapping[str, float], episode: int | str | None = None, *, stream: bool = False
) -> bytes:
    """The frame of the final packet: a plain answer, or with `stream` the end of a streamed one.

    `actions` is the whole chunk [H, A]; rows where `valid` is false must not be executed. In a streamed answer, `new`
    are the places in the chunk of actions that no partial frame brought.
    """
    # openpi's chunk broker cuts every array of a plain answer along its first axis: each has H rows.
    chunk = packet.chunk
    if chunk is None:
        raise ProtocolError("a packet without a chunk is not the final one")
    head = {"type": "final", "step": packet.step, "new": packet.indices} if stream else {}
    timing = {k: float(v) for k, v in chunk.timing.items()}
    timing.setdefault("infer_ms", server_timing.get("infer_ms", 0.0))
    body = {"actions": chunk.actions, "valid": chunk.valid, "policy_timing": timing}
    return encode({**head, **body, "server_timing": dict(server_timing), **_echo(episode)})


@dataclass(frozen=True, eq=False)
class Reply:
    """One frame of a server, for the client.

    Attributes:
        packet: the actions; in a final one, `packet.chunk` is the whole result.
        episode: as the request had it.
        fields: everything that the frame held.
    """

    packet: ActionPacket
    episode: int | str | None
    fields: Mapping[str, Any]


class ReplyReader:
    """Reads the frames of one answer; servers without `indices` are followed by counting.

    Args:
        delay: committed actions of the request: where counting starts.
        limits: of every frame.
    """

    def __init__(self, delay: int = 0, limits: Limits = LIMITS):
        self._next, self._limits = delay, limits
        self._delay = delay

    def read(self, frame: bytes | str) -> Reply:
        """One frame.

        Raises:
            ServerError: the server reports an error.
            ProtocolError: the frame is not an answer.
        """
        return self.check(read_map(frame, self._limits))

    def check(self, fields: dict[str, Any]) -> Reply:
        """One answer, decoded already; errors as in `read`."""
        kind = fields.get("type", "final")
        if kind not in ("partial", "final"):
            raise ProtocolError(f"an answer of type {str(kind)[:40]!r}; partial and final are known")
        actions = fields.get("actions")
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype.kind not in "fiu":
            raise ProtocolError("an answer without actions [k, A]; the server speaks another protocol")
        actions = actions.astype(np.float32)
        if not np.isfinite(actions).all() or len(actions) > MAX_HORIZON:
            raise ProtocolError(f"an answer's actions hold NaN or infinity, or more than {MAX_HORIZON} rows")
        packet = self._partial(fields, actions) if kind == "partial" else self._final(fields, actions)
        return Reply(packet, fields.get(EPISODE), fields)

    def _partial(self, fields: dict[str, Any], actions: np.ndarray) -> ActionPacket:
        indices = _indices(fields.get("indices", self._next + np.arange(len(actions))), MAX_HORIZON)
        if len(indices) != len(actions):
            raise ProtocolError(f"{len(actions)} actions with {len(indices)} indices")
        if len(indices):
            self._next = int(indices[-1]) + 1
        return ActionPacket(_step(fields), indices, actions)

    def _final(self, fields: dict[str, Any], actions: np.ndarray) -> ActionPacket:
        rows = np.arange(len(actions))
        valid = fields.get("valid", rows >= self._delay)
        if not isinstance(valid, np.ndarray) or valid.dtype != bool or valid.shape != (len(actions),):
            raise ProtocolError("an answer's valid is not one truth value for each action")
        indices = _indices(fields.get("new", rows[valid & (rows >= self._next)]), len(actions))
        timing = fields.get("policy_timing", {})
        if not isinstance(timing, dict):
            raise ProtocolError("an answer's policy_timing is not a map")
        plain = {str(k): float(v) for k, v in timing.items() if isinstance(v, int | float)}
        return ActionPacket(_step(fields), indices, actions[indices], ActionChunk(actions, valid, plain))


def late_text(fault: DeadlineError) -> str:
    """The text frame of a missed deadline: the connection stays."""
    return f"{_LATE}{fault}"


def read_map(frame: bytes | str, limits: Limits = LIMITS) -> dict[str, Any]:
    """A server's frame as a map; `ServerError` for its text frames, `ProtocolError` for anything else.

    `DeadlineError` where the text says that an action would be late.
    """
    if isinstance(frame, str):
        if frame.startswith(_LATE):
            raise DeadlineError(frame[len(_LATE) :][:2000])
        raise ServerError(f"the policy server answered: {frame[:2000]}")
    fields = decode(frame, limits)
    if not isinstance(fields, dict):
        raise ProtocolError("a server's frame is not a map; it speaks another protocol")
    return fields


def _packet(packet: ActionPacket) -> dict[str, Any]:
    indices = np.ascontiguousarray(packet.indices, np.int64)
    return {"actions": np.ascontiguousarray(packet.actions), "step": int(packet.step), "indices": indices}


def _echo(episode: int | str | None) -> dict[str, Any]:
    return {} if episode is None else {EPISODE: episode}


def _step(fields: Mapping[str, Any]) -> int:
    step = fields.get("step", 0)
    if type(step) is not int or not 0 <= step <= 1_000_000:
        raise ProtocolError("an answer's step is not a small integer")
    return step


def _indices(values: Any, horizon: int) -> np.ndarray:
    array = np.asarray(values)
    good = array.ndim == 1 and (array.dtype.kind in "iu" or array.size == 0)
    if not good or (
        array.size and (int(array.min()) < 0 or int(array.max()) >= horizon or (np.diff(array) <= 0).any())
    ):
        raise ProtocolError(f"an answer's indices are not rising integers in [0, {horizon})")
    return array.astype(np.int64)
