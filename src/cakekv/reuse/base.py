"""The contract of a way to reuse documents: which tokens of them are recomputed, and how the others are placed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from cakekv.prompt import Place
from cakekv.recipes import recipe_of


@dataclass(frozen=True)
class Reuse(ABC):
    """How documents that were computed by themselves are put into prompts. Its fields are its parameters."""

    name: ClassVar[str]

    @property
    def recipe(self) -> str:
        """Its name with its parameters, as `cakekv.reuse.reuse_named` reads it."""
        return recipe_of(self.name, self)

    @property
    def turns(self) -> bool:
        """Whether keys are turned to where they are placed."""
        return True

    @abstractmethod
    def recomputed(self, document: Place) -> range:
        """The positions of a document that are computed where it stands, although they are stored.

        Not asked of a document at the very beginning of a prompt, where what is stored is exact.
        """
