"""B12: where a stream ends."""

from __future__ import annotations

from hypothesis import strategies as st

from rollout_core.testing.cases import PackerCase
from rollout_core.testing.checks.base import buckets_of, must_raise, packer_check, plain_cases, require_refusal, round_trip
from rollout_core.testing.packers import PackerUnderTest

_SEVERAL = plain_cases(min_size=1, places=2)


packer_check("packer/B12-empty", "the empty model round-trips", cases=st.just(PackerCase()))(round_trip)


@packer_check(
    "packer/B12-truncated",
    "a stream without its last bucket is refused",
    cases=_SEVERAL,
    needs=["end"],
    script="\nbuckets = list(packer.pack(named, capacity))\n" + must_raise("packer.unpack(buckets[:-1])"),
)
def truncated(packer: PackerUnderTest, case: PackerCase) -> None:
    buckets = buckets_of(packer, case)
    if buckets:
        require_refusal(packer, lambda: packer.unpack(buckets[:-1]), f"{len(buckets) - 1} of {len(buckets)} buckets were accepted")


@packer_check(
    "packer/B12-missing",
    "a stream without one of its buckets is refused",
    cases=_SEVERAL,
    needs=["end"],
    script="""
buckets = list(packer.pack(named, capacity))
del buckets[{at}[0] % (len(buckets) - 1)]
"""
    + must_raise("packer.unpack(buckets)"),
)
def missing(packer: PackerUnderTest, case: PackerCase) -> None:
    buckets = buckets_of(packer, case, least=2)
    if buckets:
        place = case.at[0] % (len(buckets) - 1)
        rest = [*buckets[:place], *buckets[place + 1 :]]
        require_refusal(packer, lambda: packer.unpack(rest), f"bucket {place} of {len(buckets)} was left out")


@packer_check(
    "packer/B12-repeated",
    "a bucket that comes twice is refused",
    cases=_SEVERAL,
    needs=["end"],
    script="""
buckets = list(packer.pack(named, capacity))
place = {at}[0] % len(buckets)
"""
    + must_raise("packer.unpack([*buckets[: place + 1], *buckets[place:]])"),
)
def repeated(packer: PackerUnderTest, case: PackerCase) -> None:
    buckets = buckets_of(packer, case)
    if buckets:
        place = case.at[0] % len(buckets)
        twice = [*buckets[: place + 1], *buckets[place:]]
        require_refusal(packer, lambda: packer.unpack(twice), f"bucket {place} of {len(buckets)} came twice")


@packer_check(
    "packer/B12-reordered",
    "buckets in another order are refused",
    cases=_SEVERAL,
    needs=["end"],
    script="""
buckets = list(packer.pack(named, capacity))
one = {at}[0] % (len(buckets) - 1)
buckets[one], buckets[one + 1] = buckets[one + 1], buckets[one]
"""
    + must_raise("packer.unpack(buckets)"),
)
def reordered(packer: PackerUnderTest, case: PackerCase) -> None:
    buckets = buckets_of(packer, case, least=2)
    if buckets:
        one = case.at[0] % (len(buckets) - 1)
        buckets[one], buckets[one + 1] = buckets[one + 1], buckets[one]
        require_refusal(packer, lambda: packer.unpack(buckets), f"buckets {one} and {one + 1} of {len(buckets)} changed places")


@packer_check(
    "packer/B12-after-end",
    "a bucket after the end is refused",
    cases=_SEVERAL,
    needs=["end"],
    script="\nbuckets = list(packer.pack(named, capacity))\n" + must_raise("packer.unpack([*buckets, buckets[0]])"),
)
def after_end(packer: PackerUnderTest, case: PackerCase) -> None:
    buckets = buckets_of(packer, case)
    if buckets:
        more = [*buckets, buckets[0]]
        require_refusal(packer, lambda: packer.unpack(more), f"bucket 0 came again after the last of {len(buckets)}")
