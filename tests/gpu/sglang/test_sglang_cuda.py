"""SGLangWorker on a GPU: the contract of tests/engines/contract where SGLang computes in bfloat16, and what only a GPU shows."""

from __future__ import annotations

import time

import pytest
import torch

from gpu.sglang.reference import Reference
from gpu.small import POSITIONS, used_memory
from rollout_core.errors import IntegrityError, PlanMismatchError, WorkerError
from rollout_core.testing.oracles import bytes_of
from rollout_core.workers import SamplingParams

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
def test_w2_every_tensor_is_read_back(worker, models, device):
    source = {name: tensor.to(device) for name, tensor in models[1].state_dict().items()}
    report = worker.sync_weights(source, capacity=MIB)
    assert report.carrier == {"cuda": "cuda_ipc", "cpu": "memory"}[device]
    assert worker.digest_algorithm != "xxh3-128", "that is a CPU's: they would have been copied to it"
    for name, expected in models[1].state_dict().items():
        found = worker.read_tensor(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert bytes_of(found) == bytes_of(expected.cpu()), name


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


def test_w4_aborted_and_resumed(worker, references):
    worker.pause()
    futures = worker.submit(PROMPTS, LONG, request_ids=list("abcd"))
    worker.step(7)
    assert worker.abort(["b"]) == ["b"]
    assert worker.abort(["b", "nobody"]) == []
    worker.resume()
    done = [future.result(120) for future in futures]
    assert [one.status for one in done] == ["length", "aborted", "length", "length"]
    assert len(done[1].token_ids) == 7
    references[0].check(PROMPTS, tokens_of(done))
    prefix = list(done[1].token_ids)
    (rest,) = worker.generate([PROMPTS[1] + prefix], SamplingParams(response_length=9, ignore_eos=True))
    references[0].check([PROMPTS[1]], [prefix + list(rest.token_ids)])


def test_requests_fill_all_positions_and_go_on_from_near_the_end(worker):
    prompt = [5] * 40
    params = SamplingParams(response_length=POSITIONS - 40, ignore_eos=True)
    worker.pause()
    (future,) = worker.submit([prompt], params)
    worker.step(POSITIONS - 42)
    assert not future.done()
    worker.resume()
    done = future.result(120)
    assert (done.status, len(done.token_ids)) == ("length", POSITIONS - 40)
    with pytest.raises(WorkerError, match=f"passes the model's {POSITIONS} positions"):
        worker.generate([[*prompt, 5]], params)


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
    with pytest.raises(PlanMismatchError, match="has none of that name"):
        worker.sync_weights({**models[1].state_dict(), "model.extra": torch.zeros(3, device="cuda")})
    worker.sync_weights(models[1], capacity=MIB)
    assert len(worker.generate(PROMPTS, GREEDY)) == len(PROMPTS)


def test_t5_weights_that_are_nan_give_no_token(worker, models):
    with torch.no_grad():
        bad = {name: tensor.clone() for name, tensor in models[0].state_dict().items()}
        bad["model.norm.weight"][5] = float("nan")
    worker.sync_weights(bad)
    with pytest.raises(WorkerError, match="NaN"):
        worker.generate(PROMPTS, GREEDY)


def test_t4_an_update_waits_for_what_the_gpu_has_yet_to_do(worker, models):
    """The weights are written behind work on the trainer's stream that has not begun."""
    source = {name: torch.zeros_like(tensor) for name, tensor in models[1].state_dict().items()}
    work = torch.randn(8192, 8192, device="cuda")
    for _ in range(40):
        work = (work @ work).clamp(-1, 1)
    for name, tensor in models[1].state_dict().items():
        source[name].copy_(tensor)
    assert not torch.cuda.current_stream().query(), "the work is done: this would show nothing"
    worker.sync_weights(source, capacity=MIB)
    for name, expected in models[1].state_dict().items():
        assert bytes_of(worker.read_tensor(name)) == bytes_of(expected.cpu()), name


def test_w6_nine_tenths_of_what_the_engine_held_come_back(place, worker, models):
    """And its CUDA graphs, which have the addresses of weights and cache in them, still give the same."""
    before_tokens = tokens_of(worker.generate(PROMPTS, GREEDY))
    worker.pause()
    futures = worker.submit(PROMPTS[:2], LONG)
    worker.step(9)
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
    assert abs(used_memory() - place.before - held) < 0.02 * held


def test_t3_memory_is_flat_over_200_updates(worker, models):
    def update(count):
        for turn in range(count):
            worker.sync_weights(models[turn % 2], capacity=MIB)
        return used_memory()

    few = update(10)
    start = time.perf_counter()
    many = update(200)
    print(f"\n200 updates in {time.perf_counter() - start:.1f} s; {(many - few) / MIB:.1f} MiB more in use")
    assert many - few < 32 * MIB
