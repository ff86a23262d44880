"""From what a model writes to what a user gets: reasoning, answer and tool calls, at once or as a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import InputError
from engine.io.text.convert import Schemas, convert
from engine.io.text.template import check_tools

Kind = Literal["reasoning", "answer", "tool_call"]
MAX_STOPS = 64


@dataclass(frozen=True)
class Tags:
    """The strings that structure a reply; the defaults are those of Nemotron 3 and Qwen3-Coder."""

    think_open: str = "<think>"
    think_close: str = "</think>"
    call_open: str = "<tool_call>"
    call_close: str = "</tool_call>"
    function_open: str = "<function="
    function_close: str = "</function>"
    parameter_open: str = "<parameter="
    parameter_close: str = "</parameter>"


@dataclass(frozen=True)
class ToolCall:
    """One requested call; `arguments` are converted to the types that the tool's schema declares."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Event:
    """A piece of a reply. A tool call comes whole: `text` as the model wrote it, `calls` parsed."""

    kind: Kind
    text: str
    calls: tuple[ToolCall, ...] = ()


@dataclass
class Message:
    """A parsed reply."""

    content: str
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The assistant message to append to a conversation (`ChatTemplate.render`)."""
        made: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            made["reasoning_content"] = self.reasoning
        if self.tool_calls:
            made["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return made


def parse_response(
    text: str, *, thinking: bool, tools: Sequence[Mapping[str, Any]] | None = None, tags: Tags | None = None
) -> Message:
    """Split a whole reply; never fails on what a model writes.

    Args:
        text: the reply, without the prompt and without end-of-turn tokens.
        thinking: the prompt ended inside the reasoning (so the reply starts there).
        tools: the schemas that were offered, for the types of arguments. Values of unknown tools and undeclared
            parameters stay text.
        tags: other spellings of the tags.

    Returns:
        Reasoning and content without line breaks before and white space after them, and the calls in order. A call
        that is not well formed stays in the content as it was written.
    """
    stream = ResponseStream(thinking, tools=tools, tags=tags)
    stream.push(text)
    stream.flush()
    return stream.message


class ResponseStream:
    """Incremental `parse_response`: the events of any split of a text, joined by kind, are its one-shot parse.

    Text that may turn out to be a tag or a stop string is held back until it is decided; a tool call is held until it
    is complete. White space at the end of a part comes only with what follows it.

    Args:
        thinking: the prompt ended inside the reasoning.
        stop: the answer ends before the first of these (they are not part of it).
        stop_in_reasoning: look for them in the reasoning too. Tool calls are never searched.
        tools: schemas that were offered.
        tags: other spellings of the tags.

    Attributes:
        stopped: a stop string was found; everything after it is ignored.
    """

    def __init__(
        self,
        thinking: bool,
        stop: Sequence[str] = (),
        *,
        stop_in_reasoning: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tags: Tags | None = None,
    ):
        self.tags = tags or Tags()
        stops = [stop] if isinstance(stop, str) else list(stop)
        if len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
            raise InputError(f"stop takes at most {MAX_STOPS} strings, none of them empty")
        self._schemas = Schemas(check_tools(tools))
        self._thinking = thinking
        self._needles: dict[str, list[str]] = {
            "reasoning": [self.tags.think_close, *(stops if stop_in_reasoning else [])],
            "answer": [self.tags.call_open, *stops],
        }
        self._state = "start"
        self._buffer = ""
        self._seen = 0  # characters of an open tool call already searched for its end
        self._blank = {"reasoning": "", "answer": ""}  # white space whose successor is not known yet
        self._text: dict[str, list[str]] = {"reasoning": [], "answer": []}
        self._calls: list[ToolCall] = []
        self._events: list[Event] = []
        self.stopped = False

    @property
    def message(self) -> Message:
        """Everything decided so far; the whole reply after `flush`."""
        return Message("".join(self._text["answer"]), "".join(self._text["reasoning"]), list(self._calls))

    def push(self, text: str) -> list[Event]:
        """Add text, get what it decides."""
        if not self.stopped:
            self._buffer += text
            while self._step():
                pass
        return self._taken()

    def flush(self) -> list[Event]:
        """End of the reply: what was held back. An unfinished tool call with a whole function in it counts."""
        while not self.stopped and self._buffer:
            if self._state == "start":
                self._state = "reasoning" if self._thinking else "answer"
            elif self._state == "call":
                self._finish_call(len(self._buffer))
            else:
                self._emit(self._state, self._buffer)
                self._buffer = ""
            while self._step():
                pass
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _step(self) -> bool:
        """Consume what is decided at the head of the buffer; False when more text is needed."""
        if self.stopped or not self._buffer:
            return False
        if self._state == "start":
            return self._start()
        if self._state == "call":
            return self._call()
        # The needle whose last character comes first wins, the longer one on a tie: the only rule that does not
        # depend on how the text was cut into pieces.
        found = [(at + len(n), at, n) for n in self._needles[self._state] if (at := self._buffer.find(n)) >= 0]
        if not found:
            keep = _partial(self._buffer, self._needles[self._state])
            self._emit(self._state, self._buffer[: len(self._buffer) - keep])
            self._buffer = self._buffer[len(self._buffer) - keep :]
            return False
        end, at, needle = min(found)
        self._emit(self._state, self._buffer[:at])
        if needle in self._needles[self._state][1:]:  # before the tag, should both be the same
            self.stopped, self._buffer = True, ""
        elif self._state == "reasoning":
            self._state, self._buffer = "answer", self._buffer[end:]
        else:
            self._state, self._buffer, self._seen = "call", self._buffer[at:], len(needle)
        return True

    def _start(self) -> bool:
        """Some models write the opening tag although the prompt has it, or although thinking is off."""
        head = self._buffer.lstrip()
        if self.tags.think_open.startswith(head) and head != self.tags.think_open:
            return False
        if head.startswith(self.tags.think_open):
            self._state, self._buffer = "reasoning", head[len(self.tags.think_open) :]
        else:
            self._state = "reasoning" if self._thinking else "answer"
        return True

    def _call(self) -> bool:
        """At an opening tag: wait for the end of the call, or see early that it is none."""
        inside = self._buffer[len(self.tags.call_open) :].lstrip()
        opening = self.tags.function_open
        if not inside.startswith(opening[: len(inside)]):
            self._not_a_call()
            return True
        end = self._buffer.find(self.tags.call_close, self._seen)
        if end < 0:
            self._seen = max(len(self.tags.call_open), len(self._buffer) - len(self.tags.call_close) + 1)
            return False
        self._finish_call(end + len(self.tags.call_close))
        return True

    def _finish_call(self, end: int) -> None:
        raw = self._buffer[:end]
        calls = _parse_calls(raw, self.tags, self._schemas)
        if not calls:
            self._not_a_call()
            return
        self._state, self._buffer = "answer", self._buffer[end:]
        self._calls += calls
        self._events.append(Event("tool_call", raw, tuple(calls)))

    def _not_a_call(self) -> None:
        """The tag was text; what follows it is searched again, as part of the answer."""
        tag = self.tags.call_open
        self._emit("answer", tag)
        self._state, self._buffer = "answer", self._buffer[len(tag) :]

    def _emit(self, kind: str, text: str) -> None:
        text = self._blank[kind] + text
        if not self._text[kind]:
            text = text.lstrip("\r\n")
        kept = text.rstrip()
        self._blank[kind] = text[len(kept) :]
        if kept:
            self._text[kind].append(kept)
            self._events.append(Event("reasoning" if kind == "reasoning" else "answer", kept))


class StopScanner:
    """The stop strings alone, for plain text: same interface as `ResponseStream`, white space untouched."""

    def __init__(self, stop: Sequence[str] = ()):
        self._stops = [stop] if isinstance(stop, str) else list(stop)
        if len(self._stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in self._stops):
            raise InputError(f"stop takes at most {MAX_STOPS} strings, none of them empty")
        self._buffer = ""
        self._text: list[str] = []
        self.stopped = False

    @property
    def message(self) -> Message:
        """The text so far."""
        return Message("".join(self._text))

    def push(self, text: str) -> list[Event]:
        """Add text, get what is certainly not part of a stop string."""
        if self.stopped:
            return []
        self._buffer += text
        # As in ResponseStream: the string whose last character comes first wins, the longer one on a tie.
        found = [(at + len(s), at) for s in self._stops if (at := self._buffer.find(s)) >= 0]
        if found:
            self.stopped = True
            return self._emit(min(found)[1])
        return self._emit(len(self._buffer) - _partial(self._buffer, self._stops))

    def flush(self) -> list[Event]:
        """End of the text: what was held back."""
        return [] if self.stopped else self._emit(len(self._buffer))

    def _emit(self, size: int) -> list[Event]:
        piece, self._buffer = self._buffer[:size], self._buffer[size:]
        if not piece:
            return []
        self._text.append(piece)
        return [Event("answer", piece)]


def _partial(text: str, needles: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of the needles."""
    longest = 0
    for needle in needles:
        for size in range(min(len(needle) - 1, len(text)), longest, -1):
            if text.endswith(needle[:size]):
                longest = size
                break
    return longest


