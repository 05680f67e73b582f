"""What the tiers deliver, each beside what can be had without cakekv, in turn, in one run.

    python benchmarks/tiers.py --json benchmarks/tiers.json

Every reader reads whole chunks, several at a time, in slices, as the loader does, without checking or placing them.

- Disk, nothing in the page cache: fio (Debian package), direct reads of the same files, slices and depth.
- Redis or Valkey: GETs of whole chunks over bare sockets, as many at a time, each into one buffer.
- S3: obstore's own range reads of the same size, as many at a time.

Servers that are not named are started here. A tier without its server or program is left out, with the reason.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import typer

from cakekv.bench.machine import describe_run
from cakekv.bench.servers import seaweedfs_behind, valkey_behind
from cakekv.cli.console import write_json
from cakekv.errors import CakeError
from cakekv.keys import ChunkKey
from cakekv.quantities import parse_bytes
from cakekv.store.base import Store
from cakekv.store.disk import DiskStore
from cakekv.store.folder import Folder
from cakekv.store.maintenance.walking import unwrapped
from cakekv.store.opening import open_store

TARGETS = {"disk": 0.90, "redis": 0.85, "s3": 0.85}
"""Share of the other's bytes per second that is aimed at."""

Read = Callable[[int, memoryview], None]
"""Reads chunk number so-and-so into a page-aligned buffer."""


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Write the results here.")],
    chunk: Annotated[str, typer.Option(help="Size of a chunk.")] = "4MiB",
    total: Annotated[str, typer.Option(help="Bytes per tier.")] = "1GiB",
    repeats: Annotated[int, typer.Option(min=1, help="Times that each is measured, in turn.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="Make files in here, on the disk to be measured.")] = None,
    redis: Annotated[str | None, typer.Option(help="redis://HOST:PORT to fill and empty; by default new.")] = None,
    s3: Annotated[str | None, typer.Option(help="s3://BUCKET?endpoint=… to fill and empty; by default new.")] = None,
) -> None:
    """Measure the disk tier, Valkey and S3, on servers that are named or started here."""
    size = parse_bytes(chunk)
    count = max(1, parse_bytes(total) // size)
    data: dict[str, Any] = {
        **describe_run(),
        "chunk_bytes": size,
        "chunks": count,
        "tiers": {},
        "left_out": {},
    }
    at: dict[str, AbstractContextManager[Any]] = {
        "disk": nullcontext(folder),
        "redis": nullcontext(redis) if redis else valkey_behind(),
        "s3": nullcontext(s3) if s3 else seaweedfs_behind(folder=folder),
    }
    for name, measure in (("disk", disk), ("redis", valkey), ("s3", bucket)):
        try:
            with at[name] as place:
                result = data["tiers"][name] = measure(place, size, count, repeats)
        except CakeError as error:
            data["left_out"][name] = str(error)
            continue
        share = result["share"] = result["cakekv_bytes_per_s"] / result["other_bytes_per_s"]
        verdict = "met" if share >= TARGETS[name] else "missed"
        ours, other = (1e-9 * result[f"{who}_bytes_per_s"] for who in ("cakekv", "other"))
        print(f"{name}: {ours:.2f} GB/s, {result['other']} {other:.2f} GB/s: {share:.2f}, ", end="")
        print(f"target {verdict} ({TARGETS[name]:.2f})")
    for name, reason in data["left_out"].items():
        print(f"{name} left out: {reason}")
    write_json(json_file, data)


def disk(folder: Path | None, size: int, count: int, repeats: int) -> dict[str, Any]:
    """The disk tier beside fio."""
    if shutil.which("fio") is None:
        raise CakeError("there is no fio: install it (Debian: apt install fio)")
    with (
        tempfile.TemporaryDirectory(prefix="cakekv-tiers-", dir=folder) as scratch,
        tempfile.TemporaryDirectory() as links,
        DiskStore(scratch) as store,
    ):
        keys = fill(store, size, count)
        files = [Folder(Path(scratch)).file(key) for key in keys]
        slice_bytes = slice_of(store, keys[0])
        names = [str(number) for number in range(count)]  # short ones: fio takes no more than 4096 bytes of them
        for name, file in zip(names, files, strict=True):
            Path(links, name).symlink_to(file)

        def ours() -> float:
            drop_from_cache(files)
            return rate(reader(store, keys), size, count, store.parallel_reads)

        def fio() -> float:
            drop_from_cache(files)
            shares = [names[job :: store.parallel_reads] for job in range(store.parallel_reads)]
            jobs = [
                line
                for number, share in enumerate(filter(None, shares))
                for line in (f"--name=job{number}", f"--filename={':'.join(share)}")
            ]
            common = f"--rw=read --direct=1 --ioengine=psync --thread --file_service_type=sequential --bs={slice_bytes}"
            command = ["fio", *common.split(), "--group_reporting", "--output-format=json", *jobs]
            done = subprocess.run(command, capture_output=True, text=True, cwd=links)
            if done.returncode:
                raise CakeError(f"fio failed: {done.stderr.strip()}")
            return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"])

        return compare(ours, fio, "fio", repeats, store, slice_bytes)


def valkey(url: str, size: int, count: int, repeats: int) -> dict[str, Any]:
    """The Redis tier beside plain GETs."""
    with open_store(f"{url}{'&' if '?' in url else '?'}prefix=cakekv-benchmark:") as store:
        keys = fill(store, size, count)
        host, _, port = url.partition("://")[2].partition("?")[0].partition("/")[0].rpartition(":")
        connections = threading.local()

        def get(number: int, buffer: memoryview) -> None:
            if not hasattr(connections, "stream"):
                connections.stream = socket.create_connection((host, int(port)))
            name = f"cakekv-benchmark:chunk:{keys[number].hex()}".encode()
            connections.stream.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name))
            head = b"$%d\r\n" % size
            for part in (memoryview(bytearray(len(head))), buffer[:size], memoryview(bytearray(2))):
                done = 0
                while done < len(part):
                    done += connections.stream.recv_into(part[done:])

        return beside(get, "plain GETs", store, keys, size, repeats)


