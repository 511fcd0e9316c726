"""HFWorker: a rollout worker on transformers, the reference that other engines are held against."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import msgspec
import torch
import xxhash

from rollout_core.bucketing import Bucket, BucketPlan, Packer, plan_buckets, specs_of
from rollout_core.bucketing.placement import Order, Oversize
from rollout_core.bucketing.sources import Source
from rollout_core.errors import WorkerError
from rollout_core.workers.contract import Completion, SamplingParams
from rollout_core.workers.hf_link import Link, LocalLink, ProcessLink


class SyncReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one ``sync_weights`` did: the new weight version, buckets and tensor bytes sent, wall seconds, and the digest of all
    weights as read back from the worker (32 hexadecimal digits, see ``HFWorker.weights_digest``; None without readback)."""

    version: int
    buckets: int
    nbytes: int
    seconds: float
    digest: str | None


class HFWorker:
    """A transformers causal language model that takes weights in buckets and generates.

    ``model_dir`` is a folder as ``save_pretrained`` writes it. ``dtype`` is a torch dtype's name. With ``process`` the model lives
    in a process of its own and weights reach it through shared memory; without, in this one. ``timeout`` bounds each answer of that
    process in seconds, ``start_timeout`` its start; ``threads`` is its number of torch threads (0: torch's own choice).

    Calls from several threads are carried out one after the other. ``close`` does not wait for another thread's call: where the
    model has a process of its own, that ends, and the call with an error.
    """

    def __init__(
        self,
        model_dir: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        process: bool = True,
        threads: int = 0,
        start_timeout: float = 300.0,
        timeout: float = 300.0,
    ) -> None:
        model_dir = str(model_dir)
        named = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise WorkerError(f"dtype is {dtype!r}; it is the name of a floating-point torch dtype, for example 'float32'")
        self._lock = threading.RLock()
        self._version = 0
        self._link: Link | None = None
        if process:
            self._link = ProcessLink(
                model_dir, dtype=dtype, device=device, threads=threads, start_timeout=start_timeout, timeout=timeout
            )
        else:
            self._link = LocalLink(model_dir, dtype=dtype, device=device)

    @property
    def version(self) -> int:
        """The weight version that the worker generates with; 0 for the folder's own weights."""
        return self._version

    def sync_weights(
        self,
        source: Source,
        *,
        capacity: int = 64 << 20,
        oversize: Oversize = "split",
        order: Order = "given",
        readback: bool = True,
        inject: Callable[[Bucket], Bucket] | None = None,
    ) -> SyncReport:
        """Send weights to the worker in buckets of at most ``capacity`` bytes, and read back the digest of every tensor.

        ``source`` is a module, mapping or list of pairs (it is read twice: for the plan, and to be packed). Names, dtypes and
        shapes have to be the worker's; its non-persistent buffers may be left out. If this raises, the version has not advanced:
        before the first bucket was loaded the old weights are still in use, after it the worker refuses to generate. ``inject``
        is called with every bucket on its way and returns what is sent instead: a place for faults, in tests and preflight.

        Raises ``PlanMismatchError`` (the tensors are not the worker's), ``IntegrityError``, ``TransferError`` (the process ended or
        did not answer), ``WorkerError`` (a tensor read back differs, by name), or what the source raises.
        """
        if isinstance(source, Iterator):
            raise WorkerError("the source is an iterator, which can be read once only; pass a module, a mapping or a list of pairs")
        with self._lock:
            link = self._alive()
            start = time.perf_counter()
            plan = plan_buckets(specs_of(source), capacity, oversize=oversize, order=order)
            version = self._version + 1
            try:
                found = self._transfer(link, plan, source, version, readback, inject)
                link.commit()
                self._version = version
            except BaseException:
                # Interrupted at the very end, either side may have counted on; to the caller this update has failed.
                self._version = version - 1
                link.abandon(version)
                raise
            digest = None if found is None else combined_digest(found)
            seconds = time.perf_counter() - start
            return SyncReport(version=version, buckets=len(plan.buckets), nbytes=plan.nbytes, seconds=seconds, digest=digest)

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, max_batch: int = 64) -> list[Completion]:
        """``params.n`` completions for each prompt of token ids, grouped by prompt; ``to_batch`` pads them (clause W3)."""
        _check_request(prompts, params, max_batch)
        with self._lock:
            return self._alive().generate(prompts, params, max_batch)

    def weights_digest(self) -> str:
        """32 hexadecimal digits over the name and bytes of every parameter and buffer that the worker has now."""
        return combined_digest(self.tensor_digests())

    def tensor_digests(self) -> dict[str, str]:
        """Hexadecimal xxh3-128 of the bytes of every parameter and buffer, by name, as the worker has them now."""
        with self._lock:
            return self._alive().digests()

    def read_tensor(self, name: str) -> torch.Tensor:
        """One of the worker's parameters or buffers, as a copy on the CPU."""
        if not isinstance(name, str):
            raise WorkerError(f"{name!r} is no name of a tensor: pass a str")
        with self._lock:
            return self._alive().read_tensor(name)

    def close(self) -> None:
        """End the worker. A second call is harmless."""
        link, self._link = self._link, None
        if link is None:
            return
        if not self._lock.acquire(blocking=False):  # another thread waits for an answer, and may for long
            link.kill()
            self._lock.acquire()
        try:
            link.close()
        finally:
            self._lock.release()

    def __enter__(self) -> HFWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _alive(self) -> Link:
        if self._link is None:
            raise WorkerError("the worker is closed")
        return self._link

    @staticmethod
    def _transfer(
        link: Link,
        plan: BucketPlan,
        source: Source,
        version: int,
        readback: bool,
        inject: Callable[[Bucket], Bucket] | None,
    ) -> dict[str, str] | None:
        """Send all buckets of an update. Returns the digests of what the worker has then, found right; None without readback."""
        link.begin(plan, version)
        sent = SentDigests(plan)
        for bucket in Packer(plan, allocate=link.allocator()).pack(source, version=version):
            if readback:
                sent.add(bucket)
            link.load(bucket if inject is None else inject(bucket))
            del bucket
        if not readback:
            return None
        found = link.digests()
        wrong = [name for name, digest in sent.digests.items() if found.get(name) != digest]
        if wrong:
            raise WorkerError(
                f"{len(wrong)} of {len(sent.digests)} tensors read back from the worker are not what was sent, first {wrong[0]!r}: "
                f"sent {sent.digests[wrong[0]]}, found {found.get(wrong[0])}; the worker's weights are not the trainer's"
            )
        return found


