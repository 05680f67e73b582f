"""The demo's real model on a piece of its real document."""

from __future__ import annotations

import pytest

from cakekv.cake import Cake
from cakekv.demo.document import document_prompt, read_document
from cakekv.demo.model import demo_model
from cakekv.store.memory import MemoryStore

CHUNK = 64


@pytest.mark.slow
def test_the_answer_is_the_same_in_every_mode() -> None:
    store = MemoryStore()
    with Cake.from_pretrained(demo_model(), store=store, chunk_tokens=CHUNK) as cake:
        document = read_document("demo", cake.tokenizer)[:2000]
        prompt = document_prompt(cake.tokenizer, document, "What is an object's identity?")
        answers = {}
        for mode in ("compute", "load", "both", "auto"):
            answers[mode] = cake.generate(prompt, max_new_tokens=12, mode=mode)
            assert cake.wait_saved().failed_chunks == 0
    full = len(prompt) // CHUNK
    assert answers["compute"].report.computed_tokens == len(prompt)
    assert answers["load"].report.loaded_tokens == full * CHUNK
    assert answers["both"].report.loaded_tokens > 0
    assert answers["both"].report.computed_tokens > len(prompt) - full * CHUNK
    assert answers["compute"].text
    assert len({tuple(answer.token_ids) for answer in answers.values()}) == 1
