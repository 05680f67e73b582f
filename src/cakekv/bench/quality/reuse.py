"""The judge of reuse: prompts of documents that were computed by themselves, against the same computed in full."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cakekv.bench.quality import documents as judged_on
from cakekv.bench.quality.earlier import check_settings, went_on
from cakekv.bench.quality.intervals import figures_of
from cakekv.bench.quality.judge import Reference, answers, follow, paired
from cakekv.bench.quality.rag import RagPrompt
from cakekv.cake import Cake
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import BadInput
from cakekv.prompt import Document
from cakekv.store.memory import MemoryStore

EXACT = "exact"
"""The name of the exact cache's own figures."""
_SAME = ("model", "dtype", "documents", "tokens", "continuation", "chunk_tokens")


class Answers(NamedTuple):
    """How a prompt's questions are answered; see `summary`."""

    asked: int = 0
    """Facts that the exact cache finds."""
    found: int = 0
    """Those of them that are found."""
    facts: int = 0
    all_found: int = 0
    """Facts that are found, whether the exact cache finds them or not."""
    digits: int = 0
    """Tokens of all answers."""
    right_digits: int = 0
    """Those that are the likeliest behind the right ones before them."""
    gold_nats: float = 0.0
    """Log-likelihood of all answers."""


@dataclass(frozen=True)
class Measured:
    """What one way does to one prompt.

    Attributes
    ----------
    kl : float
        Mean Kullback-Leibler divergence of the next-token distribution from the exact cache's, in nats.
    agreement : float
        Share of the positions at which the likeliest token is the same.
    recomputed : float
        Share of the prompt that is stored and computed nevertheless, as the way wants it.
    one, two : Answers
        To questions that need one document, and that need two.
    """

    kl: float
    agreement: float
    recomputed: float
    one: Answers
    two: Answers

    @property
    def both(self) -> Answers:
        """To all questions."""
        return _total((self.one, self.two))

    @property
    def asked(self) -> int:
        """Facts that the exact cache finds."""
        return self.both.asked

    @property
    def found(self) -> int:
        """Those of them that are found."""
        return self.both.found

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        kinds = {"one": self.one._asdict(), "two": self.two._asdict()}
        own = {"kl": self.kl, "agreement": self.agreement, **self.both._asdict(), "recomputed": self.recomputed}
        return own | kinds

    @classmethod
    def of_dict(cls, data: Mapping[str, Any]) -> Measured:
        """What `to_dict` returned."""
        one, two = (Answers(**data[kind]) for kind in ("one", "two"))
        return cls(float(data["kl"]), float(data["agreement"]), float(data["recomputed"]), one, two)


def judge(
    engine: TransformersEngine, prompt: RagPrompt, ways: Sequence[str], chunk_tokens: int = 64
) -> dict[str, Measured]:
    """Compare every way with the exact cache, whose own figures come first.

    Parameters
    ----------
    engine : TransformersEngine
        The model.
    prompt : RagPrompt
        Its documents are computed by themselves, once for all ways, and loaded.
    ways : sequence of str
        As `cakekv.reuse.reuse_named` reads them.
    chunk_tokens : int
        Tokens per chunk.
    """
    parts, whole, store = [Document(part) for part in prompt.parts], prompt.whole, MemoryStore()
    room = len(whole.tail) + 1
    with Cake(engine, chunk_tokens=chunk_tokens) as cake:
        exact = follow(engine, cake.prefill(whole.context, room=room).cache, whole)
    reference = Reference(exact, len(whole.continuation))
    known = answers(whole, reference.likeliest)
    measured = {EXACT: Measured(0.0, 1.0, 0.0, *_answered(whole, exact, known))}
    for way in ways:
        with Cake(engine, None, store, reuse=way, learn=False, chunk_tokens=chunk_tokens) as cake:
            for part in parts:
                cake.learn(part)
            cake.wait_saved()
            prefill = cake.prefill([*parts, whole.tail[:1]], mode="load", room=room)
        logits = follow(engine, prefill.cache, whole)
        kl, agreement, _ = reference.compare(logits)
        report = prefill.report
        recomputed = report.miss_reasons().get("linked", 0) + report.blended_tokens
        measured[way] = Measured(kl, agreement, recomputed / len(whole.context), *_answered(whole, logits, known))
    return measured


