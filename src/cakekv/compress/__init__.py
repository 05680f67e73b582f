"""Methods that keep fewer tokens of a cache. One file per method, a line each in `METHODS`."""

from __future__ import annotations

from collections.abc import Sequence

from cakekv.compress.base import TIMES, Method
from cakekv.errors import BadInput
from cakekv.recipes import made_by

METHODS = {
    "sink_recent": "cakekv.compress.sink_recent:SinkRecent",
    "heavy_hitter": "cakekv.compress.heavy_hitter:HeavyHitter",
    "key_norm": "cakekv.compress.key_norm:KeyNorm",
    "dbudgetkv": "cakekv.compress.dbudgetkv:DBudgetKV",
    "corm": "cakekv.compress.corm:Corm",
    "vl_cache": "cakekv.compress.vl_cache:VLCache",
    "elastic_cache": "cakekv.compress.elastic_cache:ElasticCache",
    "kvmerger": "cakekv.compress.kvmerger:KVMerger",
    "cascading": "cakekv.compress.cascading:Cascading",
}
"""Module and class by name."""


def method_named(recipe: str) -> Method:
    """The method that a recipe names, such as "dbudgetkv:threshold=0.01".

    Raises
    ------
    BadInput
        There is no such method or parameter, or a parameter's value is out of range.
    """
    return made_by(recipe, METHODS, "unknown method to keep fewer tokens", "compress")


def methods_named(recipes: str | Method | Sequence[str | Method] | None) -> tuple[Method, ...]:
    """The methods that recipes name, "one+other" or a sequence, none of which gets in another's way.

    Raises
    ------
    BadInput
        As for `method_named`; or two of them act at the same time, or behind a prefill; or one at store beside one that
        moves tokens up.
    """
    if recipes is None:
        return ()
    given = recipes.split("+") if isinstance(recipes, str) else [recipes] if isinstance(recipes, Method) else recipes
    odd = [one for one in given if not isinstance(one, str | Method)]
    if odd:
        raise BadInput(f'compress holds {odd[0]!r:.60}: give names, such as "corm:window=64", or a Method')
    methods = tuple(method_named(one) if isinstance(one, str) else one for one in given)
    for time in TIMES:
        acting = [method.name for method in methods if time in method.at]
        if len(acting) > 1:
            raise BadInput(
                f"{' and '.join(acting)} cannot be combined: both choose which tokens to keep at {time}. Give one of "
                "them, or one with when=store"
            )
    later = [method.name for method in methods if method.at - {"store"}]
    if len(later) > 1:
        raise BadInput(f"{' and '.join(later)} cannot be combined: besides one at store, one method acts on a prompt")
    for method in methods:
        if method.compact and len(methods) > 1:
            raise BadInput(f"{method.name} moves tokens up, and needs a cache that has everything: give it alone")
    return methods
