"""How an HFWorker reaches its model: in this process, or in one of its own. Both ways offer the same calls."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Protocol

import torch

from rollout_core.bucketing import Bucket, BucketPlan
from rollout_core.bucketing.buffers import Allocate
from rollout_core.bucketing.dtypes import DTYPES
from rollout_core.errors import RolloutCoreError, TransferError, WorkerError
from rollout_core.transfer.arena import Arena
from rollout_core.transfer.causes import error_of
from rollout_core.transfer.channel import Channel, PeerGone
from rollout_core.workers.contract import Completion, SamplingParams
from rollout_core.workers.hf_model import HFModel
from rollout_core.workers.messages import (
    Abandon,
    Answer,
    Answered,
    Asked,
    Begin,
    Close,
    Commit,
    Completions,
    Digests,
    Done,
    Failed,
    Generate,
    Load,
    ReadDigests,
    ReadTensor,
    Request,
    TensorBytes,
)

_SLOTS: Final = 2  # one bucket is packed while the one before it is loaded
_GRACE: Final = 5.0  # seconds that the process has to end by itself
#: What the process runs. It finds this package, and transformers, where its parent did, also when they are not installed.
#: Ctrl-C reaches every process of a terminal; whether this one ends is for the trainer to say.
_PROGRAM: Final = (
    "import json, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from rollout_core.transfer.lifetime import end_with_parent; end_with_parent(int(sys.argv.pop(1))); "
    "from rollout_core.workers.hf_process import main; main()"
)


class Link(Protocol):
    """The calls of ``HFModel``, wherever it is. ``allocator`` gives what makes the memory that buckets are packed into; ``kill``
    ends a call that another thread is waiting in, where that can be done."""

    def allocator(self) -> Allocate | None: ...
    def begin(self, plan: BucketPlan, version: int) -> None: ...
    def load(self, bucket: Bucket) -> None: ...
    def commit(self) -> None: ...
    def abandon(self, version: int) -> None: ...
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, max_batch: int) -> list[Completion]: ...
    def digests(self) -> dict[str, str]: ...
    def read_tensor(self, name: str) -> torch.Tensor: ...
    def kill(self) -> None: ...
    def close(self) -> None: ...


class LocalLink(HFModel):
    """The model in this process."""

    def allocator(self) -> Allocate | None:
        return None

    def kill(self) -> None:
        pass

    def close(self) -> None:
        self._weights.tensors.clear()
        self.model = None


class ProcessLink:
    """The model in a process of its own. Weights go through shared memory, everything else through a socket pair.

    Started with ``subprocess``, not ``multiprocessing``: the caller's main module is not run again, so a script needs no
    ``__main__`` guard. Every wait has an end: ``timeout`` seconds, or the other process's. A process that did not answer is killed:
    it could do anything, at any time.
    """

    def __init__(self, model_dir: str, *, dtype: str, device: str, threads: int, start_timeout: float, timeout: float) -> None:
        self._timeout = timeout
        self._number = 0  # of the last request
        self._loading: dict[int, int] = {}  # number of a bucket's request -> offset of its slot
        self._packing: dict[int, int] = {}  # address of a slot that is being filled -> its offset
        self._lost: str | None = None  # why the process is of no use any more, if it is
        self._slot_nbytes = 0
        self._arena = Arena()
        ours, theirs = socket.socketpair()
        self._channel: Channel[Answered] = Channel(ours.detach(), Answered)
        options = {"model": model_dir, "dtype": dtype, "device": device, "threads": threads}
        options |= {"channel": theirs.fileno(), "arena": self._arena.fd}
        path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-P", "-c", _PROGRAM, path, str(os.getpid())),
                        *(f"--{name}={value}" for name, value in options.items()),
                    ],
                    pass_fds=(theirs.fileno(), self._arena.fd),
                    stdin=subprocess.DEVNULL,
                )
        except BaseException:
            self._channel.close()
            self._arena.close()
            raise
        try:
            self._answer_to(0, Done, start_timeout)
        except BaseException:
            self.kill()
            self.close()
            raise

    def begin(self, plan: BucketPlan, version: int) -> None:
        largest = max((layout.nbytes for layout in plan.buckets), default=0)
        self._loading.clear()
        self._packing.clear()
        nbytes = self._arena.resize(_SLOTS, largest)
        self._slot_nbytes = nbytes // _SLOTS
        self._ask(Begin(plan.to_bytes(), version, nbytes))

    def allocator(self) -> Allocate | None:
        return self._allocate

    def _allocate(self, nbytes: int) -> torch.Tensor:
        """A slot that the worker is done with."""
        while self._loading and not self._arena.has_free_slot:
            self._settle()
        offset = self._arena.lease()
        buffer = self._arena.view(offset, nbytes)
        self._packing[buffer.data_ptr()] = offset
        return buffer

    def load(self, bucket: Bucket) -> None:
        """Hand a bucket over; returns while the worker loads it."""
        offset = self._packing.pop(bucket.buffer.data_ptr(), None)
        if offset is None:  # not the one that was packed but another in its place
            if bucket.nbytes > self._slot_nbytes:
                raise TransferError(f"bucket {bucket.index} has {bucket.nbytes} bytes, and none of its plan is larger than a slot")
            _, offset = self._packing.popitem()
            self._arena.view(offset, bucket.nbytes).copy_(bucket.buffer)
        self._loading[self._send(Load.of(bucket, offset))] = offset
        while self._loading and self._channel.has_message():
            self._settle()

    def commit(self) -> None:
        self._ask(Commit())
        self._arena.vacate()

    def abandon(self, version: int) -> None:
        """Best effort: the update failed, perhaps because the worker did, and the error that led here says more."""
        self._loading.clear()  # what became of the buckets under way is of no interest any more
        with suppress(RolloutCoreError):
            self._ask(Abandon(version))
        self._arena.vacate()

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, max_batch: int) -> list[Completion]:
        answer = self._ask(Generate([list(prompt) for prompt in prompts], params, max_batch), Completions)
        assert isinstance(answer, Completions)
        return answer.completions

    def digests(self) -> dict[str, str]:
        answer = self._ask(ReadDigests(), Digests)
        assert isinstance(answer, Digests)
        return answer.digests

    def read_tensor(self, name: str) -> torch.Tensor:
        answer = self._ask(ReadTensor(name), TensorBytes)
        assert isinstance(answer, TensorBytes)
        dtype = DTYPES[answer.dtype]
        if not answer.data:
            return torch.empty(answer.shape, dtype=dtype)
        return torch.frombuffer(bytearray(answer.data), dtype=torch.uint8).view(dtype).view(answer.shape)

    def kill(self) -> None:
        """End the process at once. Unlike the other calls, this one may come from another thread."""
        self._process.kill()

    def close(self) -> None:
        """End the process: asked first, then killed. Harmless when it has ended already."""
        try:
            if self._lost is None:
                grace = min(_GRACE, self._timeout)
                with suppress(TransferError, subprocess.TimeoutExpired):
                    self._channel.send(Asked(self._number + 1, Close()), grace)
                    self._process.wait(grace)
        finally:
            self._end()
            self._channel.close()
            self._packing.clear()
            self._arena.close()

    def _settle(self) -> None:
        """Take in the answer to one bucket; its slot is free again."""
        answered = self._receive(self._timeout)
        offset = self._loading.pop(answered.number, None)
        if offset is not None:  # else the answer to something whose caller was interrupted
            self._arena.release(offset)
            _expect(Done, answered.answer)

    def _ask(self, request: Request, kind: type[Answer] = Done) -> Answer:
        return self._answer_to(self._send(request), kind, self._timeout)

    def _answer_to(self, number: int, kind: type[Answer], timeout: float) -> Answer:
        """The answer to a request, after those to the buckets before it. What was refused first is raised."""
        while True:
            answered = self._receive(timeout)
            if answered.number == number:
                return _expect(kind, answered.answer)
            if answered.number in self._loading:
                self._arena.release(self._loading.pop(answered.number))
                _expect(Done, answered.answer)

    def _send(self, request: Request) -> int:
        """Send a request; returns its number."""
        self._check_usable()
        self._number += 1
        try:
            self._channel.send(Asked(self._number, request), self._timeout)
        except TransferError as error:
            raise self._give_up(error) from error
        except (TypeError, ValueError, OverflowError) as error:
            raise WorkerError(f"{type(request).__name__} cannot be sent to the worker process: {error}") from error
        return self._number

    def _receive(self, timeout: float) -> Answered:
        self._check_usable()
        try:
            return self._channel.receive(timeout)
        except TransferError as error:
            raise self._give_up(error) from error

    def _check_usable(self) -> None:
        if self._lost is not None:
            raise TransferError(f"{self._lost}; close this worker and make another")

    def _give_up(self, error: TransferError) -> TransferError:
        """The error that says what became of the process, once that has ended: killed unless it is on its way."""
        if isinstance(error, PeerGone):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)  # its exit code says more than the closed channel
        code = self._process.poll()
        state = "killed for it" if code is None else f"ended with exit code {code}"
        if code is not None and -code in set(signal.Signals):
            state += f" ({signal.Signals(-code).name})"
        self._end()
        self._lost = f"the worker process (pid {self._process.pid}, {state}): {error}"
        return TransferError(self._lost)

    def _end(self) -> None:
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # in the hands of a driver even a killed process may take its time
            self._process.wait(_GRACE)


def _expect(kind: type[Answer], answer: Answer) -> Answer:
    """The answer, if it is of this kind; raises what the worker raised."""
    if isinstance(answer, Failed):
        raise error_of(answer.cause, lambda text: WorkerError(f"the worker failed with {text}"))
    if not isinstance(answer, kind):
        raise WorkerError(f"the worker answered {type(answer).__name__}, not {kind.__name__}")
    return answer
