"""Random engines and random requests by a seed: plain vLLM and the plug-in have to answer the same.

One seed is one engine's configuration and some rounds of requests. Plain vLLM with the same configuration says what is
right; then the plug-in is given the same requests at random moments, over a store that fails, is slow, loses and
damages chunks; in the end another engine, which only loads, reads what that one has stored. The seed decides everything
but how long threads take, so a rare failure may need several runs of its seed.
"""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from test_lora import save_adapter
from tiny_engine import BLOCK, VOCABULARY, RequestOutputKind, TinyEngine, closing, prompt, sampling, scripted
from vllm.lora.request import LoRARequest

from cakekv.vllm.metrics import kind_of
from cakekv.vllm.scheduling.adapter_mixing import operators_mix

MODEL_TOKENS = 1024
ADAPTERS = 3
TOLERANCE = 1e-3
"""By how much log-probabilities may differ, and two tokens still be a tie. What batches of other shapes
round differently is far below, chunks of other content make far more."""
IDLE_S = 30.0
"""Seconds in which nothing at all is computed or loaded: longer than any deadline here."""
STARVED_STEPS = 600
"""Steps that compute something, but nothing of a request that has a place, while nothing of it is loaded."""
LIFETIME_STEPS = 5000
"""Steps that compute something, from a request's arrival to its end: a whole round takes less."""
FAULTS = (
    "",
    "",
    "error:0.2",
    "read.short:0.3",
    "corrupt:0.3",
    "write.corrupt:0.5",
    "read.hang:0.05,open.hang:0.05,lookup.hang:0.02,hang_s:1s",
    "slow:0.5,slow_s:20ms",
    "vanish:0.3",
    "error:0.05,short:0.05,corrupt:0.1,hang:0.01,slow:0.2,vanish:0.05,hang_s:1s,slow_s:10ms",
)


class Setup(NamedTuple):
    """What an engine is started with.

    Attributes
    ----------
    engine : dict
        Options of vLLM's.
    cake : dict
        Options of the plug-in.
    faults : str
        What goes wrong in its store.
    salted : bool
        Whether some requests have a `cache_salt`.
    ahead : bool
        Whether steps are scheduled while the one before runs.
    """

    engine: dict[str, Any]
    cake: dict[str, Any]
    faults: str
    salted: bool
    ahead: bool

    @classmethod
    def draw(cls, seed: int) -> Setup:
        """The configuration of a seed."""
        choose = random.Random(f"setup {seed}")
        places = choose.randint(1, 8)
        engine: dict[str, Any] = {
            "max_model_len": MODEL_TOKENS,
            "max_num_seqs": places,
            "max_num_batched_tokens": choose.choice([128, choose.randint(129, 1024), 1024]),
            "num_gpu_blocks_override": choose.choice([10, 13, 18, 30, 200]),
            "enable_prefix_caching": choose.random() < 0.7,
            "scheduling_policy": choose.choice(["fcfs", "priority"]),
            "max_logprobs": 2,
        }
        if choose.random() < 0.15:
            engine["long_prefill_token_threshold"] = choose.randint(64, 300)
        kind = choose.choice(["plain", "plain", "ahead", "adapters", "adapters", "speculation"])
        if kind == "adapters":
            engine |= {"enable_lora": True, "max_loras": choose.randint(1, 2), "max_lora_rank": 8, "max_cpu_loras": 4}
        elif kind == "speculation":
            drafts = choose.randint(1, 4)
            engine["speculative_config"] = {
                "method": "ngram",
                "num_speculative_tokens": drafts,
                "prompt_lookup_max": 3,
                "prompt_lookup_min": 1,
            }
            engine["max_num_batched_tokens"] = max(engine["max_num_batched_tokens"], places * (drafts + 1) + 64)
        cake = {
            "chunk_tokens": choose.choice([BLOCK, BLOCK, 2 * BLOCK]),
            "mode": choose.choice(["auto", "auto", "load", "load", "both", "both", "both", "compute"]),
            "load_deadline": choose.choice([0.2, 0.5, 2.0, 5.0]),
            "load_threads": choose.choice([0, 0, 1, 4]),
            "layered_finish": choose.random() < 0.4,
            "decode_slowdown": choose.choice([0.0, 1.25, 1.25, 3.0]),
            "tenant": choose.choice(["", "", "somebody"]),
        }
        if choose.random() < 0.2:
            cake["save_queue"] = 1  # one chunk at a time, the others are not saved
        return cls(engine, cake, choose.choice(FAULTS), choose.random() < 0.4, kind == "ahead")

    @property
    def adapters(self) -> bool:
        """Whether some requests have an adapter."""
        return bool(self.engine.get("enable_lora"))


