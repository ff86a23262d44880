"""Replies: reasoning, answer, tool calls; one shot and every split agree."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from engine.io.text import Message, ResponseStream, Tags, ToolCall, parse_response

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "s": {"type": "string"}, "i": {"type": "integer"}, "x": {"type": "number"},
                    "b": {"type": "boolean"}, "a": {"type": "array"}, "o": {"type": "object"},
                    "n": {"type": ["integer", "null"]}, "u": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
                    "e": {"enum": ["p", "q"]}, "k": {"enum": [1, 2]}, "p": {"properties": {}}, "any": {},
                    "sn": {"type": ["string", "null"]}, "nu": {"type": "integer", "nullable": True},
                },
            },
        },
    }
]  # fmt: skip


def call(*parameters, name="f"):
    inner = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in parameters)
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "thinking", "want"),
    [
        ("", True, Message("")),
        ("", False, Message("")),
        ("\n\nHello \n", False, Message("Hello")),
        ("    code\n", False, Message("    code")),
        ("hm\n</think>\n\nHello", True, Message("Hello", "hm")),
        ("<think>\nhm</think>Hello", True, Message("Hello", "hm")),
        ("\n<think>\nhm</think>Hello", False, Message("Hello", "hm")),
        ("never closed", True, Message("", "never closed")),
        ("a <think> b </think> c", False, Message("a <think> b </think> c")),
        ("a</think>b</think>c", True, Message("b</think>c", "a")),
        ("cut </thi", True, Message("", "cut </thi")),
        (call(("s", "v")), False, Message("", "", [ToolCall("f", {"s": "v"})])),
        (f"t</think>\nok\n{call(('i', 1))}\n{call(name='g')}\n", True,
         Message("ok", "t", [ToolCall("f", {"i": 1}), ToolCall("g", {})])),
        (f"{call()} after", False, Message(" after", "", [ToolCall("f", {})])),
        (call(("s", "\n two\nlines \n")), False, Message("", "", [ToolCall("f", {"s": "\n two\nlines \n"})])),
        ("<tool_call><function=f><parameter=i>7</parameter></function></tool_call>", False,
         Message("", "", [ToolCall("f", {"i": 7})])),
        ("<tool_call>\n<function=f>\n</function>\n<function=g>\n</function>\n</tool_call>", False,
         Message("", "", [ToolCall("f", {}), ToolCall("g", {})])),
        ("<tool_call>\n<function=f>\n<parameter=i>\n3\n</parameter>\n</function>", False,
         Message("", "", [ToolCall("f", {"i": 3})])),
        ("use <tool_call> so", False, Message("use <tool_call> so")),
        ('<tool_call>{"name": "f"}</tool_call>', False, Message('<tool_call>{"name": "f"}</tool_call>')),
        ("<tool_call>\n<function=f>\n<parameter=i>\n3\n</function>\n</tool_call>", False,
         Message("<tool_call>\n<function=f>\n<parameter=i>\n3\n</function>\n</tool_call>")),
        ("<tool_call>\n<function=>\n</function>\n</tool_call>", False,
         Message("<tool_call>\n<function=>\n</function>\n</tool_call>")),
        ("<tool_call></tool_call>", False, Message("<tool_call></tool_call>")),
        (f"<tool_call>\n<function=x\n{call(('i', 2))}", False,
         Message("<tool_call>\n<function=x", "", [ToolCall("f", {"i": 2})])),
        (call(("i", 1)), True, Message("", call(("i", 1)))),
    ],
)  # fmt: skip
def test_parse(text, thinking, want):
    assert parse_response(text, thinking=thinking, tools=TOOLS) == want


@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        ("s", "12", "12"), ("s", "null", "null"), ("s", "True", "True"),
        ("i", "12", 12), ("i", " -3 ", -3), ("i", "4.0", 4), ("i", "4.5", "4.5"), ("i", "x", "x"), ("i", "None", None),
        ("i", "1" * 1001, "1" * 1001), ("i", "٣", "٣"),
        ("x", "1.5", 1.5), ("x", "2", 2), ("x", "1e3", 1000.0), ("x", ".5", 0.5), ("x", "nan", "nan"),
        ("x", "1e999", "1e999"), ("x", "Infinity", "Infinity"),
        ("b", "True", True), ("b", "false", False), ("b", "FALSE", False), ("b", "yes", "yes"), ("b", "1", "1"),
        ("a", "[1, \"x\"]", [1, "x"]), ("a", "[1", "[1"), ("a", '{"a": 1}', '{"a": 1}'), ("a", "[NaN]", "[NaN]"),
        ("a", "[" * 5000, "[" * 5000),
        ("o", '{"a": [true, null]}', {"a": [True, None]}), ("p", '{"z": 1}', {"z": 1}),
        ("n", "null", None), ("n", "5", 5), ("nu", "null", None), ("sn", "null", None), ("sn", "x", "x"),
        ("u", "5", 5), ("u", "five", "five"), ("e", "p", "p"), ("k", "2", 2),
        ("any", "5", "5"), ("undeclared", "5", "5"),
    ],
)  # fmt: skip
def test_arguments_follow_the_schema(name, text, want):
    (made,) = parse_response(call((name, text)), thinking=False, tools=TOOLS).tool_calls
    got = made.arguments[name]
    assert got == want and type(got) is type(want)


def test_unknown_tools_and_broken_schemas_leave_text():
    assert parse_response(call(("i", "5"), name="g"), thinking=False, tools=TOOLS).tool_calls[0].arguments == {"i": "5"}
    assert parse_response(call(("i", "5")), thinking=False).tool_calls[0].arguments == {"i": "5"}
    loop = {"type": None}
    loop["anyOf"] = [{"type": ["integer", 7]}, 5]
    for schema in (loop, 5, None, {"type": 5}, {"anyOf": 3}, {"enum": [[]]}):
        tools = [{"name": "f", "parameters": {"properties": {"i": schema}}}]
        parse_response(call(("i", "5")), thinking=False, tools=tools)
    parse_response(call(("i", "5")), thinking=False, tools=[{"name": "f", "parameters": {"properties": 5}}])


def run(text, cuts, thinking, **options):
    stream = ResponseStream(thinking, **options)
    events, at = [], 0
    for cut in [*cuts, len(text)]:
        events += stream.push(text[at:cut])
        at = cut
    events += stream.flush()
    return stream, events


def joined(events, kind):
    return "".join(e.text for e in events if e.kind == kind)


STOPS = st.sampled_from(["STOP", "TO", "STOPa", "\n\n", "</think>", "<tool_call>", "a", "<tool"])
PIECES = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=i>",
     "</parameter>", "\n", " ", "\n\n", "12", "a", "STOP", "STO", "</", "<", "t", call(("i", "3")), "ST", "OP", "\r\n"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(PIECES, max_size=14), thinking=st.booleans(), inside=st.booleans(),
    stop=st.lists(STOPS, max_size=2),
    data=st.data(),
)  # fmt: skip
def test_every_split_gives_the_same(pieces, thinking, inside, stop, data):
    text = "".join(pieces)
    options = {"stop": stop, "stop_in_reasoning": inside, "tools": TOOLS}
    whole, events = run(text, [], thinking, **options)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    for split in (cuts, range(1, len(text))):
        stream, parts = run(text, split, thinking, **options)
        assert stream.stopped == whole.stopped and stream.message == whole.message
        for kind in ("reasoning", "answer", "tool_call"):
            assert joined(parts, kind) == joined(events, kind)
    assert joined(events, "answer") == whole.message.content
    assert joined(events, "reasoning") == whole.message.reasoning
    assert [c for e in events for c in e.calls] == whole.message.tool_calls
    if not stop:
        assert whole.message == parse_response(text, thinking=thinking, tools=TOOLS)


def test_nothing_of_a_tag_or_stop_string_leaks_and_the_rest_is_prompt():
    stream = ResponseStream(True, ["END"])
    assert [e.text for e in stream.push("think </thi")] == ["think"]
    assert [(e.kind, e.text) for e in stream.push("s is</think>Hi E")] == [
        ("reasoning", " </this is"),
        ("answer", "Hi"),
    ]
    assert [e.text for e in stream.push("N")] == []
    assert [e.text for e in stream.push("O. ")] == [" ENO."]
    assert stream.push("EN") == [] and not stream.stopped
    assert stream.push("D more") == [] and stream.stopped
    assert stream.push("</think> x") == [] and stream.flush() == []
    assert stream.message == Message("Hi ENO.", "think </this is")


def test_stop_strings_by_section():
    text = "a END b</think>c END d"
    assert run(text, [], True, stop="END")[0].message == Message("c", "a END b")
    assert run(text, [], True, stop=["END"], stop_in_reasoning=True)[0].message == Message("", "a")
    inside = f"{call(('s', 'END'))} tail END x"
    stream, _ = run(inside, [], False, stop=["END"])
    assert stream.stopped and stream.message == Message(" tail", "", [ToolCall("f", {"s": "END"})])
    for bad in ([""], [3], ["x"] * 65):
        with pytest.raises(InputError, match="stop"):
            ResponseStream(False, bad)


def test_false_alarms_are_released_early():
    stream = ResponseStream(False)
    assert joined(stream.push("the <tool_call> tag"), "answer") == "the <tool_call> tag"


def test_other_tags():
    tags = Tags(think_open="[T]", think_close="[/T]", call_open="[C]", call_close="[/C]")
    got = parse_response("x[/T]y[C]<function=f></function>[/C]", thinking=True, tags=tags)
    assert got == Message("y", "x", [ToolCall("f", {})])


def test_message_goes_back_into_a_conversation():
    from engine.io.text.template import check_messages

    message = parse_response(f"hm</think>{call(('i', 1))}", thinking=True, tools=TOOLS).to_dict()
    assert message["reasoning_content"] == "hm" and message["content"] == ""
    assert check_messages([message])[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"i": 1}}
