"""The object storage tier: chunks in a bucket of S3 or a compatible service, of Google's or of Azure's storage.

    {prefix}/chunks/KEY            a chunk, by its key in hexadecimal
    {prefix}/identities/ROOT.json  whose chunks these are

obstore talks to the service: it signs, retries, and uploads large chunks in parts. What is kept for how long is for the
bucket's life-cycle rules to say.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict, Unpack
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore, S3Store

from cakekv.errors import BadInput, MissingChunk, NoAnswer, NotDeleted, StoreError
from cakekv.keys import ChunkKey
from cakekv.messages import learn, without_secrets
from cakekv.quantities import format_bytes
from cakekv.store.asking import ask_each
from cakekv.store.base import ChunkReader, Store, StoredChunk, StoreStats, count
from cakekv.store.identities import MAX_NOTE_BYTES, decode_note, encode_note, is_root
from cakekv.store.sizes import FoundSizes, doubt_of, known_sizes

TIMEOUT_S = 10.0
MAX_RETRIES = 3
_SLICE_BYTES = 4 << 20
_PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 4
_LOOKUPS_AT_ONCE = 32


class ObjectStore(Store):
    """Chunks in a bucket.

    Parameters
    ----------
    backend : obstore store
        The bucket, below a prefix; see `open_s3`, `open_gcs`, `open_azure`.
    where : str
        What to call it in messages.
    name : str
        Short name for reports.

    Raises
    ------
    StoreError
        The bucket cannot be reached, does not exist, or refuses this client.
    """

    parallel_reads = 8

    def __init__(self, backend: Any, where: str, name: str = "s3") -> None:
        self.name = name
        self._backend = backend
        self._where = where
        self._found = FoundSizes()
        self._pool = ThreadPoolExecutor(_LOOKUPS_AT_ONCE, thread_name_prefix="cakekv-lookup")
        self._hanging: dict[ChunkKey, Future[int | None]] = {}
        """Look-ups that nobody waits for any more, but which have not ended."""
        self._untold: set[ChunkKey] = set()
        """Chunks that a look-up did not get to in time."""
        self._check("open the store")

    def lookup(self, keys: Sequence[ChunkKey]) -> list[int | None]:
        """See `Store`; the service takes no batches, so this is one request per chunk, many at a time.

        What the service does not tell in time, or not to us, is not known; of the others it is.
        """
        known: dict[ChunkKey, int | None] = {}
        failed: dict[ChunkKey, StoreError] = {}
        silent = 0
        self._hanging = {key: future for key, future in self._hanging.items() if not future.done()}
        asked = [key for key in dict.fromkeys(keys) if key not in self._hanging]
        for key, future in ask_each(self._pool, self._look, asked, _LOOKUPS_AT_ONCE, self._hanging):
            try:
                known[key], silent = future.result(), 0
            except StoreError as error:
                failed[key] = error
                silent = silent + 1 if isinstance(error, NoAnswer) else 0
            if silent == _LOOKUPS_AT_ONCE or (not known and len(failed) == _LOOKUPS_AT_ONCE):
                break
        if keys and not known:
            trouble = next(iter(failed.values()), NoAnswer(f"cannot look for chunks in {self._where}: it is late"))
            if isinstance(trouble, NoAnswer) or len(failed) >= _LOOKUPS_AT_ONCE:
                raise trouble
            self._check("look for chunks")  # is it these few, or all?
        self._untold |= {key for key in asked if key not in known and key not in failed}
        sizes = known_sizes(keys, known, failed)
        self._found.note(keys, sizes)
        return sizes

    def open(self, key: ChunkKey) -> ChunkReader:
        size = self._found.take(key)
        if size is None:
            size = self._look(key)
        if size is None:
            raise MissingChunk(f"chunk {key.short}… is not in {self._where}")
        return _ObjectReader(self, key, size)

    def write(self, key: ChunkKey, data: memoryview) -> bool:
        self._found.forget([key])
        if key in self._untold:  # so it was computed again, and is here, perhaps
            self._untold.discard(key)
            with suppress(StoreError):
                if self._look(key) == len(data):
                    return True
        with self._explained(f"write chunk {key.short}… of {format_bytes(len(data))}"):
            obstore.put(self._backend, _path(key), data, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)
        return True

    def delete(self, keys: Sequence[ChunkKey]) -> int:
        unique = list(dict.fromkeys(keys))
        sizes = self.lookup(unique)
        self._found.forget(unique)
        unsure = doubt_of(sizes) is not None
        stored = [key for key, size in zip(unique, sizes, strict=True) if size is not None or unsure]
        if not stored:
            return 0
        try:
            with self._explained("delete chunks"):
                obstore.delete(self._backend, [_path(key) for key in stored])
            return len(stored)
        except NoAnswer:
            raise
        except StoreError:  # of which of them?
            return self._delete_each(stored)

    def _delete_each(self, keys: Sequence[ChunkKey]) -> int:
        def delete(key: ChunkKey) -> None:
            # It may be gone with the batch that failed.
            with self._explained(f"delete chunk {key.short}…"), suppress(FileNotFoundError):
                obstore.delete(self._backend, [_path(key)])

        left: dict[ChunkKey, str] = {}
        for key, future in ask_each(self._pool, delete, keys, _LOOKUPS_AT_ONCE):
            if (error := future.exception()) is not None:
                left[key] = str(error)
        if left:
            raise NotDeleted.of(len(keys) - len(left), left)
        return len(keys)

    def __iter__(self) -> Iterator[StoredChunk]:
        """See `Store`; `used_at` is when a chunk was written: reading leaves no trace."""
        with self._explained("list the chunks"):
            for batch in obstore.list(self._backend, "chunks"):
                for meta in batch:
                    name = re.fullmatch(r"chunks/([0-9a-f]{64})", meta["path"])
                    if name:
                        key = ChunkKey(bytes.fromhex(name[1]))
                        yield StoredChunk(key, meta["size"], meta["last_modified"].timestamp())

    def stats(self) -> StoreStats:
        return count(self)

    def remember_identity(self, root: str, fields: Mapping[str, str]) -> None:
        """See `Store`; raises `BadInput` if `root` is not a digest in hexadecimal or the fields exceed 64 KiB."""
        note = encode_note(root, fields)
        with self._explained("note an identity"):
            obstore.put(self._backend, f"identities/{root}.json", note.encode())

    def identities(self) -> dict[str, dict[str, str]]:
        """See `Store`; notes that are damaged are left out."""
        found = {}
        with self._explained("read the identities"):
            for batch in obstore.list(self._backend, "identities"):
                for meta in batch:
                    root = meta["path"].removeprefix("identities/").removesuffix(".json")
                    if is_root(root) and meta["size"] <= MAX_NOTE_BYTES:
                        fields = decode_note(bytes(obstore.get(self._backend, meta["path"]).bytes()))
                        if fields is not None:
                            found[root] = fields
        return found

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read_range(self, key: ChunkKey, buffer: memoryview, offset: int, whole: bool) -> None:
        """Fill `buffer` with a chunk's bytes from `offset` on; `whole` if that is all of it."""
        with self._explained(f"read chunk {key.short}…"):
            try:
                if whole:
                    found = obstore.get(self._backend, _path(key))
                    data = found.bytes() if found.meta["size"] == len(buffer) else b""
                else:
                    data = obstore.get_range(self._backend, _path(key), start=offset, length=len(buffer))
            except FileNotFoundError as error:
                raise MissingChunk(f"chunk {key.short}… was removed from {self._where} meanwhile") from error
        if len(data) != len(buffer):
            raise MissingChunk(f"chunk {key.short}… in {self._where} was replaced meanwhile")
        buffer[:] = memoryview(data)

    def _look(self, key: ChunkKey) -> int | None:
        """Size of a chunk; None if it is not stored."""
        with self._explained("look for chunks"):
            try:
                return obstore.head(self._backend, _path(key))["size"]
            except FileNotFoundError:
                return None

    def _check(self, action: str) -> None:
        """Raise why the service does not let us in, if it does not."""
        with self._explained(action):
            next(iter(obstore.list(self._backend, "chunks", chunk_size=1)), None)

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Turn an error of obstore into the store's own."""
        try:
            yield
        except StoreError:
            raise
        except (exceptions.BaseError, OSError, ValueError) as error:
            reason, kind = _reason(error), StoreError
            if re.search("40[13] (Forbidden|Unauthorized)", reason):
                advice = "Check the credentials in the environment, and what they allow."
            elif "NoSuchBucket" in reason:
                advice = "Make the bucket first, or check its name."
            elif "timed out" in reason or "error sending request" in reason:
                advice, kind = "See whether the service can be reached, and check endpoint= and timeout=.", NoAnswer
            else:
                advice = "Check the store's URL, region= and endpoint=."
            raise kind(f"cannot {action} in {self._where}: {reason}. {advice}") from None


