"""B13: changed payload is noticed."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from rollout_core.testing import strategies
from rollout_core.testing.cases import PackerCase
from rollout_core.testing.checks.base import buckets_of, must_raise, packer_check, plain_cases, require_refusal
from rollout_core.testing.packers import PackerUnderTest

#: Small ones, and one of kilobytes: a digest may look at the beginning only.
_CASES = plain_cases(shapes=strategies.shapes(min_dims=1, min_side=1) | st.just((2000,)), places=2)
_LIKE = plain_cases(min_size=2, max_size=4, places=2)


@packer_check(
    "packer/B13-flipped-bit",
    "one flipped bit is noticed",
    cases=_CASES,
    needs=["buffer", "integrity"],
    script="""
buckets = [b for b in packer.pack(named, capacity)]
buffer = packer.buffer(buckets[{at}[0] % len(buckets)])
bit = {at}[1] % (8 * len(buffer))
buffer[bit // 8] ^= 1 << bit % 8
"""
    + must_raise("packer.unpack(buckets)"),
)
def flipped_bit(packer: PackerUnderTest, case: PackerCase) -> None:
    buckets = buckets_of(packer, case)
    if not buckets:
        return
    index = case.at[0] % len(buckets)
    buffer = packer.buffer(buckets[index])
    if not buffer.numel():
        return
    bit = case.at[1] % (8 * buffer.numel())
    buffer[bit // 8] ^= 1 << bit % 8
    require_refusal(packer, lambda: packer.unpack(buckets), f"bit {bit} of bucket {index} ({buffer.numel()} bytes) was flipped")


@packer_check(
    "packer/B13-swapped-values",
    "two values that changed places are noticed",
    cases=_CASES,
    needs=["buffer", "integrity"],
    script="""
buckets = list(packer.pack(named, capacity))
buffer = packer.buffer(buckets[{at}[0] % len(buckets)])
words = buffer[: len(buffer) // 4 * 4].clone().view(torch.int32)
one = {at}[1] % (len(words) - 1)
words[[one, one + 1]] = words[[one + 1, one]]
buffer[: 4 * len(words)] = words.view(torch.uint8)
"""
    + must_raise("packer.unpack(buckets)"),
)
def swapped_values(packer: PackerUnderTest, case: PackerCase) -> None:
    buckets = buckets_of(packer, case)
    if not buckets:
        return
    index = case.at[0] % len(buckets)
    buffer = packer.buffer(buckets[index])
    words = buffer[: buffer.numel() // 4 * 4].clone().view(torch.int32)
    if len(words) < 2:
        return
    one = case.at[1] % (len(words) - 1)
    if words[one] == words[one + 1]:
        return
    words[[one, one + 1]] = words[[one + 1, one]]
    buffer[: 4 * len(words)].copy_(words.view(torch.uint8))
    require_refusal(packer, lambda: packer.unpack(buckets), f"values {one} and {one + 1} of bucket {index} changed places")


@packer_check(
    "packer/B13-swapped-slots",
    "two slots of one size that changed places are noticed",
    cases=_LIKE,
    needs=["buffer", "slots", "integrity"],
    script="""
buckets = list(packer.pack(named, capacity))
for bucket in buckets:
    slots = packer.slots(bucket)
    for (_, a, n), (_, b, m) in [(s, t) for s in slots for t in slots if s[1] < t[1] and s[2] == t[2]][:1]:
        buffer = packer.buffer(bucket)
        buffer[a : a + n], buffer[b : b + m] = buffer[b : b + m].clone(), buffer[a : a + n].clone()
"""
    + must_raise("packer.unpack(buckets)"),
)
def swapped_slots(packer: PackerUnderTest, case: PackerCase) -> None:
    buckets = buckets_of(packer, case)
    for index, bucket in enumerate(buckets):
        slots = packer.slots(bucket)
        like = [(s, t) for s in slots for t in slots if s[1] < t[1] and s[2] == t[2] > 0]
        if not like:
            continue
        (one, a, size), (other, b, _size) = like[case.at[0] % len(like)]
        buffer = packer.buffer(bucket)
        first, second = buffer[a : a + size].clone(), buffer[b : b + size].clone()
        if torch.equal(first, second):
            continue
        buffer[a : a + size], buffer[b : b + size] = second, first
        require_refusal(packer, lambda: packer.unpack(buckets), f"slots {one!r} and {other!r} of bucket {index} changed places")
        return


@packer_check(
    "packer/B13-moved",
    "the payload of another bucket is noticed",
    cases=_LIKE,
    needs=["buffer", "integrity"],
    script="""
buckets = list(packer.pack(named, capacity))
buffers = [packer.buffer(bucket) for bucket in buckets]
one, other = [(s, t) for s in buffers for t in buffers if s is not t and len(s) == len(t)][0]
kept = one.clone()
one.copy_(other)
other.copy_(kept)
"""
    + must_raise("packer.unpack(buckets)"),
)
def moved(packer: PackerUnderTest, case: PackerCase) -> None:
    buckets = buckets_of(packer, case, least=2)
    buffers = [packer.buffer(bucket) for bucket in buckets]
    for one in range(len(buffers)):
        for other in range(one + 1, len(buffers)):
            if len(buffers[one]) == len(buffers[other]) and not torch.equal(buffers[one], buffers[other]):
                kept = buffers[one].clone()
                buffers[one].copy_(buffers[other])
                buffers[other].copy_(kept)
                require_refusal(packer, lambda: packer.unpack(buckets), f"buckets {one} and {other} carry each other's payload")
                return


@packer_check(
    "packer/B13-replay",
    "a bucket of an older round is noticed",
    cases=_CASES,
    needs=["versions"],
    script="""
older = list(packer.pack(named, capacity))
newer = list(packer.pack(named, capacity))
place = {at}[0] % len(newer)
newer[place] = older[place]
"""
    + must_raise("packer.unpack(newer)"),
)
def replayed(packer: PackerUnderTest, case: PackerCase) -> None:
    older = buckets_of(packer, case, least=2)
    if not older:
        return
    newer = packer.pack(case.make(packer.device, seed=50), case.capacity)
    place = case.at[0] % len(newer)
    mixed = [*newer[:place], older[place], *newer[place + 1 :]]
    require_refusal(packer, lambda: packer.unpack(mixed), f"bucket {place} of {len(newer)} was one of the round before")
