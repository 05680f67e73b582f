"""cakekv store explain"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.table import Table

from cakekv.cli.console import RESULTS, print_json
from cakekv.cli.store.opened import Json, Url, opened, say
from cakekv.cli.store.prompt import PromptOptions, about_a_prompt
from cakekv.store.maintenance.explain import OtherIdentity, PromptExplanation, Whereabouts, explain_prompt

_NAMED = 3
_LONGEST = 40


@about_a_prompt
def explain(store: Url, prompt: PromptOptions, as_json: Json = False) -> None:
    """Say why a prompt was missed: which of its chunks are stored where, and what became of the others.

    If none of this model's chunks are stored, says in which field the nearest identity differs: weights, element type,
    tokens per chunk, codec (recipe), tenant, … Memory and disk remember the last chunks that they removed, and when;
    servers do not tell. Keys of the plug-in for vLLM are made by vLLM; of its chunks only the identities are compared.

    Examples:

        cakekv store explain /var/cache/kv --document notes.txt --model path/to/model

        cakekv store explain redis://kv.example --tokens prompt.json --identity 3f2a
    """
    with opened(store) as found:
        asked = prompt.find(found)
        explained = explain_prompt(asked.root, asked.fields, asked.token_ids, found.tiers)
    if as_json:
        print_json(_as_json(explained, asked.root))
        return
    stored = sum(bool(chunk.tiers) for chunk in explained.chunks)
    say(f"{stored:,} of {len(explained.chunks):,} chunks are stored ({explained.prompt_tokens:,} tokens).")
    if explained.chunks:
        RESULTS.print(_table(explained))
    rest = explained.prompt_tokens % explained.chunk_tokens
    if rest:
        say(f"The last {rest:,} tokens fill no chunk, and are never stored.")
    if not explained.known and not explained.others:
        say("The store has no note of any identity: nothing was ever saved here.")
    elif not explained.known:
        say("Nothing of this identity was ever saved here. It differs from others that were:")
    elif explained.others:
        say("Chunks of this prompt are stored under other identities, too:")
    for other in explained.others[:_NAMED]:
        say(_sentence(other))
    if asked.window:
        say(f"Among a prompt's newest {asked.window:,} tokens, chunks in the codec's form are not used.")
    for note in explained.notes:
        say(note)


def _table(explained: PromptExplanation) -> Table:
    """One row for each run of chunks of which the same is to be said."""
    table = Table("tokens", "chunks", "where, or why not")
    for text, group in groupby(explained.chunks, _where):
        run = list(group)
        table.add_row(f"{run[0].start:,} to {run[-1].start + run[-1].tokens - 1:,}", f"{len(run):,}", text)
    return table


def _where(chunk: Whereabouts) -> str:
    if chunk.tiers:
        return ", ".join(chunk.tiers)
    return "not stored: " + ("; ".join(chunk.reasons) or "never saved here, or gone too long ago to be remembered")


def _sentence(other: OtherIdentity) -> str:
    differs = "; ".join(
        f"{name} is {_cut(mine)}, there {_cut(theirs)}" for name, (mine, theirs) in other.differs.items()
    )
    if other.chunks is None:
        stored = " (Whether it has this prompt cannot be told: its keys are made by vLLM.)"
    else:
        stored = f" It has {other.chunks:,} chunks of this prompt." if other.chunks else ""
    return f"- identity {other.root[:12]}…: {differs or 'no field that is known differs'}.{stored}"


def _cut(value: str | None) -> str:
    if value is None:
        return "not known"
    shown = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}…"
    return shown or "empty"


def _as_json(explained: PromptExplanation, root: bytes) -> dict[str, Any]:
    return {
        "identity": root.hex(),
        "identity_known": explained.known,
        "prompt_tokens": explained.prompt_tokens,
        "chunk_tokens": explained.chunk_tokens,
        "chunks": [
            {"key": one.key.hex(), "start": one.start, "tiers": one.tiers, "reasons": one.reasons}
            for one in explained.chunks
        ],
        "others": [
            {
                "identity": other.root,
                "differs": {name: {"asked": mine, "stored": theirs} for name, (mine, theirs) in other.differs.items()},
                "chunks": other.chunks,
            }
            for other in explained.others
        ],
        "notes": explained.notes,
    }