class Question(NamedTuple):
    """What decides a request's answer."""

    tokens: tuple[int, ...]
    most: int = 4
    stops: tuple[int, ...] = ()
    answers: int = 1
    adapter: int = 0
    """0: none."""

    def about(self) -> str:
        """A few words."""
        return f"{len(self.tokens)} tokens, most {self.most}, n={self.answers}, adapter {self.adapter}"

    def send(self, engine: TinyEngine, adapters: Path, asked: Asked | None = None) -> str:
        """Ask an engine; returns the request's id."""
        engine._number += 1
        name = f"r{engine._number}"
        options: dict[str, Any] = {"n": self.answers, "temperature": 1.0, "top_k": 1} if self.answers > 1 else {}
        wanted = asked.wanted if asked is not None else {}
        params = sampling(
            self.most,
            min_tokens=0,
            logprobs=2,
            stop_token_ids=list(self.stops),
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": {"cakekv": wanted}},
            **options,
        )
        text: Any = {"prompt_token_ids": list(self.tokens)}
        if asked is not None and asked.salt:
            text["cache_salt"] = asked.salt
        lora = None
        if self.adapter:
            lora = LoRARequest(str(self.adapter), self.adapter, str(adapters / str(self.adapter)))
        priority = asked.priority if asked is not None else 0
        engine.llm.llm_engine.add_request(name, text, params, lora_request=lora, priority=priority)
        return name


class Asked(NamedTuple):
    """A question, and when and how it is asked."""

    question: Question
    step: int = 0
    abort_after: int | None = None
    priority: int = 0
    salt: str = ""
    wanted: dict[str, Any] = {}  # noqa: RUF012


def questions(choose: random.Random, texts: Sequence[list[int]], count: int, setup: Setup) -> list[Question]:
    """Prompts with beginnings in common, from one token to nearly all that there may be, some of them equal."""
    made: list[Question] = []
    for _ in range(count):
        if made and choose.random() < 0.2:
            made.append(choose.choice(made))
            continue
        most = choose.choice([1, 2, 2, 4, 4, 8, 30])
        begin = choose.choice(
            [choose.choice([0, 1, BLOCK - 1, BLOCK]), 5 * BLOCK, *(choose.randint(129, 900) for _ in range(3))]
        )
        own = choose.choice([0, 1, choose.randint(1, 40), choose.randint(1, 2 * BLOCK)])
        tokens = choose.choice(texts)[:begin] + prompt(own, choose.randrange(10**9))
        tokens = (tokens or [7])[: MODEL_TOKENS - most - 8]
        stops = tuple(choose.sample(range(3, VOCABULARY), 50)) if choose.random() < 0.25 else ()
        # vLLM's rejection sampler dies of a batch in which nobody with top_k has drafts, and n > 1 needs one here.
        several = choose.random() < 0.1 and "speculative_config" not in setup.engine
        answers = choose.choice([2, 3]) if several else 1
        adapter = choose.choice([0, 0, 1, 1, 2, 3]) if setup.adapters else 0
        made.append(Question(tuple(tokens), most, stops, answers, adapter))
    return made


