"""Worker: what a trainer calls, whatever the engine is. Weights in buckets, requests that can be followed, ended and resumed."""

from __future__ import annotations

import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import torch

from rollout_core.bucketing import Bucket, Packer
from rollout_core.bucketing.placement import Order, Oversize
from rollout_core.bucketing.sources import Source
from rollout_core.errors import RolloutCoreError, TransferError, WorkerError
from rollout_core.multimodal import Conversation
from rollout_core.transfer import SendReport, send
from rollout_core.transfer.carriers.names import CarrierName
from rollout_core.transfer.causes import cause_of, error_of
from rollout_core.transfer.targets import named_weights, persistent_weights
from rollout_core.workers.carriers import CarrierChoice, Senders
from rollout_core.workers.contract import Completion, SamplingParams
from rollout_core.workers.digests import SentDigests, algorithm_on, combined_digest
from rollout_core.workers.engine import Group, Progress, Update
from rollout_core.workers.expert_names import in_checkpoint_names
from rollout_core.workers.link.hosts import Spec
from rollout_core.workers.link.link import Link
from rollout_core.workers.link.messages import (
    Abandon,
    Abort,
    Answer,
    Call,
    Failed,
    Freed,
    MediaHits,
    Ping,
    ReadMediaHits,
    Receive,
    Received,
    ReleaseMemory,
    ResumeMemory,
    Returned,
    Run,
    Submit,
)
from rollout_core.workers.media import Form, Media, MediaReport
from rollout_core.workers.plans import Plans
from rollout_core.workers.requests import check_request, futures_of, request_ids_of
from rollout_core.workers.rollouts import Rollout, Rollouts, raise_failed
from rollout_core.workers.shards import Expected
from rollout_core.workers.weights import EngineWeights, digests_of, read_back, read_tensor

#: Seconds in which a process that ends has ended: once its answer is there that its end of a carrier is closed, and for who has
#: only seen that it is, which may be before the rest of a killed process has gone.
_LAST_WORDS: Final = 1.0
_LAST_BREATH: Final = 0.2


class SyncReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one ``sync_weights`` did: the new weight version, buckets and tensor bytes sent, wall seconds (of these ``packing``,
    ``loading`` in the engine, which go on side by side, and ``reading`` back), and the digest of all weights as read back from the
    worker (32 hexadecimal digits, see ``Worker.weights_digest``; None without readback). ``carrier``: what the weights went by,
    "memory" (shared) or "cuda_ipc"."""

    version: int
    buckets: int
    nbytes: int
    seconds: float
    packing: float
    loading: float
    reading: float
    digest: str | None
    carrier: CarrierName = "memory"


class Worker:
    """A rollout worker: an engine with a model's weights, which are replaced in buckets, and which generates.

    ``device``: where the engine has its weights. ``carrier``: how they get there; "auto" takes CUDA IPC from a source on a GPU to
    an engine on one, which copies nothing on the way, else shared memory. ``WorkerError`` for one that does not reach the device.

    ``timeout`` bounds each answer of the engine in seconds, ``start_timeout`` its start. Any thread may call. Requests of several
    calls are under way side by side; an update of the weights waits for no request: those under way go on with the new weights,
    from what they have by then, and each token says which weights it came from (clause W5).

    ``close`` does not wait for another thread's call: where the engine has a process of its own, that ends, and the call with an
    error.
    """

    #: What it can do beside what every worker does. "seeds": a seed makes sampling repeatable; without it a request that has one is
    #: refused. "memory": ``release_memory`` frees what the engine's weights take.
    capabilities: frozenset[str] = frozenset({"seeds", "memory"})
    #: Whether weights are read back as values: -0.0 counts as 0.0.
    reads_values = False
    #: Whether an update has to have the buffers that a model computes from its config. Where not, the engine has its own of them.
    takes_computed = True
    #: Whether the engine quantizes the weights that it is sent, so that what is read back is something else.
    is_quantized = False
    #: How its engine takes the media of conversations, if it does; see ``workers.media``.
    media_form: Form = "none"
    #: Whether ``step(n)`` makes n steps of the engine and no more. Where not, the engine samples on its own between calls: each
    #: request that is under way gets at least one token, unless it ended, before the pause.
    steps_exactly = True

    def __init__(
        self,
        spec: Spec,
        *,
        process: bool = True,
        device: str = "cpu",
        carrier: CarrierChoice = "auto",
        start_timeout: float = 300.0,
        timeout: float = 300.0,
    ) -> None:
        self._is_on(device, carrier)
        self._lock = threading.RLock()  # of the weights
        self._version = 0
        self._next = 1  # the next update's
        self._weights = EngineWeights()
        self._plans = Plans()
        self._media = Media(self.media_form)
        # Weakly: the link's thread keeps the rollouts, and must not keep a worker that is forgotten.
        resend = weakref.WeakMethod(self._resend)

        def missed(rollout: Rollout, missing: Sequence[str]) -> None:
            if (method := resend()) is not None:
                method(rollout, missing)

        self._rollouts = Rollouts(missed)
        self._link: Link | None = Link(
            spec, process=process, start_timeout=start_timeout, timeout=timeout, hear=self._rollouts.hear
        )

    @property
    def version(self) -> int:
        """The weight version that the worker generates with; 0 for the folder's own weights."""
        return self._version

    @property
    def digest_algorithm(self) -> str:
        """What its tensors are digested by: one that runs where they are. "xxh3-128" on a CPU."""
        return algorithm_on(self._device)

    @property
    def ranks(self) -> int:
        """On how many ranks the engine has its weights, each of which takes its part of every update (clause W9)."""
        with self._lock:
            return max(1, len(self._weights.layout(self._alive())))

    @property
    def timeout(self) -> float:
        """Seconds that an answer of the engine may take."""
        return self._alive().timeout

    # Weights

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
        shapes have to be the worker's; its non-persistent buffers may be left out, and a module, dict or list may have the experts
        of a layer in one tensor (transformers 5) where the worker has each by itself. If this raises, the version has not advanced:
        before the first bucket was loaded the old weights are still in use, after it the worker refuses to generate. ``inject``
        is called with every bucket on its way and returns what is sent instead: a place for faults, in tests and preflight.

        Raises ``PlanMismatchError`` (the tensors are not the worker's), ``IntegrityError``, ``TransferError`` (the process ended or
        did not answer), ``WorkerError`` (a tensor read back differs, by name), or what the source raises.
        """
        if isinstance(source, Iterator):
            raise WorkerError("the source is an iterator, which can be read once only; pass a module, a mapping or a list of pairs")
        if readback and self.is_quantized:
            raise WorkerError("the engine quantizes its weights, and what it has is not what it is sent: pass readback=False")
        packing = {"capacity": capacity, "oversize": oversize, "order": order}
        with self._lock:
            try:
                return self._sync(source, packing, readback, inject)
            except TransferError as error:
                if not self._senders.do_without_ipc(error):
                    raise
            return self._sync(source, packing, readback, inject)

    def _sync(
        self, source: Source, packing: dict[str, Any], readback: bool, inject: Callable[[Bucket], Bucket] | None
    ) -> SyncReport:
        link = self._alive()
        start = time.perf_counter()
        if isinstance(source, torch.nn.Module):
            source = named_weights(source) if self.takes_computed else persistent_weights(source)
        source = in_checkpoint_names(source, self._weights.specs(link))
        packer = self._plans.packer_for(source, **packing)
        plan = packer.plan
        self._weights.check(link, plan)
        before, version = self._version, self._next
        layout = self._weights.layout(link)
        expected = Expected(layout, plan) if readback and layout else None
        parts = None if expected is None else expected.parts
        algorithm = self.digest_algorithm
        sent = SentDigests(plan, values=self.reads_values, algorithm=algorithm, parts=parts) if readback else None
        carrier = self._senders.carrier_for(source)

        def tap(bucket: Bucket) -> Bucket:
            if sent is not None:
                sent.add(bucket)
            return bucket if inject is None else inject(bucket)

        try:
            report, loading = self._send(link, packer, source, carrier, version, tap)
            self._next = version + 1  # the engine has committed it: no other update may have this version
            reading = time.perf_counter()
            found = None if sent is None else read_back(link, sent, expected)
            reading = time.perf_counter() - reading
            self._version = version
        except BaseException:
            # Interrupted at the very end, either side may have counted on; to the caller this update has failed.
            self._version = before
            self._abandon(link, version)
            raise
        return SyncReport(
            version=version,
            buckets=report.buckets,
            nbytes=plan.nbytes,
            seconds=time.perf_counter() - start,
            packing=report.packing,
            loading=loading,
            reading=reading,
            digest=None if found is None else combined_digest(found),
            carrier=carrier,
        )

    def weights_digest(self) -> str:
        """32 hexadecimal digits over the name and bytes of every parameter and buffer that the worker has now."""
        return combined_digest(self.tensor_digests())

    def tensor_digests(self) -> dict[str, str]:
        """32 hexadecimal digits of the bytes of every parameter and buffer, by name, as the worker has them now: ``weight_digest``
        of ``rollout_core.workers.digests``, by the worker's ``digest_algorithm``."""
        with self._lock:
            return digests_of(self._alive())

    def read_tensor(self, name: str) -> torch.Tensor:
        """One of the worker's parameters or buffers, as a copy on the CPU."""
        with self._lock:
            return read_tensor(self._alive(), name)

    # Requests

    def generate(
        self,
        prompts: Sequence[Sequence[int] | Conversation],
        params: SamplingParams,
        *,
        request_ids: Sequence[str] | None = None,
        max_batch: int = 64,
    ) -> list[Completion]:
        """``params.n`` completions for each prompt, grouped by prompt; ``to_batch`` pads them (clause W3).

        A prompt is a list of token ids, or a ``Conversation`` with its pictures, whose assistant speaks next. A picture's data is
        sent once; the ids that the engine makes of a conversation are compared with ``input_ids`` (clause W8).

        Waits for all of them; ``abort``, from another thread, ends some. Raises ``WorkerError`` for a request that is refused, and
        then none was made, or that failed; ``TransferError`` if the engine ended or did not answer.
        """
        link, rollouts = self._start(prompts, params, request_ids, max_batch)
        futures = futures_of(rollouts, params)
        try:
            self._wait(link, futures)
        except BaseException:
            with suppress(RolloutCoreError):  # the error that led here says more
                self._abort(link, rollouts)
            raise
        completions = [future.result() for future in futures]
        raise_failed(rollouts, link.lost)
        return completions

    def submit(
        self,
        prompts: Sequence[Sequence[int] | Conversation],
        params: SamplingParams,
        *,
        request_ids: Sequence[str] | None = None,
        max_batch: int = 64,
    ) -> list[Future[Completion]]:
        """``generate`` without waiting: the future of each completion, in the same order.

        Every future gets a completion, whatever becomes of the request or the engine: its status says how it ended (clause W4), and
        its tokens are what there was by then. ``request_ids``: one for each prompt, by which ``abort`` finds it; its n samples
        share it; without, only all are aborted. Ask nothing of the worker in a future's callback: it runs in the thread that hears
        the engine. Raises ``WorkerError`` for a request that is refused; then none was made.
        """
        return futures_of(self._start(prompts, params, request_ids, max_batch)[1], params)

    def abort(self, request_ids: Sequence[str] | None = None) -> list[str]:
        """End these requests, or all that are under way. Returns the ids of those that this ended; each has its completion by then.

        An id that is unknown, or of a request that has ended, ends nothing and is not returned; "" stands for requests that were
        given no id.
        """
        link = self._alive()
        if isinstance(request_ids, str):
            raise WorkerError(f"request_ids is {request_ids!r}: pass a list of ids, or None for all")
        return self._abort(link, self._rollouts.find(request_ids))

    def pause(self) -> None:
        """Sample no further token until ``resume``; when this returns, none is under way. A second call is harmless."""
        self._alive().ask(Run(0))

    def resume(self) -> None:
        """Go on where ``pause`` stopped. Harmless when nothing is paused."""
        self._alive().ask(Run(None))

    def step(self, steps: int = 1) -> None:
        """Go on for this many steps of the engine, and pause: at most ``steps`` tokens for each request, where ``steps_exactly``.
        For tests, which want to stop at a given place."""
        if type(steps) is not int or steps < 1:
            raise WorkerError(f"steps is {steps!r}: pass a whole number of at least 1")
        self._alive().ask(Run(steps))
        self._alive().ask(Run(0))

    # Media

    def media_report(self) -> MediaReport:
        """How the pictures of all requests so far got to the engine: with data, or by identity alone."""
        answer = self._alive().ask(ReadMediaHits(), MediaHits)
        assert isinstance(answer, MediaHits)
        return msgspec.structs.replace(self._media.report, hits=answer.hits, queries=answer.queries)

    # Memory

    def release_memory(self) -> int:
        """Let go of the memory of weights and caches, for a trainer on the same device. Returns the bytes that this freed. What
        updates by CUDA IPC keep in this process goes, too (``free_buffers``), and is not counted.

        Requests that are under way keep what they have and wait; new ones are refused. Weights have to come again after
        ``resume_memory``: until then nothing is sampled, and what waited goes on with the new weights. A second call is harmless,
        and frees 0. ``WorkerError`` where the engine cannot (see ``capabilities``).
        """
        with self._lock:
            self.free_buffers()
            answer = self._alive().ask(ReleaseMemory(), Freed)
        assert isinstance(answer, Freed)
        return answer.nbytes

    def free_buffers(self) -> int:
        """Give back the GPU memory that updates by CUDA IPC keep between them in this process: two buckets, and tables by which
        they are packed. The next update takes it anew. Returns the buckets' bytes."""
        with self._lock:
            self._plans.clear()
            return self._senders.free()

    def resume_memory(self) -> None:
        """Take the memory again, for weights that ``sync_weights`` brings. A second call, or one without a release, is harmless."""
        with self._lock:
            self._alive().ask(ResumeMemory())

    # What one engine has beside the others

    def call(self, name: str, argument: bytes = b"") -> bytes:
        """Call the engine's own method ``call_<name>``, which takes bytes and gives some, where the engine is. ``WorkerError`` if
        it has none of that name, or that raises."""
        answer = self._alive().ask(Call(name, argument), Returned)
        assert isinstance(answer, Returned)
        return answer.value

    def processes(self) -> list[int]:
        """The ids of the processes that are this worker's own: its engine's, and theirs."""
        return self._alive().host.processes()

    # Its end

    def close(self) -> None:
        """End the worker. A second call is harmless."""
        link, self._link = self._link, None
        if link is None:
            return
        is_free = self._lock.acquire(blocking=False)
        if not is_free or self._rollouts.find(None):  # another thread waits for an answer, and may for long
            link.kill()
            if not is_free:
                self._lock.acquire()
        try:
            link.close()
            self._senders.free()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _is_on(self, device: str, carrier: CarrierChoice) -> None:
        """Where the engine has its weights, and how they get there."""
        self._senders = Senders(carrier, device)
        self._device = device

    def _alive(self) -> Link:
        if self._link is None:
            raise WorkerError("the worker is closed")
        return self._link

    def _start(
        self,
        prompts: Sequence[Sequence[int] | Conversation],
        params: SamplingParams,
        request_ids: Sequence[str] | None,
        max_batch: int,
    ) -> tuple[Link, list[Rollout]]:
        taken = self._media.take(prompts)
        check_request([prompt.ids for prompt in taken], params, max_batch)
        link = self._alive()
        ids = request_ids_of(len(prompts), request_ids)
        # Greedy samples of a prompt are the same: the engine makes one.
        samples = 1 if params.temperature == 0 else params.n
        rollouts = self._rollouts.add([(ids[place], place, sample) for place in range(len(prompts)) for sample in range(samples)])
        try:
            link.ask(Submit(Group(params, self._media.requests(taken, rollouts, params, max_batch), max_batch)))
        except BaseException as error:
            if not isinstance(error, RolloutCoreError):  # interrupted: the engine may have them
                with suppress(RolloutCoreError):
                    link.post(Abort([rollout.key for rollout in rollouts]))
            self._rollouts.drop(rollouts, str(error) or type(error).__name__)
            self._media.drop(taken, rollouts)
            raise
        return link, rollouts

    def _abort(self, link: Link, rollouts: list[Rollout]) -> list[str]:
        resent = [rollout.resent for rollout in rollouts]
        if rollouts:
            link.ask(Abort([rollout.key for rollout in rollouts]))
        # The engine did not have one that was sent again meanwhile. It has now, or it has ended.
        again = [rollout.key for rollout, count in zip(rollouts, resent, strict=True) if rollout.resent != count]
        if again:
            link.ask(Abort(again))
        # What this ended was told before the answer. One that another thread is about to submit is not under way yet.
        ended = [rollout for rollout in rollouts if rollout.status == "aborted"]
        return list(dict.fromkeys(rollout.request_id for rollout in ended))

    def _resend(self, rollout: Rollout, missing: Sequence[str]) -> None:
        """The engine has forgotten a request, because it misses the data of these media. In the thread of the link."""

        def fail(error: Exception) -> None:
            self._rollouts.hear([Progress(rollout.key, [], [], self._version, "failed", cause_of(error))])

        def answered(answer: Future[Answer]) -> None:
            found = None if answer.exception() is not None else answer.result()
            if isinstance(found, Failed):
                fail(error_of(found.cause, WorkerError))

        try:
            answer = self._alive().post(Submit(self._media.again(rollout, missing)))
        except Exception as error:  # also of pictures that cannot be encoded: a request ends in any case
            fail(error)
        else:
            answer.add_done_callback(answered)

    def _send(
        self,
        link: Link,
        packer: Packer,
        source: Source,
        carrier: CarrierName,
        version: int,
        tap: Callable[[Bucket], Bucket],
    ) -> tuple[SendReport, float]:
        """Send all buckets of an update, which the engine receives beside; also the seconds that it took to load them."""
        address, ranks = secrets.token_hex(16), max(1, len(self._weights.layout(link)))
        received = link.post(Receive(Update(address, version, link.timeout, carrier, ranks)))

        def check() -> None:
            if received.done():
                link.result(received, Received)

        with self._senders.listen(carrier, source, address, ranks=ranks, timeout=link.timeout, check=check) as end:
            link.is_updating = True
            try:
                report = send(packer.plan, source, end, version=version, timeout=link.timeout, packer=packer, tap=tap)
            except TransferError:
                link.check(_LAST_WORDS if received.done() else _LAST_BREATH)
                raise
            finally:
                link.is_updating = False
        answer = link.result(received, Received)
        assert isinstance(answer, Received)
        return report, answer.loading

    def _abandon(self, link: Link, version: int) -> None:
        """Best effort: the update failed, perhaps because the engine did, and the error that led here says more."""
        with suppress(RolloutCoreError):
            link.ask(Abandon(version))

    def _wait(self, link: Link, futures: Sequence[Future[Completion]]) -> None:
        """Until all are done. An engine that says nothing for long is asked whether it is there."""
        left = set(futures)
        while left:
            told = self._rollouts.told
            done, left = wait(left, link.timeout / 2, FIRST_COMPLETED)
            if not done and self._rollouts.told == told:
                link.result(link.post(Ping()), timeout=link.timeout / 2, silent=link.timeout / 2)
