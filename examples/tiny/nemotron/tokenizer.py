"""Trains the tokenizer of nemotron-tiny on its own data and renders its chat template."""

from __future__ import annotations

import json
import random
from pathlib import Path

import data
import jinja2.sandbox
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 768
SPECIAL = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 10)), "<|im_start|>", "<|im_end|>"]
# Single tokens that a reader of the text must see, so they are not "special".
VISIBLE = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
# Digits one by one; a mark may lead a word; line ends stay apart.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


class Template:
    """A checkpoint's chat template."""

    def __init__(self, file: Path):
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        # As the ecosystem renders it: plain JSON, no HTML escapes.
        env.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self.template = env.from_string(file.read_text())

    def render(self, messages: list[dict], tools: list[dict] | None = None, enable_thinking: bool = True) -> str:
        """The prompt up to where the assistant's answer begins."""
        return self.template.render(
            messages=messages, tools=tools, enable_thinking=enable_thinking, add_generation_prompt=True
        )


def train_tokenizer(template: Template, seed: int = 0, documents: int = 6000) -> Tokenizer:
    """Byte-level BPE: ids 0-11 special, 12-17 the visible marks, then the 256 bytes, then merges."""
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    r = random.Random(f"tokenizer {seed}")

    def texts():
        for _ in range(documents):
            p = data.training_problem(r)
            yield template.render(p.messages, p.tools) + p.thought + "\n</think>\n" + p.reply

    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL + VISIBLE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts(), trainer)
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    spec = json.loads(tok.to_str())
    for entry in spec["added_tokens"]:
        entry["special"] = entry["content"] in SPECIAL
    return Tokenizer.from_str(json.dumps(spec))


def save_tokenizer(tok: Tokenizer, template: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tok.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(template.read_text())
