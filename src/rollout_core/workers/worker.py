"""Worker: what a trainer calls, whatever the engine is. Weights in buckets, requests that can be followed, ended and resumed."""

from __future__ import annotations

import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import torch

from rollout_core.bucketing import Bucket, BucketPlan, Packer, TensorSpec
from rollout_core.bucketing.dtypes import DTYPES
from rollout_core.bucketing.placement import Order, Oversize
from rollout_core.bucketing.sources import Source
from rollout_core.errors import PlanMismatchError, RolloutCoreError, TransferError, WorkerError
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
    Digests,
    Failed,
    Freed,
    MediaHits,
    Ping,
    RankDigests,
    ReadDigests,
    ReadMediaHits,
    ReadRankDigests,
    ReadShards,
    ReadSpecs,
    ReadTensor,
    Receive,
    Received,
    ReleaseMemory,
    ResumeMemory,
    Returned,
    Run,
    Shards,
    Specs,
    Submit,
    TensorBytes,
)
from rollout_core.workers.media import Form, Media, MediaReport
from rollout_core.workers.names import EMBEDDING, HEAD, canonical
from rollout_core.workers.plans import Plans
from rollout_core.workers.rollouts import Rollout, Rollouts, raise_failed
from rollout_core.workers.shards import Expected, Shard

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
        self._specs: dict[str, TensorSpec] | None = None  # that an update has to have; empty: the engine looks itself
        self._layout: list[dict[str, Shard]] | None = None  # by rank, the parts that it has; empty: there is one rank
        self._plans = Plans()
        self._checked: BucketPlan | None = None  # the last that had the engine's specs
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
            return max(1, len(self._layout_of(self._alive())))

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
        source = in_checkpoint_names(source, self._specs_of(link))
        packer = self._plans.packer_for(source, **packing)
        plan = packer.plan
        self._check_specs(link, plan)
        before, version = self._version, self._next
        layout = self._layout_of(link)
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
            found = None if sent is None else self._read_back(link, sent, expected)
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
            return _digests(self._alive(), None)

    def read_tensor(self, name: str) -> torch.Tensor:
        """One of the worker's parameters or buffers, as a copy on the CPU."""
        if not isinstance(name, str):
            raise WorkerError(f"{name!r} is no name of a tensor: pass a str")
        with self._lock:
            answer = self._alive().ask(ReadTensor(name), TensorBytes)
        assert isinstance(answer, TensorBytes)
        dtype = DTYPES[answer.dtype]
        if not answer.data:
            return torch.empty(answer.shape, dtype=dtype)
        return torch.frombuffer(bytearray(answer.data), dtype=torch.uint8).view(dtype).view(answer.shape)

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
        futures = _futures(rollouts, params)
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
        return _futures(self._start(prompts, params, request_ids, max_batch)[1], params)

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

    def _ids(self, count: int, given: Sequence[str] | None) -> list[str]:
        if given is None:
            return [""] * count
        ids = list(given)
        if isinstance(given, str) or len(ids) != count or not all(isinstance(one, str) and one for one in ids):
            raise WorkerError(f"request_ids is {given!r}: pass one str for each of {count} prompts")
        if len(set(ids)) < len(ids):
            twice = next(one for one in ids if ids.count(one) > 1)
            raise WorkerError(f"request id {twice!r} is given twice: pass each prompt one of its own")
        return ids

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
        ids = self._ids(len(prompts), request_ids)
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
        address, ranks = secrets.token_hex(16), max(1, len(self._layout or ()))
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

    def _specs_of(self, link: Link) -> dict[str, TensorSpec]:
        """The engine's tensors by name; none where it looks at an update itself."""
        if self._specs is None:
            answer = link.ask(ReadSpecs(), Specs)
            assert isinstance(answer, Specs)
            listed = answer.specs or []
            self._specs = {name: TensorSpec(name, DTYPES[dtype], shape) for name, dtype, shape in listed}
        return self._specs

    def _check_specs(self, link: Link, plan: BucketPlan) -> None:
        """Raise ``PlanMismatchError`` if these are not the engine's tensors, where that does not say so itself."""
        wanted = self._specs_of(link)
        if wanted and plan is not self._checked:
            check_specs(plan, wanted)
            self._checked = plan

    def _layout_of(self, link: Link) -> list[dict[str, Shard]]:
        """By rank of the engine, the parts of tensors that it has; empty if there is one rank."""
        if self._layout is None:
            answer = link.ask(ReadShards(), Shards)
            assert isinstance(answer, Shards)
            self._layout = answer.ranks
        return self._layout

    def _read_back(self, link: Link, sent: SentDigests, expected: Expected | None) -> dict[str, str]:
        """The digests of what the worker has, found right; ``expected``: of each rank, if there are several."""
        if expected is not None:
            answer = link.ask(ReadRankDigests(), RankDigests)
            assert isinstance(answer, RankDigests)
            return expected.check(sent.of_parts, answer.ranks)
        found, wanted = _digests(link, None), dict(sent.digests)
        known = {canonical(name): digest for name, digest in found.items()}
        embedding = next((name for name in wanted if canonical(name) == EMBEDDING), None)
        if HEAD in found and HEAD not in wanted and embedding is not None:
            wanted[HEAD] = wanted[embedding]  # tied, or it would have had to be sent
        wrong = [name for name, digest in wanted.items() if known.get(canonical(name)) != digest]
        if wrong:
            raise WorkerError(
                f"{len(wrong)} of {len(wanted)} tensors read back from the worker are not what was sent, first {wrong[0]!r}: "
                f"sent {wanted[wrong[0]]}, found {known.get(canonical(wrong[0]))}; the worker's weights are not the trainer's"
            )
        return found

    def _wait(self, link: Link, futures: Sequence[Future[Completion]]) -> None:
        """Until all are done. An engine that says nothing for long is asked whether it is there."""
        left = set(futures)
        while left:
            told = self._rollouts.told
            done, left = wait(left, link.timeout / 2, FIRST_COMPLETED)
            if not done and self._rollouts.told == told:
                link.result(link.post(Ping()), timeout=link.timeout / 2, silent=link.timeout / 2)