def asks(choose: random.Random, what: Sequence[Question], setup: Setup) -> list[Asked]:
    """A round of requests: some together, some one after the other, some broken off."""
    made, step = [], 0
    for question in what:
        step += choose.choice([0, 0, 0, 1, choose.randint(1, 30)])
        wanted: dict[str, Any] = {}
        if choose.random() < 0.2:
            wanted["mode"] = choose.choice(["auto", "compute", "load", "both"])
        if choose.random() < 0.1:
            wanted["save"] = False
        if choose.random() < 0.1:
            wanted["report"] = True
        made.append(
            Asked(
                question,
                step,
                choose.choice([0, 1, choose.randint(2, 60)]) if choose.random() < 0.15 else None,
                choose.randint(-2, 2) if setup.engine["scheduling_policy"] == "priority" else 0,
                choose.choice(["", "", "", "mine", "yours"]) if setup.salted else "",
                wanted,
            )
        )
    return made


def with_documents(choose: random.Random, texts: Sequence[list[int]], asked: Sequence[Asked]) -> list[Asked]:
    """A round with some more requests, whose middle is what others begin with: marked as a document, and not."""
    added = []
    for _ in range(max(1, len(asked) // 6)):
        most = choose.choice([1, 2, 8])
        head, own = prompt(choose.randint(1, 200), choose.randrange(10**9)), prompt(30, choose.randrange(10**9))
        document = choose.choice(texts)[: choose.randint(BLOCK, 700)]
        tokens = (head + document + own)[: MODEL_TOKENS - most - 8]
        question, marks = Question(tuple(tokens), most, (), 1, 0), [[len(head), len(head) + len(document)]]
        for number in range(choose.choice([1, 2, 3])):
            other = choose.choice(asked)
            wanted = {"documents": marks, "link_tokens": choose.choice([0, 16, 200])} if number < 2 else {}
            added.append(other._replace(question=question, wanted=wanted))
    return sorted([*asked, *added], key=lambda each: each.step)


Answer = list[list[tuple[int, dict[int, float]]]]
"""Per output and position, the token and the log-probabilities of the likeliest two."""


def answer(output: Any) -> Answer:
    """What an engine said."""
    return [
        [
            (token, {other: entry.logprob for other, entry in likely.items()})
            for token, likely in zip(one.token_ids, one.logprobs, strict=True)
        ]
        for one in output.outputs
    ]


class Difference(NamedTuple):
    """How an answer differs from plain vLLM's."""

    what: str
    """Empty: not at all."""
    tie: bool = False
    """Whether it was judged up to a token only that another is as likely as, but for rounding."""
    deviation: float = 0.0
    """The most by which a log-probability differs."""


def compare(right: Answer, ours: Answer) -> Difference:
    """Tokens and log-probabilities, up to where plain vLLM might as well have gone on with another token."""
    deviation, tie = 0.0, False
    if len(right) != len(ours):
        return Difference(f"{len(ours)} outputs instead of {len(right)}")
    for one, other in zip(right, ours, strict=True):
        for place, ((expected, likely), (token, said)) in enumerate(zip(one, other, strict=False)):
            apart = abs(likely[expected] - said.get(expected, -1e9))
            if token != expected and likely[expected] - likely.get(token, -1e9) < TOLERANCE:
                tie = True
                break
            if token != expected or apart > TOLERANCE:
                return Difference(f"token {place} is {token}, not {expected}; log-probability off by {apart:.2g}")
            deviation = max(deviation, apart)
        else:
            if len(one) != len(other):
                return Difference(f"{len(other)} tokens instead of {len(one)}")
    return Difference("", tie, deviation)


@dataclass
class Findings:
    """What became of a seed's requests: plain data."""

    seed: int
    setup: Setup
    counts: Counter[str] = field(default_factory=Counter)
    deviation: float = 0.0
    differences: list[str] = field(default_factory=list)

    def judge(self, right: Answer, ours: Answer, what: str) -> None:
        """Compare two answers."""
        found = compare(right, ours)
        self.deviation = max(self.deviation, found.deviation)
        self.counts["compared"] += 1
        self.counts["ties"] += found.tie
        if found.what:
            self.differences.append(f"{what}: {found.what}")


class Watch:
    """Notices requests for which nothing happens any more, and counts what does."""

    def __init__(self, engine: TinyEngine, counts: Counter[str]) -> None:
        self._engine = engine
        self._counts = counts
        self._scheduler = engine.scheduler
        self._seen: dict[str, tuple[Any, int, int]] = {}
        """Per request: how it stands, the last step in which that changed, and the first one."""
        self._computing_steps = 0
        self._moved_at = time.monotonic()
        self._schedule, self._preempt = engine.scheduler.schedule, engine.scheduler._preempt_request
        engine.scheduler.schedule, engine.scheduler._preempt_request = self._look, self._count_preemption

    def _count_preemption(self, *args: Any, **kwargs: Any) -> None:
        self._counts["preempted"] += 1
        self._preempt(*args, **kwargs)

    def _look(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        self._computing_steps += bool(output.num_scheduled_tokens)
        now, seen = time.monotonic(), {}
        for name, request in self._scheduler.requests.items():
            restoration = self._engine.half.restorations.get(name)
            state: tuple[Any, ...] = (
                request.num_computed_tokens,
                request.num_tokens,
                request.status,
                request.num_preemptions,
            )
            loads = None
            if restoration is not None:
                state = (*state, restoration.planner.report().loaded_tokens, len(restoration.failed_chunks))
                loads = tuple(restoration._loads)
            before, moved, begun = self._seen.get(name, (None, 0, self._computing_steps))
            if name in output.num_scheduled_tokens or before != (state, loads):
                moved, self._moved_at = self._computing_steps, now
            seen[name] = (state, loads), moved, begun
            admitted = restoration is not None or request in self._scheduler.running
            waited, age = self._computing_steps - moved, self._computing_steps - begun
            assert not admitted or waited < STARVED_STEPS, f"nothing of {name} in {waited} steps: {state}, {loads}"
            assert age < LIFETIME_STEPS, f"no end of {name} in {age} steps: {state}, {loads}"
        self._seen = seen
        if not seen:
            self._moved_at = now
        idle = now - self._moved_at
        assert idle < IDLE_S, f"nothing at all in {idle:.0f} s: {seen}"
        return output


def play(
    engine: TinyEngine, adapters: Path, asked: Sequence[Asked], resets: Sequence[tuple[int, dict[str, bool]]]
) -> dict[int, Answer]:
    """Send a round's requests as its steps come; returns the answers of those that were not broken off, by index."""
    names: dict[int, str] = {}
    aborted: set[int] = set()
    coming, step = sorted(range(len(asked)), key=lambda index: asked[index].step), 0
    pending = sorted(resets, key=lambda reset: reset[0])

    def finished(index: int) -> bool:
        return names[index] in engine.outputs and engine.outputs[names[index]].finished

    while coming or not all(finished(index) or index in aborted for index in names):
        if all(finished(index) or index in aborted for index in names):
            step = max(step, asked[coming[0]].step)
        while coming and asked[coming[0]].step <= step:
            index = coming.pop(0)
            names[index] = asked[index].question.send(engine, adapters, asked[index])
        for index, name in names.items():
            after = asked[index].abort_after
            if after is not None and index not in aborted and step >= asked[index].step + after and not finished(index):
                engine.llm.llm_engine.abort_request([name])
                aborted.add(index)
        while pending and pending[0][0] <= step:
            engine.core.reset_prefix_cache(**pending.pop(0)[1])
        engine.step()
        step += 1
    return {index: answer(engine.outputs[name]) for index, name in names.items() if index not in aborted}


def right_answers(model: Path, adapters: Path, setup: Setup, what: Sequence[Question]) -> dict[Question, Answer]:
    """Plain vLLM's. Requests with one adapter are never in a step with others: see `repair_lora_operators`."""
    found: dict[Question, Answer] = {}
    with closing(TinyEngine(model, **setup.engine)) as engine:
        for adapter in range(ADAPTERS + 1):
            names = {
                question: question.send(engine, adapters)
                for question in dict.fromkeys(what)
                if question.adapter == adapter
            }
            finish(engine, names.values())
            found |= {question: answer(engine.outputs[name]) for question, name in names.items()}
    return found


def finish(engine: TinyEngine, names: Collection[str]) -> None:
    """Work until these requests are finished, however long the machine takes."""
    engine.until(lambda: all(name in engine.outputs and engine.outputs[name].finished for name in names), 3600)


def repair_lora_operators() -> None:
    """Have vLLM compute requests without an adapter without one.

    On CPUs, vLLM 0.32 takes -1, which stands for no adapter, for the last of its places for adapters. So a request
    without one, in a step with one that has one, is computed with an adapter: wrong, and not only rounded otherwise.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    original = lora_ops.bgmv_shrink

    def bgmv_shrink(inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
        original(inputs, weights, output, indices, scaling)
        output[indices < 0] = 0

    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = bgmv_shrink


def fuzz(model: Path, seed: int, rounds: int, requests: int) -> Findings:
    """All of one seed. To be done once in a process.

    Parameters
    ----------
    model : Path
        The model's folder.
    seed : int
        Decides the rest.
    rounds, requests : int
        Rounds, and requests in each.

    Raises
    ------
    AssertionError
        Something hangs or leaks.
    """
    setup, choose = Setup.draw(seed), random.Random(f"requests {seed}")
    findings = Findings(seed, setup)
    adapters = model.parent / "adapters"
    adapters.mkdir(exist_ok=True)
    for number in range(1, ADAPTERS + 1):
        if not (adapters / str(number)).exists():
            save_adapter(adapters / str(number), number)
    texts = [prompt(BLOCK * 7 // 8, choose.randrange(10**9)) * 9 for _ in range(2)]  # so that n-grams come again
    texts += [prompt(MODEL_TOKENS, choose.randrange(10**9)) for _ in range(3)]
    played = [asks(choose, questions(choose, texts, requests, setup), setup) for _ in range(rounds)]
    more = random.Random(f"documents {seed}")
    played = [with_documents(more, texts, asked) for asked in played]
    resets: list[Any] = []
    for asked in played:
        last = asked[-1].step
        resets.append([(choose.randint(0, last), {}) for _ in range(choose.randint(0, 2))])
        if choose.random() < 0.3:
            resets[-1].append((choose.randint(0, last), {"reset_running_requests": True}))
        if choose.random() < 0.05:
            resets[-1].append((choose.randint(0, last), {"reset_running_requests": True, "reset_connector": True}))
    repair = setup.adapters and choose.random() < 0.5
    right = right_answers(model, adapters, setup, [each.question for asked in played for each in asked])
    # Where vLLM itself answers wrongly, answers are not compared, but nothing wrong may have been stored.
    wrong_beside_adapters = setup.adapters and operators_mix()
    if wrong_beside_adapters and repair:
        repair_lora_operators()
        wrong_beside_adapters = operators_mix()
    store = f"fuzz {seed}"
    url = f"scripted://{store}" + (f"?faults=seed:{seed},{setup.faults}" if setup.faults else "")
    scheduler = {"scheduler_cls": "cakekv.vllm.CakeAsyncScheduler"} if setup.ahead else {}
    with closing(TinyEngine(model, {"store": url} | setup.cake, **scheduler, **setup.engine)) as engine:
        engine.half.outcomes.latest = deque()  # all of them
        if setup.ahead:
            engine.schedule_ahead()
        Watch(engine, findings.counts)
        for number, asked in enumerate(played):
            answers = play(engine, adapters, asked, resets[number])
            engine.settle()
            engine.assert_nothing_leaked()
            findings.counts["requests"] += len(asked)
            findings.counts["aborted"] += len(asked) - len(answers)
            for index, ours in answers.items():
                question = asked[index].question
                if "documents" in asked[index].wanted:
                    findings.counts["with documents"] += 1
                elif question.adapter or not wrong_beside_adapters:
                    findings.judge(
                        right[question], ours, f"round {number}, {index}: {question.about()} {asked[index][1:]}"
                    )
            if choose.random() < 0.7:
                assert engine.core.reset_prefix_cache()
        findings.counts["restores"] += len(engine.half.outcomes.latest)
        for _, report in engine.half.outcomes.latest:
            findings.counts["loaded tokens"] += report.loaded_tokens
            findings.counts["reused tokens"] += report.reused_tokens
            findings.counts.update(f"missed: {kind_of(miss.reason)}" for miss in report.misses)
    stored = [(each.question, each.salt) for asked in played for each in asked]
    reread(model, adapters, setup, store, stored, right, findings)
    return findings


def reread(
    model: Path,
    adapters: Path,
    setup: Setup,
    store: str,
    stored: Sequence[tuple[Question, str]],
    right: dict[Question, Answer],
    findings: Findings,
) -> None:
    """Have another engine load what is stored, and compare its answers."""
    cake = setup.cake | {"store": f"scripted://{store}", "mode": "load", "load_deadline": 30.0, "save": False}
    options = setup.engine | {"enable_prefix_caching": False}
    with closing(TinyEngine(model, cake, **options)) as engine:
        engine.half.outcomes.latest = deque()
        for adapter in range(ADAPTERS + 1):
            names = {
                each: each[0].send(engine, adapters, Asked(each[0], salt=each[1]))
                for each in dict.fromkeys(stored)
                if each[0].adapter == adapter
            }
            finish(engine, names.values())
            for (question, salt), name in names.items():
                findings.judge(right[question], answer(engine.outputs[name]), f"reread, {question.about()} {salt}")
        engine.settle()
        engine.assert_nothing_leaked()
        findings.counts["stored chunks"] += len(list(scripted(store)))
        findings.counts["reread tokens"] += sum(report.loaded_tokens for _, report in engine.half.outcomes.latest)
        findings.counts["spoiled"] += notices_spoiled_chunks(engine, adapters, stored, right)


def notices_spoiled_chunks(
    engine: TinyEngine, adapters: Path, stored: Sequence[tuple[Question, str]], right: dict[Question, Answer]
) -> int:
    """The negative control: place other keys and values than were stored, and see that answers differ.

    Returns how many did, all of them; of the five requests that load most.
    """
    spoil_loads(engine)
    loaded = sorted(dict.fromkeys(stored), key=lambda each: -len(each[0].tokens))[:20]
    differ = 0
    for question, salt in loaded:
        if differ == 5:
            break
        engine.half.outcomes.latest.clear()
        name = question.send(engine, adapters, Asked(question, salt=salt))
        engine.finish(name)
        engine.settle()
        found = engine.half.outcomes.latest
        if not found or found[-1][1].loaded_tokens < len(question.tokens) / 2:
            continue
        difference = compare(right[question], answer(engine.outputs[name]))
        assert difference.what, f"chunks of other content make no difference to {question.about()}"
        differ += 1
    return differ


def spoil_loads(engine: TinyEngine) -> None:
    """Have half of the keys and values placed, behind all checks of ours."""
    cache = engine.worker.shards[0].cache
    place = cache.place

    def place_halves(block_ids: Any, segments: Any) -> Any:
        halves = [None if one is None else bytearray(one) for one in segments]
        for half in filter(None, halves):
            np.frombuffer(half, np.float32)[:] *= 0.5
        return place(block_ids, [None if half is None else memoryview(half) for half in halves])

    cache.place = place_halves


def fuzz_alone(model: Path, seed: int, rounds: int, requests: int, most_s: float) -> Findings:
    """`fuzz` in a process of its own: repaired operators, n-gram drafts and broken engines stay there."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        try:
            return processes.submit(fuzz, model, seed, rounds, requests).result(most_s)
        except BaseException:
            for process in list(processes._processes.values()):
                process.kill()
            raise
