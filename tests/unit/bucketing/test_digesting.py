"""Digests of many payloads, some in pieces, are those of each as a whole; nothing is kept of them but parts of blocks."""

from __future__ import annotations

import random
import weakref

import pytest
import torch

from rollout_core.bucketing.digest import BLOCK_NBYTES, payload_digest
from rollout_core.bucketing.digesting import BlockDigests


def data(nbytes, seed=0):
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def digest(payload):
    return payload_digest(payload, b"", "block-multilinear-128")


@pytest.mark.parametrize("size", [0, 1, 15, 16, BLOCK_NBYTES - 1, BLOCK_NBYTES, BLOCK_NBYTES + 1, 3 * BLOCK_NBYTES + 48])
@pytest.mark.parametrize("cut", [1, 4, 16, BLOCK_NBYTES // 2, BLOCK_NBYTES, BLOCK_NBYTES + 4, 2 * BLOCK_NBYTES])
@pytest.mark.parametrize("flushes", [True, False])
def test_pieces_make_the_digest_of_the_whole(size, cut, flushes):
    whole = data(size)
    pieces = torch.split(whole, max(cut, size // 40)) if size else [whole]
    found = BlockDigests()
    for place, piece in enumerate(pieces):
        memory = piece.clone()
        found.add("w", memory, last=place == len(pieces) - 1)
        if flushes:
            found.flush()
            memory.fill_(255)  # it is used again
    assert found.digests() == {"w": digest(whole)}


@pytest.mark.parametrize("seed", range(8))
def test_payloads_come_in_turns(seed):
    rng = random.Random(seed)
    wholes = {f"w{i}": data(rng.choice([0, 5, 40_000, rng.randint(0, 60_000)]), 10 * seed + i) for i in range(6)}
    cuts = {
        name: list(torch.split(whole, rng.choice([7_000, 16_384, 20_000]))) if len(whole) else [whole]
        for name, whole in wholes.items()
    }
    found = BlockDigests()
    while cuts:
        name = rng.choice(list(cuts))
        found.add(name, cuts[name].pop(0), last=not cuts[name])
        if not cuts[name]:
            del cuts[name]
        if rng.random() < 0.3:
            found.flush()
    assert found.digests() == {name: digest(whole) for name, whole in wholes.items()}


def test_a_part_of_memory_and_tensors_of_any_dtype():
    memory = data(50_000)
    found = BlockDigests()
    found.add("part", memory, 33, 40_001)
    found.add("rest", memory, 40_034)
    found.add("floats", memory.view(torch.float32).view(125, 100))
    assert found.digests() == {"part": digest(memory[33:40_034]), "rest": digest(memory[40_034:]), "floats": digest(memory)}


def test_what_is_not_complete_has_no_digest_yet():
    found = BlockDigests()
    found.add("a", data(20_000), last=False)
    found.add("b", data(3))
    assert found.digests() == {"b": digest(data(3))}
    found.add("a", data(5), last=True)
    assert found.digests() == {"a": digest(torch.cat([data(20_000), data(5)])), "b": digest(data(3))}


def test_a_payload_is_added_once():
    found = BlockDigests()
    found.add("a", data(5))
    with pytest.raises(ValueError, match="all of 'a' was added before"):
        found.add("a", data(5))


def test_b15_pieces_are_not_kept():
    found, refs = BlockDigests(), []
    for place in range(3):
        memory = data(3 * BLOCK_NBYTES + 100, place).clone()
        refs.append(weakref.ref(memory.untyped_storage()))
        found.add("w", memory, last=place == 2)
        del memory
        found.flush()
        assert refs[-1]() is None
    wholes = torch.cat([data(3 * BLOCK_NBYTES + 100, place) for place in range(3)])
    assert found.digests() == {"w": digest(wholes)}
