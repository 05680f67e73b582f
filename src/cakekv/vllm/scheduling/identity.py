"""Who a chunk of vLLM's is: model, adapter, layout, and vLLM's own chained hashes of everything in the prompt."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from cakekv.errors import BadInput, UnsupportedEngine
from cakekv.keys import ChunkKey, Identity, canonical, fingerprint_files
from cakekv.vllm.engine_fields import keyed_fields

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.request import Request

_LOG = logging.getLogger("vllm.cakekv")

HASH = "sha256_cbor"
"""vLLM's block hash that is the same in every process and on every machine."""
_SEED = "vllm-none-hash"
"""What vLLM begins its chains of hashes with where PYTHONHASHSEED is not set."""
_NOT_ARCHITECTURE = ("_name_or_path", "transformers_version")
"""Where a model lay, and what wrote its configuration."""
_BY_MAX_LENGTH = ('"longrope"', '"su"', "attn_temperature_tuning", '"llama4')
"""What in a configuration says that keys depend on --max-model-len, too (Phi-3 and its kin, Llama 4)."""
_CONFIGS = ("config.json", "params.json", "hf_quant_config.json")
"""Files of a model's folder that configurations are read from (params.json: Mistral's form)."""
_ADAPTER_CONFIG = "adapter_config.json"


def make_hashes_stable(vllm_config: VllmConfig) -> None:
    """Have vLLM hash blocks in the one way that does not depend on process, Python or pickle.

    Called while the scheduler is made, before vLLM sets up its hashing.
    """
    cache = vllm_config.cache_config
    if cache.prefix_caching_hash_algo != HASH:
        _LOG.info(
            "cakekv: block hashes by %s instead of %s, since chunks are shared between processes",
            HASH,
            cache.prefix_caching_hash_algo,
        )
        cache.prefix_caching_hash_algo = HASH


