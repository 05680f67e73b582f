"""A tokenizer that chats: letters, some of which are merged, and a template whose turns end in tokens of their own."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.cake.poisoned import Poisoned

SPECIAL = ["<s>", "<user>", "<system>", "<tool>", "<assistant>", "<end>"]
TEMPLATE = (
    "<s>{% if tools %}<tool>{% for t in tools %}{{ t.name }} {% endfor %}<end>{% endif %}"
    "{% for m in messages %}"
    "{% if m.role not in ['user', 'system', 'tool', 'assistant'] %}{{ raise_exception('no ' + m.role) }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRIPPING = TEMPLATE.replace("{{ m.content }}", "{{ m.content[8:] if m.role == 'assistant' else m.content }}")
"""Leaves out how an answer begins."""
LETTERS = "abcdefghij "


def tokenizer(merged: bool = True, template: str | None = TEMPLATE) -> Any:
    """If not merged, every text can be cut in one way only."""
    alphabet = sorted({"Ġ", *LETTERS.strip()})
    merges = [("a", "b"), ("c", "d"), ("ab", "cd")] if merged else []
    merges += permutations("acegi" if merged else "", 2)
    words = {word: number for number, word in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    made = Tokenizer(models.BPE(words, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(sign, normalized=False) for sign in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token="<s>")
    fast.chat_template = template
    return fast


def talker(made: Any) -> Poisoned:
    """A tiny model that answers in letters, and never ends."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(made),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        model.lm_head.weight[made.convert_tokens_to_ids(SPECIAL)] = 0
    engine = Poisoned(model)
    engine.stop_tokens = frozenset([made.convert_tokens_to_ids("<end>")])
    return engine
