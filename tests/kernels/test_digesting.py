"""Digests of many payloads in one launch: those that torch's operations give for each."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from rollout_core.bucketing.cuda import launching
from rollout_core.bucketing.digest import BLOCK_NBYTES, block_multilinear_by_torch, lanes_digest
from rollout_core.bucketing.digesting import BlockDigests
from support.kernel_checks import bytes_at

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # Triton's interpreter does
SIZES = [0, 1, 3, 16, 17, 2048, BLOCK_NBYTES - 16, BLOCK_NBYTES - 1, BLOCK_NBYTES, BLOCK_NBYTES + 1, BLOCK_NBYTES + 16, 40_000]


def rows_of(payloads, firsts):
    addresses = np.array([payload.data_ptr() for payload in payloads], dtype=np.int64)
    sizes = np.array([payload.numel() for payload in payloads], dtype=np.int64)
    return launching.digest_rows(torch.device("cpu"), addresses, sizes, np.array(firsts, dtype=np.int64))


def expected(payloads, firsts):
    lanes = [block_multilinear_by_torch(payload.clone(), first=first) for payload, first in zip(payloads, firsts, strict=True)]
    return [[lane - (lane >> 63 << 64) for lane in pair] for pair in lanes]  # as int64


@pytest.mark.parametrize("skip", [0, 16, 8, 4, 2, 1])
def test_lanes_of_rows(skip):
    payloads = [bytes_at("cpu", size, skip, size) for size in SIZES]
    firsts = [0] * len(payloads)
    assert rows_of(payloads, firsts).tolist() == expected(payloads, firsts)


def test_blocks_are_counted_from_the_first():
    payloads = [bytes_at("cpu", 20_000, 0, 1), bytes_at("cpu", 20_000, 0, 1), bytes_at("cpu", 100, 1, 2)]
    firsts = [0, 3, (1 << 31) // BLOCK_NBYTES + 7]
    lanes = rows_of(payloads, firsts).tolist()
    assert lanes == expected(payloads, firsts)
    assert lanes[0] != lanes[1]


def test_no_rows_and_rows_without_bytes():
    assert rows_of([], []).tolist() == []
    assert rows_of([torch.empty(0, dtype=torch.uint8)] * 2, [0, 5]).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("seed", range(6))
def test_payloads_in_pieces_by_one_launch_each(seed, kernels):
    rng = random.Random(seed)
    found, wholes = BlockDigests(), {}
    for i in range(5):
        wholes[f"w{i}"] = bytes_at("cpu", rng.choice(SIZES) + rng.choice([0, 33_000]), rng.choice([0, 0, 2, 3]), i)
    pieces = {
        name: list(torch.split(whole, rng.choice([9_000, BLOCK_NBYTES, 20_001]))) or [whole] for name, whole in wholes.items()
    }
    rounds = 0
    while pieces:
        for name in list(pieces):
            found.add(name, pieces[name].pop(0), last=not pieces[name])
            if not pieces[name]:
                del pieces[name]
        found.flush()
        rounds += 1
    lanes = {name: (block_multilinear_by_torch(whole.clone()), whole.numel()) for name, whole in wholes.items()}
    assert found.digests() == {name: lanes_digest(*one, b"") for name, one in lanes.items()}
    assert kernels["digest_rows"] <= rounds
