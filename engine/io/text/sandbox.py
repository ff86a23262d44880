"""Jinja for templates of checkpoints that nobody here has read: no side effects, bounded output, bounded time.

The immutable sandbox of jinja2 stops a template from reaching Python. It does not stop one from asking for 10^12
characters, so here every operation that can make a value much larger than its inputs has a bound, and loops and macros
look at the clock.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEXT = 16_000_000  # characters of any one value
MAX_NODES = 1_000_000  # elements of a nested value that is turned into text
MAX_RANGE = 100_000
MAX_BITS = 4096  # of an integer

_FILTERS = {
    "abs", "attr", "bool", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "reverse", "round", "safe", "select", "selectattr", "sort", "title", "trim", "unique", "upper",
}  # fmt: skip
# Padding and formatting by width make any size out of nothing, and no chat template needs them.
_METHODS_OFF = {"ljust", "rjust", "center", "zfill", "expandtabs", "format", "format_map", "translate", "encode"}

_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))


class Refused(jinja2.TemplateError):
    """The template went over a limit, or raised on its own."""


def make_environment() -> jinja2.Environment:
    """The environment chat templates are written for (block trimming, loop controls, `tojson`, `raise_exception`)."""
    env = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_checked)
    env.filters = {name: call for name, call in env.filters.items() if name in _FILTERS}
    env.filters |= {
        "_concat": _concat, "_tick": _tick, "tojson": _to_json, "join": _join, "replace": _replace, "indent": _indent,
        "string": _string,
    }  # fmt: skip
    env.globals = {name: env.globals[name] for name in ("dict", "namespace", "cycler", "joiner")}
    env.globals |= {"range": _range, "raise_exception": _raise, "strftime_now": _strftime_now}
    return env


def compile_template(env: jinja2.Environment, source: str) -> jinja2.Template:
    """Compile with the bounds woven in; raises what jinja2 and the Python compiler raise."""
    tree = env.parse(source)
    for loop in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        tick = nodes.ExprStmt(nodes.Filter(nodes.Const(0), "_tick", [], [], None, None, lineno=loop.lineno))
        loop.body.insert(0, tick.set_lineno(loop.lineno))  # type: ignore[attr-defined]
    _bound_concat(tree)
    tree.set_environment(env)
    return env.template_class.from_code(env, env.compile(tree), dict(env.globals))


def run(template: jinja2.Template, variables: dict[str, Any], max_chars: int, seconds: float) -> str:
    """Render, giving up as soon as a limit is crossed. Raises `Refused` and what jinja2 raises."""
    token = _deadline.set(time.monotonic() + seconds)
    try:
        pieces, size = [], 0
        for piece in template.generate(**variables):
            size += len(piece)
            if size > max_chars:
                raise Refused(f"more than {max_chars} characters come out")
            _check_time()
            pieces.append(piece)
        return "".join(pieces)
    finally:
        _deadline.reset(token)


def _bound_concat(node: nodes.Node) -> None:
    """Turn `a ~ b` into a filter that knows the limit; jinja2 has no hook for this operator."""
    for name, value in node.iter_fields():
        items = value if isinstance(value, list) else [value]
        for i, item in enumerate(items):
            if not isinstance(item, nodes.Node):
                continue
            _bound_concat(item)
            if isinstance(item, nodes.Concat):
                first, *rest = item.nodes
                made = nodes.Filter(first, "_concat", rest, [], None, None, lineno=item.lineno)
                if isinstance(value, list):
                    value[i] = made
                else:
                    setattr(node, name, made)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "+", "%"])

    # Captured blocks and macro results are joined through this attribute.
    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # type: ignore[override]
        return "".join(_bounded(parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = max(_size(left), _size(right))
        if operator == "*":
            count = next((n for n in (left, right) if isinstance(n, int)), 1)
            if isinstance(left, (str, list, tuple)) or isinstance(right, (str, list, tuple)):
                _limit(size * max(count, 1), MAX_TEXT)
            elif isinstance(left, int) and isinstance(right, int):
                _limit(left.bit_length() + right.bit_length(), MAX_BITS)
        elif operator == "+":
            _limit(_size(left) + _size(right), MAX_TEXT)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _limit(left.bit_length() * max(right, 1), MAX_BITS)
        elif isinstance(left, str):
            raise Refused("text formatting with % is switched off; join the parts with ~")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (str, bytes)) and attr in _METHODS_OFF:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        _check_time()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if name in ("format", "format_map"):  # jinja2 wraps these before it asks is_safe_attribute
            raise Refused("text formatting with .format is switched off; join the parts with ~")
        if isinstance(owner, str) and name == "replace":
            _limit_replace(owner, *args[:2])
        elif isinstance(owner, str) and name == "join" and args:
            return _join(args[0], owner)
        return super().call(context, obj, *args, **kwargs)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's part for trainers; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own attribute

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _limit(size: int, most: int) -> None:
    if size > most:
        raise Refused(f"a value of size {size} is asked for, the limit is {most}")


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise Refused("rendering takes too long")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 1


def _bounded(parts: Iterable[str]) -> Iterator[str]:
    size = 0
    for part in parts:
        size += len(part)
        _limit(size, MAX_TEXT)
        yield part


def _checked(value: Any) -> Any:
    """Pass a value that is about to become text, unless that text would be huge (lists that share their parts)."""
    if isinstance(value, (list, tuple, dict)):
        stack, count, size = [value], 0, 0
        while stack:
            item = stack.pop()
            count += 1
            if isinstance(item, dict):
                stack += [*item, *item.values()]
            elif isinstance(item, (list, tuple)):
                stack += item
            elif isinstance(item, str):
                size += len(item)
            _limit(count + len(stack), MAX_NODES)
            _limit(size, MAX_TEXT)
    return value


@jinja2.pass_context  # a filter with a context is never folded away at compile time
def _tick(context: Any, value: Any) -> Any:
    _check_time()
    return value


def _concat(*parts: Any) -> str:
    return "".join(_bounded(str(_checked(part)) for part in parts))


def _string(value: Any) -> str:
    return str(_checked(value))


def _join(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        raise Refused("join with attribute= is switched off; use map(attribute=...) first")

    def spaced() -> Iterator[str]:
        for i, item in enumerate(value):
            if i and d:
                yield str(d)
            yield str(_checked(item))

    return "".join(_bounded(spaced()))


def _limit_replace(text: str, old: Any = "", new: Any = "") -> None:
    if isinstance(old, str) and isinstance(new, str):
        _limit(len(text) + text.count(old) * max(len(new) - len(old), 0), MAX_TEXT)


def _replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    text = _string(value)
    _limit_replace(text, str(old), str(new))
    return text.replace(str(old), str(new), -1 if count is None else count)


def _indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    pad = " " * min(width, 64) if isinstance(width, int) else str(width)[:64]
    lines = _string(value).split("\n")
    _limit(sum(map(len, lines)) + len(lines) * (len(pad) + 1), MAX_TEXT)
    return "\n".join(pad + s if (first if i == 0 else (blank or s)) else s for i, s in enumerate(lines))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escaping of jinja2's own filter, as chat templates expect."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise Refused("tojson: indent must be from 0 to 16")
    text = json.dumps(
        _checked(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    _limit(len(text), MAX_TEXT)
    return text


def _range(*args: int) -> range:
    made = range(*args)
    _limit(len(made), MAX_RANGE)
    return made


def _raise(message: Any = "") -> NoReturn:
    raise Refused(str(message)[:2000])


def _strftime_now(pattern: str) -> str:
    # A width inside the pattern ("%999999999d") would be honoured by the C library.
    if len(pattern) > 256 or not re.fullmatch(r"(?:[^%]|%-?[A-Za-z%])*", pattern):
        raise Refused(f"strftime_now: {pattern[:60]!r} is not a plain date pattern")
    return datetime.now().strftime(pattern)