def _digests(link: Link, names: Sequence[str] | None) -> dict[str, str]:
    answer = link.ask(ReadDigests(None if names is None else list(names)), Digests)
    assert isinstance(answer, Digests)
    return answer.digests


def _futures(rollouts: Sequence[Rollout], params: SamplingParams) -> list[Future[Completion]]:
    """One for each sample of each prompt."""
    futures = [rollout.future for rollout in rollouts]
    return futures if params.temperature != 0 else [copy for future in futures for copy in _copies(future, params.n)]


def _copies(future: Future[Completion], samples: int) -> list[Future[Completion]]:
    """A future for each sample of a prompt, of which one was made."""
    copies: list[Future[Completion]] = [Future() for _ in range(samples)]

    def settle(made: Future[Completion]) -> None:
        for sample, copy in enumerate(copies):
            if copy.set_running_or_notify_cancel():  # else its owner has cancelled it
                copy.set_result(msgspec.structs.replace(made.result(), sample_index=sample))

    future.add_done_callback(settle)
    return copies


def check_specs(plan: BucketPlan, wanted: Mapping[str, TensorSpec]) -> None:
    """Raise ``PlanMismatchError`` naming the first tensor of a plan that is not among these, or that it leaves out. A tied tensor
    is there under any of its names."""
    known = {canonical(name): spec for name, spec in wanted.items()}
    for spec in plan.specs:
        mine = known.get(canonical(spec.name))
        if mine is None:
            raise PlanMismatchError(f"the update has a tensor {spec.name!r} ({spec}), and the model has none of that name")
        if (mine.dtype, mine.shape) != (spec.dtype, spec.shape):
            raise PlanMismatchError(f"tensor {spec.name!r} is {spec} in the update and {mine} in the model")
    sent = {canonical(spec.name) for spec in plan.specs}
    missing = next((name for name in wanted if canonical(name) not in sent), None)
    if missing is not None and not (missing == HEAD and EMBEDDING in sent):
        raise PlanMismatchError(f"the model's tensor {missing!r} is not in the update; send every parameter and persistent buffer")


def check_request(prompts: Sequence[Sequence[int]], params: SamplingParams, max_batch: int) -> None:
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
