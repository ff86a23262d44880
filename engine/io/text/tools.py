"""Function schemas for tools, from Python functions."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.errors import InputError

_PLAIN: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    tuple: "array",
    dict: "object",
    type(None): "null",
}


def tool_from_function(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a Python function, for `tools=` of a chat.

    The first paragraph of the docstring describes the function, the lines under `Args:` its parameters. Every parameter
    needs a type annotation (str, int, float, bool, list, dict, Literal, Optional and unions of these); those without a
    default are required.

    Returns:
        {"type": "function", "function": {"name", "description", "parameters": JSON schema}}.

    Raises:
        InputError: a parameter without a usable annotation.
    """
    name = getattr(function, "__name__", "")
    try:
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError, NameError) as fault:
        raise InputError(f"{function!r} has no readable signature ({fault}); write its schema as a dict") from fault
    summary, described = _docstring(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise InputError(f"{name}: parameter {parameter} cannot be given by name; tools take named parameters only")
        if parameter.name not in hints:
            raise InputError(f"{name}: parameter {parameter.name} has no type annotation; add one")
        schema = _schema(hints[parameter.name], f"{name}: parameter {parameter.name}")
        if parameter.name in described:
            schema["description"] = described[parameter.name]
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": summary,
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


def _schema(hint: Any, where: str) -> dict[str, Any]:
    if hint is Any:
        return {}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        kinds = {_PLAIN.get(type(value)) for value in inner}
        if kinds == {"string"}:
            return {"type": "string", "enum": list(inner)}
        return {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        schemas = [_schema(part, where) for part in inner]
        if all(schema.keys() == {"type"} for schema in schemas):
            return {"type": [schema["type"] for schema in schemas]}
        return {"anyOf": schemas}
    if origin in (list, tuple, set, Sequence):
        items = [part for part in inner if part is not Ellipsis]
        return {"type": "array"} | ({"items": _schema(items[0], where)} if items else {})
    if origin in (dict, Mapping):
        return {"type": "object"}
    raise InputError(
        f"{where} is annotated {hint!r}; use str, int, float, bool, list, dict, Literal or a union of these"
    )


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """First paragraph, and the entries of the `Args:` section by name."""
    summary = " ".join(re.split(r"\n\s*\n|\n\s*Args:", text, maxsplit=1)[0].split())
    described: dict[str, str] = {}
    section = re.search(r"^(\s*)(?:Args|Arguments|Parameters):\s*\n(.*)", text, re.DOTALL | re.MULTILINE)
    margin, name = None, ""
    for line in (section[2] if section else "").splitlines():
        indent = len(line) - len(line.lstrip())
        if not line.strip() or (margin is not None and indent < margin) or (section and indent <= len(section[1])):
            break
        margin = indent if margin is None else margin
        entry = re.match(r"\s*\**(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)", line) if indent == margin else None
        if entry:
            name = entry[1]
            described[name] = entry[2].strip()
        elif name:
            described[name] = f"{described[name]} {line.strip()}".strip()
    return summary, described
