"""Codecs: fewer bytes per chunk, exactly or nearly the same cache. One file per codec, a line each in `CODECS`."""

from __future__ import annotations

from cakekv.codec.base import Codec
from cakekv.recipes import made_by

CODECS = {
    "raw": "cakekv.codec.raw:Raw",
    "fp8": "cakekv.codec.fp8:Fp8",
    "int8": "cakekv.codec.int8:Int8",
    "int4": "cakekv.codec.int4:Int4",
    "k5v4": "cakekv.codec.k5v4:K5V4",
    "kivi": "cakekv.codec.kivi:Kivi",
    "two_plane": "cakekv.codec.two_plane:TwoPlane",
    "ladder": "cakekv.codec.ladder:Ladder",
    "think": "cakekv.codec.think:Think",
    "nuq3": "cakekv.codec.nuq3:Nuq3",
    "turboquant": "cakekv.codec.turboquant:TurboQuant",
    "cachegen": "cakekv.codec.cachegen:CacheGen",
    "kvtc": "cakekv.codec.kvtc:Kvtc",
    "kvtc_ladder": "cakekv.codec.kvtc_ladder:KvtcLadder",
}
"""Module and class by name; imported when named, because most need numba."""


def codec_named(recipe: str) -> Codec:
    """The codec that a recipe names, such as "int8" or "kivi:bits=2,window=128".

    Raises
    ------
    BadInput
        There is no such codec or parameter, or a parameter's value is out of range.
    """
    return made_by(recipe, CODECS, "unknown codec", "codec")
