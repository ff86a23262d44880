"""Text generation over static plans: prompt in chunks, one replay per token, prefix reuse, typed results.

A subclass owns the network: it captures the plans 'prefill', 'decode', 'head', 'draw' and 'score' over the buffers of
`TokenIO` and lists its recurrent state. Everything else about generating text is here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.blocks.prefix import PrefixCache
from engine.blocks.sampling import SamplingOptions
from engine.errors import ContextError, EngineError, InputError, TokenizerError
from engine.io.text import ChatTemplate, Event, Message, ResponseStream, StopScanner, StreamDecoder, Tokenizer
from engine.ops.sample import SamplerState
from engine.runtime.arena import Arena, Tensor
from engine.runtime.model import Model
from engine.runtime.plan import NodeInfo

SNAPSHOT_EVERY = 4096  # tokens between snapshots inside a long prompt


@dataclass(frozen=True)
class TokenIO:
    """What a step reads and writes: ids i32 [chunk], rows i32 [1] (tokens in this chunk), last i32 [1] (rows - 1),
    logits f32 [V], score_logits f32 [score_chunk, V], and the sampler's memory (its `pos` is the cache length)."""

    ids: Tensor
    rows: Tensor
    last: Tensor
    logits: Tensor
    score_logits: Tensor
    sampler: SamplerState

    @staticmethod
    def empty(arena: Arena, vocab: int, chunk: int, score_chunk: int, context: int) -> TokenIO:
        def io(name: str, shape: tuple[int, ...], dtype: str = "i32") -> Tensor:
            return arena.alloc(name, shape, dtype, "io")

        logits, scores = io("logits", (1, vocab), "f32"), io("score_logits", (score_chunk, vocab), "f32")
        sampler = SamplerState.empty(arena, vocab, context)
        return TokenIO(io("ids", (chunk,)), io("rows", (1,)), io("last", (1,)), logits, scores, sampler)


@dataclass
class Timing:
    """Seconds. `steps` has one entry per decoded token after the first."""

    prefill: float = 0.0
    steps: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return len(self.steps) / sum(self.steps) if self.steps else 0.0

    def percentile(self, q: float) -> float:
        """Milliseconds per token, q in [0, 100]."""
        return float(np.percentile(self.steps, q)) * 1e3 if self.steps else 0.0


@dataclass
class Generation:
    """Result of generate, chat and a finished stream."""

    text: str
    tokens: list[int]
    finish_reason: str  # 'stop' | 'length' | 'cancelled'
    prompt_tokens: int
    reused_tokens: int
    timing: Timing
    message: Message

    def __str__(self) -> str:
        return self.text