def _answered(whole: judged_on.Document, logits: torch.Tensor, known: Sequence[bool]) -> tuple[Answers, Answers]:
    """How questions that need one document, and that need two, are answered by a model that is led along all of them.

    Parameters
    ----------
    whole : Document
        Context and needles.
    logits : Tensor
        As from `follow`: (tokens, vocabulary).
    known : sequence of bool
        Which needles the exact cache finds.
    """
    kinds: dict[int, list[Answers]] = {1: [], 2: []}
    at = len(whole.continuation)
    for needle, is_known in zip(whole.needles, known, strict=True):
        at += len(needle.question)
        gold = torch.tensor(needle.answer)
        likely = torch.log_softmax(logits[at : at + len(gold)], -1)
        at += len(gold)
        right = int((likely.argmax(-1) == gold).sum())
        is_found = right == len(gold)
        nats = float(likely.gather(1, gold[:, None]).sum())
        kinds[needle.documents].append(
            Answers(int(is_known), int(is_known and is_found), 1, int(is_found), len(gold), right, nats)
        )
    return _total(kinds[1]), _total(kinds[2])


def _total(ones: Iterable[Answers]) -> Answers:
    return Answers._make(sum(column) for column in zip(Answers(), *ones, strict=True))


def summary(way: str, ones: Sequence[Measured], exact: Sequence[Measured]) -> dict[str, Any]:
    """A way's figures with 95 % intervals over prompts, and each prompt's.

    Figures of answers are of all questions, and as `…_one` and `…_two` of those that need so many documents.

    Parameters
    ----------
    way : str
        Its name.
    ones : sequence of Measured
        By prompt.
    exact : sequence of Measured
        The exact cache's, by prompt.

    Returns
    -------
    dict
        `kl`, `agreement`, `recomputed_share`; `retrieval`: share of facts found, of those that the exact cache finds;
        `of_all`: of all; `digits`: share of all answers' tokens that are the likeliest; `gold_nats`: their mean
        log-likelihood, and `gold_nats_lost`: by how much the exact cache's is higher. None stands for what cannot be
        told, such as retrieval of facts of which the exact cache finds none.
    """
    columns: dict[str, list[tuple[float, float]]] = {
        "kl": [(one.kl, 1.0) for one in ones],
        "agreement": [(one.agreement, 1.0) for one in ones],
        "recomputed_share": [(one.recomputed, 1.0) for one in ones],
    }
    kinds = {
        "": [(one.both, own.both) for one, own in zip(ones, exact, strict=False)],
        "_one": [(one.one, own.one) for one, own in zip(ones, exact, strict=False)],
        "_two": [(one.two, own.two) for one, own in zip(ones, exact, strict=False)],
    }
    for kind, pairs in kinds.items():
        counts: dict[str, list[tuple[float, int]]] = {
            "retrieval": [(one.found, one.asked) for one, _ in pairs],
            "of_all": [(one.all_found, one.facts) for one, _ in pairs],
            "digits": [(one.right_digits, one.digits) for one, _ in pairs],
            "gold_nats": [(one.gold_nats, one.digits) for one, _ in pairs],
            "gold_nats_lost": [(own.gold_nats - one.gold_nats, one.digits) for one, own in pairs],
        }
        columns |= {
            f"{name}{kind}": [(part / max(whole, 1), float(whole)) for part, whole in column]
            for name, column in counts.items()
        }
    return {
        "name": way,
        **figures_of(columns),
        "facts": sum(one.both.facts for one in ones),
        "facts_two": sum(one.two.facts for one in ones),
        "prompts": [one.to_dict() for one in ones],
    }


class Aim(NamedTuple):
    """That a way removes more than so much of the divergence that another way leaves."""

    claim: str
    way: str
    other: str
    share: float


TURNED, LINKED, BLEND = "turned", "epic:link=16", "blend:recompute={}"
AIMS = (
    Aim("turning keys removes at least 50 % of the KL of not turning them", TURNED, "naive", 0.5),
    Aim("16 linked tokens remove at least 30 % of the KL that turning leaves", LINKED, TURNED, 0.3),
    Aim("recomputing the 15 % that deviate most removes at least 50 % of that", BLEND.format(0.15), TURNED, 0.5),
    Aim(
        "recomputing those leaves less KL than recomputing any 15 %",
        BLEND.format(0.15),
        f"{BLEND.format(0.15)},choice=random",
        0.0,
    ),
    Aim("KL falls from nothing recomputed to 5 %", BLEND.format(0.05), TURNED, 0.0),
    Aim("KL falls from 5 % to 15 %", BLEND.format(0.15), BLEND.format(0.05), 0.0),
    Aim("KL falls from 15 % to 30 %", BLEND.format(0.3), BLEND.format(0.15), 0.0),
)
MOST_LINKED = 0.05