class _ObjectReader(ChunkReader):
    slice_bytes = _SLICE_BYTES

    def __init__(self, store: ObjectStore, key: ChunkKey, size: int) -> None:
        self.size = size
        self._store = store
        self._key = key

    def read_into(self, buffer: memoryview, offset: int) -> int:
        wanted = max(0, min(len(buffer), self.size - offset))
        if wanted:
            self._store.read_range(self._key, buffer[:wanted], offset, whole=wanted == self.size)
        return wanted


class Reach(TypedDict, total=False):
    """How to reach a service; see `open_s3`."""

    endpoint: str | None
    http: bool
    ca: str | None
    timeout_s: float


def open_s3(
    bucket: str, prefix: str = "", *, region: str | None = None, path_style: bool = True, **reach: Unpack[Reach]
) -> ObjectStore:
    """Open a bucket of S3, or of a service that speaks its language.

    Credentials come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, web
    identity and container roles), else from the profile `AWS_PROFILE` of `~/.aws/credentials`, else from the machine's
    role.

    Parameters
    ----------
    bucket, prefix : str
        Where; the prefix is a folder's name.
    endpoint : str or None
        URL of the service; None: Amazon's.
    region : str or None
        None: as the environment says, else us-east-1.
    path_style : bool
        Whether the bucket is named in the path or in the host's name.
    http : bool
        Whether an endpoint without TLS will do.
    ca : str or None
        File of a certificate to trust beside the system's.
    timeout_s : float
        Seconds that a request, or one part of an upload, may take; with retries, an operation takes up to two to three
        times as long.

    Raises
    ------
    BadInput
        The endpoint has no TLS and none was not asked for, or a parameter is out of range.
    StoreError
        The bucket cannot be reached, does not exist, or refuses this client.
    """
    endpoint = reach.get("endpoint")
    if not path_style and endpoint and f"://{bucket}." not in endpoint:
        raise BadInput(
            "with path_style=false, an endpoint is the bucket's own host: write "
            f"endpoint=https://{bucket}.HOST, or leave path_style=false out"
        )
    config: dict[str, Any] = {"virtual_hosted_style_request": not path_style, **_profile_credentials()}
    config |= {"region": region} if region else {}
    return _open(S3Store, "s3", "s3", bucket, prefix, "endpoint", config, **reach)