def bucket(url: str, size: int, count: int, repeats: int) -> dict[str, Any]:
    """The S3 tier beside obstore's range reads."""
    import obstore

    from cakekv.store.s3 import ObjectStore

    store = unwrapped(open_store(url))
    assert isinstance(store, ObjectStore)
    with store:
        keys = fill(store, size, count)
        slice_bytes = min(slice_of(store, keys[0]), size)
        backend = store._backend

        def ranges(number: int, buffer: memoryview) -> None:
            for start in range(0, size, slice_bytes):
                length = min(slice_bytes, size - start)
                obstore.get_range(backend, f"chunks/{keys[number].hex()}", start=start, length=length)

        return beside(ranges, "obstore's range reads", store, keys, size, repeats)


def beside(other: Read, name: str, store: Store, keys: Sequence[ChunkKey], size: int, repeats: int) -> dict[str, Any]:
    """A store beside another way to read the same chunks, which are deleted in the end."""
    parallel = store.parallel_reads
    try:
        return compare(
            lambda: rate(reader(store, keys), size, len(keys), parallel),
            lambda: rate(other, size, len(keys), parallel),
            name,
            repeats,
            store,
            slice_of(store, keys[0]),
        )
    finally:
        store.delete(keys)


def compare(
    ours: Callable[[], float], other: Callable[[], float], name: str, repeats: int, store: Store, slice_bytes: int
) -> dict[str, Any]:
    """Measure both in turn; the medians, in bytes per second, and every repeat."""
    runs = [(ours(), other()) for _ in range(repeats)]
    return {
        "other": name,
        "parallel_reads": store.parallel_reads,
        "slice_bytes": slice_bytes,
        "cakekv_bytes_per_s": median(run[0] for run in runs),
        "other_bytes_per_s": median(run[1] for run in runs),
        "repeats_bytes_per_s": runs,
    }


def fill(store: Store, size: int, count: int) -> list[ChunkKey]:
    """Write chunks of random bytes."""
    keys = [ChunkKey(os.urandom(ChunkKey.LENGTH)) for _ in range(count)]
    for key in keys:
        store.write(key, memoryview(os.urandom(size)))
    return keys


def slice_of(store: Store, key: ChunkKey) -> int:
    """How much is read at a time."""
    with store.open(key) as opened:
        return opened.slice_bytes


def reader(store: Store, keys: Sequence[ChunkKey]) -> Read:
    """Reads as the loader does; look-ups come first, as they do there."""
    store.lookup(keys)

    def read(number: int, buffer: memoryview) -> None:
        with store.open(keys[number]) as opened:
            opened.announce(0, opened.size)
            for start in range(0, opened.size, opened.slice_bytes):
                opened.read_into(buffer[start : min(start + opened.slice_bytes, opened.size)], start)

    return read


def rate(read: Read, size: int, count: int, parallel: int) -> float:
    """Bytes per second of reading all chunks, `parallel` at a time."""
    buffers = threading.local()

    def one(number: int) -> None:
        if not hasattr(buffers, "buffer"):
            buffers.buffer = memoryview(mmap.mmap(-1, size))
        read(number, buffers.buffer)

    with ThreadPoolExecutor(parallel) as pool:
        began = perf_counter()
        for _ in pool.map(one, range(count)):
            pass
        return size * count / (perf_counter() - began)


def drop_from_cache(files: Sequence[Path]) -> None:
    """Make the page cache forget files."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    typer.run(main)
