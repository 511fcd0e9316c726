"""What every engine offers to the process that serves it, in the same words: requests in, progress out, updates, readback.

A worker's public half (``worker.py``) speaks of prompts, samples and request ids; an engine sees single-sample requests under
numbers that are never used twice, and says of each what was sampled and, once, how it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol, runtime_checkable

import msgspec
import torch

from rollout_core.bucketing import TensorSpec
from rollout_core.transfer.carriers.names import CarrierName
from rollout_core.transfer.protocol.messages import Cause
from rollout_core.workers.contract import SamplingParams, Status
from rollout_core.workers.shards import Shard


class MediaItem(msgspec.Struct, frozen=True):
    """A picture of a prompt. ``identity``, 64 hexadecimal digits, is of its content and of the processor with its settings: what an
    engine may keep it under. ``data``: what ``workers.media`` makes of it; None where the engine is believed to have it, or an
    earlier request of its call brings it."""

    kind: str  # "image"
    identity: str
    data: bytes | None = None


class Request(msgspec.Struct, frozen=True):
    """One sample of one prompt. ``place`` is the prompt's index in its call and ``sample`` the sample's, for errors and seeds.

    ``media``: what stands at the placeholders of ``prompt``, one each, in their order. ``input_ids``: the prompt with each of them
    at full length, as the engine has to expand it (clause W8), if it is of a conversation. ``inputs``: for engines without a
    processor, what the model is given beside ``input_ids`` (``workers.media.decode_tensors``); of a call, the first request of each
    place has it."""

    key: int
    prompt: list[int]
    place: int
    sample: int
    media: list[MediaItem] = []
    input_ids: list[int] = []
    inputs: bytes = b""


class Group(msgspec.Struct, frozen=True):
    """Requests of one call, with its parameters; ``params.n`` is spent: each sample is a request of its own. ``max_batch``: the
    most that an engine without a scheduler of its own decodes at once."""

    params: SamplingParams
    requests: list[Request]
    max_batch: int


class Progress(msgspec.Struct, frozen=True):
    """Tokens that a request got from the weights of one version, with their logprobs; and its status, once, with the last.

    ``missing``: identities of media that came without data and that the engine does not have. It has forgotten the request then,
    and takes it again, under the same key, with data."""

    key: int
    token_ids: list[int]
    logprobs: list[float]
    version: int
    status: Status | None = None
    cause: Cause | None = None  # of status "failed"
    missing: list[str] = []


class Update(msgspec.Struct, frozen=True):
    """An update of the weights to ``version`` will come from who listens at ``address``, by a carrier of this name; see
    ``rollout_core.transfer.carriers.names``. ``ranks``: how many of the engine are waited for, each at ``address_of`` its own."""

    address: str
    version: int
    timeout: float
    carrier: CarrierName = "memory"
    ranks: int = 1

    def address_of(self, rank: int) -> str:
        """Where this rank finds the sender, so that the sender knows who it is."""
        return rank_address(self.address, rank, self.ranks)


def rank_address(address: str, rank: int, ranks: int) -> str:
    """The address for one rank of several; of a single one it is ``address`` itself."""
    return address if ranks == 1 else f"{address}/{rank}"


Emit = Callable[[Sequence[Progress]], None]

#: Why nothing can be asked of an engine whose memory is released, and why not after that either until weights have come.
RELEASED: Final = "the worker's memory is released: call resume_memory, and sync_weights"
AWAITED: Final = "their memory was released, and none have come since"


class Engine(Protocol):
    """An engine in the process that serves it. Its calls come from one thread, but for ``update`` where ``is_read_in_update``."""

    #: Whether its weights can be read while an update is under way, by another thread than that which receives it.
    is_read_in_update: bool

    @property
    def version(self) -> int:
        """Of the weights that the next token will come from."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether a step would do anything."""
        ...

    def submit(self, group: Group) -> None:
        """Queue requests, or raise ``WorkerError`` and queue none."""
        ...

    def abort(self, keys: Sequence[int] | None, emit: Emit) -> None:
        """End these requests, or all, and say so at once; those that have ended, or never were, are none of its business."""
        ...

    def step(self, emit: Emit, between: Callable[[], None]) -> None:
        """Sample one token for each of some requests, or more. ``between`` is called after each, once it was emitted; anything of
        this class but ``step`` may be called in it."""
        ...

    def update(self, update: Update) -> float:
        """Receive an update; returns the seconds spent on loading. Requests that are under way go on with the new weights, from
        what they have by then, computed anew."""
        ...

    def abandon(self, version: int) -> None:
        """The update to ``version`` failed for the sender, whatever it was here."""
        ...

    def specs(self) -> Sequence[TensorSpec] | None:
        """What an update has to bring, by the names of a checkpoint; None if ``update`` itself refuses what is not the model's."""
        ...

    def digests(self, names: Sequence[str] | None) -> dict[str, str]:
        """``weight_digest`` of tensors by the names of a checkpoint, by the algorithm that ``algorithm_on`` has for the device that
        they are on; of all that it knows without ``names``."""
        ...

    def read_tensor(self, name: str) -> torch.Tensor:
        """A copy on the CPU. ``WorkerError`` for a name that it does not know."""
        ...

    def release_memory(self) -> int:
        """Let go of what weights and caches take; returns the bytes that this freed, as measured. Requests that are under way wait
        for new weights, with what they have. Harmless when it is released; ``WorkerError`` where it cannot be."""
        ...

    def resume_memory(self) -> None:
        """Take the memory again, without weights: an update has to bring them. Harmless when it is not released."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Ranked(Protocol):
    """What an ``Engine`` has, too, that may have its weights on several ranks, none of which has whole tensors (clause W9)."""

    def shards(self) -> Sequence[Mapping[str, Shard]]:
        """By rank, which part it has of the tensors that it has, by the names of a checkpoint; empty if there is one rank."""
        ...

    def rank_digests(self) -> Sequence[Mapping[str, str]]:
        """By rank, ``weight_digest`` of the parts that it has."""
        ...


@runtime_checkable
class SelfRunning(Protocol):
    """What an ``Engine`` has, too, that samples without being asked for each step. Its ``step`` tells what came meanwhile, and it
    ``is_busy`` when there is something to tell."""

    def wait(self, descriptors: Iterable[int]) -> None:
        """Until there is something to tell, or to read at one of these file descriptors."""
        ...

    def check_alive(self) -> None:
        """Raise if the engine is not there any more, or does not answer."""
        ...

    def run(self, steps: int | None, emit: Emit) -> None:
        """Go on without an end (None), or until each request got so many tokens or ended; 0: pause, with no token under way."""
        ...