def open_gcs(bucket: str, prefix: str = "", **reach: Unpack[Reach]) -> ObjectStore:
    """Open a bucket of Google Cloud Storage; credentials come from the environment (`GOOGLE_APPLICATION_CREDENTIALS`,
    …) or the machine. Parameters and errors as in `open_s3`."""
    return _open(GCSStore, "gcs", "gs", bucket, prefix, "base_url", {}, **reach)


def open_azure(container: str, prefix: str = "", **reach: Unpack[Reach]) -> ObjectStore:
    """Open a container of Azure Blob Storage; account and credentials come from the environment
    (`AZURE_STORAGE_ACCOUNT_NAME`, `AZURE_STORAGE_ACCOUNT_KEY`, …) or the machine. Otherwise as `open_s3`."""
    return _open(AzureStore, "azure", "az", container, prefix, "endpoint", {}, **reach)


def _open(
    client: Callable[..., Any],
    name: str,
    scheme: str,
    bucket: str,
    prefix: str,
    address: str,
    config: Mapping[str, Any],
    *,
    endpoint: str | None = None,
    http: bool = False,
    ca: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> ObjectStore:
    """`address` is what the client calls the endpoint; `config` is what else it is to be told."""
    if endpoint is not None:
        _check_no_credentials(endpoint)
    if endpoint is not None and not endpoint.startswith("https://") and not (http and endpoint.startswith("http://")):
        raise BadInput(
            f"the endpoint {f'{endpoint} ' if '://' in endpoint else ''}is not an https:// address; what is stored "
            "would go over the network in the open. If that is what you want, write endpoint=http://… and http=true"
        )
    at = {address: endpoint} if endpoint else {}
    where = f"{scheme}://{bucket}/{prefix}".rstrip("/") + (f" at {endpoint}" if endpoint else "")
    with _constructed(where):
        backend = client(bucket, prefix=prefix or None, **config, **at, **_client(timeout_s, ca, http))
    return ObjectStore(backend, where, name)


def _check_no_credentials(endpoint: str) -> None:
    """Raise `BadInput` if an endpoint holds more than a place: what else there is would be sent along, and shown."""
    try:
        place = urlsplit(endpoint)
        whole = not (place.username or place.password or place.query or place.fragment) and (place.port or True)
    except ValueError:
        whole = False
    if not whole or "@" in endpoint:
        raise BadInput(
            "an endpoint is https://HOST or https://HOST:PORT, for Azure with /ACCOUNT; user, password and signatures "
            "are no part of it: credentials come from the environment (AZURE_STORAGE_SAS_KEY takes a SAS token)"
        )


def _client(timeout_s: float, ca: str | None, http: bool) -> dict[str, Any]:
    """How obstore is to behave on the network."""
    if timeout_s <= 0:
        raise BadInput(f"a timeout is more than 0 s, not {timeout_s}")
    try:
        trusted = {"root_certificate": Path(ca).read_bytes()} if ca else {}
    except OSError as error:
        raise BadInput(f"cannot read the certificate that ca= names: {error.strerror}") from None
    timeout = timedelta(seconds=timeout_s)
    return {
        "client_options": {"timeout": timeout, "connect_timeout": timeout, "allow_http": http, **trusted},
        "retry_config": {
            "max_retries": MAX_RETRIES,
            "retry_timeout": timeout,
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=1), "base": 2},
        },
    }


