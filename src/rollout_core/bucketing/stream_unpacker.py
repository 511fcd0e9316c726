"""unpack_stream and StreamUnpacker: from the buckets of a stream back to named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from rollout_core.bucketing.bucket import check_sealed, check_version, verify
from rollout_core.bucketing.placement import BucketLayout, Slot
from rollout_core.bucketing.recipes import Recipe
from rollout_core.bucketing.sources import Pair
from rollout_core.bucketing.stream_header import StreamBucket, chain_digest, decode_header, require
from rollout_core.bucketing.unpacker import JoinMemory, check_payload, drop_joined, hand_out
from rollout_core.errors import DuplicateNameError, IncompleteStreamError, IntegrityError, PlanMismatchError


def unpack_stream(
    buckets: Iterable[StreamBucket], *, verify: bool = True, copy: bool = False, version: int | None = None
) -> Iterator[Pair]:
    """The (name, tensor) pairs of a stream. Arguments and errors: see ``StreamUnpacker``."""
    unpacker = StreamUnpacker(verify=verify, copy=copy, version=version)
    for bucket in buckets:
        yield from unpacker.feed(bucket)
    unpacker.close()


class StreamUnpacker:
    """Turns the buckets of a stream, fed one by one and in order, into named tensors, as ``Unpacker`` does for a plan.

    The first bucket's version is that of the stream unless ``version`` says which to accept. ``max_header_nbytes`` bounds a header,
    ``max_tensor_nbytes`` a split tensor, which is joined in memory of its own, or where ``memory`` says: see ``JoinMemory``.
    """

    def __init__(
        self,
        *,
        verify: bool = True,
        copy: bool = False,
        version: int | None = None,
        max_header_nbytes: int = 64 << 20,
        max_tensor_nbytes: int = 1 << 38,
        memory: JoinMemory | None = None,
    ) -> None:
        self._memory = memory
        self._verify = verify
        self._copy = copy
        self._version = None if version is None else check_version(version)
        self._max_header_nbytes = max_header_nbytes
        self._max_tensor_nbytes = max_tensor_nbytes
        self._next = 0
        self._ended = False
        self._chain = b""
        self._names: set[str] = set()
        self._joins: dict[str, torch.Tensor] = {}
        self._awaited_names: list[str] = []  # those tied to it
        self._awaited: Slot | None = None  # the last piece of a tensor that is not whole yet

    def feed(self, bucket: StreamBucket) -> list[Pair]:
        """The tensors that this bucket completes.

        Raises ``ManifestError`` (bad header), ``IncompleteStreamError`` (order, repeats, after the end), ``DuplicateNameError``,
        ``PlanMismatchError`` (another stream) or ``IntegrityError``; then nothing of the bucket was used.
        """
        check_sealed(bucket)
        if self._ended:
            raise IncompleteStreamError(f"bucket {bucket.index} came after the stream's last bucket")
        if bucket.index != self._next:
            when = "was fed already" if bucket.index < self._next else "is out of order"
            raise IncompleteStreamError(f"bucket {bucket.index} {when}; the next one is bucket {self._next}")
        if self._version is not None and bucket.version != self._version:
            raise IntegrityError(
                f"bucket {bucket.index} is of version {bucket.version}, and this stream is version {self._version}"
            )
        chain = chain_digest(self._chain, bucket.header)
        if bucket.plan_digest != chain:
            raise PlanMismatchError(f"bucket {bucket.index} does not follow the buckets fed before it: it is of another stream")
        header, layout, tied = decode_header(bucket.header, bucket.index, self._max_header_nbytes)
        names, awaited = self._follow(layout, tied, last=header.last)
        check_payload(bucket, layout.nbytes)
        if self._verify:
            verify(bucket)
        recipe = Recipe.of(layout.slots, tied)
        pairs = hand_out(recipe, bucket.buffer, tied, joins=self._joins, memory=self._memory, copy=self._copy)
        self._next, self._chain, self._version = self._next + 1, chain, bucket.version
        self._awaited, self._ended = awaited, header.last
        self._names |= names
        drop_joined(self._joins, layout)
        return pairs

    def close(self) -> None:
        """Raise ``IncompleteStreamError`` unless the stream's last bucket was fed."""
        if not self._ended:
            what = f" in the middle of tensor {self._awaited.name!r}" if self._awaited else ""
            raise IncompleteStreamError(f"the stream ended after {self._next} buckets{what}; its last bucket is missing")

    def _follow(self, layout: BucketLayout, tied: dict[str, list[str]], *, last: bool) -> tuple[set[str], Slot | None]:
        """The names that this bucket adds and the piece that it leaves open, if it continues what came before."""
        names: set[str] = set()
        awaited = self._awaited
        for slot in layout.slots:
            if awaited is not None:
                same = slot.spec == awaited.spec and tied.get(slot.name, []) == self._awaited_names
                continues = same and slot.start == awaited.start + awaited.nbytes
                require(continues, f"slot {slot.name!r} stands where tensor {awaited.name!r} has to continue")
            else:
                require(slot.start == 0, f"a piece of {slot.name!r} starts at byte {slot.start}, and nothing came before it")
                for name in (slot.name, *tied.get(slot.name, ())):
                    if name in self._names or name in names:
                        raise DuplicateNameError(f"name {name!r} came twice in the stream")
                    names.add(name)
            if slot.is_piece:
                fits = slot.spec.nbytes <= self._max_tensor_nbytes
                require(fits, f"split tensor {slot.name!r} has {slot.spec.nbytes} bytes; the bound is {self._max_tensor_nbytes}")
            awaited = None if slot.is_tail else slot
            self._awaited_names = tied.get(slot.name, [])
        require(not (last and awaited is not None), f"the stream's last bucket leaves {awaited and awaited.name!r} incomplete")
        return names, awaited
