"""Two engines of one server (`--data-parallel-size 2`), each with a scheduler and a worker of its own, on one store."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from cakekv.bench.vllm.filling import wait_saved
from cakekv.bench.vllm.server import NAME, Server
from cakekv.demo.model import demo_model

PROMPT = topics["with"][:3000]


def loaded_by_engine(server: Server) -> list[float]:
    """Tokens that each engine has loaded."""
    metrics = server.metrics()
    return [metrics[f"cakekv:loaded_tokens_total{{{engine}}}"] for engine in range(2)]


def test_an_engine_loads_what_the_other_has_saved(tmp_path: Path, server_environment: None) -> None:
    plug_in = {"store": f"file://{tmp_path}/store?capacity=1GB", "chunk_tokens": 128, "mode": "load"}
    arguments = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "2048", "--data-parallel-size", "2"]
    with Server(demo_model(), tmp_path / "log", plug_in, [*arguments, "--no-enable-prefix-caching"]) as server:
        client = server.client()

        def ask(rank: int) -> str:
            wish = {"extra_headers": {"X-data-parallel-rank": str(rank)}}
            answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=8, temperature=0, **wish)
            return answer.choices[0].text

        first = ask(0)
        wait_saved(server, 4)
        assert set(loaded_by_engine(server)) == {0.0}
        again = [ask(rank) for rank in (0, 1)]
        loaded = loaded_by_engine(server)
    assert again == [first] * 2
    assert len(loaded) == 2
    assert all(loaded), "one of the engines loaded nothing"
