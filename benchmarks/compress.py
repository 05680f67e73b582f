"""What is kept of a prompt's cache, and what that does to answers: each method against what is claimed of it.

    python benchmarks/compress.py --json benchmarks/compress.json
    python benchmarks/compress.py --json benchmarks/compress.json --claims corm --claims cascading
    python benchmarks/compress.py --json out/compress.json --tiny     # to try the program

What `cakekv quality --compress` measures, in float32, on three sorts of documents, which are the file's `studies`:
`short` (--tokens, questions behind the choice), `asked` (the same, with the question in the prompt) and `long`
(--long-tokens, which is also where CORM's share is measured by length). A study that was interrupted goes on; its
documents are written one by one, and several studies may run at once. `methods` and `claims` are made of what there is.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import typer

from cakekv.bench.machine import describe_run
from cakekv.bench.quality.compress import CompressResults, Measured, judge
from cakekv.bench.quality.compress_picture import compress_picture
from cakekv.bench.quality.documents import Document, make_documents
from cakekv.bench.quality.intervals import figures_of, spread
from cakekv.cli.console import write_json
from cakekv.cli.model import load_cake
from cakekv.compress import method_named
from cakekv.compress.base import Layer, Method
from cakekv.compress.heavy_hitter import HeavyHitter
from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.transformers import TransformersEngine
from cakekv.errors import CakeError

SHORT, ASKED, LONG = "short", "asked", "long"
WAYS = {
    SHORT: (
        *("dbudgetkv", "dbudgetkv:min_recent=0"),
        "corm",
        *("vl_cache", "vl_cache:share=0.2"),
        *("elastic_cache:answering=no", "elastic_cache:merging=values,answering=no"),
        "elastic_cache:merging=no,answering=no",
        *("kvmerger", "kvmerger:share=0.5", "kvmerger:share=0.5,values=biased", "kvmerger:share=0.5,merging=no"),
        *("heavy_hitter:share=0.2", "heavy_hitter:share=0.5"),
        *("sink_recent:share=0.2", "sink_recent:share=0.5"),
        *("key_norm:share=0.5", "kvmerger:share=0.5,when=store", "elastic_cache:share=0.5,when=store"),
    ),
    ASKED: tuple(f"vl_cache:share={share}{rows}" for share in (0.1, 0.2) for rows in ("", ",rows_of=prompt")),
    LONG: ("cascading", "sink_recent:recent=508"),
}
"""By study. `long` has a stream: what is kept is of the same size however long it is."""
LENGTHS = (256, 512, 1024, 2048, 4096)
DENSE = 0.01
"""As VL-Cache has it: attention counts that is at least this share of its row's maximum."""
SPAN = 512


class Claim(NamedTuple):
    """What is claimed of a method, and what was found."""

    method: str
    """As in `WAYS`; of several studies, the first that has it."""
    claim: str
    measured: float | None
    interval: list[float | None]
    holds: bool


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here, and go on with what is there.")],
    claims: Annotated[
        list[str] | None, typer.Option(help="Measure only what these methods' claims need; repeatable.")
    ] = None,
    study: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    documents: Annotated[int, typer.Option(min=1, help="In each study.")] = 21,
    tokens: Annotated[int, typer.Option(min=256, help="Of each document.")] = 1024,
    long_tokens: Annotated[int, typer.Option(min=256, help="Of each long document.")] = 4096,
    continuation: Annotated[int, typer.Option(min=8, help="Tokens behind it that are predicted.")] = 48,
    model: Annotated[str, typer.Option(help="A model folder, a model's name, or demo.")] = "demo",
    tiny: Annotated[bool, typer.Option("--tiny", help="Two documents, as short as can be.")] = False,
) -> None:
    """Measure what methods keep, and what it does to answers."""
    if tiny:
        documents, tokens, long_tokens, continuation = 2, 256, 640, 8
    for given, known in ((claims, CLAIMS), (study, WAYS)):
        if unknown := [name for name in given or () if name not in known]:
            raise CakeError(f"there is no {unknown[0]!r}: choose of {', '.join(known)}")
    loaded = load_cake(model, None, dtype="float32")
    engine: TransformersEngine = loaded.engine  # type: ignore[assignment]  # load_cake makes transformers engines
    settings = {"model": model, "dtype": "float32", "documents": documents, "continuation": continuation}
    for name in study or WAYS:
        length = long_tokens if name == LONG else tokens
        ways = {way: "compress" for way in WAYS[name] if not claims or way.partition(":")[0] in claims}
        if claims and "cascading" in claims and name == LONG:
            ways[WAYS[LONG][1]] = "compress"  # to compare with
        if ways or (name == LONG and "corm" in (claims or ())):
            made = make_documents(loaded.tokenizer, documents, length, continuation)
            said = settings | {"tokens": length, "questions": "first" if name == ASKED else "last"}
            run_study(engine, name, made, ways, said, json_file)
            typer.echo(f"{name} is complete")
    data = json.loads(json_file.read_text())
    for claim in data["claims"]:
        typer.echo(
            f"{'holds' if claim['holds'] else 'fails'}: {claim['method']}: {claim['claim']}: {claim['measured']}"
        )
    compress_picture(data["studies"], json_file.with_suffix(".png"))


