"""An engine on two GPUs (W9): one update reaches both by CUDA IPC, one of them out of the other GPU's memory. ROLLOUT_CORE_ENGINE
says which engine."""

from __future__ import annotations

import pytest
import torch

from gpu.sglang.reference import Reference
from gpu.small import changed, make_model
from gpu.two.starting import start
from rollout_core.errors import IntegrityError, WorkerError
from rollout_core.workers import SamplingParams
from rollout_core.workers.digests import combined_digest, weight_digest
from support.engines import ENGINE
from support.rank_kills import kill_while

PROMPTS = [[5], [17, 3, 60], list(range(100, 137)), [9, 2, 2, 12, 7, 55]]
GREEDY = SamplingParams(response_length=32, ignore_eos=True)
LONG = SamplingParams(response_length=400, ignore_eos=True)
MIB = 1 << 20


@pytest.fixture(scope="module")
def models():
    if torch.cuda.device_count() < 2:
        pytest.fail("these tests need two GPUs")
    model = make_model()
    return [changed(model, seed).cuda() for seed in (1, 2)]


@pytest.fixture(scope="module")
def worker(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models[0].save_pretrained(folder)
    with start(folder) as worker:
        yield worker


def tokens_of(completions):
    return [list(one.token_ids) for one in completions]


def digests_of(worker, model):
    return {name: weight_digest(tensor, algorithm=worker.digest_algorithm) for name, tensor in model.state_dict().items()}


def test_w9_one_update_reaches_both_gpus_and_is_read_back_from_both(worker, models):
    assert worker.ranks == 2
    references, found = [Reference(model) for model in models], []
    for model, reference in zip(models, references, strict=True):
        report = worker.sync_weights(model, capacity=MIB)
        assert report.carrier == "cuda_ipc"
        assert report.buckets > 2
        expected = digests_of(worker, model)
        assert worker.tensor_digests() == expected
        assert report.digest == combined_digest(expected)
        completions = worker.generate(PROMPTS, GREEDY)
        reference.check(PROMPTS, tokens_of(completions), [one.logprobs for one in completions])
        found.append(tokens_of(completions))
    with pytest.raises(AssertionError, match="behind"):  # or the check would find nothing
        references[0].check(PROMPTS, found[1])


@pytest.mark.parametrize("source", ["cuda:0", "cuda:1", "cpu"])
def test_w9_from_wherever_the_trainer_has_its_weights(worker, models, source):
    weights = {name: tensor.to(source) for name, tensor in models[1].state_dict().items()}
    report = worker.sync_weights(weights, capacity=MIB)
    assert report.carrier == ("memory" if source == "cpu" else "cuda_ipc")
    assert report.digest == combined_digest(digests_of(worker, models[1]))
    worker.free_buffers()


def test_t3_the_trainers_buffers_come_back_after_updates_from_either_gpu(worker, models):
    weights = {name: tensor.to("cuda:1") for name, tensor in models[0].state_dict().items()}
    worker.sync_weights(weights, capacity=MIB)
    before = torch.cuda.mem_get_info(1)[0]
    assert worker.free_buffers() > 0
    assert torch.cuda.mem_get_info(1)[0] > before


def test_w9_a_damaged_update_leaves_neither_rank_usable(worker, models):
    def flip(bucket):
        if bucket.index == 2:
            bucket.buffer[bucket.nbytes // 2] ^= 1
        return bucket

    with pytest.raises(IntegrityError, match="bucket 2"):
        worker.sync_weights(models[1], capacity=MIB, inject=flip)
    with pytest.raises(WorkerError, match="weights are unusable"):
        worker.generate(PROMPTS, GREEDY)
    worker.sync_weights(models[0])
    assert len(worker.generate(PROMPTS, GREEDY)) == len(PROMPTS)


def test_how_long_updates_take(worker, models):
    for model in models * 2:
        worker.sync_weights(model, capacity=MIB)
    reports = [worker.sync_weights(model, capacity=MIB) for model in models * 5]
    for name in ("seconds", "packing", "loading", "reading"):
        print(f"\n{name}: {1e3 * sorted(getattr(report, name) for report in reports)[len(reports) // 2]:.1f} ms", end="")


@pytest.mark.parametrize("when", ["update", "abort"])
def test_w9_a_rank_that_is_killed_elsewhere(models, when, tmp_path):
    """With an engine for each, which ends in it."""
    models[0].save_pretrained(tmp_path)
    with start(tmp_path) as worker:
        worker.sync_weights(models[0])
        kill_while(when, worker, ENGINE, PROMPTS, LONG, models[1], capacity=MIB)


def test_w9_a_rank_that_is_killed_is_noticed(worker, models):
    """The last of the tests with the shared engine, which ends in it."""
    kill_while("generation", worker, ENGINE, PROMPTS, LONG, models[1], capacity=MIB)