class _HashedAgain:
    """A request as vLLM's functions see it, with hashes of its own, and perhaps other things."""

    def __init__(self, request: Request, **others: object) -> None:
        self._request = request
        self.block_hashes: list[bytes] = []
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class ChunkNames:
    """Makes the keys of a request's chunks.

    Parameters
    ----------
    vllm_config
        The engine's.
    chunk_tokens, hash_tokens : int
        Tokens per chunk, and per hash of vLLM's.
    layout : str
        Order of the bytes in a shard, `canonical`.
    tenant : str
        As in the options.
    recipe : str
        The codec's fingerprint.

    Raises
    ------
    UnsupportedEngine
        The model's weights cannot be identified.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        chunk_tokens: int,
        hash_tokens: int,
        layout: str,
        tenant: str,
        recipe: str,
    ) -> None:
        self._chunk_hashes = chunk_tokens // hash_tokens
        self._hash_tokens = hash_tokens
        model = vllm_config.model_config
        order: dict[str, object] = {
            "engine": "vllm",
            "worker": layout,
            "hash": [vllm_config.cache_config.prefix_caching_hash_algo, hash_tokens, None],  # None: `_SEED`
        }
        # Engines with a KV connector have none of these; if that changes, their chunks are others.
        if lookahead := getattr(vllm_config, "num_hash_lookahead_tokens", 0):
            order["lookahead"] = lookahead
        if settings := keyed_fields(vllm_config):
            order["settings"] = _plain(settings)
        self.identity = Identity(
            weights=_weights(model, vllm_config.load_config.load_format),
            architecture=architecture_of(model),
            dtype=f"{model.dtype} {vllm_config.cache_config.cache_dtype}",
            layout=canonical(order),
            chunk_tokens=chunk_tokens,
            tenant=tenant,
            recipe=recipe,
        )
        self.earlier = replace(self.identity, architecture=architecture_by_library(model))
        """Who the model was to cakekv 0.1."""
        self._epoch = b""
        self._roots: dict[str, bytes] = {}
        """By folder of the LoRA adapter, "" for none."""
        self._files: dict[str, object] = {}
        """What the files of an adapter's folder were like when they were read."""
        self._keys: dict[str, tuple[bytes, list[ChunkKey]]] = {}
        """By request, with their root."""
        self._again: dict[str, _HashedAgain] = {}
        """By request, if vLLM's hashes are not the same everywhere, or not those of its tokens alone."""
        self._salts: dict[str, str | None] = {}
        """By request that was set apart, its own `cache_salt`."""

    def keys(self, request: Request) -> list[ChunkKey]:
        """Keys of the request's full chunks, as far as their tokens are known.

        Raises
        ------
        UnsupportedEngine
            The request's adapter cannot be identified.
        """
        if request.request_id not in self._keys:
            self._keys[request.request_id] = self._root(request), []
        root, keys = self._keys[request.request_id]
        if len(keys) == len(request.block_hashes) // self._chunk_hashes:
            return keys
        keys += self._named(root, self._hashes(request), len(keys))
        return keys

    def _named(self, root: bytes, hashes: Sequence[bytes], first: int) -> list[ChunkKey]:
        """Keys of the chunks from `first` on."""
        lasts = (
            hashes[(chunk + 1) * self._chunk_hashes - 1] for chunk in range(first, len(hashes) // self._chunk_hashes)
        )
        return [ChunkKey(blake3(root + last, derive_key_context="cakekv vllm chunk").digest()) for last in lasts]

    def document_keys(self, request: Request, start: int, end: int) -> list[ChunkKey]:
        """Keys of the full chunks of a part of a request's prompt, as they are if it is a prompt of its own.

        To be asked for after the request's own.
        """
        document = _HashedAgain(
            request,
            num_tokens=end - start,
            all_token_ids=request.all_token_ids[start:end],
            mm_features=[],
            cache_salt=self._salts.get(request.request_id, request.cache_salt),
        )
        return self._named(self._keys[request.request_id][0], self._hash(document), 0)

    def set_apart(self, request: Request, why: object) -> None:
        """Have vLLM share the request's blocks only with requests that are set apart for the same reason.

        Its keys, and those of its documents, stay what they are.

        Parameters
        ----------
        request
            vLLM's request, of which nothing is computed.
        why
            Plain data.
        """
        if request.request_id in self._salts:
            return
        own = self._salts[request.request_id] = request.cache_salt
        request.cache_salt = blake3(canonical([own, why]).encode(), derive_key_context="cakekv vllm apart").hexdigest()
        request.block_hashes.clear()
        request.update_block_hashes()

    def is_apart(self, request_id: str) -> bool:
        """Whether a request was set apart."""
        return request_id in self._salts

    def _hashes(self, request: Request) -> Sequence[bytes]:
        """vLLM's hashes of the request's blocks, as they are where PYTHONHASHSEED is not set, by its own salt.

        Where it is, vLLM's own begin with it: servers that set it differently would share nothing. So they are computed
        once more then.
        """
        from vllm.utils.hashing import sha256_cbor
        from vllm.v1.core import kv_cache_utils

        apart = request.request_id in self._salts
        if not apart and sha256_cbor(_SEED) == kv_cache_utils.NONE_HASH:
            known: Sequence[bytes] = request.block_hashes
            return known
        if request.request_id not in self._again:
            salt = {"cache_salt": self._salts[request.request_id]} if apart else {}
            self._again[request.request_id] = _HashedAgain(request, **salt)
        return self._hash(self._again[request.request_id])

    def _hash(self, again: _HashedAgain) -> Sequence[bytes]:
        """Hash what was not hashed yet."""
        from vllm.utils.hashing import sha256_cbor
        from vllm.v1.core import kv_cache_utils

        if not again.block_hashes and again.num_tokens >= self._hash_tokens:
            first = sha256_cbor(_SEED)
            extra, _ = kv_cache_utils.generate_block_hash_extra_keys(again, 0, self._hash_tokens, 0)
            tokens = tuple(again.all_token_ids[: self._hash_tokens])
            again.block_hashes.append(sha256_cbor((first, tokens, extra)))
        hasher = kv_cache_utils.get_request_block_hasher(self._hash_tokens, sha256_cbor)
        again.block_hashes += hasher(again)
        return again.block_hashes

    def forget(self, request_id: str) -> None:
        """The request is gone."""
        self._keys.pop(request_id, None)
        self._again.pop(request_id, None)
        self._salts.pop(request_id, None)

    def keep_to(self, known: Container[str]) -> None:
        """Go on under the identity of an earlier cakekv if a store knows chunks of it; `known` are its roots."""
        if self.earlier.root.hex() in known:
            self.identity = self.earlier

    def start_anew(self) -> None:
        """The weights may have changed: from now on nothing that was stored before is found, nor shared."""
        self._epoch = os.urandom(32)
        self._roots.clear()
        self._keys.clear()

    def _root(self, request: Request) -> bytes:
        folder = None if request.lora_request is None else _adapter_folder(request.lora_request.lora_path)
        if folder is not None:
            files = _files_of(folder)
            if self._files.setdefault(str(folder), files) != files:
                raise UnsupportedEngine(
                    f"the files of the LoRA adapter {folder} have changed since they were read, and which ones vLLM "
                    "uses cannot be told; start the engine anew, or give another version another folder"
                )
        name = "" if folder is None else str(folder)
        if name not in self._roots:
            adapter = "" if folder is None else _adapter(folder)
            self._roots[name] = replace(self.identity, adapter=adapter).root + self._epoch
        return self._roots[name]


def weights_names(vllm_config: VllmConfig) -> Iterator[str]:
    """As `Engine.weights_names`, of the model's files."""
    yield _weights(vllm_config.model_config, vllm_config.load_config.load_format)


def _weights(model: ModelConfig, load_format: str) -> str:
    if load_format == "dummy":
        return "dummy"
    return _fingerprint(_folder(model.model_weights or model.model, model.revision), f"the model {model.model}")


def _folder(name: str | Path, revision: str | None) -> Path:
    """Where the files of a model are that is named by its path or as on the Hugging Face Hub."""
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), revision=revision, local_files_only=True))


