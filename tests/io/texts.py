"""Small tokenizers and a chat template, made here in the published file formats."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "What is 12 + 34? The sum of 12 and 34 is 46.",
    "The quick brown fox jumps over the lazy dog, twice: ünïcödé, 你好世界, 😀😃 and tabs\t\n\n  spaces.",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

TEMPLATE = """\
{%- set thinking = enable_thinking if enable_thinking is defined else true %}
{%- set ns = namespace(last_user = -1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}
{%- if messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content, messages[1:] %}
{%- else %}
    {%- set system, turns = '', messages %}
{%- endif %}
{{- '<|im_start|>system\\n' ~ system }}
{%- if tools %}
    {{- '\\n\\n# Tools' }}
    {%- for tool in tools %}
        {{- '\\n<function>\\n<name>' ~ tool.function.name ~ '</name>' }}
        {%- for name, p in tool.function.parameters.properties | items %}
            {{- '\\n<parameter>' ~ name ~ ':' ~ (p.type | string) ~ '</parameter>' }}
        {%- endfor %}
        {{- '\\n</function>' }}
    {%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for m in turns %}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content | trim %}
        {{- '<|im_start|>assistant\\n<think></think>' ~ content.split('</think>')[-1] }}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n<function=' ~ call.function.name ~ '>\\n' }}
            {%- for k, v in call.function.arguments | items %}
                {{- '<parameter=' ~ k ~ '>\\n' ~ (v if v is string else v | tojson) ~ '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.previtem is not defined or loop.previtem.role != 'tool' %}{{ '<|im_start|>user\\n' }}{% endif %}
        {{- '<tool_response>\\n' ~ m.content ~ '\\n</tool_response>\\n' }}
        {%- if loop.nextitem is not defined or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- elif m.role in ['user', 'system'] %}
        {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
    {%- else %}
        {{- raise_exception('role ' ~ m.role ~ ' is not known') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' ~ ('<think>\\n' if thinking else '<think></think>') }}
{%- endif %}
"""


def byte_level():
    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([AddedToken(t, special=False, normalized=False) for t in [*PLAIN, "a b ü"]])
    return made


def byte_fallback():
    """SentencePiece's style: spaces as U+2581, unknown characters as byte tokens."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581",
        "\u2581the",
        "he",
        "t",
        "h",
        "e",
        "a",
    ]
    made = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def write(folder, tokenizer=None, template=TEMPLATE, **config):
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    values = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "unk_token": "<unk>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
