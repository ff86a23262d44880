"""Tool arguments arrive as text; a JSON schema says what they are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

_INTEGER = re.compile(r"[+-]?\d{1,1000}(?:\.0*)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,4})?", re.ASCII)
# Narrow types first: "3" of a union is an integer before it is text.
_ORDER = ("null", "boolean", "integer", "number", "array", "object", "string")
MAX_SCHEMA_DEPTH = 32


class Schemas:
    """Parameter schemas of the tools on offer, by tool and parameter name."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None):
        self._properties: dict[str, Mapping[str, Any]] = {}
        for tool in tools or ():
            function = tool["function"]
            properties = function.get("parameters", {}).get("properties", {})
            self._properties[function["name"]] = properties if isinstance(properties, Mapping) else {}

    def parameter(self, tool: str, name: str) -> Any:
        """The schema of a parameter, None for an unknown tool or an undeclared parameter."""
        return self._properties.get(tool, {}).get(name)


def convert(text: str, schema: Any) -> Any:
    """A value of a type that the schema allows; the text itself where it has none of these forms."""
    kinds = _kinds(schema)
    if "string" not in kinds and kinds:
        kinds = kinds | {"null"}  # optional parameters are often declared without it
    for kind in _ORDER:
        if kind in kinds:
            fits, value = _READERS[kind](text)
            if fits:
                return value
    return text


def _kinds(schema: Any, depth: int = 0) -> set[str]:
    """JSON types that a schema allows; empty where it says nothing."""
    if not isinstance(schema, Mapping) or depth > MAX_SCHEMA_DEPTH:
        return set()
    declared = schema.get("type")
    kinds = {kind for kind in (declared if isinstance(declared, list) else [declared]) if isinstance(kind, str)}
    if schema.get("nullable") is True:
        kinds.add("null")
    for key in ("anyOf", "oneOf", "allOf"):
        for part in schema[key] if isinstance(schema.get(key), list) else []:
            kinds |= _kinds(part, depth + 1)
    if not kinds - {"null"}:
        if isinstance(schema.get("enum"), list):
            kinds |= {_kind_of(value) for value in schema["enum"]}
        elif "properties" in schema:
            kinds.add("object")
        elif "items" in schema:
            kinds.add("array")
    return kinds


def _kind_of(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _null(text: str) -> tuple[bool, Any]:
    return text.strip().lower() in ("null", "none"), None


def _boolean(text: str) -> tuple[bool, Any]:
    word = text.strip().lower()
    return word in ("true", "false"), word == "true"


def _integer(text: str) -> tuple[bool, Any]:
    word = text.strip()
    return (True, int(word.partition(".")[0])) if _INTEGER.fullmatch(word) else (False, None)


def _number(text: str) -> tuple[bool, Any]:
    word = text.strip()
    if not _NUMBER.fullmatch(word):
        return False, None
    if "." not in word and "e" not in word.lower():
        return True, int(word)
    value = float(word)
    return math.isfinite(value), value


def _json(text: str, kind: type) -> tuple[bool, Any]:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False, None
    return isinstance(value, kind), value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_READERS = {
    "null": _null,
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
    "array": lambda text: _json(text, list),
    "object": lambda text: _json(text, dict),
    "string": lambda text: (True, text),
}
