"""``block-multilinear-128`` of many payloads, whole or piece by piece: on a GPU in one launch for all that is at hand."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch

from rollout_core.bucketing import cuda
from rollout_core.bucketing.digest import BLOCK_NBYTES, Lanes, block_multilinear_by_torch, lanes_digest
from rollout_core.bucketing.tensors import as_bytes

_MASK = (1 << 64) - 1
#: What a payload is called.
Name = TypeVar("Name", bound=Hashable)


@dataclass(slots=True)
class _Payload:
    """One of which pieces have come: its bytes and whole blocks so far, and the bytes of a block that is not whole yet."""

    nbytes: int = 0
    blocks: int = 0
    rest: torch.Tensor | None = None


@dataclass(slots=True)
class _Rows(Generic[Name]):
    """What is to be digested on one device: contiguous bytes, whole blocks or the end of a payload."""

    names: list[Name] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)  # blocks of the payload before these
    memory: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # where it lies, and from which byte

    def add(self, name: Name, memory: torch.Tensor, start: int, nbytes: int, first: int) -> None:
        self.names.append(name)
        self.addresses.append(memory.data_ptr() + start)
        self.sizes.append(nbytes)
        self.firsts.append(first)
        self.memory.append((memory, start))


class BlockDigests(Generic[Name]):
    """``payload_digest`` by ``block-multilinear-128``, with an empty context, of payloads by name.

    The lanes are sums over blocks, so a payload that comes in pieces is kept nowhere: only what a piece leaves of a block, less
    than 16 KiB, until the next one. ``add`` raises ``ValueError`` for a payload that was complete.
    """

    def __init__(self) -> None:
        self._open: dict[Name, _Payload] = {}
        self._nbytes: dict[Name, int] = {}  # of payloads that are complete
        self._rows: dict[torch.device, _Rows[Name]] = {}
        self._launched: list[tuple[list[Name], torch.Tensor]] = []  # lanes, on their device
        self._lanes: dict[Name, Lanes] = {}

    def add(self, name: Name, memory: torch.Tensor, start: int = 0, nbytes: int | None = None, *, last: bool = True) -> None:
        """The payload's next piece: ``nbytes`` from byte ``start`` on of a contiguous tensor, without ``nbytes`` all of it;
        ``last``: it ends with it. The memory has to stay as it is until ``flush``."""
        nbytes = memory.nbytes - start if nbytes is None else nbytes
        payload = self._open.get(name)
        if payload is None:
            if name in self._nbytes:
                raise ValueError(f"all of {name!r} was added before")
            payload = self._open[name] = _Payload()
        payload.nbytes += nbytes
        rows = self._rows.get(memory.device)
        if rows is None:
            rows = self._rows[memory.device] = _Rows()
        if payload.rest is not None:
            missing = min(BLOCK_NBYTES - payload.rest.numel(), nbytes)
            joined = torch.cat([payload.rest, as_bytes(memory)[start : start + missing]])
            start, nbytes = start + missing, nbytes - missing
            if joined.numel() < BLOCK_NBYTES and not last:
                payload.rest = joined
                return
            payload.rest = None
            rows.add(name, joined, 0, joined.numel(), payload.blocks)
            payload.blocks += 1
        whole = nbytes if last else nbytes // BLOCK_NBYTES * BLOCK_NBYTES
        if whole:
            rows.add(name, memory, start, whole, payload.blocks)
            payload.blocks += whole // BLOCK_NBYTES
        if last:
            self._nbytes[name] = payload.nbytes
            del self._open[name]
        elif whole < nbytes:
            payload.rest = as_bytes(memory)[start + whole : start + nbytes].clone()

    def flush(self) -> None:
        """Digest what was added, in one launch for each device; what other work on the current stream does to the memory comes
        after it."""
        queued, self._rows = self._rows, {}
        for device, rows in queued.items():
            if not rows.names:
                continue
            if cuda.possible(device):
                from rollout_core.bucketing.cuda import launching

                if launching.usable(device):
                    columns = (np.array(column, dtype=np.int64) for column in (rows.addresses, rows.sizes, rows.firsts))
                    self._launched.append((rows.names, launching.digest_rows(device, *columns)))
                    continue
            for name, (memory, start), nbytes, first in zip(rows.names, rows.memory, rows.sizes, rows.firsts, strict=True):
                self._count(name, block_multilinear_by_torch(as_bytes(memory)[start : start + nbytes], first=first))

    def digests(self) -> dict[Name, bytes]:
        """Of all payloads that are complete. Waits for each device once."""
        self.flush()
        launched, self._launched = self._launched, []
        for device in {lanes.device for _, lanes in launched}:
            found = torch.cat([lanes for _, lanes in launched if lanes.device == device]).tolist()
            names = [name for some, lanes in launched if lanes.device == device for name in some]
            for name, (one, other) in zip(names, found, strict=True):
                self._count(name, (one, other))
        return {name: lanes_digest(self._lanes.get(name, (0, 0)), nbytes, b"") for name, nbytes in self._nbytes.items()}

    def _count(self, name: Name, lanes: Lanes) -> None:
        one, other = self._lanes.get(name, (0, 0))
        self._lanes[name] = ((one + lanes[0]) & _MASK, (other + lanes[1]) & _MASK)
