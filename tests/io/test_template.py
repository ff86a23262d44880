"""Chat templates: what they see, what they may not do, and how long they may take."""

import json
import time

import pytest
import texts

from engine.errors import InputError, TokenizerError
from engine.io.text import ChatTemplate, tool_from_function


@pytest.fixture(scope="module")
def chat():
    return ChatTemplate(texts.TEMPLATE)


USER = [{"role": "user", "content": "hi"}]
ADD = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}


def test_generation_prompts(chat):
    head = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert chat.render(USER) == head + "<|im_start|>assistant\n<think>\n"
    assert chat.render(USER, enable_thinking=False) == head + "<|im_start|>assistant\n<think></think>"
    assert chat.render(USER, add_generation_prompt=False) == head


def test_a_whole_conversation(chat):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "good."}]},
        {"role": "user", "content": "1+2?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "ü"}'}}
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "x"},
        {"role": "tool", "content": "three"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n3 <b>"},
        {"role": "user", "content": "thanks"},
    ]
    before = json.dumps(messages)
    got = chat.render(messages, tools=[{"type": "function", "function": ADD}])
    assert got == (
        "<|im_start|>system\nBe\ngood.\n\n# Tools\n<function>\n<name>add</name>\n<parameter>a:integer</parameter>\n"
        "<parameter>b:integer</parameter>\n</function><|im_end|>\n"
        "<|im_start|>user\n1+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n"
        "<parameter=b>\nü\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\nthree\n</tool_response>\n<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>\n3 <b><|im_end|>\n"
        "<|im_start|>user\nthanks<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert json.dumps(messages) == before
    assert chat.render(messages, tools=[ADD]) == got  # the bare form


def test_what_templates_expect_of_their_environment():
    def render(source, **kwargs):
        return ChatTemplate(source).render(USER, **kwargs)

    assert render("{{ x | tojson }}", x={"ü": "<'&>", "a": [1, None, True]}) == '{"ü": "<\'&>", "a": [1, null, true]}'
    assert render("{{ x | tojson(indent=2) }}", x=[1]) == "[\n  1\n]"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("  {% if true %}\n  x\n  {% endif %}\n") == "  x\n"  # blocks leave no lines behind
    assert render("{% generation %}a{% endgeneration %}b") == "ab"
    assert render("{{ messages[0].nothing }}{{ nothing is defined }}") == "False"
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert (
        render("{{ [3,1] | sort | join('-') }}{{ 'a b'.split()[1] | upper }}{{ {'k': 1} | items | list }}")
        == "1-3B[('k', 1)]"
    )
    assert render("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) ~ f('y') }}") == "<1><y>"
    assert (
        render("{% set a %}x{{ 1 }}{% endset %}{{ a + 'z' }}{{ 7 % 4 }}{{ 'ab' * 2 }}{{ 'a\nb' | indent(2) }}")
        == "x1z3ababa\n  b"
    )
    assert ChatTemplate("{{ bos_token }}|", {"bos_token": "<s>"}).render(USER) == "<s>|"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ range.__globals__.x }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% include '/etc/passwd' %}",
        "{% import 'x' as y %}",
        "{{ raise_exception('no way') }}",
        "{{ 1 / 0 }}",
        "{{ nothing.more }}",
        "{{ lipsum(5) }}",
        "{{ '{:>9}'.format(1) }}",
        "{{ 'x'.center(9) }}",
        "{{ 'x' % () }}",
        "{{ strftime_now('%999999999d') }}",
        "{{ [1] | tojson(indent=999999999) }}",
    ],
)
def test_what_templates_may_not_do(source):
    with pytest.raises(TokenizerError, match="refuses these messages"):
        ChatTemplate(source).render(USER)


DOUBLING = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 'x' * 10**12 }}",
        "{{ 10**12 * 'x' }}",
        "{{ [0] * 10**12 }}",
        "{{ 9 ** 99999999 }}",
        "{% for i in range(10**12) %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) recursive %}{{ loop(range(100000)) }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        DOUBLING.replace("START", "'x'").replace("STEP", "ns.x ~ ns.x"),
        DOUBLING.replace("START", "'x'").replace("STEP", "ns.x + ns.x"),
        DOUBLING.replace("START", "'x'").replace("STEP", "ns.x.replace('x', 'xx')"),
        DOUBLING.replace("START", "'x'").replace("STEP", "ns.x | replace('', ns.x)"),
        DOUBLING.replace("START", "'x'").replace("STEP", "[ns.x, ns.x] | join"),
        DOUBLING.replace("START", "'x'").replace("STEP", "ns.x.join([ns.x, ns.x, ns.x])"),
        DOUBLING.replace("START", "[0]").replace("STEP", "ns.x + ns.x"),
        DOUBLING.replace("START", "[0]").replace("STEP", "[ns.x, ns.x]"),
        DOUBLING.replace("START", "[0]").replace("STEP", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns.x | tojson }}"),
        DOUBLING.replace("START", "[0]").replace("STEP", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns.x | string }}"),
        DOUBLING.replace("START", "7").replace("STEP", "ns.x * ns.x"),
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}{{ ns.x }}",
        "{{ ('\n' * 10000000) | indent(64, true, true) }}",
    ],
)
def test_bombs_end_in_time_and_memory(source):
    chat = ChatTemplate(source, seconds=0.5)
    start = time.perf_counter()
    with pytest.raises(TokenizerError, match="refuses these messages"):
        chat.render(USER)
    assert time.perf_counter() - start < 5


