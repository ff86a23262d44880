"""The tokenizer, and questions as the engine asks them: pieces of the chat are tokenised one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from questions import Question
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.models.vega3d.scene import INSTRUCTION, SYSTEM, TASKS

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<ground>", "<coord>"]
END = "<|im_end|>"
HEAD = (SYSTEM, "<|im_start|>user", "\n")  # what stands in front of the frames
TAIL = ("<|im_end|>\n", "<|im_start|>assistant\n")
VOCAB = 640


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE in which every word of the questions is one token."""
    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\n|[^\p{L}\n]"), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator([*texts, *[SYSTEM, INSTRUCTION, *TASKS.values(), *TAIL] * 50], trainer)
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tok


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
