"""The tokenizer, and questions as the engine asks them: pieces of the chat are tokenised one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from questions import Question
from tokenizers import Tokenizer

from engine.models.vega3d.scene import INSTRUCTION, SYSTEM, TASKS
from examples.tiny.tokens import train_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<ground>", "<coord>"]
END = "<|im_end|>"
HEAD = (SYSTEM, "<|im_start|>user", "\n")  # what stands in front of the frames
TAIL = ("<|im_end|>\n", "<|im_start|>assistant\n")
VOCAB = 640


def vocabulary(texts: Iterable[str]) -> Tokenizer:
    """In which every word of the questions is one token."""
    return train_tokenizer([*texts, *[SYSTEM, INSTRUCTION, *TASKS.values(), *TAIL] * 50], SPECIAL, VOCAB)


def pieces(tok: Tokenizer, *texts: str) -> list[int]:
    return [i for text in texts for i in tok.encode(text, add_special_tokens=False).ids]


def chat(tok: Tokenizer, question: Question) -> tuple[list[int], int]:
    """Ids of what follows the frames, and how many of them at its end are the answer, its end mark included."""
    asked = pieces(tok, "\n", TASKS["scanqa"].format(question=question.text), *TAIL)
    # The answer's words are the question's, space included.
    answer = pieces(tok, f" {question.answer}", END)
    return asked + answer, len(answer)


def save_tokenizer(tok: Tokenizer, folder: Path) -> None:
    tok.save(str(folder / "tokenizer.json"))
    config = {"eos_token": END, "add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
