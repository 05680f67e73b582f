"""A model that may change between requests: what it is called now, and whether it is still what it was."""

from __future__ import annotations

from typing import Any, NamedTuple

from cakekv.engine.deviations import Blank, find_deviations, unnamed_text
from cakekv.engine.identify import (
    Digests,
    UnnamedState,
    adapter_fingerprint,
    architecture,
    weights_fingerprint,
)
from cakekv.engine.stamps import Stamps, form_of, plain_tensors
from cakekv.keys import canonical


class Names(NamedTuple):
    """The parts of an `Identity` that are found in a live model."""

    weights: str
    architecture: str
    adapter: str
    unnamed: str
    """Why they do not name all that computes, in words; "" if they do."""


class LiveModel:
    """Follows a model. Not for several threads at once.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        The model.
    revision : int
        How often it was found to be changed, or to have been written to.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._digests = Digests()
        self._stamps: Stamps | None = None
        self._blank: Blank | None = None
        self._names: Names | None = None
        self.revision = 0

    @property
    def names(self) -> Names:
        """What it was called when it was last looked at."""
        assert self._names is not None, "look first"
        return self._names

    @property
    def form(self) -> Any:
        """Its configurations, and what kinds of weights it has now: what its layers keep follows from them."""
        return form_of(self.model)

    def look(self) -> bool:
        """See what it is now. Returns whether anything may have changed; costs next to nothing if not.

        Raises
        ------
        BadInput
            Some of its tensors are not in memory.
        """
        before = self._stamps
        if before is not None and before.hold():
            return False
        written = before is not None and not before.weights_hold()
        if before is not None and before.silent_writes():
            self._digests.forget()
        self._stamps = None  # if what follows fails, it is done again
        stamps = Stamps(self.model)
        self._digests.keep(inner for tensor in stamps.weights for inner in plain_tensors(tensor))
        names = self._name()
        if before is not None and (written or names != self._names):
            self.revision += 1
        self._stamps, self._names = stamps, names
        return True

    def forget(self) -> None:
        """Read all weights anew."""
        self._digests.forget()
        self._stamps = None
        self.revision += 1

    def _name(self) -> Names:
        model = self.model
        if self._blank is None or not self._blank.is_of(model):
            self._blank = Blank(model)
        deviations = find_deviations(model, self._blank)
        unnamed = deviations.unnamed
        weights = adapter = ""
        try:
            weights = weights_fingerprint(model, self._digests)
            adapter = adapter_fingerprint(model, self._digests)
        except UnnamedState as state:
            unnamed.append(str(state))
        text = architecture(model.config)
        if deviations.named:
            text = f"{text} but {canonical(deviations.named)}"
        return Names(weights, text, adapter, unnamed_text(unnamed) if unnamed else "")
