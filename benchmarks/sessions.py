"""What sessions save: turns of chats computed in full, restored as prefixes are, and restored with their answers.

    python benchmarks/sessions.py --json benchmarks/sessions.json

The chats are those of conversations.json. The model answers each turn greedily, in a session over a store on the local
disk; the same prompt is also computed in full, and restored from a store that has only the full chunks of prompts.
*restarted* is a new `Cake`, which knows nothing but the store, the messages, and its calibration file. *loaded_share*
is how much of what was there before the new message was loaded, in tokens. *differ* counts answers that are not those
of a full prefill of the same tokens. Times are seconds to the first token, means over chats. A chat that does not count
comes first; the calibration is from there.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import typer

from cakekv.bench.machine import describe_run
from cakekv.cake import Cake
from cakekv.cli.console import write_json
from cakekv.cli.model import load_cake
from cakekv.prompt import Chat
from cakekv.restore.options import Mode

CHATS = Path(__file__).with_name("conversations.json")
BEFORE = {"system": "You answer in one sentence.", "said": ["What is dew?", "And what is fog?", "Which one is colder?"]}
"""A chat that does not count."""


class Turn(NamedTuple):
    """One turn of one chat."""

    number: int
    before: int
    """Tokens of the turns before it."""
    prompt: int
    compute_s: float
    restored_s: float
    sessions_s: float
    restarted_s: float
    loaded: int
    restored_loaded: int
    restarted_loaded: int
    differs: bool
    restarted_differs: bool
    cuts_differ: bool
    """Whether the answer is another one if the full prefill is cut into spans of a chunk each."""
    cut_otherwise: bool
    """Whether an answer becomes other tokens when its text is cut anew, which a restart has to do."""

    def share(self, loaded: int) -> float:
        """Of what was there before, how much was loaded."""
        return min(loaded, self.before) / self.before


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")] = Path("out/sessions.json"),
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 48,
    chats: Annotated[int, typer.Option(min=1, help="How many, the first ones.")] = 10,
    mode: Annotated[str, typer.Option(help="As of Cake.generate.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the model. In bfloat16 it matters how a prefill is cut.")] = "float32",
    cuts: Annotated[
        bool, typer.Option(help="Count, too, how many full prefills that are cut otherwise differ.")
    ] = False,
    tiny: Annotated[bool, typer.Option(help="Two chats of three turns, short answers: whether it runs.")] = False,
) -> None:
    """Measure sessions on the demo's model."""
    talks = json.loads(CHATS.read_text())[:chats]
    if tiny:
        talks = [{**chat, "said": chat["said"][:3]} for chat in talks[:2]]
        new_tokens = min(new_tokens, 12)
    how: Mode = mode  # type: ignore[assignment]  # an unknown one is refused
    loaded, turns = load_cake(model, None, dtype=dtype), list[Turn]()
    with tempfile.TemporaryDirectory(prefix="cakekv-sessions-") as folder:
        talk(loaded, Path(folder), BEFORE, new_tokens, how)
        for chat in talks:
            turns += talk(loaded, Path(folder), chat, new_tokens, how, cuts)
            shares = [turn.share(turn.loaded) for turn in turns if turn.before]
            print(f"{chat['name']}: {len(turns)} turns so far, at least {min(shares):.1%} loaded")
    rows = [
        row(number, [turn for turn in turns if turn.number == number]) for number in sorted({t.number for t in turns})
    ]
    for one in rows:
        print(*(f"{name} {value:.4g}" for name, value in one.items() if value is not None))
    later = [turn for turn in turns if turn.before]
    result = {
        **describe_run(),
        "settings": {
            "model": model,
            "new_tokens": new_tokens,
            "mode": mode,
            "dtype": dtype,
            "chunk_tokens": loaded.chunk_tokens,
        },
        "chats": len(talks),
        "answers": len(turns),
        "differ": sum(turn.differs for turn in turns),
        "restarted_differ": sum(turn.restarted_differs for turn in turns),
        "cuts_differ": sum(turn.cuts_differ for turn in turns) if cuts else None,
        "cut_otherwise": sum(turn.cut_otherwise for turn in turns),
        "least_loaded_share": min(turn.share(turn.loaded) for turn in later),
        "restarted_least_loaded_share": min(turn.share(turn.restarted_loaded) for turn in later),
        "restarted_loaded_share": mean(turn.share(turn.restarted_loaded) for turn in later),
        "turns": rows,
        "each": [turn._asdict() for turn in turns],
    }
    write_json(json_file, result)


