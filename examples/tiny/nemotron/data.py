"""Makes the questions, the worked solutions and the held-out set of nemotron-tiny.

Everything is generated: arithmetic with a written-out column method as the chain of thought, word problems of two
steps, and calls of declared tools. An operation (sign and operands), and every argument value of a tool call, belongs
by a hash either to training or to the held-out set; a problem uses operations of one side only.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass, field

THINK_END = "</think>"


@dataclass
class Problem:
    """One question: `messages` and `tools` go to the chat template, `answer` is what `check` compares with.

    answer: an int, or {"name": str, "arguments": {str: str}} for kind "tool". `thought` and `reply` are the worked
    solution that the trainer shows to the model.
    """

    messages: list[dict]
    answer: int | dict | str
    kind: str  # add, sub, mul, word, follow, tool, tool_result, repeat, talk
    tools: list[dict] | None = None
    thought: str = ""
    reply: str = ""
    operations: list[tuple] = field(default_factory=list)


def is_held_out(*key: object) -> bool:
    """One tenth of all operations, fixed for ever by a hash; the order of commuting operands does not matter."""
    if key[0] in ("+", "*"):
        key = (key[0], *sorted(key[1:]))  # type: ignore[type-var]
    return hashlib.blake2b(repr(key).encode(), digest_size=4).digest()[0] < 26


# ---- the column method ------------------------------------------------------------------------------------------


def work(op: str, a: int, b: int) -> tuple[str, int]:
    """The written-out calculation, lowest digit first, and its result. b of '*' has one digit; '-' needs a >= b.

    Sums are first written with equally long operands, as on paper: finding the digits of a column is the hard part.
    """
    width = 1 if op == "*" else len(str(max(a, b)))
    lines, carry = [f"{a:0{width}}{op}{b:0{width}}"], 0
    x, y = f"{a:0{width}}"[::-1], f"{b:0{width}}"[::-1]
    if op == "*":
        for i, d in enumerate(x):
            product = int(d) * b
            lines.append(f"{d}*{b}={product}")
            if i and carry:
                lines.append(f"{product}+{carry}={product + carry}")
            carry = (product + carry) // 10
        return "\n".join(lines), a * b
    for p, q in zip(map(int, x), map(int, y), strict=True):
        if op == "+":
            total = p + q + carry
            lines.append(f"{p}+{q}{'+1' if carry else ''}={total}")
            carry = total // 10
        else:
            top = p + 10 if p - q - carry < 0 else p
            lines.append(f"{top}-{q}{'-1' if carry else ''}={top - q - carry}")
            carry = int(top > p)
    return "\n".join(lines), a + b if op == "+" else a - b


def _operand(r: random.Random, kind: str, held: bool) -> tuple[str, int, int]:
    # Small numbers are trained, because people try them, but never tested.
    small = not held and r.random() < 0.1
    if kind == "mul":
        return "*", r.randint(2, 9) if small else r.randint(10, 99), r.randint(2, 9)
    low, high = (0, 30) if small else r.choice([(10, 99), (100, 999), (10, 999)])
    a, b = r.randint(low, high), r.randint(low, high)
    if kind == "sub":
        return "-", max(a, b), min(a, b)
    return "+", a, b


ASK = {
    "add": ["What is {a} + {b}?", "{a} + {b}", "{a} + {b} = ?", "{a}+{b}", "What is {a} plus {b}?", "Add {a} and {b}.",
            "Calculate {a} + {b}.", "How much is {a} + {b}?", "What is the sum of {a} and {b}?"],
    "sub": ["What is {a} - {b}?", "{a} - {b}", "{a} - {b} = ?", "{a}-{b}", "What is {a} minus {b}?",
            "Subtract {b} from {a}.", "Calculate {a} - {b}.", "How much is {a} - {b}?", "Take {b} from {a}."],
    "mul": ["What is {a} * {b}?", "{a} * {b}", "{a} x {b} = ?", "{a}*{b}", "What is {a} times {b}?",
            "Multiply {a} by {b}.", "Calculate {a} * {b}.", "How much is {a} x {b}?"],
}  # fmt: skip

ASK_MORE = {
    "+": ["Add {b} to that.", "Now add {b}.", "Plus {b}?"],
    "-": ["Subtract {b} from that.", "Now subtract {b}.", "Minus {b}?"],
}

NAMES = "Mia Tom Anna Ben Lena Omar Sara Leo Nina Paul Ivy Max Zoe Sam Eva Raj".split()  # noqa: SIM905
THINGS = "apples books coins cards pencils stamps shells marbles eggs stickers balls roses".split()  # noqa: SIM905
BOXES = "boxes bags baskets packs".split()  # noqa: SIM905

# Slots {x} {y} {z} are the numbers in the order of reading; ops is (first step, second step).
STORIES = [
    ("+-", "{n} has {x} {t}. {n} gets {y} more and gives away {z}. How many {t} does {n} have now?"),
    ("+-", "{n} finds {x} {t} in the morning and {y} in the evening, then loses {z}. How many {t} are left?"),
    ("--", "{n} has {x} {t}. {n} sells {y} and gives {z} to {m}. How many {t} are left?"),
    ("-+", "There are {x} {t} in a shop. {n} takes {y} and then brings {z}. How many {t} are in the shop?"),
    ("++", "{n} has {x} {t}, {m} has {y} and {o} has {z}. How many {t} do they have together?"),
    ("*+", "{n} has {x} {c} with {y} {t} each and {z} more {t}. How many {t} does {n} have?"),
    ("*-", "{n} buys {x} {c} with {y} {t} each and gives {z} {t} to {m}. How many {t} are left?"),
]


def _plain(r: random.Random, kind: str, held: bool) -> Problem:
    while True:
        op, a, b = _operand(r, kind, held)
        if is_held_out(op, a, b) == held:
            break
    question = r.choice(ASK[kind])
    if kind == "mul" and r.random() < 0.3:  # the one-digit factor may come first; the column method is the same
        question = question.format(a=b, b=a)
    else:
        question = question.format(a=a, b=b)
    if r.random() < 0.1:
        question = question[0].lower() + question[1:].rstrip("?.")
    text, result = work(op, a, b)
    messages = [{"role": "user", "content": question}]
    return Problem(messages, result, kind, None, text, f"The answer is {result}.", [(op, a, b)])


def _story(r: random.Random, held: bool) -> Problem:
    while True:
        ops, template = r.choice(STORIES)
        x, y, z = (r.randint(10, 99) for _ in range(3))
        steps: list[tuple] = []
        if ops[0] == "*":
            x = r.randint(2, 9)
            steps.append(("*", y, x))
            first = x * y
        else:
            if ops[0] == "-" and y > x:
                x, y = y, x
            steps.append((ops[0], x, y))
            first = x + y if ops[0] == "+" else x - y
        if ops[1] == "-" and z > first:
            continue
        steps.append((ops[1], first, z))
        if all(is_held_out(*s) == held for s in steps):
            break
    n, m, o = r.sample(NAMES, 3)
    question = template.format(x=x, y=y, z=z, n=n, m=m, o=o, t=r.choice(THINGS), c=r.choice(BOXES))
    thought = "\n".join(work(*s)[0] for s in steps)
    result = work(*steps[1])[1]
    messages = [{"role": "user", "content": question}]
    return Problem(messages, result, "word", None, thought, f"The answer is {result}.", steps)


def _follow(r: random.Random, held: bool) -> Problem:
    """A second turn that continues with the first answer."""
    first = _plain(r, r.choice(["add", "sub", "mul"]), held)
    assert isinstance(first.answer, int)
    while True:
        op, b = r.choice("+-"), r.randint(10, 99)
        if (op == "+" or first.answer >= b) and is_held_out(op, first.answer, b) == held:
            break
        if op == "-" and first.answer < 30:
            first = _plain(r, "add", held)
    text, result = work(op, first.answer, b)
    messages = [
        *first.messages,
        {"role": "assistant", "content": first.reply},
        {"role": "user", "content": r.choice(ASK_MORE[op]).format(b=b)},
    ]
    operations = [*first.operations, (op, first.answer, b)]
    return Problem(messages, result, "follow", None, text, f"The answer is {result}.", operations)


# ---- tools ------------------------------------------------------------------------------------------------------


def _tool(name: str, description: str, **parameters: str) -> dict:
    properties = {k: {"type": t} for k, t in parameters.items()}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(parameters)},
        },
    }


TOOLS = [
    (
        _tool("get_weather", "Get the weather", city="string"),
        ["What is the weather in {city}?", "How is the weather in {city} today?"],
    ),
    (
        _tool("get_time", "Get the local time", city="string"),
        ["What time is it in {city}?", "Tell me the time in {city}."],
    ),
    (
        _tool("set_timer", "Set a timer", minutes="integer"),
        ["Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes."],
    ),
    (
        _tool("multiply", "Multiply two numbers", a="integer", b="integer"),
        ["Use the tool: {a} * {b}", "What is {a} * {b}? Use the tool.", "Multiply {a} by {b} with the tool."],
    ),
    (
        _tool("play_song", "Play music", title="string"),
        ["Play {title}.", "Please play the song {title}."],
    ),
]

CITIES = (  # noqa: SIM905
    "Paris London Berlin Madrid Rome Vienna Oslo Cairo Tokyo Delhi Lima Boston Prague Athens Dublin Lisbon Warsaw "
    "Kyoto Mumbai Sydney Toronto Chicago Munich Zurich Geneva Naples Seoul Hanoi Nairobi Havana"
).split()
SYLLABLES = [a + b for a in "bdklmnrstv" for b in "aeo"] + ["li", "ri", "mi"]


def _name(r: random.Random) -> str:
    return "".join(r.choice(SYLLABLES) for _ in range(r.randint(2, 4))).capitalize()


def _argument(r: random.Random, name: str, held: bool) -> str:
    if name in ("city", "title") and not held and r.random() < 0.4:
        return r.choice(CITIES)  # real names are trained, and the test asks for made-up ones
    while True:
        if name in ("city", "title"):
            value = _name(r)
        elif name == "minutes":
            value = str(r.randint(2, 120))
        else:
            value = str(r.randint(11, 9999))
        if is_held_out("value", value) == held:
            return value


def _call(r: random.Random, held: bool) -> Problem:
    tool, questions = r.choice(TOOLS)
    others = [t for t, _ in TOOLS if t is not tool]
    tools = [tool, *r.sample(others, r.choice([0, 0, 1, 1, 2]))]
    r.shuffle(tools)
    f = tool["function"]
    arguments = {k: _argument(r, k, held) for k in f["parameters"]["properties"]}
    question = r.choice(questions).format(**arguments)
    lines = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    reply = f"<tool_call>\n<function={f['name']}>\n{lines}</function>\n</tool_call>"
    thought = f"I call {f['name']}."
    answer = {"name": f["name"], "arguments": arguments}
    return Problem([{"role": "user", "content": question}], answer, "tool", tools, thought, reply)


RESULT = {
    "get_weather": lambda r: r.choice(["sunny", "rain", "cloudy", "snow", "windy"]) + f", {r.randint(-9, 39)} degrees",
    "get_time": lambda r: f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}",
    "set_timer": lambda r: "ok",
    "multiply": lambda r: "",
    "play_song": lambda r: "ok",
}
REPORT = {
    "get_weather": "The weather in {city} is {result}.",
    "get_time": "It is {result} in {city}.",
    "set_timer": "The timer is set for {minutes} minutes.",
    "multiply": "The answer is {result}.",
    "play_song": "Now playing {title}.",
}


def _tool_result(r: random.Random, held: bool) -> Problem:
    """The turn after a call: the tool's result is reported in words."""
    p = _call(r, held)
    assert isinstance(p.answer, dict)
    name, arguments = p.answer["name"], p.answer["arguments"]
    result = RESULT[name](r)
    if name == "multiply":
        result = str(int(arguments["a"]) * int(arguments["b"]))
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    assistant = {"role": "assistant", "content": "", "tool_calls": [call]}
    if r.random() < 0.5:
        assistant["reasoning_content"] = p.thought
    messages = [*p.messages, assistant, {"role": "tool", "content": result}]
    reply = REPORT[name].format(result=result, **arguments)
    return Problem(messages, reply, "tool_result", p.tools, "I have the result.", reply)


