"""The embedded engine: a Hugging Face transformers model, run by its own unpatched forward over a two-ended cache."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from os import PathLike
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cakekv.codec.base import Segment
from cakekv.compress.base import Marked, Method
from cakekv.decode.base import Sight
from cakekv.decode.groups import Groups
from cakekv.engine.absent import present_only
from cakekv.engine.base import Engine, EngineState, Gate, Gather, Move, Result, check_sampling
from cakekv.engine.blending import blend, check_blends
from cakekv.engine.cache import TwoEndedCache
from cakekv.engine.choice import Choice, Sampling
from cakekv.engine.choosing import begin_recall, check_tap, choose, look
from cakekv.engine.deviations import surroundings
from cakekv.engine.identify import activated_adapter, layout_text
from cakekv.engine.live import LiveModel
from cakekv.engine.ragged import RaggedCache, ragged_view
from cakekv.engine.rotation import find_rotations
from cakekv.engine.sampling import Chooser, choose_token
from cakekv.engine.sharing import LayerMap, find_map
from cakekv.engine.support import accepts, cache_argument, check_config, probe, shapes_of
from cakekv.engine.tap import Tap
from cakekv.engine.transfer import transfer_for
from cakekv.engine.turning import check_turns
from cakekv.engine.versions import explain_if_newer, is_newer, warn_of_newer
from cakekv.errors import BadInput, CacheRewritten, UnsupportedEngine, UnsupportedModel
from cakekv.forks import on_fork
from cakekv.keys import RAW, Identity, canonical, fingerprint_files
from cakekv.layout import KVLayout
from cakekv.quantities import whole
from cakekv.reuse.blend import Blend
from cakekv.rotation import Rotation

if TYPE_CHECKING:  # codecs need numba
    from cakekv.codec.coder import ChunkCoder
    from cakekv.codec.on_device import DeviceDecoder


_NO_GGUF = (
    "GGUF is llama.cpp's format, which is not read here. Give the folder or the name of the model that it was made "
    "from; or convert it, by AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(NEW), and "
    "the same with AutoTokenizer"
)


class TransformersEngine(Engine[TwoEndedCache, torch.Tensor]):
    """Restores KV caches of a causal language model of the transformers library.

    Any attention implementation will do. They differ by rounding only and do not enter into the identity, unless they
    are somebody's own, or the model is a Falcon with ALiBi.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        The model, on one device, weights in memory. It is put into evaluation mode (dropout off). It may change while
        the engine lives, for instance have its adapters switched: each request is for the model as it is then. What
        must stay is its device, and what its layers keep.
    share : LayerMap or None
        Which layers keep nothing, and attend to what another keeps; see `cakekv.engine.sharing`. What it computes is
        not what the model computes, and its chunks are its own.

    Raises
    ------
    BadInput
        The map is not for this model.
    UnsupportedModel
        The model keeps something else than keys and values per token, or is on a device that is not supported.
    UnsupportedEngine
        The installed transformers is too old, or newer than any that was tested and a trial restore fails.
    """

    def __init__(self, model: Any, share: LayerMap | None = None) -> None:
        self._activates = hasattr(model, "get_base_model")
        if self._activates:
            if any(config.is_prompt_learning for config in model.peft_config.values()):
                raise UnsupportedModel("a prompt-tuned model is not supported, because its prompt has no token ids")
            model = model.get_base_model()
        self.model = model.eval()
        bare = getattr(model, "_orig_mod", model)  # of a compiled one
        self.device: torch.device = model.device
        self._transfer = transfer_for(self.device)
        with torch.autocast(self.device.type, enabled=False):
            self.shapes = probe(bare)
        stored = [shape for shape in self.shapes if shape is not None]
        self._share(share)
        self._dtype = "+".join(sorted({str(plane.dtype) for shape in stored for plane in shape[:2]}))
        self.max_context = context_length(model.config)
        self._looking = Lock()
        self._live = LiveModel(bare)
        self._form = self._live.form
        self._refusal = ""
        self._read_from = ""
        self._stop_tokens: frozenset[int] | None = None
        self.arguments = {"logits_to_keep": 1} if accepts(bare, "logits_to_keep") else {}
        self._cache_argument = cache_argument(bare)
        self._tap: tuple[int, Tap] | None = None
        self._turns: tuple[int, list[Rotation]] | None = None
        on_fork(self)
        if is_newer():
            self._try_out()

    def _forked(self) -> None:
        """This is a child process: another thread of the parent's may hold the lock."""
        self._looking = Lock()

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

    @property
    def vocabulary_size(self) -> int:  # type: ignore[override]
        """As the model's embeddings have it now."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        share: int | str | PathLike[str] | None = None,
    ) -> Self:
        """Load a model from a folder, or by its name on the Hugging Face hub.

        Parameters
        ----------
        name_or_folder : str or Path
            A folder with config.json and safetensors files, or a name such as "HuggingFaceTB/SmolLM2-135M-Instruct".
        dtype : str or torch.dtype
            "float32", "bfloat16", "float16", or "auto" for what the weights are stored in. Processors without
            instructions for bfloat16 are several times as fast in float32, which takes twice the memory.
        share : int, str, or Path, optional
            How many layers attend to what another keeps, as `cakekv share calibrate` found; or the file that it wrote.
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
        advice = (
            "give a folder with config.json and safetensors files, or the name of a model on the Hugging Face hub that "
            "is cached here or can be downloaded"
        )
        if "gguf" in source.lower() or any(folder.glob("*.gguf")):
            advice = _NO_GGUF
        if folder.is_dir():
            source = str(folder)
            if not (folder / "config.json").is_file():
                raise BadInput(f"the folder {source} holds no model: it has no config.json ({advice})")
        elif folder.is_file():
            raise BadInput(f"the model {source} is a file ({advice})")
        elif folder.is_absolute() or source.startswith((".", "~")):
            raise BadInput(f"there is no model folder {source} ({advice})")
        try:
            config = AutoConfig.from_pretrained(source)
            check_config(config)
            model, loading = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise BadInput(f"cannot load the model {source!r}: {reason} ({advice})") from error
        if loading["missing_keys"]:
            missing = sorted(loading["missing_keys"])
            raise BadInput(f"the model {source!r} is incomplete: it lacks {len(missing)} tensors, such as {missing[0]}")
        engine = cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")))
        engine._read_from = source
        if share is not None:
            engine._share(find_map(share, engine.model_names()))
        return engine

    def _share(self, share: LayerMap | None) -> None:
        """Have layers shared from now on; nothing was computed yet."""
        self.share, self._kept = share, share.kept(self.shapes) if share else self.shapes
        self.layout = KVLayout(tuple(shape.layout for shape in self._kept if shape is not None))

    def rotations(self) -> list[Rotation]:
        """As `Engine.rotations`."""
        found = zip((at for at, shape in enumerate(self.shapes) if shape), find_rotations(self.model), strict=True)
        return [rotation for at, rotation in found if self._kept[at]]

    def turnable(self) -> list[Rotation]:
        """As `Engine.turnable`."""
        revision = self.state().revision
        if self._turns is None or self._turns[0] != revision:
            rotations = self.rotations()
            check_turns(self, rotations)
            self._turns = revision, rotations
        return self._turns[1]

    def identity(self, chunk_tokens: int, tenant: str = "", recipe: str = RAW) -> Identity:
        """As `Engine.identity`. The first call reads all weights, later ones what was written to since."""
        with self._looking:
            self._look()
            return Identity(
                weights=self._live.names.weights,
                architecture=self._architecture(),
                dtype=self._dtype.replace("torch.", ""),
                layout=layout_text(self.layout),
                chunk_tokens=chunk_tokens,
                adapter=self._live.names.adapter,
                tenant=tenant,
                recipe=recipe,
            )

    def _architecture(self) -> str:
        name = self._live.names.architecture
        return name if self.share is None else canonical({"architecture": name, "share": self.share.digest})

    def weights_names(self) -> Iterator[str]:
        """As `Engine.weights_names`; then that of the files it was read from, whatever it computes in.

        If layers are shared, others than without: what was learned of the layers is not for these.
        """
        mark = f"{self.share.digest} " if self.share else ""
        yield from (mark + name for name in self.model_names())

    def model_names(self) -> Iterator[str]:
        """As `weights_names`, whether layers are shared or not."""
        yield from super().weights_names()
        if self._read_from:
            from huggingface_hub import snapshot_download

            folder = Path(self._read_from)
            with suppress(BadInput, OSError, ValueError):  # it is no more than another name
                if not folder.is_dir():
                    folder = Path(snapshot_download(self._read_from, local_files_only=True))
                yield fingerprint_files(folder)

    def state(self) -> EngineState:
        """As `Engine.state`.

        A write to a few elements of a weight through `.data` or NumPy may go unseen: call `weights_changed` after it.

        Raises
        ------
        UnsupportedModel
            The model was changed so that another engine is needed.
        """
        with self._looking:
            self._look()
            return EngineState(self._live.revision, self._live.names.unnamed or surroundings(self.device))

    def weights_changed(self) -> None:
        """Have all weights read anew, because they were written to in a way that cannot be noticed."""
        with self._looking:
            self._live.forget()

    def _look(self) -> None:
        """Find out what changed in the model; called with the lock held."""
        if self.model.device != self.device:
            raise UnsupportedModel(f"the model is on {self.model.device} now, not on {self.device}: make a new engine")
        if self._live.look():
            self.max_context = context_length(self.model.config)
            self._refusal = self._why_refused()
        if self._refusal:
            raise UnsupportedModel(self._refusal)

    def _why_refused(self) -> str:
        """Why nothing can be computed with the model as it is now; "" if it can."""
        if self._activates and (name := activated_adapter(self._live.model)):
            return (
                f"the adapter {name} is an activated LoRA (aLoRA): tokens of the prompt switch it on, of which a span "
                "of prefill does not know; switch to another adapter, disable it, or use PEFT's own generate()"
            )
        if self._live.form != self._form:
            with torch.autocast(self.device.type, enabled=False):
                shapes = shapes_of(self._live.model)
            if shapes != self.shapes:
                return "the model's layers keep other keys and values than when its engine was made: make a new engine"
            self._form = self._live.form
        return ""

    def new_cache(self, capacity: int) -> TwoEndedCache:
        """As `Engine.new_cache`. Raises `BadInput` if the model's context has not so many tokens."""
        return self._new_cache(capacity)

    def new_sparse_cache(self, capacity: int) -> TwoEndedCache:
        """As `Engine.new_sparse_cache`. Raises `BadInput` if the model's context has not so many tokens."""
        return self._new_cache(capacity, sparse=True)

    def kept_share(self, cache: TwoEndedCache, length: int) -> float:
        """As `Engine.kept_share`."""
        return cache.present_share(length) if isinstance(cache, TwoEndedCache) else 1.0

    def present(self, cache: TwoEndedCache, length: int) -> TwoEndedCache | RaggedCache:
        """As `Engine.present`."""
        if not cache.has_absent:
            return cache
        with torch.inference_mode():
            left = ragged_view(cache, length)
            left.own()
        left.capacity = self.max_context
        return left

    def _new_cache(self, capacity: int, sparse: bool = False) -> TwoEndedCache:
        if not 1 <= capacity <= self.max_context:
            raise BadInput(f"a cache can have 1 to {self.max_context} tokens (the model's context), not {capacity}")
        cache = TwoEndedCache(self._kept, capacity, self.device, sparse, self.share.sources if self.share else {})
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
        if isinstance(cache, RaggedCache):
            return self._compute_ragged(cache, token_ids, start)
        cache.set_length(start)
        with (
            torch.inference_mode(),
            cache.forwarding(),
            cache.gated(gate) if gate is not None else nullcontext(),
            self.attending(cache, some_may_come=gate is not None) as model,
        ):
            try:
                last = self.forward_of(model, cache, token_ids, **self.arguments).logits[0, -1]
            except RuntimeError:
                self.state()  # it may be that the model outgrew its caches, which says more
                raise
            logits: torch.Tensor = last.to("cpu", torch.float32, copy=True)
        _check_filled(cache, start + tokens)
        return logits

    @contextmanager
    def attending(self, cache: TwoEndedCache, some_may_come: bool = False) -> Iterator[Any]:
        """What forwards over a cache run within the `with` block: the model, or a twin that hides rows that are absent.

        Parameters
        ----------
        cache : TwoEndedCache
            Is read and written to.
        some_may_come : bool
            Whether chunks are placed meanwhile, before what they cover is read.
        """
        with cache.hiding():  # what is placed from now on is behind what a forward sees, unless some may come
            if cache.has_absent or (cache.sparse and some_may_come):
                with self.tap.handing(present_only(cache)) as twin:
                    yield twin
            else:
                yield self.model

    def _compute_ragged(self, cache: RaggedCache, token_ids: Sequence[int], start: int) -> torch.Tensor:
        logits = self._forward_ragged(cache, token_ids, start, 1)[0]
        with torch.inference_mode():
            cache.grew(len(token_ids))
        return logits

    def _forward_ragged(self, cache: RaggedCache, token_ids: Sequence[int], start: int, rows: int) -> torch.Tensor:
        """The logits of the last `rows` tokens, which the cache has then."""
        cache.set_length(start)
        arguments = dict.fromkeys(self.arguments, rows)
        try:
            with torch.inference_mode(), self.tap.handing(cache.attend) as twin, cache.driven():
                last = self.forward_of(twin, cache, token_ids, **arguments).logits[0, -rows:]
                logits: torch.Tensor = last.to("cpu", torch.float32, copy=True)
        except BaseException:
            cache.give_up(start)
            raise
        return logits

    def draft(self, cache: Any, token: int, position: int) -> int:
        """As `Engine.draft`."""
        with cache.drafting():
            return int(self._forward_ragged(cache, [token], position, 1)[0].argmax())

    def verify(self, cache: Any, token_ids: Sequence[int], start: int) -> list[torch.Tensor]:
        """As `Engine.verify`."""
        cache.give_up(start)
        return list(self._forward_ragged(cache, token_ids, start, len(token_ids)))

    def logits(self, cache: TwoEndedCache | RaggedCache, token_ids: Sequence[int], start: int) -> torch.Tensor:
        """Compute a span, as `compute` does, and return what is said behind each of its tokens.

        Returns
        -------
        Tensor
            (tokens, vocabulary), float32, on the CPU.
        """
        if isinstance(cache, RaggedCache):
            logits = self._forward_ragged(cache, token_ids, start, len(token_ids))
            with torch.inference_mode():
                cache.grew(len(token_ids))
            return logits
        cache.set_length(start)
        with torch.inference_mode(), cache.forwarding(), self.attending(cache) as model:
            said: torch.Tensor = self.forward_of(model, cache, token_ids).logits[0]
            return said.to("cpu", torch.float32, copy=True)

    @property
    def tap(self) -> Tap:
        """On the attention of the model as it is now.

        Raises
        ------
        UnsupportedModel
            It cannot be tapped.
        """
        revision = self.state().revision
        if self._tap is None or self._tap[0] != revision:
            tap = Tap(getattr(self.model, "_orig_mod", self.model))
            if self._tap is None:
                check_tap(self, tap)
            self._tap = revision, tap
        return self._tap[1]

    def compressible(self, methods: Sequence[Method | Sight]) -> None:
        """As `Engine.compressible`."""
        if methods and self.share:
            raise UnsupportedModel("layers that share another's keys and values cannot be shown to it: give no share")
        if any(isinstance(method, Method) and method.compact for method in methods):
            self.turnable()
        if methods:
            assert self.tap is not None

    def compress(
        self, cache: TwoEndedCache, token_ids: Sequence[int], method: Method, marked: Sequence[Marked] = ()
    ) -> RaggedCache | TwoEndedCache:
        """As `Engine.compress`."""
        return choose(self, cache, token_ids, method, marked)

    def look(
        self,
        cache: TwoEndedCache,
        token_ids: Sequence[int],
        sight: Sight,
        marked: Sequence[Marked] = (),
        spans: Mapping[int, Mapping[int, Groups]] = MappingProxyType({}),
    ) -> RaggedCache:
        """As `Engine.look`."""
        return look(self, cache, token_ids, sight.for_model(self.weights_names()), marked, spans)

    def begin_recall(
        self, cache: TwoEndedCache, length: int, sight: Sight, spans: Mapping[int, Mapping[int, Groups]]
    ) -> RaggedCache:
        """As `Engine.begin_recall`."""
        view = begin_recall(cache, length, sight, spans)
        view.capacity = self.max_context
        return view

    def forward(self, cache: Any, token_ids: Sequence[int], **arguments: Any) -> Any:
        """The model's own forward over one sequence and a cache of transformers' kind; returns its output."""
        return self.forward_of(self.model, cache, token_ids, **arguments)

    def forward_of(self, model: Any, cache: Any, token_ids: Sequence[int], **arguments: Any) -> Any:
        """As `forward`, of a model that takes the same arguments."""
        input_ids = torch.tensor(np.asarray(token_ids, dtype=np.int64)[None], device=self.device)
        arguments[self._cache_argument] = cache
        return model(input_ids=input_ids, use_cache=True, return_dict=True, **arguments)

    def blendable(self, way: Blend) -> None:
        """As `Engine.blendable`."""
        if self.share:
            raise UnsupportedModel("layers that share another's keys and values cannot be driven one by one")
        check_blends(self, way)

    def blend(
        self,
        cache: TwoEndedCache,
        token_ids: Sequence[int],
        start: int,
        always_from: int,
        way: Blend,
        gate: Gate | None = None,
    ) -> tuple[torch.Tensor, list[int]]:
        """As `Engine.blend`."""
        end = start + len(token_ids)
        if not 0 <= start <= always_from < end <= cache.capacity:
            raise BadInput(f"positions {start} to {end} cannot be blended in a cache of {cache.capacity} tokens")
        try:
            logits, positions = blend(self, cache, token_ids, start, always_from, way, gate)
        except RuntimeError:
            self.state()  # as in `compute`
            raise
        _check_filled(cache, end)
        return logits, positions

    def place(self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[Segment | None]) -> int:
        """As `Engine.place`. Raises `BadInput` if the segments do not fit."""
        return self._transfer.place(cache, start, tokens, segments)

    def place_moved(
        self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[Segment | None], move: Move
    ) -> int:
        """As `Engine.place_moved`. Raises `BadInput` if the segments do not fit."""
        return self._transfer.place_moved(cache, start, tokens, segments, move)

    def decoder(self, coder: ChunkCoder) -> DeviceDecoder | None:
        """As `Engine.decoder`."""
        return self._transfer.decoder(coder)

    def gather(self, cache: TwoEndedCache, start: int, tokens: int, segments: Sequence[memoryview]) -> None:
        """As `Engine.gather`. Raises `BadInput` if the segments do not fit, or rows are absent."""
        cache.check_present(start, start + tokens)
        self._transfer.gather(cache, start, tokens, segments)

    def gatherer(self, cache: TwoEndedCache, start: int, tokens: int) -> Gather:
        """As `Engine.gatherer`."""
        since = cache.watch_below(start + tokens)

        def gather(segments: Sequence[memoryview]) -> None:
            self.gather(cache, start, tokens, segments)
            if cache.rewritten(start + tokens, since):  # asked afterwards: it may have been while we copied
                raise CacheRewritten(f"the cache was written to below position {start + tokens} before it was saved")

        return gather

    def staging(self, size: int) -> memoryview:
        """As `Engine.staging`."""
        return self._transfer.staging(size)

    def held_bytes(self, cache: TwoEndedCache) -> int:
        """As `Engine.held_bytes`."""
        if isinstance(cache, RaggedCache):
            return cache.held_bytes
        return sum(region.nbytes for layer in cache.stored for region in layer.regions)

    def carry(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """As `Engine.carry`: the number of torch's threads, autocast, and the current stream."""
        threads, kind = torch.get_num_threads(), self.device.type
        settings: list[Callable[[], AbstractContextManager[Any]]] = []
        if kind == "cuda":
            settings.append(partial(torch.cuda.stream, torch.cuda.current_stream(self.device)))
        if torch.is_autocast_enabled(kind):
            cached = torch.is_autocast_cache_enabled()
            settings.append(partial(torch.autocast, kind, torch.get_autocast_dtype(kind), cache_enabled=cached))

        def carried() -> Result:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            with ExitStack() as stack:
                for setting in settings:
                    stack.enter_context(setting())
                return work()

        return carried

    def sampler(
        self, temperature: float, top_k: int | None, top_p: float | None, seed: int | None
    ) -> Callable[[torch.Tensor], int]:
        """As `Engine.sampler`."""
        check_sampling(temperature, top_k, top_p)
        generator = _generator(seed)
        return lambda logits: choose_token(logits, temperature, top_k, top_p, generator)

    def chooser(self, sampling: Sampling, prompt: Sequence[int]) -> Callable[[torch.Tensor], Choice]:
        """As `Engine.chooser`."""
        if sampling.is_plain:
            return super().chooser(sampling, prompt)
        return Chooser(sampling, prompt, _generator(sampling.seed))

    @property
    def proposed_sampling(self) -> dict[str, Any]:
        """As `Engine.proposed_sampling`: of the model's generation settings, if those say to sample."""
        settings = self.model.generation_config
        if not getattr(settings, "do_sample", False):
            return {}
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        proposed = {name: getattr(settings, name, None) for name in names}
        proposed["temperature"] = 1.0 if proposed["temperature"] is None else proposed["temperature"]
        return {name: value for name, value in proposed.items() if value is not None and (name, value) != ("top_k", 0)}

    @property
    def device_name(self) -> str:
        """As `Engine.device_name`."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} {platform.node()}, {torch.get_num_threads()} threads"

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens that the model's generation settings end an answer with."""
        if self._stop_tokens is not None:
            return self._stop_tokens
        stop = getattr(self.model.generation_config, "eos_token_id", None)
        return frozenset([stop] if isinstance(stop, int) else stop or [])

    @stop_tokens.setter
    def stop_tokens(self, tokens: frozenset[int]) -> None:
        self._stop_tokens = tokens


def _check_filled(cache: TwoEndedCache, length: int) -> None:
    if cache.length != length:
        raise UnsupportedModel(
            "the model's forward did not fill its cache, as with gradient checkpointing in training mode: "
            "call model.eval()"
        )


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(whole("seed", seed, -(2**63), 2**64 - 1))
    return generator


def context_length(config: Any) -> int:
    """Tokens that a model can have in its context; `sys.maxsize` if its positions have no end (ALiBi).

    A scaling of RoPE that turns a key alike in every prompt takes the context as far as it reaches: YaRN to `factor`
    times the original context, also where `max_position_embeddings` was left as it was, as model cards have it; linear
    scaling to `factor` times `max_position_embeddings`, unless layers differ in their RoPE (Gemma 3), where that is the
    scaled context already; Llama 3's to `factor` times the original context, if the configuration states that one.

    LongRoPE and dynamic scaling turn the keys of *all* positions differently once a prompt is longer than the original
    context, so that what is stored for a short prompt would be wrong for a long one. Such a model is used within its
    original context only.
    """
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    limits = [limit for name in names if (limit := getattr(text, name, None))]
    if not limits:
        return sys.maxsize
    stated = int(limits[0])
    rope = getattr(text, "rope_parameters", None) or {}
    by_layer = [parameters for parameters in rope.values() if isinstance(parameters, dict)]
    reaches = [_reach(parameters, stated, same_everywhere=not by_layer) for parameters in by_layer or [rope]]
    return min([max(stated, *reaches), *(reach for reach in reaches if reach < stated)])


def _reach(rope: dict[str, Any], stated: int, same_everywhere: bool) -> int:
    """Tokens that one RoPE of a model reaches whose configuration has `stated` as its context."""
    kind, factor = rope.get("rope_type"), float(rope.get("factor") or 1.0)
    original = int(rope.get("original_max_position_embeddings") or stated)
    if kind == "longrope":
        return original
    if kind == "yarn":
        return max(stated, int(factor * original))
    if (kind == "linear" and same_everywhere) or (kind == "llama3" and original == stated):
        return int(factor * original)
    return stated


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
