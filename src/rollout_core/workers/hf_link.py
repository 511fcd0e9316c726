"""How an HFWorker reaches its model: in this process, or in one of its own. Both ways offer the same calls."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import torch

import rollout_core.errors
from rollout_core.bucketing import Bucket, BucketPlan
from rollout_core.bucketing.buffers import Allocate
from rollout_core.bucketing.dtypes import DTYPES
from rollout_core.errors import RolloutCoreError, TransferError, WorkerError
from rollout_core.transfer.arena import Arena
from rollout_core.transfer.channel import Channel
from rollout_core.workers.contract import Completion, SamplingParams
from rollout_core.workers.hf_model import HFModel
from rollout_core.workers.messages import (
    Abandon,
    Answer,
    Begin,
    Close,
    Commit,
    Completions,
    Digests,
    Done,
    Failed,
    Generate,
    Load,
    Loaded,
    ReadDigests,
    ReadTensor,
    Request,
    TensorBytes,
)

_SLOTS: Final = 2  # one bucket is packed while the one before it is loaded


class Link(Protocol):
    """The calls of ``HFModel``, wherever it is. ``allocator`` gives what makes the memory that buckets are packed into."""

    def allocator(self) -> Allocate | None: ...
    def begin(self, plan: BucketPlan, version: int) -> None: ...
    def load(self, bucket: Bucket) -> None: ...
    def commit(self) -> None: ...
    def abandon(self) -> None: ...
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, max_batch: int) -> list[Completion]: ...
    def digests(self) -> dict[str, str]: ...
    def read_tensor(self, name: str) -> torch.Tensor: ...
    def close(self) -> None: ...


class LocalLink(HFModel):
    """The model in this process."""

    def allocator(self) -> Allocate | None:
        return None

    def close(self) -> None:
        self._weights.clear()
        self.model = None


class ProcessLink:
    """The model in a process of its own. Weights go through shared memory, everything else through a socket pair.

    Started with ``subprocess``, not ``multiprocessing``: the caller's main module is not run again, so a script needs no
    ``__main__`` guard. Every wait has an end: ``timeout`` seconds, or the other process's.
    """

    def __init__(self, model_dir: str, *, dtype: str, device: str, threads: int, start_timeout: float, timeout: float) -> None:
        self._timeout = timeout
        self._arena = Arena()
        ours, theirs = socket.socketpair()
        seconds, fraction = divmod(timeout, 1)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # also when it stops in the middle of a message
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(fraction * 1e6)))
        command = [sys.executable, "-P", "-m", "rollout_core.workers.hf_process"]
        options = {"model": model_dir, "dtype": dtype, "device": device, "threads": threads}
        options |= {"channel": theirs.fileno(), "arena": self._arena.fd}
        with theirs:
            self._process = subprocess.Popen(
                [*command, *(f"--{name}={value}" for name, value in options.items())],
                pass_fds=(theirs.fileno(), self._arena.fd),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": _python_path()},
            )
        self._channel: Channel[Answer] = Channel(ours.detach(), Answer)
        self._leased: dict[int, int] = {}  # address of a leased slot -> its offset
        self._unanswered = 0
        try:
            self._expect(Done, start_timeout)
        except BaseException:
            self.close()
            raise

    def begin(self, plan: BucketPlan, version: int) -> None:
        largest = max((layout.nbytes for layout in plan.buckets), default=0)
        nbytes = self._arena.resize(_SLOTS, largest)
        self._leased.clear()
        self._ask(Begin(plan.to_bytes(), version, nbytes))

    def allocator(self) -> Allocate | None:
        return self._allocate

    def _allocate(self, nbytes: int) -> torch.Tensor:
        """A slot that the worker is done with."""
        while not self._arena.has_free_slot:
            self._settle()
        offset = self._arena.lease()
        buffer = self._arena.view(offset, nbytes)
        self._leased[buffer.data_ptr()] = offset
        return buffer

    def load(self, bucket: Bucket) -> None:
        """Hand a bucket over; returns while the worker loads it."""
        offset = self._leased.pop(bucket.buffer.data_ptr())
        self._channel.send(Load.of(bucket, offset))
        self._unanswered += 1
        while self._unanswered and self._channel.has_message():
            self._settle()

    def commit(self) -> None:
        self._ask(Commit())
        self._arena.vacate()

    def abandon(self) -> None:
        """Best effort: the update failed, perhaps because the worker did, and the error that led here says more."""
        while self._unanswered:
            with suppress(RolloutCoreError):  # buckets sent after the one that failed are refused too
                self._settle()
        with suppress(RolloutCoreError):
            self._ask(Abandon())
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

    def close(self) -> None:
        """End the process: asked first, then told, then killed. Harmless when it has ended already."""
        try:
            self._channel.send(Close())
            self._process.wait(5)
        except (TransferError, subprocess.TimeoutExpired):
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._channel.close()
        self._leased.clear()
        self._arena.close()

    def _settle(self) -> None:
        """Take in the answer to one bucket; its slot is free again."""
        self._unanswered -= 1  # also if the answer is an error
        answer = self._receive(self._timeout)
        if not isinstance(answer, Loaded):
            raise WorkerError(f"the worker answered {type(answer).__name__} to a bucket")
        self._arena.release(answer.offset)

    def _ask(self, request: Request, kind: type[Answer] = Done) -> Answer:
        while self._unanswered:
            self._settle()
        self._channel.send(request)
        return self._expect(kind, self._timeout)

    def _expect(self, kind: type[Answer], timeout: float) -> Answer:
        answer = self._receive(timeout)
        if not isinstance(answer, kind):
            raise WorkerError(f"the worker answered {type(answer).__name__}, not {kind.__name__}")
        return answer

    def _receive(self, timeout: float) -> Answer:
        try:
            answer = self._channel.receive(timeout)
        except TransferError as error:
            state = self._state()
            self._process.kill()  # a late answer must not be taken for the answer to something else
            raise TransferError(f"the worker process ({state}): {error}") from error
        if isinstance(answer, Failed):
            raise _error_of(answer)
        return answer

    def _state(self) -> str:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return f"pid {self._process.pid}, still running"
        return f"pid {self._process.pid}, ended with exit code {code}"


def _error_of(failed: Failed) -> RolloutCoreError:
    """The worker's error as an error of the same kind here, with the worker's own traceback as a note."""
    kind = getattr(rollout_core.errors, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, RolloutCoreError):
        error: RolloutCoreError = kind(failed.message)
    else:
        error = WorkerError(f"the worker failed with {failed.kind}: {failed.message}")
    error.add_note(f"in the worker process:\n{failed.trace}")
    return error


def _python_path() -> str:
    """The child finds this package where the parent did, also when it is not installed."""
    here = str(Path(rollout_core.__path__[0]).parent)
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