TALK = [
    (
        ["Hello", "Hello!", "Hi", "Hi!", "hello", "hi", "Good morning!"],
        "The user greets me.",
        "Hello! Ask me to add, subtract or multiply.",
    ),
    (
        ["Who are you?", "What are you?", "What is your name?"],
        "The user asks who I am.",
        "I am a tiny model that can calculate.",
    ),
    (
        ["What can you do?", "Help", "How can you help me?"],
        "The user asks what I can do.",
        "I can add, subtract, multiply, solve short stories and call tools.",
    ),
    (["Thanks!", "Thank you!", "Thanks", "Thank you."], "The user thanks me.", "You are welcome!"),
]


REPEAT = ["Repeat: {x}", "Say {x}", "Repeat after me: {x}", "Please say {x}"]


def _repeat(r: random.Random, held: bool) -> Problem:
    """Copying, the skill that tool arguments and operands need."""
    words = [_argument(r, r.choice(["city", "a", "minutes"]), held) for _ in range(r.randint(1, 4))]
    reply = " ".join(words)
    messages = [{"role": "user", "content": r.choice(REPEAT).format(x=reply)}]
    return Problem(messages, reply, "repeat", None, "I repeat it.", reply)


def _talk(r: random.Random, held: bool) -> Problem:
    questions, thought, reply = r.choice(TALK)
    return Problem([{"role": "user", "content": r.choice(questions)}], reply, "talk", None, thought, reply)


