"""Getting a model ready, with something to look at meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cakekv.cli.console import NEWS
from cakekv.options import CakeKeywords
from cakekv.store.base import Store

if TYPE_CHECKING:
    from cakekv.cake import Cake
    from cakekv.metrics import Metrics


def load_cake(
    model: str,
    store: Store | str | None,
    tenant: str = "",
    codec: str = "raw",
    chunk_tokens: int | None = None,
    dtype: str = "auto",
    reuse: str | None = None,
    save_answers: bool = True,
    policy: str = "marginal_saving",
    metrics: Metrics | None = None,
    compress: str | None = None,
    compress_front: bool = False,
    decode: str | None = None,
    share: str | None = None,
) -> Cake:
    """A `Cake` of the demo's model ("demo"), a folder, or a model name.

    The demo's model is stored in bfloat16. Processors that do not compute in it take several times as long as in
    float32, so there it is loaded as float32, unless a `dtype` is given.

    Raises
    ------
    CakeError
        There is no such model, or it is not supported.
    """
    with NEWS.status("Loading the libraries …") as status:
        from cakekv.cake import Cake
        from cakekv.calibration import cache_folder
        from cakekv.demo.model import NAME, computes_bfloat16, demo_model, is_converted

        if model == "demo":
            if not is_converted():
                status.update(f"Converting {NAME} (once, about 20 s) …")
            model = str(demo_model())
            if dtype == "auto" and not computes_bfloat16():
                dtype = "float32"
        status.update("Loading the model …")
        options: CakeKeywords = {
            "tenant": tenant,
            "codec": codec,
            "reuse": reuse,
            "save_answers": save_answers,
            "calibration": cache_folder() / "calibration.json",
            "policy": policy,
            "metrics": metrics,
            "compress": compress,
            "compress_front": compress_front,
            "decode": decode,
        }
        if chunk_tokens is not None:
            options["chunk_tokens"] = chunk_tokens
        return Cake.from_pretrained(model, store, dtype=dtype, share=share, **options)
