"""What a `Cake` makes of a prompt's complete cache before its answer begins: fewer tokens, or a view of them."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any

from cakekv.compress.base import Marked, Method
from cakekv.decode.base import Sight
from cakekv.embedded.arbiter import Request
from cakekv.embedded.arms import Arms
from cakekv.embedded.computed_front import ComputedFront
from cakekv.embedded.saver import Saver
from cakekv.embedded.stored import Found
from cakekv.errors import BadInput, UnknownRotation, UnsupportedEngine, UnsupportedModel
from cakekv.options import CakeOptions
from cakekv.prompt import Tokenized
from cakekv.results import Prefill


class Compressing:
    """Lets a method choose what to keep of prompts' caches, and a sight what to see of them.

    Parameters
    ----------
    arms : Arms
        The engine, and who lends it.

    Raises
    ------
    BadInput
        The model cannot do what its options ask for.
    """

    def __init__(self, arms: Arms[Any, Any]) -> None:
        self._arms = arms
        options: CakeOptions = arms.options
        acting = [method for method in options.compress if method.at - {"store"}]
        self.method: Method | None = acting[0] if acting else None
        self._stored: Method | None = next((one for one in options.compress if "store" in one.at), None)
        self.sight: Sight | None = options.decode and options.decode.for_model(arms.engine.weights_names())
        dropping = self.method or self._stored
        if dropping is not None and self.sight is not None:
            raise BadInput(
                f"decode {self.sight.name} needs a cache that has everything, and compress {dropping.name} lets go "
                "of tokens: give one of them"
            )
        self._front = ComputedFront(arms) if options.compress_front else None
        if self.sight is not None:
            self.sight.check_chunks(options.chunk_tokens, arms.engine.layout)
        wanted = [one for one in (self.method, self._stored, self.sight) if one is not None]
        try:
            arms.engine.compressible(wanted)
        except (UnknownRotation, UnsupportedEngine, UnsupportedModel) as error:
            which = "compress" if isinstance(wanted[0], Method) else "decode"
            raise BadInput(
                f"{which} {wanted[0].name} does not work with this model: {error}. Give no {which}"
            ) from error

    @property
    def is_exact(self) -> bool:
        """Whether answers attend to all that a restore has put into a prompt's cache."""
        return self.method is None and self.sight is None and self._front is None

    @property
    def completes(self) -> bool:
        """Whether parts of chunks that a restore has left are read behind it, while an answer is drafted."""
        return self.sight is not None and self.sight.speculates and self._arms.options.reuse is None

    def apply(
        self, request: Request, prefill: Prefill, prompt: Tokenized, found: Found, saver: Saver | None = None
    ) -> None:
        """Replace a prefill's cache by what is left of it; its report says how much that is.

        What a sight works out of the chunks that were `found` goes to the saver, if there is one.
        """
        engine, report, began = self._arms.engine, prefill.report, monotonic()
        if self._front is not None:
            with self._arms.arbiter.turn(request):
                self._front.replace(prefill, found)
        if self._stored is not None:
            report.kept_share = engine.kept_share(prefill.cache, len(prefill.token_ids))
            report.compress = self._stored.recipe if report.kept_share < 1 else ""
        if self.is_exact or prefill.recall is not None:
            return
        whole = engine.held_bytes(prefill.cache) or 0
        with self._arms.arbiter.turn(request):
            if self.method is not None:
                report.compress = "+".join(filter(None, (report.compress, self.method.recipe)))
                left = engine.compress(prefill.cache, prefill.token_ids, self.method, marked(prompt))
            elif self.sight is None:
                left = engine.present(prefill.cache, len(prefill.token_ids))
            else:
                report.decode = self.sight.recipe
                read = found.beside.spans(report.notes) if found.beside is not None else {}
                if found.beside is not None:
                    for sidecar, size in found.beside.read_bytes.items():
                        report.bytes_by_tier[self._arms.tiers[found.beside.tiers[sidecar]].name] += size
                left = engine.look(prefill.cache, prefill.token_ids, self.sight, marked(prompt), read)
                is_exact = not (report.lossy_tokens or report.after_lossy_tokens or report.blended_tokens)
                if found.beside is not None and saver is not None and is_exact and found.still():
                    made = {number: one.memo.get("spans", {}) for number, one in enumerate(left.stored)}
                    planes = [one.planes for one in left.stored] if self.sight.lazy else []
                    found.beside.save(saver, made, planes.__getitem__, read)
        if left is not prefill.cache:
            report.kept_share = left.kept_share
            report.cache_bytes = left.held_bytes
            prefill.cache = left
        else:
            report.cache_bytes = whole
        report.compress_s = monotonic() - began


def marked(prompt: Tokenized) -> Sequence[Marked]:
    """What is marked of a prompt. Unless its question is known, that is what follows its last document and image."""
    if any(mark.what == "question" for mark in prompt.marked):
        return prompt.marked
    end = max([0, *(place.end for place in prompt.documents), *(mark.end for mark in prompt.marked)])
    tokens = len(prompt.token_ids)
    return [*prompt.marked, Marked(end, tokens, "question")] if 0 < end < tokens else prompt.marked
