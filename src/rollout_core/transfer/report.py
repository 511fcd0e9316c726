"""What an update was, for each end; and the steps it goes through, for who wants to watch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class SendReport:
    """An update that every receiver has committed. Times in seconds; ``nbytes`` counts the buckets' bytes, padding included."""

    version: int
    receivers: int
    buckets: int
    nbytes: int
    seconds: float
    packing: float  # of these: reading the source, copying into slots, digests


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveReport:
    """An update that was committed here. Times in seconds; ``nbytes`` counts the buckets' bytes, padding included.

    ``weights``: the tensors by name, tied ones under each of their names, if ``receive`` was given nothing to load them into.
    """

    version: int
    buckets: int
    nbytes: int
    seconds: float  # from the sender's Hello on
    loading: float  # of these: digests, and loading into the target
    weights: dict[str, torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an end, as ``observe`` is told of it: before ``pack``, ``push``, ``examine``, ``pull``, ``load``, ``prepare`` and
    ``apply``; after ``say X`` and ``hear X``, X being a message's name. ``index``: the bucket, where there is one."""

    name: str
    index: int | None = None

    def __str__(self) -> str:
        return self.name if self.index is None else f"{self.name} {self.index}"


Observe: TypeAlias = Callable[[Step], None]
