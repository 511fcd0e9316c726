"""A trainer with FSDP2 on two GPUs, over NCCL: each rank has one, and a worker on it."""

from __future__ import annotations

import pytest
import torch

from rollout_core.preflight.models import make_small_model
from support.ranks import run_ranks, values_of

SCENARIOS = ("updates", "cast", "wrapped", "refusals", "rollouts")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if torch.cuda.device_count() < 2:
        pytest.fail("these tests need two GPUs")
    folder = tmp_path_factory.mktemp("model")
    make_small_model(folder)
    ended = run_ranks(
        2,
        "support.sharded:scenarios",
        str(folder),
        list(SCENARIOS),
        timeout=300.0,
        ROLLOUT_CORE_BACKEND="cpu:gloo,cuda:nccl",
        ROLLOUT_CORE_TRAINER="cuda",
        ROLLOUT_CORE_DEVICE="cuda:{rank}",
    )
    return values_of(ended)


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_rank_raises(ranks, name):
    assert not any(isinstance(rank[name], str) for rank in ranks), [rank[name] for rank in ranks]


@pytest.mark.parametrize("sender", [0, 1])
def test_b1_w1_w2_a_sharded_model_arrives_byte_for_byte(ranks, sender):
    mine = ranks[sender]["updates"][sender]
    assert mine["wrong"] == []
    assert mine["tokens"] == mine["expected"]
    first, second = (rank["updates"][sender]["report"] for rank in ranks)
    assert first == second
    assert first.carrier == "cuda_ipc"


def test_w2_in_another_dtype_and_under_wrappers(ranks):
    assert ranks[0]["cast"]["wrong"] == []
    assert ranks[0]["wrapped"]["wrong"] == []


def test_t2_what_one_rank_raises_ends_the_update_on_both(ranks):
    for rank in ranks:
        found = rank["refusals"]
        assert found["name"][0] == "PlanMismatchError"
        assert "no memory for a part" in found["part"][1]
        assert (found["version"], found["after"], found["last"]) == (1, 2, 3)
    assert ranks[0]["refusals"]["wrong"] == []


def test_w1_w3_each_rank_generates_what_the_whole_model_does(ranks):
    for rank in ranks:
        for call in rank["rollouts"]:
            assert call["tokens"] == call["expected"]
            assert call["unequal"] == []