def _parse_calls(raw: str, tags: Tags, schemas: Schemas) -> list[ToolCall]:
    """The functions of one tool call block; an empty list where anything is not as it should be."""
    body = raw[len(tags.call_open) :].strip()
    if body.endswith(tags.call_close):
        body = body[: -len(tags.call_close)].rstrip()
    calls = []
    while body:
        head, closed, rest = body.partition(tags.function_close)
        name, ended, inner = head.removeprefix(tags.function_open).partition(">")
        name = name.strip()
        if not closed or not ended or not head.startswith(tags.function_open) or not name or "\n" in name:
            return []
        values = _parameters(inner.strip(), tags)
        if values is None:
            return []
        arguments = {key: convert(value, schemas.parameter(name, key)) for key, value in values.items()}
        calls.append(ToolCall(name, arguments))
        body = rest.strip()
    return calls


def _parameters(inner: str, tags: Tags) -> dict[str, str] | None:
    values: dict[str, str] = {}
    while inner:
        head, closed, rest = inner.partition(tags.parameter_close)
        key, ended, value = head.removeprefix(tags.parameter_open).partition(">")
        if not closed or not ended or not head.startswith(tags.parameter_open) or not key.strip() or "\n" in key:
            return None
        # One line break on each side belongs to the format, any more to the value.
        values[key.strip()] = value.removeprefix("\n").removesuffix("\n")
        inner = rest.lstrip()
    return values