def claims(judged: Mapping[str, Sequence[Measured]]) -> list[dict[str, Any]]:
    """What is claimed of ways of reuse, as far as they were judged.

    Returns
    -------
    list of dict
        `claim`; `measured`, the share of the divergence that is removed, or of the prompt that is linked; its 95 %
        `interval`, of pairs on the same prompts; `holds`, which goes by `measured`.
    """
    found = []
    for claim, way, other, share in AIMS:
        if way in judged and other in judged:
            pairs = list(zip(judged[way], judged[other], strict=False))
            column = [(1 - one.kl / two.kl if two.kl else 0.0, two.kl) for one, two in pairs]
            found.append(_claim(claim, column, lambda removed, share=share: removed >= share and removed > 0))
        if way == LINKED and way in judged:
            column = [(one.recomputed, 1.0) for one in judged[way]]
            found.append(
                _claim(
                    "16 linked tokens of every document are at most 5 % of the prompt",
                    column,
                    lambda linked: linked <= MOST_LINKED,
                )
            )
    return found


def _claim(claim: str, column: list[tuple[float, float]], holds: Any) -> dict[str, Any]:
    figures = figures_of({"measured": column})
    measured = figures["measured"]
    return {
        "claim": claim,
        "measured": measured,
        "interval": figures["intervals"]["measured"],
        "holds": measured is not None and holds(measured),
    }


class ReuseResults:
    """What was measured so far, of all ways on the same prompts.

    Parameters
    ----------
    run : mapping
        What `describe_run` says.
    settings : mapping
        `model`, `dtype`, `chunk_tokens`, and of the prompts: `documents`, `tokens`, `continuation`, `prompts`.
    ways : sequence of str
        What is to be judged.
    """

    def __init__(self, run: Mapping[str, Any], settings: Mapping[str, Any], ways: Sequence[str]) -> None:
        self._run, self._settings = dict(run), dict(settings)
        self._judged: dict[str, list[Measured]] = {way: [] for way in (EXACT, *ways)}
        self._beside: dict[str, Any] = {}

    @property
    def is_complete(self) -> bool:
        """Whether all ways were judged on all prompts."""
        return all(len(ones) >= self._settings["prompts"] for ones in self._judged.values())

    def read(self, file: Path, *, add: bool) -> None:
        """Keep what a file of results has of other measurements, and with `add` all that it has.

        Raises
        ------
        BadInput
            With `add`: it is no such file, or was measured with other settings or more prompts.
        """
        try:
            data = json.loads(file.read_text())
            self._beside = {"ttft": data["ttft"]} if "ttft" in data else {}
            if not add or set(data) == {"ttft"}:
                return
            before, command = data["settings"], went_on(data, self._run)
            judged = {
                str(method["name"]): [Measured.of_dict(prompt) for prompt in method["prompts"]]
                for method in data["methods"]
            }
            exact = judged[EXACT]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if not add:
                return
            raise BadInput(
                f"cannot add to {file}: it is no file that `cakekv quality --reuse --json` wrote ({error!r})"
            ) from error
        check_settings(file, before, self._settings, _SAME)
        if len(exact) > self._settings["prompts"]:
            raise BadInput(f"cannot add to {file}: it has {len(exact)} prompts, so that as many have to be judged")
        self._run["command"] = command
        self._judged = judged | {way: [] for way in self._judged if way not in judged}

    def judge(self, engine: TransformersEngine, number: int, prompt: RagPrompt) -> None:
        """Judge those ways on a prompt that were not yet; prompts come in their order.

        Raises
        ------
        BadInput
            Results that are added to cannot be of this prompt: what the exact cache answers differs.
        """
        missing = [way for way, ones in self._judged.items() if len(ones) <= number]
        if not missing:
            return
        new = judge(engine, prompt, [way for way in missing if way != EXACT], self._settings["chunk_tokens"])
        if EXACT not in missing and _asks(self._judged[EXACT][number]) != _asks(new[EXACT]):
            raise BadInput("cannot add to the file: its prompts are not those that are judged now")
        for way in missing:
            self._judged[way].append(new[way])

    def to_dict(self) -> dict[str, Any]:
        """As it is written to the file."""
        exact = self._judged[EXACT]
        ways = {way: ones for way, ones in self._judged.items() if way != EXACT}
        return {
            **self._run,
            "settings": self._settings,
            "methods": [summary(way, ones, exact) for way, ones in self._judged.items() if ones],
            "paired": paired({way: ones for way, ones in ways.items() if ones}),
            "claims": claims(ways),
            **self._beside,
        }


def _asks(exact: Measured) -> list[tuple[int, ...]]:
    return [(kind.asked, kind.facts, kind.digits) for kind in (exact.one, exact.two)]
