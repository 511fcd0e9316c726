"""Payload digests against independent implementations, and what they must tell apart."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_core.bucketing.digest import (
    ALGORITHMS,
    BLOCK_NBYTES,
    _signed,
    _words,
    block_keys,
    block_multilinear,
    default_algorithm,
    multilinear,
    payload_digest,
)
from support.tensors import placed_at

MASK = 2**64 - 1


def splitmix64(seed: int, number: int) -> int:
    """Output ``number`` of splitmix64 in plain integers, from the published reference (Vigna, splitmix64.c)."""
    z = (seed + number * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference(data: bytes) -> tuple[int, int]:
    """The two lanes in plain integers."""
    padded = data + b"\0" * (-len(data) % 4)
    words = [int.from_bytes(padded[i : i + 4], "little") for i in range(0, len(padded), 4)]
    seeds = (0x243F6A8885A308D3, 0x13198A2E03707344)
    first, second = (sum((splitmix64(seed, i + 1) | 1) * word for i, word in enumerate(words)) & MASK for seed in seeds)
    return first, second


def finalized(z: int) -> int:
    """splitmix64's finalizer: its output number 0 for a seed."""
    return splitmix64(z, 0)


def block_reference(data: bytes) -> tuple[int, int]:
    """The two lanes of block-multilinear-128 in plain integers: byte strings are cut, where the code views tensors."""
    padded = data + b"\0" * (-len(data) % 16384)
    blocks = [padded[i : i + 16384] for i in range(0, len(padded), 16384)]
    columns = [b"".join(block[i : i + 16] for i in range(16 * t, 16384, 2048)) for block in blocks for t in range(128)]
    hashes = [reference(column) for column in columns]
    first, second = (
        sum(finalized((h[lane] + (n + 1) * 0x9E3779B97F4A7C15 + seed) & MASK) for n, h in enumerate(hashes)) & MASK
        for lane, seed in enumerate((0xA4093822299F31D0, 0x082EFA98EC4E6C89))
    )
    return first, second


def tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def test_reference_is_splitmix64():
    """The first outputs for seed 1234567, as published with the algorithm (rosettacode.org, Pseudo-random numbers/Splitmix64)."""
    assert [splitmix64(1234567, i) for i in (1, 2, 3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.binary(max_size=100))
def test_multilinear_is_what_it_says(data):
    assert multilinear(tensor(data)) == reference(data)


@settings(max_examples=20)
@given(st.binary(max_size=40), st.binary(max_size=40))
def test_digests_are_the_documented_bytes(data, context):
    header = context + len(context).to_bytes(8, "little")
    assert payload_digest(tensor(data), context, "xxh3-128") == xxhash.xxh3_128_digest(header + data)
    lanes = b"".join(lane.to_bytes(8, "little") for lane in reference(data))
    wanted = xxhash.xxh3_128_digest(header + len(data).to_bytes(8, "little") + lanes)
    assert payload_digest(tensor(data), context, "multilinear-128") == wanted
    lanes = b"".join(lane.to_bytes(8, "little") for lane in block_reference(data))
    wanted = xxhash.xxh3_128_digest(header + len(data).to_bytes(8, "little") + lanes)
    assert payload_digest(tensor(data), context, "block-multilinear-128") == wanted


@settings(max_examples=20)
@given(st.binary(max_size=100))
def test_block_multilinear_is_what_it_says(data):
    assert block_multilinear(tensor(data)) == block_reference(data)


@pytest.mark.parametrize("size", [0, 1, BLOCK_NBYTES - 1, BLOCK_NBYTES, BLOCK_NBYTES + 1, 9 * BLOCK_NBYTES + 7])
def test_block_multilinear_is_what_it_says_across_blocks(size):
    data = bytes((7 * i + i // 256 + i // 65536) % 251 for i in range(size))
    assert block_multilinear(tensor(data)) == block_reference(data)


def test_two_keys_of_a_lane_are_neither_equal_nor_opposite():
    """So two swapped words, or two flipped bits, of a column change its sum: what they change it by is at most 2**31 times an odd
    number times the sum or the difference of two keys."""
    for keys in block_keys(torch.device("cpu")).flatten(1):
        low = {int(key) % 2**33 for key in keys} | {-int(key) % 2**33 for key in keys}
        assert len(low) == 2 * len(keys) == 64


GOLDEN = {
    0: ("6ee92e90639b77e9b4ba933d306e92b1", "6ee92e90639b77e9b4ba933d306e92b1"),
    1: ("9fddd2eb13cb0b925a522e4faa67a876", "375c5cbd51165064a6bc9c66fb69d9e0"),
    16384: ("0620f0f63ca77883e6b08db2df3637ae", "3120e219811884df3e0be6c5954bc4d6"),
    40000: ("bcf733254b86e06c32d9a642ebf9665a", "f500d1850252d1103aa0f2d08d69a961"),
}


@pytest.mark.parametrize("size", GOLDEN)
def test_digests_stay_what_they_are(size):
    """Two sides of different versions have to agree: what a name stands for does not change."""
    data = tensor(bytes((7 * i + i // 256) % 251 for i in range(size)))
    digests = tuple(payload_digest(data, b"rollout", name).hex() for name in ("multilinear-128", "block-multilinear-128"))
    assert digests == GOLDEN[size]


@pytest.mark.parametrize("algorithm", ["multilinear-128", "block-multilinear-128"])
def test_blocks_that_changed_places_show(algorithm):
    blocks = [bytes([i]) * BLOCK_NBYTES for i in range(3)]
    digests = {payload_digest(tensor(b"".join(blocks[i] for i in order)), b"", algorithm) for order in permutations(range(3))}
    assert len(digests) == 6


def test_multilinear_does_not_depend_on_where_it_is_cut(monkeypatch):
    from rollout_core.bucketing import digest

    data = tensor(bytes(i * 37 % 256 for i in range(1000)))
    whole = multilinear(data)
    monkeypatch.setattr(digest, "_CHUNK_WORDS", 7)
    assert multilinear(data) == whole


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_multilinear_of_memory_at_an_odd_address(shift):
    data = tensor(bytes(range(64)))
    moved = torch.empty(64 + shift, dtype=torch.uint8)[shift:]
    moved.copy_(data)
    assert multilinear(moved) == multilinear(data)


@pytest.mark.parametrize("skip", [1, 2, 3, 5, 6, 7, 15])
def test_multilinear_of_memory_whose_offset_alone_is_odd(skip):
    """A view of 32-bit words asks for an even offset in the storage as well as an even address."""
    data = tensor(bytes(range(64)))
    moved = placed_at(64 - skip, 64, skip=skip)
    moved.copy_(data)
    assert moved.data_ptr() % 64 == 0
    assert multilinear(moved) == multilinear(data)


@pytest.mark.parametrize("skip", range(0, 64, 4))
def test_b15_aligned_bytes_are_hashed_where_they_lie(skip):
    buffer = placed_at(0, 64, skip=skip)
    assert _words(buffer).data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize("address", [1, 2, 3, 5, 6, 7, 9, 10])
def test_bytes_at_an_odd_address_are_moved_before_they_are_read_as_words(address):
    """A GPU cannot load a word from there."""
    assert _words(placed_at(address, 64)).data_ptr() % 4 == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.data())
def test_changes_show(algorithm, data):
    raw = bytearray(data.draw(st.binary(min_size=8, max_size=64)))
    before = payload_digest(tensor(raw), b"context", algorithm)
    changed = bytearray(raw)
    first, second = data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=2, max_size=2, unique=True))
    match data.draw(st.sampled_from(["flip", "flip both", "swap", "rotate", "append zero", "drop"])):
        case "flip":
            changed[first] ^= 1 << data.draw(st.integers(0, 7))
        case "flip both":  # the same bit of two places: an XOR of the words would miss it
            bit = 1 << data.draw(st.integers(0, 7))
            changed[first] ^= bit
            changed[second] ^= bit
        case "swap":  # a sum of the words would miss it
            changed[first], changed[second] = changed[second], changed[first]
        case "rotate":
            changed = changed[1:] + changed[:1]
        case "append zero":
            changed.append(0)
        case "drop":
            changed.pop()
    assert (payload_digest(tensor(changed), b"context", algorithm) == before) == (changed == raw)


def test_the_context_is_part_of_the_digest():
    data = tensor(b"abcd")
    digests = {payload_digest(data, context, a) for context in (b"", b"a", b"b", b"ab") for a in ALGORITHMS}
    assert len(digests) == 12
    assert payload_digest(tensor(b"bc"), b"a", "xxh3-128") != payload_digest(tensor(b"c"), b"ab", "xxh3-128"), "no sliding border"


def test_unknown_algorithm():
    with pytest.raises(
        ValueError, match="digest algorithm is 'crc'; it is one of xxh3-128, multilinear-128, block-multilinear-128"
    ):
        payload_digest(tensor(b""), b"", "crc")


def test_the_default_is_what_runs_where_the_bytes_are():
    assert default_algorithm(torch.device("cpu")) == "xxh3-128"
    assert default_algorithm(torch.device("cuda")) == "block-multilinear-128"


def test_constants_fit_into_int64():
    """Older torch takes no larger ones."""
    assert [_signed(value) for value in (0, 5, 2**63 - 1, 2**63, 2**64 - 1)] == [0, 5, 2**63 - 1, -(2**63), -1]