def run_study(
    engine: TransformersEngine,
    study: str,
    documents: Sequence[Document],
    ways: Mapping[str, str],
    settings: Mapping[str, Any],
    file: Path,
) -> None:
    """Judge what the file lacks, document by document, and write it."""
    results = CompressResults(describe_run(), settings, ways)
    beside: list[dict[str, Any]] = []
    if study in studies_of(file):
        results.read(file, "studies", study)
        beside = studies_of(file)[study]["beside"]
    measured = {name: measure for name, (way, measure) in BESIDE[study].items() if way is None or way in results.judged}
    for number, document in enumerate(documents):
        if len(beside) <= number:
            beside.append({})
        lacking = measured.keys() - beside[number].keys()
        if not lacking and not results.lacks(number):
            continue
        exact = engine.new_cache(len(document.context) + len(document.tail))
        for start in range(0, len(document.context), SPAN):
            engine.compute(exact, document.context[start : start + SPAN], start)
        results.judge(engine, number, document, exact)
        for name in sorted(lacking):
            beside[number][name] = measured[name](engine, document, exact, results, number)
        write(file, study, results.to_dict() | {"beside": beside})


def studies_of(file: Path) -> dict[str, Any]:
    """What a file has, by study."""
    return dict(json.loads(file.read_text())["studies"]) if file.exists() else {}


def write(file: Path, study: str, found: Mapping[str, Any]) -> None:
    """Put a study into the file, and make anew what is made of all of them."""
    studies = studies_of(file) | {study: found}
    studies = {name: studies[name] for name in WAYS if name in studies}
    claims = [claim for make in CLAIMS.values() for claim in make(studies)]
    first = next(iter(studies.values()))
    data = {
        **{name: first[name] for name in ("command", "machine")},
        "methods": [entry for name, one in studies.items() for entry in entries(name, one, claims)],
        "claims": [claim._asdict() for claim in claims],
        "studies": studies,
    }
    rest = json.loads(file.read_text()) if file.exists() else {}  # such as the TTFTs of another program
    write_json(file, rest | data)