def _adapter_folder(path: str) -> Path:
    """Where vLLM reads a LoRA adapter from."""
    from vllm.lora.utils import get_adapter_absolute_path

    return Path(get_adapter_absolute_path(path))


def _files_of(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a folder's files."""
    with suppress(OSError):
        files = sorted(folder.iterdir())
        return [(file.name, status.st_size, status.st_mtime_ns) for file in files if (status := file.stat())]
    return []


def _adapter(folder: Path) -> str:
    """Digest of an adapter's weights, and of how they are to be used."""
    weights = _fingerprint(folder, f"the LoRA adapter {folder}")
    settings = folder / _ADAPTER_CONFIG
    used = blake3(settings.read_bytes()).hexdigest() if settings.exists() else ""
    return canonical([weights, used])


def _fingerprint(path: Path, what: str) -> str:
    began = monotonic()
    try:
        fingerprint = fingerprint_files(path)
    except BadInput as error:
        raise UnsupportedEngine(
            f"cakekv cannot tell the weights of {what} from others, and would mix up their chunks: {error}"
        ) from error
    _LOG.info("cakekv: read the weights of %s in %.1f s to know whose chunks are whose", what, monotonic() - began)
    return fingerprint


def architecture_of(model: ModelConfig) -> str:
    """What the model's files and the user say of it, as far as it can change keys and values.

    Not what vLLM and transformers make of that: they add defaults, and rename and move fields, with every release. The
    chunks of before would not be found any more.
    """
    said = _files_said(model)
    if not said:
        return architecture_by_library(model)
    overrides = model.hf_overrides
    if callable(overrides):
        overrides = architecture_by_library(model)  # what it changes shows in the outcome only
    return _with_length(
        model, {"config": said} | ({"overrides": _plain(overrides, _NOT_ARCHITECTURE)} if overrides else {})
    )


def _files_said(model: ModelConfig) -> dict[str, object]:
    """The model's configuration files by name; none if its configuration lies in another file, such as a GGUF."""
    said: dict[str, object] = {}
    with suppress(OSError, ValueError):
        folder = _folder(model.hf_config_path or model.model, model.revision)
        for file in filter(Path.is_file, map(folder.joinpath, _CONFIGS)):
            said[file.name] = _plain(json.loads(file.read_text(encoding="utf-8")), _NOT_ARCHITECTURE)
    return said


def architecture_by_library(model: ModelConfig) -> str:
    """The model's configuration as the installed transformers has it: that was the key of cakekv 0.1."""
    fields = {name: value for name, value in model.hf_config.to_dict().items() if name not in _NOT_ARCHITECTURE}
    return _with_length(model, {"config": _plain(fields)})


def _with_length(model: ModelConfig, known: dict[str, object]) -> str:
    known["quantization"] = str(model.quantization)
    text = canonical(known)
    if any(word in text for word in _BY_MAX_LENGTH):
        text = canonical(known | {"max_model_len": model.max_model_len})
    return text


def _plain(value: object, leave_out: Container[str] = ()) -> object:
    """Data that JSON knows, without fields of these names; everything else by its text."""
    if isinstance(value, dict):
        return {str(name): _plain(part, leave_out) for name, part in value.items() if name not in leave_out}
    if isinstance(value, list | tuple):
        return [_plain(part, leave_out) for part in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value if value is None or isinstance(value, bool | int | str) else str(value)
