"""One cache in two precisions: draft from its upper four bits, verify with all eight (QuantSpec, arXiv 2502.10424)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from cakekv.codec.two_plane import TwoPlane
from cakekv.decode.base import Sight

if TYPE_CHECKING:
    from cakekv.engine.ragged import RaggedCache

Role = Literal["keys", "values"]

MOST_DRAFTS = 64


@dataclass(frozen=True)
class QuantSpec(Sight):
    """What is behind the newest tokens is kept in eight bits, as the codec `two_plane` does, and answers see that.

    Keys are rounded per channel, in groups of tokens; values per token. New tokens go to a buffer in full precision,
    which is rounded from its front once it has more than twice `recent`; so drafts that are rejected never were in what
    is rounded.

    Parameters
    ----------
    gamma : int
        Tokens that are drafted, at most, before they are verified together; 0 for none.
    group : int
        Elements that share a scale: tokens of a channel of keys, channels of a token's values. An even number.
    recent : int
        So many of the newest tokens, at least, are never rounded.
    draft : {"upper", "recent"}
        What drafts see: all tokens in four bits; or, to compare with, the first and newest of them in eight, as many as
        take the same bytes.
    """

    name: ClassVar[str] = "quantspec"
    speculates: ClassVar[bool] = True
    gamma: int = 5
    group: int = 32
    recent: int = 128
    draft: str = "upper"

    def __post_init__(self) -> None:
        self.check("gamma", 0 <= self.gamma <= MOST_DRAFTS, f"0 to {MOST_DRAFTS} tokens")
        self.check("group", 2 <= self.group < 2**31 and self.group % 2 == 0, "an even number of elements, 2 or more")
        self.check("recent", self.group <= self.recent < 2**31, f"at least {self.group} tokens, which is group")
        self.check("draft", self.draft in ("upper", "recent"), "upper or recent")

    def codec(self, role: Role, width: int) -> TwoPlane:
        """What rounds keys or values of such a width; a token's values together, if they cannot be cut into groups."""
        return TwoPlane(group=width if role == "values" and width % self.group else self.group)

    def rounded(self, exact: int) -> int:
        """Of so many tokens in full precision, how many the oldest are that are to be rounded."""
        return 0 if exact <= 2 * self.recent else (exact - self.recent) // self.group * self.group

    def hold(self, cache: RaggedCache) -> RaggedCache:
        """As `Sight.hold`: a copy in two precisions."""
        from cakekv.engine.halves import HalvesCache

        return HalvesCache(cache, self)