@dataclass
class Score:
    """Log-probabilities (natural log, fp64) of tokens[1:], each given everything before it."""

    tokens: list[int]
    logprobs: np.ndarray

    @property
    def total(self) -> float:
        return float(self.logprobs.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(-float(self.logprobs.mean())) if len(self.logprobs) else 1.0


class TextStream:
    """Iterator of `Event`s (kind 'reasoning', 'answer' or 'tool_call'; str(event.text)). `result` after the end.

    Closing it, or leaving the loop and dropping it, stops within one step and frees the model.
    """

    def __init__(self, events: Generator[Event, None, None], result: list[Generation]) -> None:
        # The generator fills the list and does not know the stream: no cycle, so dropping the stream ends it.
        self._events, self._result = events, result

    @property
    def result(self) -> Generation | None:
        return self._result[0] if self._result else None

    def finish(self) -> Generation:
        """Runs to the end."""
        for _ in self:
            pass
        return self._result[0]

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        self._events.close()

    def __del__(self) -> None:
        self._events.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LanguageModel(Model):
    """Generation verbs of a causal language model with recurrent and KV state."""

    def __init__(
        self,
        name: str,
        arena: Arena,
        io: TokenIO,
        states: Sequence[Tensor],
        *,
        vocab_size: int,
        context: int,
        stop_ids: Sequence[int],
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        snapshots: int,
    ) -> None:
        super().__init__(name, arena)
        self.io, self.vocab_size, self.context = io, vocab_size, context
        self.tokenizer, self.template = tokenizer, template
        self.stop_ids = frozenset(stop_ids) | frozenset(tokenizer.eos_ids if tokenizer else ())
        self.chunk = io.ids.shape[0]
        self._cache = PrefixCache(arena, states, snapshots)
        self.reused_tokens = 0

    # ------------------------------------------------------------------------------------------ state
    def _set(self, buffer: Tensor, value: int) -> None:
        buffer.window()[0] = value

    def _prefill(self, tokens: list[int], cuts: Sequence[int] = ()) -> None:
        """Runs tokens[len(live):] through the network in chunks; snapshots at the lengths in `cuts`."""
        cache, io, run = self._cache, self.io, self.plans["prefill"].replay
        live = cache.live or []
        at = start = len(live)
        ids = io.ids.window()
        cache.live = None  # unknown until the last chunk is through
        while at < len(tokens):
            stop = min([at + self.chunk, len(tokens), *(c for c in cuts if c > at)])
            n = stop - at
            ids[:n] = tokens[at:stop]
            self._set(io.rows, n)
            self._set(io.last, n - 1)
            self._set(io.sampler.pos, at)
            run()
            at = stop
            if at in cuts:
                cache.live = tokens[:at]
                cache.snapshot()
                cache.live = None
        cache.live = live + tokens[start:]

    def _enter(self, tokens: list[int]) -> None:
        """Before a prompt is looked up among what is cached: for models whose ids mean different things by request."""

    def _start(self, tokens: list[int], options: SamplingOptions, boundaries: Sequence[int]) -> int:
        """Prompt to first token: returns how many prompt tokens came from the cache."""
        self._enter(tokens)
        reused = self._cache.rewind(tokens)
        self._prefill(tokens, [*boundaries, *range(SNAPSHOT_EVERY, len(tokens), SNAPSHOT_EVERY)])
        s = self.io.sampler
        options.write(s)
        seen = np.zeros(s.seen.shape, np.uint8)
        seen[[t for t in tokens if t < self.vocab_size]] = 1
        s.seen.write(seen)
        self._set(s.step, 0)
        self._set(s.pos, len(tokens) - 1)  # the draw advances it: the drawn token is not cached yet
        self.plans["head"].replay()
        self.plans["draw"].replay()
        self.reused_tokens = reused
        return reused

    # ------------------------------------------------------------------------------------------ checks
    def tokenize(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise TokenizerError(
                f"model {self.name!r} has no tokenizer.json; pass token ids, or add the file to its folder"
            )
        return self.tokenizer.encode(text)

    def _prompt(self, prompt: str | Sequence[int], room: int = 1) -> list[int]:
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else _token_ids(prompt)
        if not tokens:
            raise InputError("the prompt is empty; give at least one token")
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self.vocab_size:
            raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary [0, {self.vocab_size})")
        self._fits(len(tokens), room)
        return tokens

    def _fits(self, tokens: int, room: int = 1) -> None:
        if tokens + room > self.context:
            raise ContextError(
                f"the prompt has {tokens} tokens and the context is {self.context}; "
                f"shorten it or load with context={tokens + room} or more"
            )

    def _budget(self, max_new_tokens: int | None, prompt: int) -> int:
        room = self.context - prompt
        if max_new_tokens is None:
            return room
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens!r} is not a positive integer")
        if max_new_tokens > room:
            raise ContextError(
                f"{prompt} prompt tokens and max_new_tokens={max_new_tokens} exceed the context of {self.context}; "
                "ask for fewer or load with a larger context="
            )
        return max_new_tokens

    # ------------------------------------------------------------------------------------------ verbs
    def _tokens(
        self, prompt: list[int], budget: int, options: SamplingOptions, boundaries: Sequence[int], timing: Timing,
        ignore_eos: bool, force: tuple[int, list[int]] | None,
    ) -> Generator[int, None, None]:  # fmt: skip
        """Token ids, one per step. `force` = (step, ids): from that step on the drawn ids are replaced by these,
        unless they were drawn before that. Keeps the cache's record right however it is left."""
        s, replay, clock = self.io.sampler, self.plans["decode"].replay, time.perf_counter
        token, step = s.token.window(), s.step.window()
        history, seen = s.history.window(), s.seen.window()
        t0 = clock()
        self._start(prompt, options, boundaries)
        timing.prefill = clock() - t0
        forced: list[int] = []
        written = set(prompt)
        tail: list[int] = []
        try:
            for n in range(budget):
                if n:
                    t0 = clock()
                    replay()
                    timing.steps.append(clock() - t0)
                drawn = int(token[0])
                if drawn < 0:
                    raise EngineError(
                        f"model {self.name!r} gave no finite logit; its weights or their quantisation are broken"
                    )
                if force is not None:
                    tail = [*tail, drawn][-len(force[1]) :]
                    if tail == force[1]:
                        force = None  # closed by itself
                    elif n >= force[0]:
                        forced, force = list(force[1]), None
                if forced:
                    if drawn not in written:
                        seen[drawn] = 0  # drawn, but never part of the text
                    drawn = token[0] = history[n] = forced.pop(0)
                    seen[drawn] = 1
                written.add(drawn)
                yield drawn
                if drawn in self.stop_ids and not ignore_eos:
                    break
        finally:
            # Device memory is the record: it and the recurrent state advance in the same replay.
            cached = int(s.pos.window()[0])
            drawn_ids = history[: int(step[0])].tolist()
            self._cache.live = (prompt + drawn_ids)[:cached]
            self._cache.snapshot()

    def _events(
        self, result: list[Generation], prompt: list[int], budget: int, options: SamplingOptions,
        boundaries: Sequence[int], parser: ResponseStream | StopScanner, decoder: StreamDecoder, ignore_eos: bool,
        force: tuple[int, list[int]] | None,
    ) -> Generator[Event, None, None]:  # fmt: skip
        with self._use():
            timing, tokens = Timing(), []
            reason = "length"
            ids = self._tokens(prompt, budget, options, boundaries, timing, ignore_eos, force)
            finished = False
            try:
                for token in ids:
                    tokens.append(token)
                    if token in self.stop_ids and not ignore_eos:
                        reason = "stop"
                        break
                    yield from parser.push(decoder.push(token))
                    if parser.stopped:
                        reason = "stop"
                        break
                yield from parser.push(decoder.flush())
                yield from parser.flush()
                if parser.stopped:
                    reason = "stop"
                finished = True
            finally:
                ids.close()
                message = parser.message
                reason = reason if finished else "cancelled"
                result.append(
                    Generation(message.content, tokens, reason, len(prompt), self.reused_tokens, timing, message)
                )

    def stream(
        self,
        prompt: str | Sequence[int] | list[dict],
        *,
        tools: list[dict] | None = None,
        thinking: bool = True,
        thinking_budget: int | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: float,
    ) -> TextStream:
        """Events as they come: of a chat when `prompt` is a list of messages, else of a plain continuation.

        thinking_budget: after that many tokens of reasoning the model is made to close it. sampling: fields of
        SamplingOptions (temperature, top_k, top_p, min_p, repetition_penalty, seed).
        Raises: InputError, ContextError, TokenizerError before any work; BusyError on the first event.
        """
        options = self._options(stop, sampling)
        boundaries: list[int] = []
        force = None
        parser: ResponseStream | StopScanner = StopScanner(options.stop)
        if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], dict):
            tokens, boundaries = self._render(list(prompt), tools, thinking)
            parser = ResponseStream(thinking, list(options.stop), tools=tools)
            if thinking_budget is not None:
                if isinstance(thinking_budget, bool) or not isinstance(thinking_budget, int) or thinking_budget < 0:
                    raise InputError(f"thinking_budget={thinking_budget!r} is not a non-negative integer")
                force = (thinking_budget, self.tokenize(parser.tags.think_close)) if thinking else None
        else:
            if tools or thinking_budget is not None:
                raise InputError("tools and thinking_budget need a list of messages as the prompt")
            tokens = self._prompt(prompt)  # type: ignore[arg-type]
        return self._streamed(tokens, max_new_tokens, options, parser, boundaries, ignore_eos, force)

    def _streamed(
        self, tokens: list[int], max_new_tokens: int | None, options: SamplingOptions,
        parser: ResponseStream | StopScanner, boundaries: Sequence[int] = (), ignore_eos: bool = False,
        force: tuple[int, list[int]] | None = None,
    ) -> TextStream:  # fmt: skip
        if self.tokenizer is None:
            raise TokenizerError(f"model {self.name!r} has no tokenizer.json to make text with; use generate(ids)")
        budget, decoder = self._budget(max_new_tokens, len(tokens)), self.tokenizer.stream()
        result: list[Generation] = []
        events = self._events(result, tokens, budget, options, boundaries, parser, decoder, ignore_eos, force)
        stream = TextStream(events, result)
        self._open.add(stream)
        return stream

    def generate(
        self, prompt: str | Sequence[int], *, max_new_tokens: int | None = None, stop: str | Sequence[str] = (),
        ignore_eos: bool = False, **sampling: float,
    ) -> Generation:  # fmt: skip
        """Continues a text or a list of token ids. Greedy unless temperature is given. See `stream`."""
        if self.tokenizer is None and not isinstance(prompt, str):
            return self._generate_ids(prompt, max_new_tokens, self._options(stop, sampling), ignore_eos)
        stream = self.stream(prompt, max_new_tokens=max_new_tokens, stop=stop, ignore_eos=ignore_eos, **sampling)  # type: ignore[arg-type]
        return stream.finish()

    def _generate_ids(
        self, prompt: Sequence[int], max_new: int | None, options: SamplingOptions, ignore_eos: bool
    ) -> Generation:
        if options.stop:
            raise InputError(f"model {self.name!r} has no tokenizer.json: stop= strings need text; use stop ids")
        tokens = self._prompt(prompt)
        budget, timing = self._budget(max_new, len(tokens)), Timing()
        with self._use():
            ids = list(self._tokens(tokens, budget, options, (), timing, ignore_eos, None))
        reason = "stop" if ids[-1] in self.stop_ids and not ignore_eos else "length"
        return Generation("", ids, reason, len(tokens), self.reused_tokens, timing, Message(""))

    def chat(self, messages: list[dict], **kwargs: object) -> Generation:
        """One assistant turn: message.content, message.reasoning, message.tool_calls. Arguments as `stream`."""
        if not isinstance(messages, (list, tuple)) or not messages or not isinstance(messages[0], dict):
            raise InputError("chat takes a non-empty list of messages such as {'role': 'user', 'content': 'Hi'}")
        return self.stream(list(messages), **kwargs).finish()  # type: ignore[arg-type]

    def logits(self, ids: str | Sequence[int]) -> np.ndarray:
        """Logits [T, V] fp32 of a whole text from an empty state; row t predicts token t+1."""
        tokens = self._prompt(ids, room=0)
        with self._use():
            out = np.empty((len(tokens), self.vocab_size), np.float32)
            for at, block in self._score_blocks(tokens):
                out[at : at + len(block)] = block
        return out

    def score(self, text: str | Sequence[int]) -> Score:
        """Log-probability of every token of a text given those before it."""
        tokens = self._prompt(text, room=0)
        out = np.empty(max(len(tokens) - 1, 0))
        with self._use():
            for at, block in self._score_blocks(tokens):
                n = min(len(block), len(tokens) - 1 - at)
                if n == 0:
                    break
                rows = block[:n].astype(np.float64)
                peak = rows.max(1, keepdims=True)
                norm = np.log(np.exp(rows - peak).sum(1)) + peak[:, 0]
                out[at : at + n] = rows[np.arange(n), tokens[at + 1 : at + 1 + n]] - norm
        return Score(tokens, out)

    def _score_blocks(self, tokens: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        step = self.io.score_logits.shape[0]
        self._enter(tokens)
        self._cache.clear()  # from scratch, whatever is cached
        for at in range(0, len(tokens), step):
            self._prefill(tokens[: at + step])
            self.plans["score"].replay()
            n = min(step, len(tokens) - at)
            yield at, self.io.score_logits.slice(0, (n, self.vocab_size)).host()

    def warmup(self) -> None:
        """Runs every plan once on an empty state."""
        with self._use():
            self._cache.clear()
            try:
                self._start([0], SamplingOptions(), ())
                self.plans["decode"].replay()
            finally:
                self._cache.clear()

    def profile(self, plan: str = "decode", repeats: int = 20) -> list[tuple[NodeInfo, float]]:
        """Median microseconds per node of a plan, on an empty sequence ('prefill': one full chunk)."""
        if plan not in self.plans:
            raise InputError(f"plan {plan!r} is not one of {', '.join(self.plans)}")
        if not isinstance(repeats, int) or not 1 <= repeats < self.context:
            raise InputError(f"repeats={repeats!r} is not an integer in [1, {self.context})")
        with self._use():
            self._cache.clear()
            self._set(self.io.sampler.pos, 0)
            self._set(self.io.rows, min(self.chunk, self.io.score_logits.shape[0]) if plan == "score" else self.chunk)
            try:
                return self.plans[plan].profile(repeats)
            finally:
                self._cache.clear()

    # ------------------------------------------------------------------------------------------ chat
    def _options(self, stop: str | Sequence[str], sampling: dict) -> SamplingOptions:
        known = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        for key in sampling:
            if key not in known:
                raise InputError(f"unknown argument {key!r}; sampling takes {', '.join(known)}")
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        return SamplingOptions(stop=stops, **sampling)  # type: ignore[arg-type]

    def _render(self, messages: list[dict], tools: list[dict] | None, thinking: bool) -> tuple[list[int], list[int]]:
        """Prompt tokens, and where to snapshot: before the generation prompt, which later turns rewrite."""
        if self.template is None:
            raise TokenizerError(
                f"model {self.name!r} has no chat template; add chat_template.jinja, or use generate()"
            )
        text = self.template.render(messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking)
        tokens = self._prompt(text)
        history = self.tokenize(
            self.template.render(messages, tools=tools, add_generation_prompt=False, enable_thinking=thinking)
        )
        boundary = next((i for i, (a, b) in enumerate(zip(history, tokens)) if a != b), min(len(history), len(tokens)))
        return tokens, [boundary]


def _token_ids(prompt: object) -> list[int]:
    try:
        array = np.asarray(prompt)
    except ValueError:
        array = np.empty(0, object)
    if array.size and array.dtype.kind not in "iu":
        raise InputError("the prompt must be a text or a flat list of integer token ids")
    return array.reshape(-1).tolist() if array.size else []
