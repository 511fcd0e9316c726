"""An SGLang server on a GPU: SGLangServerWorker, and SGLang's own door for buckets, whose memory it maps."""

from __future__ import annotations

import json
import urllib.request

import pytest
import torch

from gpu.sglang.reference import Reference
from gpu.sglang.setting import OPTIONS, TIMEOUT
from gpu.small import POSITIONS, used_memory
from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.testing.oracles import bytes_of
from rollout_core.workers import SamplingParams, SGLangServerWorker

PROMPTS = [[5], [17, 3, 60], list(range(100, 137)), [9, 2, 2, 12, 7, 55]]
GREEDY = SamplingParams(response_length=32, ignore_eos=True)
#: What is computed does not depend on the batch, so that seeds repeat samples; and SGLang starts sooner without CUDA graphs.
MORE = ["--enable-deterministic-inference", "--disable-cuda-graph"]
WORDS = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]


@pytest.fixture(scope="module")
def before():
    return used_memory()


@pytest.fixture(scope="module")
def worker(before, folder):
    with SGLangServerWorker.start(
        str(folder), device="cuda", max_model_len=POSITIONS, server_options=[*WORDS, *MORE], timeout=TIMEOUT
    ) as worker:
        yield worker


def test_w1_w2_updates_by_cuda_ipc(worker, models):
    for model in models:
        assert worker.sync_weights(model, capacity=1 << 20).carrier == "cuda_ipc"
        completions = worker.generate(PROMPTS, GREEDY)
        Reference(model).check(PROMPTS, [one.token_ids for one in completions], [one.logprobs for one in completions])
    for name, expected in models[1].state_dict().items():
        assert bytes_of(worker.read_tensor(name)) == bytes_of(expected.cpu()), name


def test_w6_nine_tenths_of_what_the_server_held_come_back(worker, models, before):
    worker.sync_weights(models[0])
    tokens = [one.token_ids for one in worker.generate(PROMPTS, GREEDY)]
    held = used_memory() - before
    freed = worker.release_memory()
    came_back = held - (used_memory() - before)
    assert came_back > 0.9 * held
    assert abs(freed - came_back) < 0.02 * held
    worker.resume_memory()
    worker.sync_weights(models[0])
    assert [one.token_ids for one in worker.generate(PROMPTS, GREEDY)] == tokens


def test_w3_a_seed_repeats_samples_in_any_company(worker):
    params = SamplingParams(response_length=24, n=3, temperature=1.0, seed=5)
    assert worker.capabilities == {"memory", "seeds"}
    completions = worker.generate(PROMPTS, params)
    assert worker.generate(PROMPTS, params) == completions
    assert len({one.token_ids for one in completions}) > len(PROMPTS)
    alone = worker.generate(PROMPTS[:1], params)
    assert [one.token_ids for one in alone] == [one.token_ids for one in completions[:3]]


def test_requests_under_way_while_weights_change(worker, models):
    futures = worker.submit(PROMPTS * 4, SamplingParams(response_length=200, ignore_eos=True))
    last = [worker.sync_weights(model).version for model in (*models, *models)][-1]
    done = [future.result(120) for future in futures]
    assert {one.status for one in done} == {"length"}
    assert {one.versions[-1] for one in done} <= {last, last - 1, last - 2, last - 3, last - 4}
    assert any(len(set(one.versions)) > 1 for one in done)
    assert worker.abort() == []


def test_buckets_through_sglangs_own_door(worker, models):
    """In memory of the GPU, mapped by SGLang's own means: the packed bucket as its flattened tensor."""
    from rollout_core.transfer.doors.sglang import flattened_buckets, rank_payloads

    worker.sync_weights(models[0])
    plan = plan_buckets(specs_of(models[1]), 1 << 20, oversize="own")
    for bucket in flattened_buckets(plan, models[1]):
        assert bucket.get_flattened_tensor().is_cuda
        (text,) = rank_payloads(bucket, 1, text=True)
        torch.cuda.synchronize()
        body = {"serialized_named_tensors": [text], "load_format": "flattened_bucket", "flush_cache": False}
        request = urllib.request.Request(
            f"{worker.server.url}/update_weights_from_tensor", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        assert json.loads(urllib.request.urlopen(request, timeout=60).read())["success"]
    for name, expected in models[1].state_dict().items():
        assert bytes_of(worker.read_tensor(name)) == bytes_of(expected.cpu()), name