def _check_request(prompts: Sequence[Sequence[int]], params: SamplingParams, max_batch: int) -> None:
    """Raise ``WorkerError`` for what is no request at all; whether the model can carry it out, the model's side says."""
    if type(params) is not SamplingParams:
        raise WorkerError(f"params is a {type(params).__name__}: pass SamplingParams(response_length=...)")
    if type(max_batch) is not int or not 1 <= max_batch < 2**63:
        raise WorkerError(f"max_batch is {max_batch!r}: pass a whole number of at least 1")
    for index, prompt in enumerate(prompts):
        for position, token in enumerate(prompt):
            if type(token) is not int or not 0 <= token < 2**63:
                raise WorkerError(
                    f"prompt {index} position {position} is {token!r}, no token id: pass plain ints, as tolist() gives"
                )


class SentDigests:
    """The digest of each tensor, taken from the buckets as they are sent."""

    def __init__(self, plan: BucketPlan) -> None:
        self._plan = plan
        self._states: dict[str, Any] = {}
        self.digests: dict[str, str] = {}

    def add(self, bucket: Bucket) -> None:
        for slot in self._plan.buckets[bucket.index].slots:
            state = self._states.setdefault(slot.name, xxhash.xxh3_128())
            state.update(bucket.buffer[slot.offset : slot.end].cpu().numpy().data)
            if slot.is_tail:
                digest = self._states.pop(slot.name).hexdigest()
                for name in (slot.name, *self._plan.tied.get(slot.name, ())):
                    self.digests[name] = digest


def combined_digest(digests: Mapping[str, str]) -> str:
    """32 hexadecimal digits over names and digests, whatever their order; names are told apart by their lengths."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        raw = name.encode("utf-8", "surrogatepass")
        state.update(len(raw).to_bytes(8, "little") + raw + bytes.fromhex(digests[name]))
    return state.hexdigest()
