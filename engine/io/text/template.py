"""The chat template of a checkpoint, rendered inside limits."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from engine.errors import InputError, TokenizerError
from engine.io.files import member, read_bytes, read_json
from engine.io.text import sandbox
from engine.io.text.tokenizer import MAX_CONFIG_BYTES, _named_tokens
from engine.io.values import show

MAX_SOURCE = 1_000_000  # characters of a template
MAX_MESSAGES = 100_000
MAX_DEPTH = 64  # of nested values in messages and tools
ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatTemplate:
    """Messages to the prompt text a model was trained on.

    Templates come from the checkpoint, never from a request. They run in jinja2's immutable sandbox and are stopped at
    `max_chars` of output or `seconds` of time.

    Args:
        source: Jinja text, or named variants; `tool_use` is taken when tools are given, else `default`.
        variables: what every rendering sees (`bos_token`, `eos_token`, ...).
        max_chars: output limit in characters.
        seconds: wall-clock limit of one rendering.
        origin: file name for messages.

    Raises:
        TokenizerError: the source is no usable template.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        variables: Mapping[str, str] | None = None,
        *,
        max_chars: int = sandbox.MAX_TEXT,
        seconds: float = 10.0,
        origin: str = "chat template",
    ):
        self.source = {"default": source} if isinstance(source, str) else dict(source)
        self.max_chars, self.seconds = max_chars, seconds
        self._variables, self._origin = dict(variables or {}), origin
        if not self.source:
            raise TokenizerError(f"{origin} is empty; fetch the checkpoint again")
        environment = sandbox.make_environment()
        self._compiled = {name: self._compile(environment, text) for name, text in self.source.items()}

    def _compile(self, environment: jinja2.Environment, text: str) -> jinja2.Template:
        if len(text) > MAX_SOURCE:
            raise TokenizerError(f"{self._origin} has {len(text)} characters; at most {MAX_SOURCE} are read")
        try:
            return sandbox.compile_template(environment, text)
        except Exception as fault:  # also SyntaxError, RecursionError and MemoryError of the Python compiler
            line = getattr(fault, "lineno", None)
            where = f" at line {line}" if line else ""
            raise TokenizerError(f"{self._origin} is not usable{where}: {_reason(fault)}; fetch it again") from fault

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], **limits: Any) -> ChatTemplate:
        """Read `chat_template.jinja`, or `chat_template` of tokenizer_config.json (text, or a list of named texts).

        Args:
            folder: checkpoint folder.
            limits: `max_chars`, `seconds`.

        Raises:
            TokenizerError: there is no template, or it is not usable.
        """
        home = Path(folder)
        config: Any = {}
        path = member(home, "tokenizer_config.json", TokenizerError)
        if path.exists():
            config = read_json(path, limit=MAX_CONFIG_BYTES, error=TokenizerError)
            if not isinstance(config, dict):
                raise TokenizerError(f"{path} is not a JSON object; fetch it again")
        variables = _named_tokens(config)
        file = member(home, "chat_template.jinja", TokenizerError)
        if file.exists():
            try:
                text = read_bytes(file, limit=4 * MAX_SOURCE, error=TokenizerError).decode("utf-8")
            except UnicodeDecodeError as fault:
                raise TokenizerError(f"{file} is not UTF-8 text; fetch it again") from fault
            return cls(text, variables, origin=str(file), **limits)
        found = config.get("chat_template")
        origin = f"chat_template of {path}"
        if isinstance(found, list):
            named = {}
            for item in found:
                if not (isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("name", "template"))):
                    raise TokenizerError(f"{origin} is a list with an entry that is no named template; fetch it again")
                named[item["name"]] = item["template"]
            found = named
        elif found is None:
            raise TokenizerError(
                f"{home} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
                "use generate() with plain text, or fetch the whole checkpoint"
            )
        elif not isinstance(found, str):
            raise TokenizerError(f"{origin} is {show(found)}, neither text nor a list of named texts; fetch it again")
        return cls(found, variables, origin=origin, **limits)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: dicts with `role` (system, developer, user, assistant, tool) and `content`: text, a list of
                {"type": "text", "text": ...} parts (joined by line breaks), or None beside `tool_calls`. Tool call
                arguments may be a dict or its JSON text.
            tools: function schemas, {"type": "function", "function": {"name", "description", "parameters"}} or the
                inner dict alone.
            add_generation_prompt: end with the opening of an assistant turn.
            enable_thinking: passed to the template.
            variables: further plain values for the template.

        Raises:
            InputError: messages, tools or variables are not of this form.
            TokenizerError: the template refuses them, fails, or crosses a limit.
        """
        given = {
            "messages": check_messages(messages),
            "tools": check_tools(tools),
            "add_generation_prompt": bool(add_generation_prompt),
            "enable_thinking": bool(enable_thinking),
        }
        for key, value in variables.items():
            if key in given:
                raise InputError(f"{key} is given twice; leave it out of the template's variables")
            _check_plain(f"template variable {key}", value)
        chosen = "tool_use" if given["tools"] and "tool_use" in self._compiled else "default"
        template = self._compiled.get(chosen) or next(iter(self._compiled.values()))
        try:
            return sandbox.run(template, self._variables | given | variables, self.max_chars, self.seconds)
        except Exception as fault:  # a template can fail in any way Python can
            raise TokenizerError(
                f"{self._origin} refuses these messages or fails: {_reason(fault)}; "
                "change the messages, or fetch the template again if it is damaged"
            ) from fault


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages in the one form templates see (see `ChatTemplate.render`); raises `InputError`."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise InputError(f"messages are {show(messages)}; a list of {{'role': ..., 'content': ...}} is needed")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InputError(f"there are {len(messages)} messages; 1 to {MAX_MESSAGES} are allowed")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is {show(message)}; a dict with role and content is needed")
    _check_plain(where, message)
    made = dict(message)
    role = made.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where}: role is {show(role)}; one of {', '.join(ROLES)} is needed")
    calls = made.get("tool_calls")
    if calls:
        if role != "assistant" or not isinstance(calls, (list, tuple)):
            raise InputError(f"{where}: tool_calls must be a list, in a message of the assistant")
        made["tool_calls"] = [_tool_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    else:
        made.pop("tool_calls", None)  # templates ask whether it is there, not what is in it
    content = made.get("content")
    if content is None and (calls or made.get("reasoning_content")):
        made["content"] = ""
    elif isinstance(content, (list, tuple)):
        for part in content:
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise InputError(
                    f"{where}: content part {show(part)}; only {{'type': 'text', 'text': ...}} is supported"
                )
        made["content"] = "\n".join(part["text"] for part in content)
    elif not isinstance(content, str):
        raise InputError(f"{where}: content is {show(content)}; text or a list of text parts is needed")
    return made


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} is {show(call)}; {{'function': {{'name': ..., 'arguments': ...}}}} is needed")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as fault:
            raise InputError(f"{where}: arguments are not valid JSON ({str(fault)[:100]}); give a dict") from fault
    if not isinstance(arguments, Mapping):
        raise InputError(f"{where}: arguments are {show(arguments)}; a dict or the JSON of one is needed")
    return {"type": "function", **call, "function": {**function, "arguments": dict(arguments)}}


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Function schemas in the form {"type": "function", "function": ...}; None for no tools; raises `InputError`."""
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise InputError(f"tools are {show(tools)}; a list of function schemas is needed")
    made = []
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise InputError(
                f"tools[{i}] is {show(tool)}; a function schema with a name is needed (tool_from_function)"
            )
        if not isinstance(function.get("parameters", {}), Mapping):
            raise InputError(f"tools[{i}]: parameters of {function['name']!r} are not a JSON schema object")
        _check_plain(f"tools[{i}]", tool)
        made.append({"type": "function", "function": dict(function)})
    return made or None


def _check_plain(where: str, value: Any) -> None:
    """Only JSON values reach a template: objects would hand it their methods."""
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise InputError(f"{where} is nested deeper than {MAX_DEPTH}")
        if isinstance(item, Mapping):
            if not all(type(key) is str for key in item):
                raise InputError(f"{where} has a key that is not text; use JSON values only")
            stack += [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, (list, tuple)):
            stack += [(inner, depth + 1) for inner in item]
        elif item is not None and type(item) not in (str, bool, int, float):
            raise InputError(f"{where} holds a {type(item).__name__}; use JSON values only")


def _reason(fault: BaseException) -> str:
    text = str(fault)[:400] or "no reason given"
    return text if isinstance(fault, jinja2.TemplateError) else f"{type(fault).__name__}: {text}"
