"""All ranks of a torch.distributed group doing one thing together: each step is agreed on before it is taken, an error of one is
everybody's, and nobody waits longer than a timeout for the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final

import msgspec
import torch
import torch.distributed as dist

from rollout_core.errors import TransferError
from rollout_core.transfer.causes import cause_of, error_of
from rollout_core.transfer.protocol.messages import Cause
from rollout_core.transfer.sending import seconds_of

_FIRST_NAP: Final = 20e-6  # seconds between looks at a collective
_LONGEST_NAP: Final = 1e-3
_MARGIN: Final = 60.0  # seconds
_DECODER: Final = msgspec.msgpack.Decoder(Cause)
_WELL, _FAILED, _LEFT = b"\x00", b"\x01", b"\x02"  # before what a rank gives to the others


class FailedElsewhere(TransferError):
    """Raised on a rank that is well, to leave what it is doing; ``together`` raises the other rank's error in its place."""


class Lockstep:
    """This rank among those of ``group`` (None: the default group), all of which make the same calls in the same order.

    ``timeout``: seconds that a rank waits for the others at one step. Raises ``TransferError`` if a rank ends, or does not come in
    time; collectives are under way then that nobody will end, so the group is aborted, and of no further use.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        group = dist.group.WORLD if group is None else group
        if group is None:
            raise TransferError("torch.distributed has no process group yet; call init_process_group first")
        self.group: dist.ProcessGroup = group
        self.timeout = seconds_of("timeout", timeout)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise TransferError("this rank is not in the group: all ranks that hold a part of the model have to be")
        #: Why the group is of no use any more; None if it is.
        self.broken: str | None = None
        # NCCL moves what is on a GPU only.
        self._device = torch.device("cpu" if "cpu:" in dist.get_backend_config(group) else "cuda")

    def agree(self, value: int) -> int:
        """The largest of all ranks' values, on every rank: one all-reduce of eight bytes."""
        word = torch.tensor(value, dtype=torch.int64, device=self._device)
        self.finish("an all-reduce", lambda: [dist.all_reduce(word, dist.ReduceOp.MAX, self.group, async_op=True)])
        return int(word)

    def exchange(self, data: bytes) -> list[bytes]:
        """What each rank gives, in their order: an all-reduce and an all-gather."""
        width = self.agree(len(data)) + 8
        mine = torch.frombuffer(bytearray(len(data).to_bytes(8, "little") + data.ljust(width - 8, b"\0")), dtype=torch.uint8)
        mine = mine.to(self._device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self.finish("an all-gather", lambda: [dist.all_gather(found, mine, self.group, async_op=True)])
        raw = [one.cpu().numpy().tobytes() for one in found]
        return [one[8 : 8 + int.from_bytes(one[:8], "little")] for one in raw]

    def together(self, work: Callable[[], bytes]) -> list[bytes]:
        """Do the work on this rank, and give every rank what all ranks' work gave. An error of one is raised on all of them: as it
        is where it was raised, elsewhere as the same class with the rank in a note."""
        error: BaseException | None = None
        try:
            data = _WELL + work()
        except BaseException as raised:
            if self.broken is not None:
                raise
            error = raised
            data = _LEFT if isinstance(raised, FailedElsewhere) else _FAILED + msgspec.msgpack.encode(cause_of(raised))
        try:
            found = self.exchange(data)
        except TransferError as lost:
            if error is None:
                raise
            error.add_note(f"and the other ranks could not be told: {lost}")
            raise error from None
        if error is not None and not isinstance(error, FailedElsewhere):
            raise error
        for rank, one in enumerate(found):
            if one.startswith(_FAILED):
                there = error_of(_DECODER.decode(one[1:]), TransferError)
                there.add_note(f"on rank {rank} of {self.size}")
                raise there from None
        if error is not None:
            raise error
        return [one[1:] for one in found]

    def finish(self, what: str, start: Callable[[], Iterable[Any]]) -> None:
        """Start collectives and wait for their end, at most ``timeout`` seconds. Raises ``TransferError``, and no rank can be
        reached any more; so too after an interrupt."""
        if self.broken is not None:
            raise TransferError(f"the ranks cannot be reached: {self.broken}")
        try:
            deadline, nap = time.monotonic() + self.timeout, _FIRST_NAP
            for work in start():
                while not work.is_completed():
                    if time.monotonic() > deadline:
                        raise TransferError(
                            f"rank {self.rank} waited {self.timeout:g} s for the others at {what}; one of them has ended, failed "
                            "or is too slow: see what it says itself, or pass a longer timeout"
                        )
                    time.sleep(nap)
                    nap = min(2 * nap, _LONGEST_NAP)
                work.wait()  # raises what went wrong; on a GPU the stream in use waits, too
        except RuntimeError as error:  # torch's own class for whatever a backend says
            lost = TransferError(f"another rank has ended, or cannot be reached, at {what}: {error}")
            self.abort(str(lost))
            raise lost from error
        except BaseException as error:
            self.abort(str(error) or type(error).__name__)
            raise

    def abort(self, why: str) -> None:
        """Leave the others: collectives that are under way are given up, and the group is of no use after."""
        if self.broken is None:
            self.broken = why
            with suppress(RuntimeError):
                self.group.abort()


@contextmanager
def bounded(groups: Iterable[dist.ProcessGroup], timeout: float) -> Iterator[None]:
    """Collectives that others start on these groups meanwhile end after ``timeout`` seconds: with an error over gloo, and with the
    process over NCCL, where torch's watchdog ends it."""
    # torch has no public way to change a timeout, and this one is what its own code uses.
    from torch.distributed.distributed_c10d import _set_pg_timeout

    before = [(group, timeout_of(group)) for group in groups]
    try:
        for group, _ in before:
            _set_pg_timeout(timedelta(seconds=timeout), group)
        yield
    finally:
        for group, seconds in before:
            with suppress(RuntimeError):  # aborted meanwhile
                _set_pg_timeout(timedelta(seconds=seconds), group)


@contextmanager
def patient(group: dist.ProcessGroup, timeout: float) -> Iterator[None]:
    """This group's own timeout is meanwhile no shorter than ``timeout`` seconds and some: who waits in it gives up by itself."""
    own = timeout_of(group)
    with bounded([group] if own < timeout + _MARGIN else [], timeout + _MARGIN):
        yield


def timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds after which a group's collectives fail."""
    device = torch.device("cpu" if "cpu:" in dist.get_backend_config(group) else "cuda")
    seconds: float = group._get_backend(device).options._timeout.total_seconds()
    return seconds