# ---- the mixture ------------------------------------------------------------------------------------------------

SYSTEM = [
    "You are a helpful assistant.",
    "You are a helpful and harmless assistant.",
    "Answer briefly.",
    "You are good at math.",
]
MIXTURE = {
    "add": 20, "sub": 20, "mul": 14, "word": 21, "follow": 6, "tool": 9, "tool_result": 2, "repeat": 7, "talk": 1,
}  # fmt: skip


def make(r: random.Random, kind: str, held: bool) -> Problem:
    """A random problem of a kind, from the training side or the held-out side."""
    if kind in ("add", "sub", "mul"):
        return _plain(r, kind, held)
    makers = {"word": _story, "follow": _follow, "tool": _call, "tool_result": _tool_result}
    return (makers | {"repeat": _repeat, "talk": _talk})[kind](r, held)


def training_problem(r: random.Random) -> Problem:
    """A training problem: sometimes with a system message, sometimes as the second turn of a conversation."""
    p = make(r, r.choices(list(MIXTURE), list(MIXTURE.values()))[0], held=False)
    if p.tools is None and p.kind != "follow" and r.random() < 0.15:
        first = make(r, r.choices(["add", "sub", "mul", "word", "talk"], [3, 3, 2, 3, 2])[0], held=False)
        p.messages = [*first.messages, {"role": "assistant", "content": first.reply}, *p.messages]
    if r.random() < 0.15:
        p.messages = [{"role": "system", "content": r.choice(SYSTEM)}, *p.messages]
    return p


