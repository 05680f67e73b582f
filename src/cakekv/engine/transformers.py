"""The embedded engine: a Hugging Face transformers model, run by its own unpatched forward over a two-ended cache."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cakekv.codec.base import Segment
from cakekv.engine.base import Engine, Gate
from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.identify import adapter_fingerprint, architecture, layout_text, weights_fingerprint
from cakekv.engine.rotation import find_rotations
from cakekv.engine.sampling import check_sampling, choose_token
from cakekv.engine.support import accepts, cache_argument, check_config, probe
from cakekv.engine.transfer import transfer_for
from cakekv.engine.versions import explain_if_newer, is_newer, warn_of_newer
from cakekv.errors import BadInput, UnsupportedEngine, UnsupportedModel
from cakekv.keys import Identity
from cakekv.layout import KVLayout
from cakekv.rotation import Rotation

if TYPE_CHECKING:  # codecs need numba
    from cakekv.codec.coder import ChunkCoder
    from cakekv.codec.on_device import DeviceDecoder


class TransformersEngine(Engine[TwoEndedCache, torch.Tensor]):
    """Restores KV caches of a causal language model of the transformers library.

    Any attention implementation will do; none enters into the identity, because they differ by rounding only.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        The model, on one device, weights in memory. It is put into evaluation mode (dropout off), and its weights must
        stay as they are while the engine lives. Adapters may be switched between requests.

    Raises
    ------
    UnsupportedModel
        The model keeps something else than keys and values per token, or is on a device that is not supported.
    UnsupportedEngine
        The installed transformers is too old, or newer than any that was tested and a trial restore fails.
    """

    def __init__(self, model: Any) -> None:
        if hasattr(model, "get_base_model"):
            if any(config.is_prompt_learning for config in model.peft_config.values()):
                raise UnsupportedModel("a prompt-tuned model is not supported, because its prompt has no token ids")
            model = model.get_base_model()
        self.model = model.eval()
        self.device: torch.device = model.device
        self._transfer = transfer_for(self.device)
        self._shapes = probe(model)
        stored = [shape for shape in self._shapes if shape is not None]
        self.layout = KVLayout(tuple(shape.layout for shape in stored))
        self._dtype = "+".join(sorted({str(plane.dtype) for shape in stored for plane in shape[:2]}))
        self.max_context = context_length(model.config)
        self.vocabulary_size = model.get_input_embeddings().weight.shape[0]
        self._cache_argument = cache_argument(model)
        self._arguments = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
        if is_newer():
            self._try_out()

    def _try_out(self) -> None:
        """With a transformers that was not tested: restore a few tokens, and use it if they come out right."""
        tokens, half = [token % self.vocabulary_size for token in range(1, 9)], 4
        computed, restored = self.new_cache(len(tokens)), self.new_cache(len(tokens))
        expected = self.compute(computed, tokens, 0)
        segments = [self.staging(size) for size in self.layout.segment_bytes(half)]
        self.gather(computed, 0, half, segments)
        self.place(restored, 0, half, segments)
        difference = float((self.compute(restored, tokens[half:], half) - expected).abs().max())
        rounding = 64 * torch.finfo(self.model.dtype).eps * max(1.0, float(expected.abs().max()))
        if not difference <= rounding:
            raise UnsupportedEngine(f"a trial restore of {half} tokens came out wrong{explain_if_newer()}")
        warn_of_newer()

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device | None = None
    ) -> Self:
        """Load a model from a folder, or by its name on the Hugging Face hub.

        Parameters
        ----------
        name_or_folder : str or Path
            A folder with config.json and safetensors files, or a name such as "HuggingFaceTB/SmolLM2-135M-Instruct".
        dtype : str or torch.dtype
            "float32", "bfloat16", "float16", or "auto" for what the weights are stored in. Processors without
            instructions for bfloat16 are several times as fast in float32, which takes twice the memory.
        device : str or torch.device, optional
            CUDA if there is one, else the CPU, if not given.

        Raises
        ------
        BadInput
            There is no such model, or its files are damaged or incomplete.
        UnsupportedModel
            As for the constructor.
        """
        source = str(name_or_folder)
        folder = Path(source).expanduser()
        if folder.is_dir():
            source = str(folder)
            if not (folder / "config.json").is_file():
                raise BadInput(f"the folder {source} holds no model: it has no config.json")
        elif folder.is_absolute() or source.startswith((".", "~")):
            raise BadInput(f"there is no model folder {source}")
        try:
            config = AutoConfig.from_pretrained(source)
            check_config(config)
            model, loading = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise BadInput(
                f"cannot load the model {source!r}: {reason} (give a folder with config.json and safetensors files, "
                "or the name of a model on the Hugging Face hub that is cached here or can be downloaded)"
            ) from error
        if loading["missing_keys"]:
            missing = sorted(loading["missing_keys"])
            raise BadInput(f"the model {source!r} is incomplete: it lacks {len(missing)} tensors, such as {missing[0]}")
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")))

    def check_prompt(self, token_ids: Sequence[int], new_tokens: int = 0) -> None:
        """Refuse a prompt that the model cannot take.

        Parameters
        ----------
        token_ids : sequence of int
            The whole prompt.
        new_tokens : int
            How many tokens are to be generated behind it.

        Raises
        ------
        BadInput
            The prompt is empty, holds something else than token ids, or does not fit the context.
        """
        tokens = np.asarray(token_ids)
        if not tokens.size:
            raise BadInput("the prompt is empty: it must have at least one token")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise BadInput(f"token ids must be a flat sequence of integers, not {tokens.ndim}-d {tokens.dtype}")
        wrong = np.flatnonzero((tokens < 0) | (tokens >= self.vocabulary_size))
        if wrong.size:
            raise BadInput(
                f"token id {tokens[wrong[0]]} at position {wrong[0]} is out of range: "
                f"the model's vocabulary goes from 0 to {self.vocabulary_size - 1}"
            )
        if tokens.size + new_tokens > self.max_context:
            raise BadInput(
                f"the prompt has {tokens.size} tokens and {new_tokens} are to be generated, "
                f"but the model's context is {self.max_context} tokens"
            )

    def rotations(self) -> list[Rotation]:
        """As `Engine.rotations`."""
        return find_rotations(self.model)

    def identity(self, chunk_tokens: int, tenant: str = "", recipe: str = "raw") -> Identity:
        """As `Engine.identity`. The first call reads all weights; adapters are looked at in every call."""
        return Identity(
            weights=self._weights,
            architecture=architecture(self.model.config),
            dtype=self._dtype.replace("torch.", ""),
            layout=layout_text(self.layout),
            chunk_tokens=chunk_tokens,
            adapter=adapter_fingerprint(self.model),
            tenant=tenant,
            recipe=recipe,
        )

    @cached_property
    def _weights(self) -> str:
        return weights_fingerprint(self.model)

    def new_cache(self, capacity: int) -> TwoEndedCache:
        """As `Engine.new_cache`. Raises `BadInput` if the model's context has not so many tokens."""
        if not 1 <= capacity <= self.max_context:
            raise BadInput(f"a cache can have 1 to {self.max_context} tokens (the model's context), not {capacity}")
        cache = TwoEndedCache(self._shapes, capacity, self.device)
        if self.device.type == "cuda":
            # The allocator may hand out memory that kernels queued earlier on this stream still use, and loads come
            # in on another stream.
            torch.cuda.current_stream(self.device).synchronize()
        return cache

    def compute(
        self, cache: TwoEndedCache, token_ids: Sequence[int], start: int, gate: Gate | None = None
    ) -> torch.Tensor:
        """As `Engine.compute`; the logits are float32 and on the CPU, so that the work is done when it returns."""
        tokens = len(token_ids)
        if tokens < 1 or start < 0 or start + tokens > cache.capacity:
            raise BadInput(f"a span of {tokens} tokens at {start} does not fit a cache of {cache.capacity} tokens")
        cache.set_length(start)
        with torch.inference_mode(), cache.gated(gate) if gate is not None else nullcontext():
            last = self.forward(cache, token_ids, **self._arguments).logits[0, -1]
            logits: torch.Tensor = last.to("cpu", torch.float32, copy=True)
        return logits

    def forward(self, cache: Any, token_ids: Sequence[int], **arguments: Any) -> Any:
        """The model's own forward over one sequence and a cache of transformers' kind; returns its output."""
        input_ids = torch.tensor(np.asarray(token_ids, dtype=np.int64)[None], device=self.device)
        arguments[self._cache_argument] = cache
        return self.model(input_ids=input_ids, use_cache=True, return_dict=True, **arguments)

    def place(self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[Segment | None]) -> int:
        """As `Engine.place`. Raises `BadInput` if the segments do not fit."""
        return self._transfer.place(cache, start, tokens, segments)

    def decoder(self, coder: ChunkCoder) -> DeviceDecoder | None:
        """As `Engine.decoder`."""
        return self._transfer.decoder(coder)

    def gather(self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[memoryview]) -> None:
        """As `Engine.gather`. Raises `BadInput` if the segments do not fit."""
        self._transfer.gather(cache, start, tokens, segments)

    def staging(self, size: int) -> memoryview:
        """As `Engine.staging`."""
        return self._transfer.staging(size)

    def sampler(
        self, temperature: float, top_k: int | None, top_p: float | None, seed: int | None
    ) -> Callable[[torch.Tensor], int]:
        """As `Engine.sampler`."""
        check_sampling(temperature, top_k, top_p)
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return lambda logits: choose_token(logits, temperature, top_k, top_p, generator)

    @property
    def device_name(self) -> str:
        """As `Engine.device_name`."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} {platform.node()}, {torch.get_num_threads()} threads"

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens that the model's generation settings end an answer with."""
        stop = getattr(self.model.generation_config, "eos_token_id", None)
        return frozenset([stop] if isinstance(stop, int) else stop or [])


def context_length(config: Any) -> int:
    """Tokens that a model can have in its context; `sys.maxsize` if its positions have no end (ALiBi).

    LongRoPE turns the keys of *all* positions differently once a prompt is longer than the model's original context,
    so that what is stored for a short prompt would be wrong for a long one. Such a model is used within its original
    context only.
    """
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    limits = [limit for name in names if (limit := getattr(text, name, None))]
    length = int(limits[0]) if limits else sys.maxsize
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            length = min(length, int(parameters["original_max_position_embeddings"]))
    return length


def load_tokenizer(name_or_folder: str | Path) -> Any:
    """The tokenizer in a model's folder, or of a model on the Hugging Face hub.

    Raises
    ------
    BadInput
        There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(str(name_or_folder))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"cannot load the tokenizer of {str(name_or_folder)!r}: {reason}") from error
