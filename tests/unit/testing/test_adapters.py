"""One-line adapters for functions that are no packers."""

from __future__ import annotations

import asyncio

import torch

from rollout_core.bucketing import aiter_buckets, iter_buckets
from rollout_core.testing import check_packer, functions_packer, grouping_packer

TIED = {"packer/B10-once": "pairs cannot say it"}


def test_a_grouping_function_sync_and_async():
    for function in (iter_buckets, aiter_buckets):
        packer = grouping_packer(function, capabilities={"oversize=own"})
        report = check_packer(packer, expected_failures=TIED, max_examples=20)
        assert report.ok, str(report)
        assert report["packer/B2-capacity"].status == "pass"


def test_a_grouping_function_that_yields_dicts_loses_duplicates():
    def by_name(named, capacity):
        for name, tensor in named:
            yield {name: tensor.clone()}

    def all_in_one(named, capacity):
        yield {name: tensor.clone() for name, tensor in named}

    assert check_packer(grouping_packer(by_name), only=["B1-order"]).ok
    report = check_packer(grouping_packer(all_in_one), only=["B9-duplicate", "B2-capacity"])
    assert {result.id for result in report.failed} == {"packer/B9-duplicate", "packer/B2-capacity"}
    assert report["packer/B2-capacity"].text == "bucket 0 has 8 bytes (capacity: 7)"


def test_two_functions_sync_and_async():
    def pack(named, capacity):
        return [(name, tensor.clone()) for name, tensor in named]

    async def apack(named, capacity):
        for pair in pack(named, capacity):
            await asyncio.sleep(0)
            yield pair

    for function in (pack, apack):
        report = check_packer(functions_packer(function, list), only=["B1-order", "B12-empty"], max_examples=20)
        assert report.ok, str(report)


def test_what_a_function_claims_is_checked():
    def eager(named, capacity):
        pairs = [(name, tensor) for name, tensor in named]
        return [pairs[i : i + 1] for i in range(len(pairs))]

    report = check_packer(grouping_packer(eager, capabilities={"iterators"}), only=["B15-lookahead", "B16-iterator"])
    assert [result.id for result in report.failed] == ["packer/B15-lookahead"]


def test_a_lambda_adapts_other_arguments():
    packer = grouping_packer(lambda named, capacity: iter_buckets(named, capacity=int(capacity / 2**20 * 2**20)))
    assert check_packer(packer, only=["B2"]).ok
    assert isinstance(packer.unpack(packer.pack([("a", torch.zeros(1))], 4)), list)