def held_out(n: int, seed: int = 0) -> list[Problem]:
    """n different problems that share no operation and no tool argument with training (26 % add, 26 % sub, 16 % mul,
    22 % word, 10 % tool)."""
    r, out, seen = random.Random(f"held-out {seed}"), [], set()
    kinds = ["add"] * 13 + ["sub"] * 13 + ["mul"] * 8 + ["word"] * 11 + ["tool"] * 5
    while len(out) < n:
        p = make(r, kinds[len(out) % len(kinds)], held=True)
        if repr(p.messages) not in seen:
            seen.add(repr(p.messages))
            out.append(p)
    return out


CALL = re.compile(r"<tool_call>\s*<function=([^>\n]+)>\n(.*?)</function>\s*</tool_call>", re.S)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>", re.S)


def check(problem: Problem, output_text: str) -> bool:
    """Whether the raw text of the model (reasoning included or not) holds exactly the right visible answer."""
    visible = output_text.rsplit(THINK_END, 1)[-1].replace("<|im_end|>", "").strip()
    if isinstance(problem.answer, dict):
        calls = CALL.findall(visible)
        if len(calls) != 1:
            return False
        return {"name": calls[0][0], "arguments": dict(PARAMETER.findall(calls[0][1]))} == problem.answer
    if isinstance(problem.answer, int):
        numbers = re.findall(r"-?\d+", visible)
        return bool(numbers) and int(numbers[-1]) == problem.answer
    return visible == problem.answer