def test_output_limit_is_the_callers():
    chat = ChatTemplate("{{ messages[0].content }}", max_chars=10)
    assert chat.render([{"role": "user", "content": "x" * 10}]) == "x" * 10
    with pytest.raises(TokenizerError, match="more than 10 characters"):
        chat.render([{"role": "user", "content": "x" * 11}])


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ x | nofilter }}",
        "{% for x in y %}",
        "{{ " + "(" * 3000,
        "x" * 1_000_001,
        "{{ " + "-" * 20000 + "1 }}",
    ],
)
def test_unusable_sources_are_refused_at_load(source):
    with pytest.raises(TokenizerError, match="chat template"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "0 messages"),
        ("hi", "a list of"),
        (None, "a list of"),
        ([3], r"messages\[0\] is 3"),
        ([{"content": "x"}], "role is None"),
        ([{"role": "robot", "content": "x"}], "role is 'robot'; one of system"),
        ([{"role": ["user"], "content": "x"}], "role is"),
        ([{"role": "user"}], "content is None"),
        ([{"role": "user", "content": 5}], "content is 5"),
        ([{"role": "user", "content": b"x"}], "holds a bytes"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content part"),
        ([*USER, {"role": "user", "content": "x", "f": print}], r"messages\[1\] holds a builtin"),
        ([{"role": "user", "content": "x", 5: 1}], "key that is not text"),
        ([{"role": "user", "content": "", "tool_calls": [{}]}], "tool_calls"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], r"tool_calls\[0\]"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "not valid JSON"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            r"arguments are \[1\]",
        ),
    ],
)
def test_messages_are_checked(chat, messages, says):
    with pytest.raises(InputError, match=says):
        chat.render(messages)


@pytest.mark.parametrize(
    "tools", ["x", [1], [{}], [{"name": ""}], [{"name": "f", "parameters": []}], [{"name": "f", "x": {1}}]]
)
def test_tools_are_checked(chat, tools):
    with pytest.raises(InputError, match="tools"):
        chat.render(USER, tools=tools)


def test_variables_are_plain_and_not_given_twice(chat):
    with pytest.raises(InputError, match="holds a function"):
        chat.render(USER, x=lambda: 1)
    nested = []
    nested.append(nested)
    with pytest.raises(InputError, match="deeper"):
        chat.render(USER, x=nested)


def test_where_templates_are_read_from(tmp_path):
    texts.write(tmp_path, template=None)
    with pytest.raises(TokenizerError, match="has no chat template"):
        ChatTemplate.from_folder(tmp_path)
    texts.write(tmp_path, template=None, chat_template="{{ eos_token }}{{ messages[0].content }}")
    assert ChatTemplate.from_folder(tmp_path).render(USER) == "<|im_end|>hi"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    texts.write(tmp_path, template=None, chat_template=named)
    chat = ChatTemplate.from_folder(tmp_path, seconds=1.0)
    assert (chat.render(USER), chat.render(USER, tools=[ADD]), chat.render(USER, tools=[])) == ("d", "t", "d")
    for bad in ({"x": 1}, 5, [5], [{"name": "x"}], []):
        texts.write(tmp_path, template=None, chat_template=bad)
        with pytest.raises(TokenizerError, match=r"chat_template of .*tokenizer_config.json"):
            ChatTemplate.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("j")  # the newer file wins
    assert ChatTemplate.from_folder(tmp_path).render(USER) == "j"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match="not UTF-8"):
        ChatTemplate.from_folder(tmp_path)


def test_tool_from_function():
    from typing import Literal

    def search(query: str, top: int = 5, mode: Literal["fast", "deep"] = "fast", where: list[str] | None = None):
        """Search the web
        for pages.

        More words.

        Args:
            query: what to look for,
                in words
            top (int): how many

        Returns:
            nothing: really
        """

    made = tool_from_function(search)["function"]
    assert (made["name"], made["description"]) == ("search", "Search the web for pages.")
    assert made["parameters"]["required"] == ["query"]
    assert made["parameters"]["properties"] == {
        "query": {"type": "string", "description": "what to look for, in words"},
        "top": {"type": "integer", "description": "how many"},
        "mode": {"type": "string", "enum": ["fast", "deep"]},
        "where": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
    }
    assert ChatTemplate(texts.TEMPLATE).render(USER, tools=[tool_from_function(search)])

    def untyped(x):
        pass

    def odd(x: complex):
        pass

    def stars(*x: int):
        pass

    for function, says in ((untyped, "no type annotation"), (odd, "annotated"), (stars, "by name")):
        with pytest.raises(InputError, match=says):
            tool_from_function(function)
