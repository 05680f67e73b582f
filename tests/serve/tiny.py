"""A tiny model that chats, in a folder; and a server of it, as a process or as a thread."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.request import Request, urlopen

import torch
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cakekv import Cake
from cakekv.metrics import Metrics
from cakekv.serve.app import Service
from cakekv.serve.running import Server, listening

SPECIAL = ["<s>", "<end>", "<user>", "<assistant>", "<system>", "<tool>"]
TEMPLATE = (
    "<s>{% if tools %}<tool>{{ tools | tojson }}<end>{% endif %}{% for m in messages %}"
    "{% if m.role not in ['user', 'system', 'tool', 'assistant'] %}{{ raise_exception('no ' + m.role) }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
NAME = "tiny"
LONG = "the quick brown fox jumps over the lazy dog. " * 30


def save_model(folder: Path, context: int = 4096) -> Path:
    """A model that takes any text, a byte a token, and answers in letters, never ending."""
    words = {sign: number for number, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(words, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(sign, normalized=False) for sign in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token="<s>")
    fast.chat_template = TEMPLATE
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.4,
        tie_word_embeddings=False,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    model = LlamaForCausalLM(config).float()
    letters = [words[sign] for sign in "abcdefghijklmnopqrstuvwxyzĠ"]
    with torch.no_grad():
        silent = torch.ones(len(fast), dtype=torch.bool)
        silent[letters] = False
        model.lm_head.weight[silent] = 0
    folder = folder / NAME
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


class Threaded:
    """A server in a thread of this process."""

    def __init__(self, cake: Cake, **options: Any) -> None:
        registry = CollectorRegistry()
        Metrics(registry)
        self.service = Service(cake, NAME, registry=registry, **options)
        self.server = Server(self.service, stop_s=10)
        self._socket = listening("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self.server.run, args=([self._socket],))
        self._thread.start()
        until(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


class Process:
    """`cakekv serve`, which may be stopped and started again."""

    def __init__(self, model: Path, store: str, *options: str, **environment: str) -> None:
        self._socket = listening("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self._socket.close()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "cakekv", "serve", "--model", str(model), "--store", store]
        self._command += ["--port", str(self.port), *options]
        self._environment = {**os.environ, **environment}
        self.key = environment.get("CAKEKV_API_KEY", "")
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, env=self._environment)
        until(self._answers, 120)

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the server has ended"
        try:
            return bool(urlopen(f"{self.url}/health", timeout=5).status == 200)
        except OSError:
            return False

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)

    def sessions(self) -> list[dict[str, Any]]:
        request = Request(f"{self.url}/cakekv/sessions", headers={"Authorization": f"Bearer {self.key}"})
        with urlopen(request) as response:
            return list(json.load(response)["sessions"])


def until(true: Any, seconds: float = 30.0) -> None:
    """Wait until something is true."""
    end = monotonic() + seconds
    while not true():
        assert monotonic() < end, "waited in vain"
        sleep(0.02)
