"""A trainer that shards with FSDP2, on two ranks over gloo: its weights into a worker, and rollouts by all ranks in step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.preflight.models import make_small_model
from rollout_core.transfer.sharded import STAGE, part, plain_name
from support.ranks import run_ranks, values_of

SCENARIOS = ("updates", "cast", "wrapped", "memory", "refusals", "rollouts", "bad_rollouts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_small_model(path)
    return str(path)


@pytest.fixture(scope="module")
def ranks(folder):
    return values_of(run_ranks(2, "support.sharded:scenarios", folder, list(SCENARIOS)))


@pytest.fixture
def found(ranks, request):
    """What both ranks found in the scenario that the test is marked with."""
    values = [rank[request.param] for rank in ranks]
    assert not any(isinstance(value, str) for value in values), values  # a traceback
    return values


def scenario(name):
    return pytest.mark.parametrize("found", [name], indirect=True)


@scenario("updates")
@pytest.mark.parametrize("sender", [0, 1])
def test_b1_w2_a_sharded_model_arrives_byte_for_byte(found, sender):
    mine = found[sender][sender]
    assert mine["tied"]
    assert mine["wrong"] == []
    assert {kind for rank in found for kind in rank[sender]["kept"]} == {"DTensor"}, "the trainer keeps its shards"
    first, second = (rank[sender]["report"] for rank in found)
    assert first == second
    assert (first.version, first.digest) == (1, mine["digest"])
    assert first.buckets > 100


@scenario("updates")
@pytest.mark.parametrize("sender", [0, 1])
def test_w1_greedy_tokens_after_a_sharded_update(found, sender):
    mine = found[sender][sender]
    assert mine["tokens"] == mine["expected"]


@scenario("cast")
def test_w2_master_weights_are_sent_in_another_dtype_and_buffers_in_theirs(found):
    assert "Parameter" in found[0]["before"], "a forward pass leaves whole parameters in the outermost module"
    assert found[0]["wrong"] == []
    # Embeddings, tied; three layers of attention with biases, MLP and two norms; the last norm.
    parameters = 251 * 120 + 3 * (121 * 120 + 2 * 121 * 40 + 120 * 120 + 3 * 120 * 250 + 2 * 120) + 120
    assert found[0]["nbytes"] == 2 * parameters + 2 * 4 * 10, "and two buffers of ten float32"


@scenario("wrapped")
def test_b9_names_without_what_wrappers_put_in(found):
    assert all("_orig_mod" in name for name in found[0]["names"])
    assert any("_checkpoint_wrapped_module" in name for name in found[0]["names"])
    assert found[0]["wrong"] == []


@scenario("memory")
def test_b15_no_more_than_two_buckets_and_the_largest_parameter(found):
    sender, follower = found
    assert sender["slots"] == [2 * 30_000]
    assert follower["slots"] == []
    assert sender["largest"] > 30_000, "it is split"
    for rank in found:
        assert rank["peak"] == rank["largest"]


@scenario("refusals")
def test_t2_what_the_engine_refuses_is_refused_on_every_rank(found):
    for rank in found:
        kind, text, _ = rank["name"]
        assert kind == "PlanMismatchError"
        assert "ffn.gate_proj" in text
    assert "on rank 0 of 2" in found[1]["name"][2]


@scenario("refusals")
def test_t2_a_rank_that_cannot_gather_ends_the_update_on_every_rank(found):
    assert found[1]["part"][:2] == ("MemoryError", "no memory for a part")
    kind, text, notes = found[0]["part"]
    assert (kind, text) == ("TransferError", "MemoryError: no memory for a part")
    assert "on rank 1 of 2" in notes
    kind, text, _ = found[0]["unusable"]
    assert kind == "WorkerError"
    assert "unusable" in text


@scenario("refusals")
def test_t5_the_next_update_is_made_after_each_error(found):
    for rank in found:
        assert (rank["version"], rank["after"], rank["last"]) == (1, 2, 3)
    assert found[0]["wrong"] == []


@scenario("refusals")
def test_b7_ranks_that_have_other_tensors_than_each_other(found):
    for rank in found:
        kind, text, _ = rank["plans"]
        assert kind == "PlanMismatchError"
        assert "'model.norm.weight' bf16[120] here and 'model.norm.weight' f32[120] there" in text


@scenario("refusals")
@pytest.mark.parametrize(("case", "senders"), [("none", "[]"), ("two", "[0, 1]")])
def test_one_rank_has_the_worker(found, case, senders):
    for rank in found:
        assert rank[case][:2] == ("WorkerError", f"ranks {senders} have a worker: pass it on one rank, and None on the others")


@scenario("rollouts")
def test_w1_w3_each_rank_generates_what_the_whole_model_does(found):
    for rank in found:
        assert len(rank) == 6
        for call, one in enumerate(rank):
            assert one["tokens"] == one["expected"], call
            assert one["unequal"] == [], call
            # Of sums over 120 terms in float32, in another order, as the parameters lie elsewhere in memory.
            assert one["far"] < 1e-4, call
            assert one["kept"] == {"DTensor"}, "no whole parameter is kept over the next step"
    lengths = [[len(one["tokens"]) for one in rank] for rank in found]
    assert lengths == [[4, 0, 9] * 2, [1, 3, 6] * 2]


@scenario("rollouts")
def test_w5_tokens_carry_the_version_that_the_trainer_counts(found):
    for rank in found:
        assert [one["versions"] for one in rank if one["tokens"]] == [{v} for v in (0, 1) for one in rank[:3] if one["tokens"]]
        assert rank[0]["tokens"] != rank[3]["tokens"]


@scenario("bad_rollouts")
def test_t2_a_prompt_that_one_rank_refuses_ends_the_call_on_every_rank(found):
    for rank in found:
        kind, text, _ = rank["prompt"]
        assert kind == "WorkerError"
        assert text.startswith("prompt 1 position 0 is 999")
    assert "on rank 1 of 2" in found[0]["prompt"][2]
    assert [rank["tokens"] for rank in found] == [4, 4], "and the next call is made"


@scenario("bad_rollouts")
def test_t2_weights_that_are_nan_end_the_call_on_every_rank(found):
    for rank in found:
        kind, text, _ = rank["nan"]
        assert kind == "WorkerError"
        assert text.startswith("the model gave NaN or infinite logits for prompt 0")
    assert [rank["after nan"] for rank in found] == [4, 4]


@scenario("bad_rollouts")
def test_w5_ranks_agree_on_the_version(found):
    for rank in found:
        assert rank["versions"][0] == "WorkerError"
        assert "[0, 1]" in rank["versions"][1]


@scenario("bad_rollouts")
def test_t2_an_error_within_a_forward_pass_leaves_no_rank_in_a_collective(found):
    assert found[1]["forward"][:2] == ("ValueError", "a kernel failed")
    assert found[0]["forward"][0] == "TransferError"
    assert 2.9 < found[0]["seconds"] < 30.0, "the timeout is 3 s, and the other rank lives for 60"
    for rank in found:
        assert rank["again"][0] == "TransferError"


@pytest.mark.parametrize("who", [0, 1], ids=["sender", "follower"])
def test_t2_a_rank_that_dies_in_an_update_ends_it_on_the_other(folder, who):
    ended = run_ranks(2, "support.sharded:dies", folder, who, "exit")
    assert ended[who].exitcode == 7
    assert ended[1 - who].error is None
    other = ended[1 - who].value
    assert other["error"][0] == "TransferError"
    assert "another rank has ended" in other["error"][1]
    assert other["seconds"] < 30.0, "gloo says it at once; the timeout is 60 s"
    if who == 1:
        assert "unusable" in other["usable"][1]


def test_t2_an_engine_that_dies_in_an_update_ends_it_on_every_rank(folder):
    mine, other = values_of(run_ranks(2, "support.sharded:engine_dies", folder))
    assert mine["error"][0] == "TransferError"
    assert other["error"][:2] == mine["error"][:2]
    assert "on rank 0 of 2" in other["error"][2]
    assert (mine["agreed"], other["agreed"]) == (1, 1), "the group is as good as before"


def test_t2_a_rank_that_stops_ends_the_update_on_the_other_within_the_timeout(folder):
    ended = run_ranks(2, "support.sharded:dies", folder, 1, "stop", until=0)
    assert ended[0].error is None
    kind, text, _ = ended[0].value["error"]
    assert kind == "TransferError"
    assert "waited 3 s for the others" in text
    assert ended[0].value["seconds"] < 60.0, "the other rank sleeps for 120"


def test_b1_shapes_dtypes_and_placements_on_four_ranks():
    assert values_of(run_ranks(4, "support.sharded:meshes", 100)) == [[]] * 4


@given(st.integers(0, 200), st.integers(1, 40))
def test_parts_are_those_of_torch_chunk(size, parts):
    chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(parts)] if size else []
    chunks += [[]] * (parts - len(chunks))
    assert [list(range(*part(size, parts, place))) for place in range(parts)] == chunks


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("_orig_mod.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.0._checkpoint_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
        ("_fsdp_wrapped_module._orig_mod.a", "a"),
        ("model.my_orig_mod.weight", "model.my_orig_mod.weight"),
        ("module.weight", "module.weight"),
    ],
)
def test_plain_names(given_name, name):
    assert plain_name(given_name) == name


def test_the_stage_is_what_the_documentation_says():
    assert STAGE == 4 << 20