def talk(
    loaded: Cake, folder: Path, chat: dict[str, Any], new_tokens: int, mode: Mode, cuts: bool = False
) -> list[Turn]:
    """One chat, turn by turn."""
    options: dict[str, Any] = {
        "chunk_tokens": loaded.chunk_tokens,
        "max_span_tokens": loaded.max_span_tokens,
        "calibration": folder / "calibration.json",
    }

    def opened(store: str | None, **more: Any) -> Cake:
        return Cake(loaded.engine, loaded.tokenizer, store, **{**options, **more})

    turns: list[Turn] = []
    known: list[int] = []
    everything, prefixes = str(folder / "everything"), str(folder / "prefixes")
    with (
        opened(everything) as cake,
        opened(prefixes, save_answers=False) as plain,
        opened(None) as none,
        opened(None, max_span_tokens=loaded.chunk_tokens) as cut_small,
    ):
        session = cake.session([{"role": "system", "content": chat["system"]}])
        for number, said in enumerate(chat["said"], start=1):
            asked = Chat([*session.messages, {"role": "user", "content": said}])
            prompt = cake.prefill(asked, mode="compute", save=False).token_ids
            with opened(everything) as restarted:
                again = restarted.generate(asked, max_new_tokens=new_tokens, mode=mode, save=False)
                cut = restarted.prefill(asked, mode="load", save=False).token_ids
            answer = session.send(said, max_new_tokens=new_tokens, mode=mode)
            full = none.generate(prompt, max_new_tokens=new_tokens)
            same = full if cut == prompt else none.generate(cut, max_new_tokens=new_tokens)
            otherwise = cut_small.generate(prompt, max_new_tokens=new_tokens) if cuts else full
            restored = plain.prefill(prompt, mode=mode).report
            for one in (cake, plain):
                one.wait_saved()
            turns.append(
                Turn(
                    number,
                    len(known),
                    len(prompt),
                    full.report.ttft_s,
                    restored.ttft_s,
                    answer.report.ttft_s,
                    again.report.ttft_s,
                    answer.cached_tokens,
                    restored.loaded_tokens,
                    again.cached_tokens,
                    answer.token_ids != full.token_ids,
                    again.token_ids != same.token_ids,
                    otherwise.token_ids != full.token_ids,
                    cut != prompt,
                )
            )
            known = prompt + answer.token_ids
    return turns


def row(number: int, turns: list[Turn]) -> dict[str, Any]:
    """The same turn of all chats; nothing stands before the first."""
    shares = {
        "loaded_share": [turn.share(turn.loaded) for turn in turns if turn.before],
        "restored_loaded_share": [turn.share(turn.restored_loaded) for turn in turns if turn.before],
        "restarted_loaded_share": [turn.share(turn.restarted_loaded) for turn in turns if turn.before],
    }
    return {
        "turn": number,
        "chats": len(turns),
        "prompt_tokens": mean(turn.prompt for turn in turns),
        "compute_s": mean(turn.compute_s for turn in turns),
        "restored_s": mean(turn.restored_s for turn in turns),
        "sessions_s": mean(turn.sessions_s for turn in turns),
        "restarted_s": mean(turn.restarted_s for turn in turns),
        **{name: mean(values) if values else None for name, values in shares.items()},
    }


if __name__ == "__main__":
    typer.run(main)
