"""VLLMWorker on a GPU, beside the contract of tests/engines/contract in float32: bfloat16 with CUDA graphs, and what only a GPU
shows."""

from __future__ import annotations

import time

import pytest
import torch

from gpu.sglang.reference import Reference
from gpu.small import used_memory
from rollout_core.errors import IntegrityError, WorkerError
from rollout_core.testing.oracles import bytes_of
from rollout_core.workers import SamplingParams
from rollout_core.workers.digests import weight_digest

PROMPTS = [[5], [17, 3, 60], list(range(100, 137)), [9, 2, 2, 12, 7, 55]]
GREEDY = SamplingParams(response_length=32, ignore_eos=True)
LONG = SamplingParams(response_length=200, ignore_eos=True)
MIB = 1 << 20


@pytest.fixture
def references(models):
    return [Reference(model) for model in models]


@pytest.fixture
def worker(place):
    """With the first weights, and nothing under way, before and after."""
    place.worker.sync_weights(place.models[0])
    yield place.worker
    place.worker.resume()
    assert place.worker.abort() == []


def tokens_of(completions):
    return [list(one.token_ids) for one in completions]


def test_w1_greedy_tokens_are_the_references_before_and_after_an_update_by_cuda_ipc(worker, models, references):
    found = []
    for model, reference in zip(models, references, strict=True):
        report = worker.sync_weights(model, capacity=MIB)
        assert report.carrier == "cuda_ipc"
        assert report.buckets > 2
        completions = worker.generate(PROMPTS, GREEDY)
        assert {one.versions for one in completions} == {(report.version,) * GREEDY.response_length}
        best = reference.check(PROMPTS, tokens_of(completions), [one.logprobs for one in completions])
        assert best > 0.9, "near ties are few"
        found.append(tokens_of(completions))
    assert found[0] != found[1]
    with pytest.raises(AssertionError, match="behind"):  # or the check would find nothing
        references[0].check(PROMPTS, found[1])


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_w2_every_tensor_is_read_back_with_the_digest_that_the_cpu_makes_of_it(worker, models, device):
    source = {name: tensor.to(device) for name, tensor in models[1].state_dict().items()}
    report = worker.sync_weights(source, capacity=MIB)
    assert report.carrier == {"cuda": "cuda_ipc", "cpu": "memory"}[device]
    assert worker.digest_algorithm != "xxh3-128", "that is a CPU's: they would have been copied to it"
    digests = worker.tensor_digests()
    for name, expected in models[1].state_dict().items():
        found = worker.read_tensor(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert bytes_of(found) == bytes_of(expected.cpu()), name
        assert digests[name] == weight_digest(expected.cpu(), algorithm=worker.digest_algorithm), name


def test_t4_an_update_waits_for_the_work_that_makes_its_weights(worker, models):
    """Weights that the GPU has yet to compute, behind much else, when the update begins."""
    load = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = {name: torch.zeros_like(tensor) for name, tensor in models[1].state_dict().items()}
    for number, (name, tensor) in enumerate(models[1].state_dict().items()):
        if number % 5 == 0:
            for _ in range(20):  # about 1.5 ms each
                load = load @ load * 1e-4
        source[name].copy_(tensor, non_blocking=True)
    assert not torch.cuda.current_stream().query(), "the work is under way"
    worker.sync_weights(source, capacity=MIB)
    for name, expected in models[1].state_dict().items():
        assert bytes_of(worker.read_tensor(name)) == bytes_of(expected.cpu()), name


def test_w5_weights_change_under_requests_again_and_again(worker, models, references):
    used = {worker.version: 0}
    futures = worker.submit(PROMPTS * 8, LONG)
    for turn in range(1, 5):
        time.sleep(0.05)
        used[worker.sync_weights(models[turn % 2]).version] = turn % 2
    done = [future.result(120) for future in futures]
    assert {one.status for one in done} == {"length"}
    assert len({version for one in done for version in one.versions}) > 1, "the updates came while they were under way"
    parts = {0: ([], []), 1: ([], [])}
    for prompt, one in zip(PROMPTS * 8, done, strict=True):
        assert list(one.versions) == sorted(one.versions)
        for version in set(one.versions):
            start, count = one.versions.index(version), one.versions.count(version)
            before, tokens = parts[used[version]]
            before.append([*prompt, *one.token_ids[:start]])
            tokens.append(list(one.token_ids[start : start + count]))
    for number, (before, tokens) in parts.items():
        references[number].check(before, tokens)


def test_t5_damage_by_cuda_ipc_is_found_and_never_sampled_from(worker, models):
    def flip(bucket):
        if bucket.index == 2:
            bucket.buffer[bucket.nbytes // 2] ^= 1
        return bucket

    version = worker.version
    with pytest.raises(IntegrityError, match="bucket 2 .*is damaged"):
        worker.sync_weights(models[1], capacity=MIB, inject=flip)
    assert worker.version == version
    with pytest.raises(WorkerError, match="weights are unusable"):
        worker.generate(PROMPTS, GREEDY)
    worker.sync_weights(models[1], capacity=MIB)
    assert len(worker.generate(PROMPTS, GREEDY)) == len(PROMPTS)


def test_w6_nine_tenths_of_what_the_engine_held_come_back(place, worker, models):
    """And its CUDA graphs, which have the addresses of weights and cache in them, still give the same."""
    before_tokens = tokens_of(worker.generate(PROMPTS, GREEDY))
    worker.pause()
    futures = worker.submit(PROMPTS[:2], LONG)
    worker.step(9)
    worker.free_buffers()
    held = used_memory() - place.before
    freed = worker.release_memory()
    came_back = held - (used_memory() - place.before)
    print(f"\nheld {held / MIB:.0f} MiB, freed {freed / MIB:.0f} MiB as it says, {came_back / MIB:.0f} MiB as measured")
    assert came_back > 0.9 * held
    assert abs(freed - came_back) < 0.02 * held
    assert worker.release_memory() == 0
    with pytest.raises(WorkerError, match="memory is released"):
        worker.generate(PROMPTS, GREEDY)
    worker.resume_memory()
    worker.resume_memory()
    worker.resume()
    with pytest.raises(WorkerError, match="weights are unusable"):
        worker.generate(PROMPTS, GREEDY)
    worker.sync_weights(models[0])
    assert {future.result(120).status for future in futures} == {"length"}
    assert tokens_of(worker.generate(PROMPTS, GREEDY)) == before_tokens


def test_t3_memory_is_flat_over_200_updates(worker, models):
    def update(count):
        for turn in range(count):
            worker.sync_weights(models[turn % 2], capacity=MIB)
        return used_memory()

    few = update(10)
    start = time.perf_counter()
    many = update(200)
    seconds = time.perf_counter() - start
    assert many - few < 32 * MIB
    start = time.perf_counter()
    for turn in range(50):
        worker.sync_weights(models[turn % 2], capacity=MIB)
        worker.free_buffers()
    anew = (time.perf_counter() - start) / 50
    print(
        f"\n200 updates: {seconds / 200 * 1e3:.2f} ms each, {(many - few) / MIB:.1f} MiB more; with slots anew {anew * 1e3:.2f} ms"
    )
