"""Payload digests against independent implementations, and what they must tell apart."""

from __future__ import annotations

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.bucketing.digest import _signed, _words, default_algorithm, multilinear, payload_digest
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


def tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def test_reference_is_splitmix64():
    """The first outputs for seed 1234567, as published with the algorithm (rosettacode.org, Pseudo-random numbers/Splitmix64)."""
    assert [splitmix64(1234567, i) for i in (1, 2, 3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.binary(max_size=100))
def test_multilinear_is_what_it_says(data):
    assert multilinear(tensor(data)) == reference(data)


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_digests_are_the_documented_bytes(data, context):
    header = context + len(context).to_bytes(8, "little")
    assert payload_digest(tensor(data), context, "xxh3-128") == xxhash.xxh3_128_digest(header + data)
    lanes = b"".join(lane.to_bytes(8, "little") for lane in reference(data))
    wanted = xxhash.xxh3_128_digest(header + len(data).to_bytes(8, "little") + lanes)
    assert payload_digest(tensor(data), context, "multilinear-128") == wanted


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


@pytest.mark.parametrize("algorithm", ["xxh3-128", "multilinear-128"])
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
    digests = {payload_digest(data, context, a) for context in (b"", b"a", b"b", b"ab") for a in ("xxh3-128", "multilinear-128")}
    assert len(digests) == 8
    assert payload_digest(tensor(b"bc"), b"a", "xxh3-128") != payload_digest(tensor(b"c"), b"ab", "xxh3-128"), "no sliding border"


def test_unknown_algorithm():
    with pytest.raises(ValueError, match="digest algorithm is 'crc'; it is one of xxh3-128, multilinear-128"):
        payload_digest(tensor(b""), b"", "crc")


def test_the_default_is_what_runs_where_the_bytes_are():
    assert default_algorithm(torch.device("cpu")) == "xxh3-128"
    assert default_algorithm(torch.device("cuda")) == "multilinear-128"


def test_constants_fit_into_int64():
    """Older torch takes no larger ones."""
    assert [_signed(value) for value in (0, 5, 2**63 - 1, 2**63, 2**64 - 1)] == [0, 5, 2**63 - 1, -(2**63), -1]
