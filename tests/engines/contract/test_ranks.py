"""Tensor parallelism on a real engine (W9): each of two ranks has its part of one update, and what goes wrong in one fails for all.

By default one worker of the engine; ROLLOUT_CORE_RANKS=all has its other workers, and a rank that is killed at other places.
"""

from __future__ import annotations

import os

import pytest
import torch
import transformers

from rollout_core.errors import IntegrityError, PlanMismatchError, WorkerError
from rollout_core.workers import SamplingParams
from rollout_core.workers.digests import combined_digest, weight_digest
from support.engines import ENGINE, POSITIONS, changed
from support.greedy import argmax_loop
from support.rank_kills import kill_while
from support.rank_workers import worker_of

PROMPTS = [[5], [17, 3, 60], list(range(100, 137)), [9, 2, 2, 12, 7, 55]]
GREEDY = SamplingParams(response_length=10, ignore_eos=True)
LONG = SamplingParams(response_length=200, ignore_eos=True)
MORE = os.environ.get("ROLLOUT_CORE_RANKS") == "all"
KINDS = {
    "vllm": ["vllm_tp2", *(["vllm_async_tp2", "vllm_server_tp2"] if MORE else [])],
    "sglang": ["sglang_tp2", *(["sglang_server_tp2"] if MORE else [])],
}[ENGINE]
OWN = [kind for kind in KINDS if "server" not in kind]  # whose processes are the worker's, with faults in them
own = pytest.mark.parametrize("running", OWN, indirect=True)
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def make_model():
    """One head of keys and values for two ranks, 300 rows of embeddings in two padded parts, a layer that SGLang pads."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=300,
        hidden_size=128,  # 4 heads of 32: vLLM's CPU attention takes no smaller ones
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=ENGINE == "vllm",
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=[2, 7],
        pad_token_id=0,
    )
    return transformers.Qwen2ForCausalLM(config).float().eval()


class Place:
    """A running worker, two models for it, and the file that says what goes wrong."""

    def __init__(self, worker, model, faults, kind):
        self.worker, self.faults, self.kind = worker, faults, kind
        self.model, self.other = changed(model, 1), changed(model, 2)


@pytest.fixture(scope="module", params=KINDS)
def running(request, tmp_path_factory):
    folder, faults = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("faults") / "fault"
    faults.write_text("")
    model = make_model()
    model.save_pretrained(folder)
    with worker_of(request.param, folder, faults) as worker:
        yield Place(worker, model, faults, request.param)


@pytest.fixture
def place(running):
    running.faults.write_text("")
    running.worker.sync_weights(running.model)
    yield running
    running.faults.write_text("")


def check_tokens(place, model):
    expected = [argmax_loop(model, prompt, 10) for prompt in PROMPTS]
    assert [list(one.token_ids) for one in place.worker.generate(PROMPTS, GREEDY)] == expected


def sent_digests(place, model):
    """Made of the model's tensors, not of buckets; of values where the engine is read so."""
    return {
        name: weight_digest(tensor, values=place.worker.reads_values, algorithm=place.worker.digest_algorithm)
        for name, tensor in model.state_dict().items()
    }


def test_w9_both_ranks_have_their_parts_of_one_update(place):
    """Greedy tokens are the reference's, and what is read back, joined of the ranks' parts, is what was sent (W1, W2)."""
    assert place.worker.ranks == 2
    for model in (place.other, place.model):
        report = place.worker.sync_weights(model, capacity=50_000)
        check_tokens(place, model)
        expected = sent_digests(place, model)
        assert place.worker.tensor_digests() == expected
        assert report.digest == combined_digest(expected)
    for name in (EMBEDDING, NORM, "model.layers.1.self_attn.k_proj.bias", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(place.worker.read_tensor(name), place.model.state_dict()[name].cpu()), name


@own
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [NORM, EMBEDDING])
def test_w9_one_value_of_one_rank_is_seen(place, name, rank):
    version = place.worker.version
    place.faults.write_text(f"{rank} changes {name}")
    with pytest.raises(WorkerError, match=rf"on ranks \[{rank}\] of 2, first '{name}' on rank {rank}: sent"):
        place.worker.sync_weights(place.other)
    assert place.worker.version == version
    with pytest.raises(WorkerError, match="weights are unusable"):
        place.worker.generate(PROMPTS, GREEDY)


@own
@pytest.mark.parametrize("rank", [0, 1])
def test_w9_a_rank_that_cannot_load_fails_all(place, rank):
    worker = place.worker
    version = worker.version
    place.faults.write_text(f"{rank} fails")
    with pytest.raises(WorkerError, match=f"receiver {rank}: .*this rank cannot load"):
        worker.sync_weights(place.other, capacity=50_000)
    assert worker.version == version
    with pytest.raises(WorkerError, match="weights are unusable"):
        worker.generate(PROMPTS, GREEDY)
    place.faults.write_text("")
    assert worker.sync_weights(place.other).version == version + 1
    check_tokens(place, place.other)


def test_w9_an_update_that_is_not_the_models_leaves_the_old_weights(place):
    with pytest.raises(PlanMismatchError, match="'model.norm.weight' is f32.127."):
        place.worker.sync_weights({**place.other.state_dict(), NORM: torch.zeros(127)})
    check_tokens(place, place.model)


@pytest.mark.parametrize("at", [0, 8])  # before a tensor is complete, and after
def test_w9_a_damaged_update_is_never_sampled_from(place, at):
    def flip(bucket):
        if bucket.index == at:
            bucket.buffer[bucket.nbytes // 2] ^= 1
        return bucket

    with pytest.raises(IntegrityError, match=f"bucket {at} .*is damaged"):
        place.worker.sync_weights(place.other, capacity=50_000, inject=flip)
    if at:
        with pytest.raises(WorkerError, match="weights are unusable"):
            place.worker.generate(PROMPTS, GREEDY)
    else:
        check_tokens(place, place.model)
    place.worker.sync_weights(place.other)
    check_tokens(place, place.other)


def test_w5_weights_change_under_requests(place):
    worker = place.worker
    worker.pause()
    futures = worker.submit(PROMPTS, SamplingParams(response_length=20, ignore_eos=True))
    worker.step(4)
    new = worker.sync_weights(place.other).version
    worker.resume()
    for prompt, future in zip(PROMPTS, futures, strict=True):
        done = future.result(60)
        tokens, before = list(done.token_ids), done.versions.count(new - 1)
        assert done.versions == (new - 1,) * before + (new,) * (20 - before)
        assert tokens[:before] == argmax_loop(place.model, prompt, before)
        assert tokens[before:] == argmax_loop(place.other, prompt + tokens[:before], 20 - before)


if MORE:

    @pytest.mark.parametrize("when", ["update", "abort"])
    @pytest.mark.parametrize("kind", OWN)
    def test_w9_a_rank_that_is_killed_elsewhere(kind, when, tmp_path):
        (tmp_path / "fault").write_text("")
        model = make_model()
        model.save_pretrained(tmp_path / "model")
        with worker_of(kind, tmp_path / "model", tmp_path / "fault") as worker:
            place = Place(worker, model, tmp_path / "fault", kind)
            worker.sync_weights(place.model)
            kill_while(when, worker, ENGINE, PROMPTS, LONG, place.other, capacity=50_000)


@own
def test_w9_a_rank_that_is_killed_is_noticed(place):
    """The last of these tests: the engine ends in it."""
    kill_while("generation", place.worker, ENGINE, PROMPTS, LONG, place.other, capacity=50_000)