def _profile_credentials() -> dict[str, str]:
    """The keys in `~/.aws/credentials`, unless the environment has some."""
    if any(name in os.environ for name in ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE")):
        return {}
    file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws" / "credentials"
    profiles = configparser.RawConfigParser()
    try:
        profiles.read(file)
    except (configparser.Error, UnicodeDecodeError):
        raise BadInput(f"cannot make sense of {file}: see that it is as `aws configure` writes it") from None
    profile = os.environ.get("AWS_PROFILE", "default")
    if not profiles.has_section(profile):
        return {}
    names = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key"}
    names["aws_session_token"] = "session_token"
    found = {names[name]: value for name, value in profiles.items(profile) if name in names}
    for secret in (found.get("secret_access_key"), found.get("session_token")):
        learn(secret or "")
    return found


@contextmanager
def _constructed(where: str) -> Iterator[None]:
    """Turn an error of obstore in making a client into the store's own."""
    try:
        yield
    except (exceptions.BaseError, ValueError) as error:
        raise BadInput(f"cannot make a client for {where}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The first lines of an error, without what might be secret in an address."""
    text = " ".join(str(error).partition("Debug source")[0].split()).rstrip(". :")
    text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", text)  # a chunk's name
    # Whose address it is stands before it; but that of a machine's credentials tells that there are no others.
    text = re.sub(r" for url \([^)]*\)|(?<=[A-Z]) https?://(?!169\.254\.)\S+", "", text)
    return without_secrets(text)[:400] or type(error).__name__


def _path(key: ChunkKey) -> str:
    return f"chunks/{key.hex()}"