def entries(study: str, found: Mapping[str, Any], claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """What there is to say of each method of a study, in short; `holds` is whether all that is claimed does."""
    made = []
    for one in found["methods"]:
        own = [claim for claim in claims if claim.method == one["name"]]
        names = ("kept", "kl", "agreement", "retrieval", "nats", "gold_nats", "cache_bytes", "intervals")
        made.append(
            {"name": one["name"], "study": study, "tokens": found["settings"]["tokens"]}
            | {name: one[name] for name in names}
            | {"documents": len(one["documents"]), "claim": "; ".join(claim.claim for claim in own) or None}
            | {"holds": all(claim.holds for claim in own) if own else None}
        )
    return made


def top_k(
    engine: TransformersEngine, document: Document, exact: TwoEndedCache, results: CompressResults, number: int
) -> dict[str, Any]:
    """What H2O's choice does with as many tokens as CORM has left of this document."""
    equal = HeavyHitter(share=results.judged["corm"][number].kept)
    return asdict(judge(engine, document, {"equal": equal}, exact=exact)["equal"])


def kept_by_length(engine: TransformersEngine, document: Document, exact: TwoEndedCache, *_: Any) -> dict[str, float]:
    """CORM's share of the document's beginnings."""
    found = {}
    for length in LENGTHS:
        if length <= len(document.context):
            exact.set_length(length)
            found[str(length)] = engine.compress(exact, document.context[:length], method_named("corm")).kept_share
    return found


@dataclass(frozen=True)
class Dense(Method):
    """Looks at how dense the attention of each layer is, and keeps everything."""

    name: ClassVar[str] = "dense"
    rows: int = 50
    found: list[float] = field(default_factory=list)

    def keep(self, layers: Sequence[Layer]) -> Sequence[torch.Tensor | None]:
        for layer in layers:
            attention, visible = layer.attention(), layer.visible()[:, None]
            counts = visible & (attention >= DENSE * attention.amax(-1, keepdim=True))
            self.found.append(float(counts.sum()) / float(visible.expand_as(attention).sum()))
        return [None] * len(layers)


def layers_of(engine: TransformersEngine, document: Document, exact: TwoEndedCache, *_: Any) -> dict[str, list[float]]:
    """Of each layer, how dense its attention is, and how much of it VL-Cache keeps."""
    dense, context = Dense(), document.context
    exact.set_length(len(context))
    engine.compress(exact, context, dense)
    left = engine.compress(exact, context, method_named("vl_cache"))
    shares = [float((layer.positions >= 0).float().mean(0).sum()) / len(context) for layer in left.stored]
    return {"density": dense.found, "kept": shares}


BESIDE: dict[str, dict[str, tuple[str | None, Callable[..., Any]]]] = {
    SHORT: {"top_k": ("corm", top_k), "layers": ("vl_cache", layers_of)},
    LONG: {"corm_kept": (None, kept_by_length)},
    ASKED: {},
}
"""By study, what is measured besides: of which way, if of one that is judged there."""


def documents_of(studies: Mapping[str, Any], study: str, way: str) -> list[Measured]:
    """What was measured of a way, by document."""
    methods = studies.get(study, {}).get("methods", ())
    return [Measured(**one) for method in methods if method["name"] == way for one in method["documents"]]


def dbudgetkv_claims(studies: Mapping[str, Any]) -> list[Claim]:
    found = []
    for way in WAYS[SHORT][:2]:
        if ones := documents_of(studies, SHORT, way):
            claim = "what is kept varies with the text: coefficient of variation above 0"
            found.append(spread_claim(way, claim, [one.kept for one in ones], lambda low, _: low > 0))
            column = [(one.agreement, 1.0) for one in ones]
            found.append(mean_claim(way, "agreement is at least 0.97 at 1 %", column, lambda mean: mean >= 0.97))
    return found


def corm_claims(studies: Mapping[str, Any]) -> list[Claim]:
    found = []
    by_length = [one["corm_kept"] for one in studies.get(LONG, {}).get("beside", ()) if "corm_kept" in one]
    if by_length:
        shortest, *_, longest = by_length[0]
        means = [fmean(one[length] for one in by_length) for length in by_length[0]]
        falls = all(more > less for more, less in pairwise(means))
        column = [(one[longest] / one[shortest], one[shortest]) for one in by_length]
        claim = f"the share that is kept falls with length: that of {longest} tokens, to that of {shortest}"
        found.append(mean_claim("corm", claim, column, lambda ratio: falls and ratio < 1))
    if ones := documents_of(studies, SHORT, "corm"):
        column = [(one.agreement, 1.0) for one in ones]
        found.append(mean_claim("corm", "agreement is at least 0.95", column, lambda mean: mean >= 0.95))
        others = [Measured(**one["top_k"]) for one in studies[SHORT]["beside"] if "top_k" in one]
        claim = "less KL than the tokens with most attention (H2O), as many of them: the share that is gone"
        found.append(removed_claim("corm", claim, ones, others, 0.0))
    return found


def vl_cache_claims(studies: Mapping[str, Any]) -> list[Claim]:
    found = []
    layers = [one["layers"] for one in studies.get(SHORT, {}).get("beside", ()) if "layers" in one]
    if layers:
        column = [(rank_correlation(one["density"], one["kept"]), 1.0) for one in layers]
        claim = "denser layers keep more: rank correlation of density and share, above 0.9"
        found.append(mean_claim("vl_cache", claim, column, lambda mean: mean > 0.9))
    for way, other in zip(WAYS[ASKED][::2], WAYS[ASKED][1::2], strict=True):
        pairs = list(zip(*(documents_of(studies, ASKED, one) for one in (way, other)), strict=False))
        if pairs:
            column = [((one.found - two.found) / max(one.asked, 1), float(one.asked)) for one, two in pairs]
            claim = "the question's rows find more needles than all rows do: difference of the shares"
            found.append(mean_claim(way, claim, column, lambda more: more > 0))
            column = [(one.gold_nats - two.gold_nats, 1.0) for one, two in pairs]
            claim = "and make their answers likelier: nats per token"
            found.append(mean_claim(way, claim, column, lambda more: more > 0))
    return found


def elastic_cache_claims(studies: Mapping[str, Any]) -> list[Claim]:
    evicting = documents_of(studies, SHORT, "elastic_cache:merging=no,answering=no")
    claim = "merging removes at least 10 % of the KL of dropping the same tokens"
    return [
        removed_claim(way, claim, ones, evicting, 0.1)
        for way in ("elastic_cache:answering=no", "elastic_cache:merging=values,answering=no")
        if (ones := documents_of(studies, SHORT, way)) and evicting
    ]


def kvmerger_claims(studies: Mapping[str, Any]) -> list[Claim]:
    found = []
    if ones := documents_of(studies, SHORT, "kvmerger"):
        claim = "at the same epsilon, what is kept differs by less than 10 %: coefficient of variation"
        found.append(spread_claim("kvmerger", claim, [one.kept for one in ones], lambda _, mean: mean < 0.1))
    evicting = documents_of(studies, SHORT, "kvmerger:share=0.5,merging=no")
    claim = "merging removes at least 10 % of the KL of dropping the same tokens"
    for way in ("kvmerger:share=0.5", "kvmerger:share=0.5,values=biased"):
        if (ones := documents_of(studies, SHORT, way)) and evicting:
            found.append(removed_claim(way, claim, ones, evicting, 0.1))
    return found


def cascading_claims(studies: Mapping[str, Any]) -> list[Claim]:
    pairs = list(zip(*(documents_of(studies, LONG, way) for way in WAYS[LONG]), strict=False))
    if not pairs:
        return []
    column = [((one.found - two.found) / max(one.asked, 1), float(one.asked)) for one, two in pairs]
    claim = "finds needles outside of a window of the same size: share found, less that of sink_recent"
    found = [mean_claim("cascading", claim, column, lambda more: more > 0)]
    column = [(math.exp(one.nats - two.nats) - 1, 1.0) for one, two in pairs]
    claim = "perplexity is no higher than sink_recent's: by how much it is"
    return [*found, mean_claim("cascading", claim, column, lambda more: more <= 0)]


CLAIMS: dict[str, Callable[[Mapping[str, Any]], list[Claim]]] = {
    "dbudgetkv": dbudgetkv_claims,
    "corm": corm_claims,
    "vl_cache": vl_cache_claims,
    "elastic_cache": elastic_cache_claims,
    "kvmerger": kvmerger_claims,
    "cascading": cascading_claims,
}


def mean_claim(way: str, claim: str, column: Sequence[tuple[float, float]], holds: Callable[[float], bool]) -> Claim:
    """About a weighted mean over documents, by which it holds or not."""
    figures = figures_of({"measured": column})
    mean = figures["measured"]
    return Claim(way, claim, mean, figures["intervals"]["measured"], mean is not None and holds(mean))


def removed_claim(way: str, claim: str, ones: Sequence[Measured], others: Sequence[Measured], least: float) -> Claim:
    """That a way has less KL than another: at least so much of the other's is gone."""
    column = [(1 - one.kl / two.kl if two.kl else 0.0, two.kl) for one, two in zip(ones, others, strict=False)]
    return mean_claim(way, claim, column, lambda removed: removed >= least and removed > 0)


def spread_claim(way: str, claim: str, values: Sequence[float], holds: Callable[[float, float], bool]) -> Claim:
    """About a coefficient of variation over documents: by its lower end and itself."""
    coefficient, low, high = spread(values)
    return Claim(way, claim, coefficient, [low, high], holds(low, coefficient))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, of numbers few of which are the same."""
    ranks = [torch.tensor(column).argsort(stable=True).argsort(stable=True).float() for column in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


if __name__ == "__main__":
    try:
        typer.run(main)
    except CakeError as error:
        sys.exit(f"error: {error}")
