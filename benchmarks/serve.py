"""The server under load: many clients, some of which go away, against `Cake.generate`; and its first token beside it.

python benchmarks/serve.py --out benchmarks/serve.json            # two minutes, the demo's model
python benchmarks/serve.py --tiny --seconds 5 --out out/serve.json
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import psutil

from cakekv import Cake, Chat
from cakekv.bench.machine import describe_run
from cakekv.cli.model import load_cake
from cakekv.serve.app import Service
from cakekv.serve.running import Server, listening

QUESTIONS = [f"Tell me something about the number {number}. " * 12 for number in range(8)]
TOKENS = 16


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--seconds", type=float, default=120.0)
    arguments.add_argument("--clients", type=int, default=32)
    arguments.add_argument("--rounds", type=int, default=20, help="of first tokens")
    arguments.add_argument("--tiny", action="store_true", help="a random model of two layers")
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cake = _tiny(Path(folder)) if asked.tiny else load_cake("demo", f"file://{folder}/store?capacity=4GB")
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        right = [cake.generate(Chat(chat), max_new_tokens=TOKENS, mode="compute", save=False).text for chat in chats]
        sock = listening("127.0.0.1", 0)
        server = Server(Service(cake, "model", running=8, waiting=asked.clients))
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        while not server.started:
            pass
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1/chat/completions"
        first = _first_tokens(cake, url, chats[0], asked.rounds)
        before = _held()
        outcomes = _load(url, chats, right, asked.clients, asked.seconds)
        cake.wait_saved()
        after = _held()
        idle = cake._arms.arbiter.is_idle
        server.should_exit = True
        thread.join()
    figures = {
        **describe_run(),
        "clients": asked.clients,
        "seconds": asked.seconds,
        "outcomes": dict(outcomes),
        "idle_afterwards": idle,
        "before": before,
        "after": after,
        "first_token": first,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def _tiny(folder: Path) -> Cake:
    from tests.serve.tiny import save_model

    return Cake.from_pretrained(save_model(folder), folder / "store", chunk_tokens=16)


def _held() -> dict[str, int]:
    """What a leak would make grow."""
    gc.collect()
    process = psutil.Process()
    caches = sum(type(one).__name__ == "TwoEndedCache" for one in gc.get_objects())
    return {"threads": process.num_threads(), "caches": caches, "rss_bytes": process.memory_info().rss}


def _load(url: str, chats: list[Any], right: list[str], clients: int, seconds: float) -> Counter[str]:
    """Every client asks again and again; each fourth request is broken off."""
    end = monotonic() + seconds

    def client(seed: int) -> Counter[str]:
        chance, seen = random.Random(seed), Counter[str]()
        with httpx.Client(timeout=600) as http:
            while monotonic() < end:
                number = chance.randrange(len(chats))
                body = {"messages": chats[number], "max_tokens": TOKENS, "temperature": 0, "stream": True}
                seen[_ask(http, url, body, right[number], chance.randrange(4) == 0)] += 1
        return seen

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(client, range(clients)), Counter[str]())


def _ask(http: httpx.Client, url: str, body: dict[str, Any], right: str, leaves: bool) -> str:
    """What became of a request."""
    said, ended = "", False
    try:
        with http.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                return f"status {response.status_code}"
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    part = json.loads(line.removeprefix("data: "))
                    if "error" in part:
                        return "error"
                    said += part["choices"][0]["delta"].get("content") or ""
                if leaves and said:
                    return "left"
    except httpx.HTTPError as error:
        return type(error).__name__
    return "lost" if not ended else "right" if said == right else "wrong"


def _first_tokens(cake: Cake, url: str, chat: Any, rounds: int) -> dict[str, float]:
    """Medians of the seconds until the first piece, all computed, in turns."""
    taken: dict[str, list[float]] = {"served": [], "streamed": []}
    body = {
        "messages": chat,
        "max_tokens": 2,
        "temperature": 0,
        "stream": True,
        "cakekv": {"mode": "compute", "store": False},
    }
    with httpx.Client(timeout=600) as http:
        for _ in range(rounds):
            began = monotonic()
            with http.stream("POST", url, json=body) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                        taken["served"].append(monotonic() - began)
                        break
            began = monotonic()
            next(iter(cake.stream(Chat(chat), max_new_tokens=2, mode="compute", save=False)), "")
            taken["streamed"].append(monotonic() - began)
    medians = {f"{name}_s": statistics.median(times) for name, times in taken.items() if times}
    return {**medians, "ratio": medians["served_s"] / medians["streamed_s"]}


if __name__ == "__main__":
    main()
