"""Prompts of 3DreamBooth: marked names of subjects, the chat around a prompt, texts to be written in the picture."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import InputError
from engine.io.values import show

_GAP = " " * 8  # in front of every item: a broken line of the released source, which the model was trained with
_OBJECTS = "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
_ASPECTS = {
    "video": (
        "1. The main content and theme of the video.", _OBJECTS,
        "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
        "4. background environment, light, style and atmosphere.",
        "5. camera angles, movements, and transitions used in the video.",
    ),
    "image": (
        "1. The main content and theme of the image.", _OBJECTS,
        "3. The background environment, light, style and atmosphere.",
    ),
}  # fmt: skip
MARK = "<|im_start|>user\n"  # what stands behind it is the prompt's
_SPAN = re.compile(r"\[([^\[\]]+)\]")
_QUOTED = re.compile('"([^"]*)"|“([^”]*)”')


@dataclass(frozen=True)
class Prompt:
    """text: without marks. spans: names of subjects in it, as (first character, character behind the last)."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def quoted(self) -> tuple[str, ...]:
        """What stands between straight or curly double quotes, each text once."""
        return tuple(dict.fromkeys(t for pair in _QUOTED.findall(self.text) for t in pair if t))

    @property
    def glyphs(self) -> str:
        """What the byte-level encoder reads of quoted texts; empty where there are none."""
        return "".join(f'Text "{t}". ' for t in self.quoted)

    def marked(self, offsets: list[tuple[int, int]]) -> list[bool]:
        """Whether each token, by its characters in `text`, is part of a name."""
        return [any(first < b and a < last for a, b in self.spans) for first, last in offsets]


def read_prompt(value: object, *, needs_span: bool = False) -> Prompt:
    """A prompt with the names of subjects in brackets: `A [rhs plushie] on a desk`.

    The first place of each name counts. needs_span: the subject must be named, or nothing of it would be shown.
    Raises: InputError (no text, brackets that do not pair, an empty name, none where one is needed).
    """
    if not isinstance(value, str):
        raise InputError(f"prompt={show(value)} is not a text")
    text, names, at = "", [], 0
    for match in _SPAN.finditer(value):
        name = match[1].strip()
        if not name:
            raise InputError(f"prompt {show(value)} has brackets with no name in them")
        text += value[at : match.start()] + match[1]
        names.append(name)
        at = match.end()
    text += value[at:]
    if "[" in text or "]" in text:
        raise InputError(f"prompt {show(value)} has brackets that do not pair; a subject's name stands in [one pair]")
    if needs_span and not names:
        raise InputError(
            f"prompt {show(value)} names no subject; put its identifier and class into brackets, as trained"
        )
    spans = {name: (text.index(name), text.index(name) + len(name)) for name in names}
    return Prompt(text, tuple(spans.values()))


def chat(prompt: str, kind: str = "video") -> str:
    """What the language model reads. kind: 'video' to generate, 'image' to personalise."""
    items = "".join(f"{_GAP}{item} " for item in _ASPECTS[kind]).rstrip(" ")
    system = f"You are a helpful assistant. Describe the {kind} by detailing the following aspects: {items}"
    return f"<|im_start|>system\n{system}<|im_end|>\n{MARK}{prompt or ' '}<|im_end|>\n<|im_start|>assistant\n"
