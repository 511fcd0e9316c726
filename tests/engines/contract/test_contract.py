"""What every engine has to do alike: weights, tokens and requests (clauses W1 to W5). The reference is one unpadded forward pass of
transformers for each token."""

import copy
import random
import threading
from concurrent.futures import wait
from contextlib import suppress

import msgspec
import pytest
import torch

from rollout_core.errors import IntegrityError, PlanMismatchError, WorkerError
from rollout_core.testing import check_worker, select_checks
from rollout_core.workers import HFWorker, RolloutGroup, SamplingParams, to_batch
from support.engines import DEVICE
from support.greedy import argmax_loop

PROMPTS = [[5], [17, 3, 60], list(range(100, 137)), [9, 2, 2, 12, 7, 55]]
GREEDY = SamplingParams(response_length=10)
LONG = SamplingParams(response_length=40, ignore_eos=True)
EOS = (2, 7)
#: The kit's checks, but those that want a worker that has just started, or look at what is left of one. Preflight makes those.
ONLY = [
    check.id
    for check in select_checks("worker")
    if check.id not in ("worker/W2-start", "worker/T3-left-behind", "worker/W4-killed")
]


@torch.no_grad()
def logprobs_of(model, prompt, tokens):
    logits = model(input_ids=torch.tensor([prompt + tokens], device=model.device)).logits[0].log_softmax(-1)
    return [float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(tokens)]


def tokens_of(completions):
    return [list(completion.token_ids) for completion in completions]


# Weights and tokens


def test_greedy_tokens_are_the_references(place):
    """W1, before and after a change of the weights, with the logprobs that the model gives."""
    seen = []
    for model in (place.model, place.other):
        report = place.worker.sync_weights(model, capacity=100_000)
        version = report.version
        assert report.carrier == ("cuda_ipc" if DEVICE == "cuda" else "memory")
        completions = place.worker.generate(PROMPTS, GREEDY)
        expected = [argmax_loop(model, prompt, 10, EOS) for prompt in PROMPTS]
        assert tokens_of(completions) == expected
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            assert completion.status == ("stop" if completion.token_ids[-1] in EOS else "length")
            assert set(completion.versions) == {version} == {completion.weight_version}
            assert completion.logprobs == pytest.approx(logprobs_of(model, prompt, list(completion.token_ids)), abs=1e-4)
        seen.append(expected)
    assert seen[0] != seen[1]


def test_every_tensor_is_read_back(place):
    """W2: fused layers by the names of their parts, tied ones under both of theirs."""
    place.worker.sync_weights(place.other, capacity=50_000)
    found = place.worker.tensor_digests()
    for name, expected in place.other.state_dict().items():
        assert name in found
        tensor = place.worker.read_tensor(name)
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
        assert torch.equal(tensor, expected.cpu()), name


def test_a_long_prompt_is_not_answered_from_what_old_weights_computed(place):
    """Prefixes longer than a block of a cache, before and after."""
    prompt = list(range(20, 120))
    assert tokens_of(place.worker.generate([prompt], GREEDY)) == [argmax_loop(place.model, prompt, 10, EOS)]
    place.worker.sync_weights(place.other)
    assert tokens_of(place.worker.generate([prompt], GREEDY)) == [argmax_loop(place.other, prompt, 10, EOS)]


def test_samples_are_grouped_and_repeatable(place):
    """W3. An engine that cannot repeat samples says so, and refuses a seed."""
    params = SamplingParams(response_length=8, n=3, temperature=1.0, seed=5)
    if "seeds" not in place.worker.capabilities:
        with pytest.raises(WorkerError, match="SamplingParams.seed is 5, and .*: pass seed=None"):
            place.worker.generate(PROMPTS, params)
        params = msgspec.structs.replace(params, seed=None)
    completions = place.worker.generate(PROMPTS, params)
    assert [(one.prompt_index, one.sample_index) for one in completions] == [(p, s) for p in range(len(PROMPTS)) for s in range(3)]
    again = place.worker.generate(PROMPTS, params)
    assert (tokens_of(completions) == tokens_of(again)) == ("seeds" in place.worker.capabilities)
    if "seeds" in place.worker.capabilities:
        for one, other in zip(completions, again, strict=True):
            # The same to the last bit on a CPU; on a GPU what a cache has of a prompt is computed with in another order.
            assert one.logprobs == (pytest.approx(other.logprobs, abs=1e-4) if DEVICE == "cuda" else other.logprobs)
    assert len({one.token_ids for one in completions if one.prompt_index == 2}) > 1
    batch = to_batch(PROMPTS, completions, response_length=8, pad_token_id=0, n=3)
    assert batch.responses.shape == (12, 8)
    assert batch.weight_versions.max() == place.worker.version


# Requests


def test_aborted_in_any_state(place):
    """Queued, decoding, ended, unknown, twice: each ends once, with a prefix of what it would have been, and others go on."""
    worker = place.worker
    full = [argmax_loop(place.model, prompt, 40) for prompt in PROMPTS]
    worker.pause()
    futures = worker.submit(PROMPTS, LONG, request_ids=["a", "b", "c", "d"])
    assert worker.abort(["a", "nobody"]) == ["a"]  # nothing was sampled yet
    assert futures[0].result().token_ids == ()
    worker.step(5)
    assert worker.abort(["b"]) == ["b"]
    assert worker.abort(["b", "a"]) == []
    worker.step(3)
    worker.resume()
    done = [future.result(60) for future in futures]
    assert [one.status for one in done] == ["aborted", "aborted", "length", "length"]
    assert [one.request_id for one in done] == ["a", "b", "c", "d"]
    for one, expected in zip(done, full, strict=True):
        assert list(one.token_ids) == expected[: len(one.token_ids)]
    assert 1 <= len(done[1].token_ids) <= 5
    assert worker.abort(["c"]) == []
    assert tokens_of(worker.generate(PROMPTS[:1], LONG)) == full[:1]


def test_all_are_aborted(place):
    worker = place.worker
    worker.pause()
    futures = worker.submit(PROMPTS, LONG) + worker.submit(PROMPTS[:1], SamplingParams(response_length=9, n=3, temperature=1.0))
    worker.step(2)
    worker.abort()
    assert {future.result(0).status for future in futures} == {"aborted"}
    worker.resume()
    assert worker.abort() == []


def test_a_resumed_request_ends_where_an_uninterrupted_one_does(place):
    worker, prompt = place.worker, PROMPTS[2]
    expected = argmax_loop(place.model, prompt, 40)
    worker.pause()
    (future,) = worker.submit([prompt], LONG, request_ids=["a"])
    worker.step(7)
    worker.abort(["a"])
    worker.resume()
    prefix = list(future.result().token_ids)
    assert 1 <= len(prefix) <= 7
    (rest,) = worker.generate([prompt + prefix], SamplingParams(response_length=40 - len(prefix), ignore_eos=True))
    assert prefix + list(rest.token_ids) == expected


def test_weights_change_under_a_request(place):
    """W5: each token is of the weights that its version says, and none of the old ones comes after the sync."""
    worker = place.worker
    worker.pause()
    futures = worker.submit(PROMPTS, LONG)
    worker.step(6)
    old = worker.version
    new = worker.sync_weights(place.other).version
    worker.resume()
    for prompt, future in zip(PROMPTS, futures, strict=True):
        done = future.result(60)
        assert done.status == "length"
        before = done.versions.count(old)
        assert done.versions == (old,) * before + (new,) * (40 - before)
        assert 0 < before <= 6
        tokens = list(done.token_ids)
        assert tokens[:before] == argmax_loop(place.model, prompt, before)
        assert tokens[before:] == argmax_loop(place.other, prompt + tokens[:before], 40 - before)


def test_a_paused_worker_samples_nothing(place):
    worker = place.worker
    worker.pause()
    worker.pause()
    futures = worker.submit(PROMPTS, LONG)
    assert not wait(futures, timeout=0.3).done
    worker.resume()
    worker.resume()
    assert tokens_of(future.result(60) for future in futures) == [argmax_loop(place.model, prompt, 40) for prompt in PROMPTS]


def test_random_schedules_of_aborts(place):
    """Each request ends once, with an exact prefix, whatever is submitted, stepped and aborted in which order."""
    worker, draw = place.worker, random.Random(4)
    full = {tuple(prompt): argmax_loop(place.model, prompt, 12) for prompt in PROMPTS}
    ended = 0
    for schedule in range(200):
        worker.pause()
        started = {}
        for move in range(draw.randint(2, 7)):
            kind = draw.choice(["submit", "step", "abort", "abort", "all"])
            if kind == "submit" or not started:
                prompt, name = draw.choice(PROMPTS), f"{schedule}-{move}"
                params = SamplingParams(response_length=draw.randint(1, 12), ignore_eos=True)
                started[name] = (prompt, params, worker.submit([prompt], params, request_ids=[name])[0])
            elif kind == "step":
                worker.step(draw.randint(1, 4))
            elif kind == "abort":
                name = draw.choice(list(started))
                was_done = started[name][2].done()
                assert worker.abort([name]) == ([] if was_done else [name])
                assert started[name][2].done()
            else:
                worker.abort()
        worker.resume()
        for prompt, params, future in started.values():
            done = future.result(60)
            ended += 1
            assert done.status in ("aborted", "length")
            assert (done.status == "length") == (len(done.token_ids) == params.response_length)
            assert list(done.token_ids) == full[tuple(prompt)][: len(done.token_ids)]
    assert ended >= 300
    assert not worker._rollouts.find(None)


def test_threads_share_a_worker(place):
    expected = [argmax_loop(place.model, prompt, 10, EOS) for prompt in PROMPTS]
    found = {}

    def use(number):
        found[number] = [tokens_of(place.worker.generate(PROMPTS, GREEDY)) for _ in range(3)]

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [expected] * 3 for number in range(4)}


# Refusals: words, and the worker goes on with what it has

BAD_REQUESTS = {
    "empty": ([[]], GREEDY, "prompt 0 is empty"),
    "vocabulary": ([[1], [512]], GREEDY, "prompt 1 position 0 is 512, not one of the model's 512 ids"),
    "length": ([[1] * 250], GREEDY, "prompt 0 has 250 tokens and with response_length 10 passes the model's 256 positions"),
    "stop id": ([[1]], SamplingParams(response_length=2, stop_token_ids=(512,)), "stop_token_ids 512 is outside"),
    "id twice": ([[1], [2]], GREEDY, "request id 'x' is given twice"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused_whole(place, case):
    prompts, params, message = BAD_REQUESTS[case]
    with pytest.raises(WorkerError, match=message):
        place.worker.generate(prompts, params, request_ids=["x"] * len(prompts) if case == "id twice" else None)
    assert tokens_of(place.worker.generate(PROMPTS[:2], GREEDY)) == [
        argmax_loop(place.model, prompt, 10, EOS) for prompt in PROMPTS[:2]
    ]


def test_requests_fill_all_positions_and_go_on_from_near_the_end(place):
    worker, prompt = place.worker, [5] * 100
    params = SamplingParams(response_length=156, ignore_eos=True)
    worker.pause()
    (future,) = worker.submit([prompt], params)
    worker.step(154)
    worker.resume()
    done = future.result(60)
    assert (done.status, len(done.token_ids)) == ("length", 156)
    expected = argmax_loop(place.model, prompt + list(done.token_ids[:150]), 6)
    assert list(done.token_ids[150:]) == expected
    with pytest.raises(WorkerError, match="passes the model's 256 positions"):
        worker.generate([[*prompt, 5]], params)


def test_an_id_that_is_under_way_is_refused(place):
    place.worker.pause()
    (future,) = place.worker.submit([[5]], LONG, request_ids=["a"])
    with pytest.raises(WorkerError, match="request 'a' is under way"):
        place.worker.submit([[6]], LONG, request_ids=["a"])
    place.worker.resume()
    assert future.result(60).status == "length"
    assert len(place.worker.generate([[6]], GREEDY, request_ids=["a"])) == 1


NORM = "model.norm.weight"
BAD_UPDATES = {
    "unknown name": (lambda w: {**w, "model.extra": torch.zeros(3)}, "'model.extra' .*has none of that name"),
    "missing": (lambda w: {n: t for n, t in w.items() if n != NORM}, f"'{NORM}' is not in the update"),
    "dtype": (lambda w: {**w, NORM: w[NORM].double()}, f"'{NORM}' is f64.128. in the update and f32.128. in the model"),
    "shape": (lambda w: {**w, NORM: w[NORM][:-1]}, f"'{NORM}' is f32.127. in the update and f32.128. in the model"),
}


@pytest.mark.parametrize("case", BAD_UPDATES)
def test_an_update_that_is_not_the_models_leaves_the_old_weights(place, case):
    make, message = BAD_UPDATES[case]
    before = place.worker.version, place.worker.weights_digest()
    with pytest.raises(PlanMismatchError, match=message):
        place.worker.sync_weights(make(dict(place.other.state_dict())))
    assert (place.worker.version, place.worker.weights_digest()) == before
    assert tokens_of(place.worker.generate(PROMPTS[:1], GREEDY)) == [argmax_loop(place.model, PROMPTS[0], 10, EOS)]


@pytest.mark.parametrize("at", [0, 3])
def test_a_damaged_update_is_never_sampled_from(place, at):
    def flip(bucket):
        if bucket.index == at:
            bucket.buffer[bucket.nbytes // 2] ^= 1
        return bucket

    before = place.worker.version
    with pytest.raises(IntegrityError, match=f"bucket {at} .*is damaged"):
        place.worker.sync_weights(place.other, capacity=100_000, inject=flip)
    assert place.worker.version == before
    if at:
        with pytest.raises(WorkerError, match="weights are unusable"):
            place.worker.generate(PROMPTS, GREEDY)
    else:
        assert tokens_of(place.worker.generate(PROMPTS[:1], GREEDY)) == [argmax_loop(place.model, PROMPTS[0], 10, EOS)]
    assert place.worker.sync_weights(place.other).version == before + 1
    assert tokens_of(place.worker.generate(PROMPTS[:1], GREEDY)) == [argmax_loop(place.other, PROMPTS[0], 10, EOS)]


def test_one_changed_value_is_seen(place):
    """The readback looks at every value, not at a sample of them."""
    other = copy.deepcopy(place.model)
    digests = place.worker.tensor_digests()
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight[63, 127] += 1e-3
    place.worker.sync_weights(other)
    after = place.worker.tensor_digests()
    assert {name for name in digests if digests[name] != after[name]} == {"model.layers.1.self_attn.k_proj.weight"}


# Memory


def test_w6_memory_is_released_and_taken_again(place):
    """What is under way waits, with what it has; nothing is sampled before weights have come; after that all is as it was."""
    worker = place.worker
    before = tokens_of(worker.generate(PROMPTS, GREEDY))
    full = [argmax_loop(place.model, prompt, 40) for prompt in PROMPTS]
    worker.pause()
    futures = worker.submit(PROMPTS, LONG)
    worker.step(6)
    freed = worker.release_memory()
    assert worker.release_memory() == 0
    worker.resume()  # there is nothing to go on with
    if DEVICE == "cuda":
        assert freed >= sum(tensor.nbytes for tensor in place.model.parameters())  # how much more: tests/gpu
    elif isinstance(worker, HFWorker):
        assert freed == sum(tensor.nbytes for tensor in place.model.parameters())
    else:
        assert freed == 0  # on a CPU vLLM and SGLang let go of nothing, and say so
    for call in (lambda: worker.generate(PROMPTS, GREEDY), worker.weights_digest, lambda: worker.sync_weights(place.model)):
        with pytest.raises(WorkerError, match="the worker's memory is released: call resume_memory"):
            call()
    worker.resume_memory()
    worker.resume_memory()
    with pytest.raises(WorkerError, match="their memory was released, and none have come since"):
        worker.generate(PROMPTS, GREEDY)
    assert not wait(futures, timeout=0.3).done
    worker.sync_weights(place.model)
    assert tokens_of(future.result(60) for future in futures) == full
    assert tokens_of(worker.generate(PROMPTS, GREEDY)) == before
    assert worker.release_memory() >= 0
    worker.resume_memory()


def test_w6_what_waits_for_weights_can_be_aborted(place):
    worker = place.worker
    worker.pause()
    futures = worker.submit(PROMPTS, LONG, request_ids=list("abcd"))
    worker.step(3)
    worker.release_memory()
    assert sorted(worker.abort(["a", "c"])) == ["a", "c"]
    worker.resume_memory()
    assert worker.abort(["b"]) == ["b"]
    worker.sync_weights(place.other)
    worker.resume()
    assert [future.result(60).status for future in futures] == ["aborted", "aborted", "aborted", "length"]


# Updates that fail under requests


def test_t5_requests_under_way_do_not_go_on_from_half_an_update(place):
    def flip(bucket):
        if bucket.index == 3:
            bucket.buffer[bucket.nbytes // 2] ^= 1
        return bucket

    worker = place.worker
    worker.pause()
    futures = worker.submit(PROMPTS, LONG)
    worker.step(5)
    old = worker.version
    with pytest.raises(IntegrityError, match="bucket 3"):
        worker.sync_weights(place.other, capacity=100_000, inject=flip)
    worker.resume()
    for prompt, future in zip(PROMPTS, futures, strict=True):
        done = future.result(60)
        assert done.status == "failed"
        assert "weights are unusable" in done.error
        assert done.versions == (old,) * len(done.token_ids)
        assert list(done.token_ids) == argmax_loop(place.model, prompt, len(done.token_ids))
    worker.sync_weights(place.other)
    assert tokens_of(worker.generate(PROMPTS[:1], GREEDY)) == [argmax_loop(place.other, PROMPTS[0], 10, EOS)]


def test_t5_an_update_that_is_refused_at_once_disturbs_no_request(place):
    worker = place.worker
    worker.pause()
    futures = worker.submit(PROMPTS, LONG)
    worker.step(4)
    worker.resume()
    with pytest.raises(PlanMismatchError):
        worker.sync_weights({**place.other.state_dict(), "model.extra": torch.zeros(3)})
    assert tokens_of(future.result(60) for future in futures) == [argmax_loop(place.model, prompt, 40) for prompt in PROMPTS]


def test_t5_weights_that_are_nan_are_delivered_and_reported(place):
    """The engine has what was sent; what it makes of it is an error, and no token."""
    worker, bad = place.worker, copy.deepcopy(place.model)
    with torch.no_grad():
        bad.model.norm.weight[5] = float("nan")
    if worker.reads_values:  # see docs/workers.md: packed weights are read through a product
        with suppress(WorkerError):
            worker.sync_weights(bad)
    else:
        worker.sync_weights(bad)
        assert worker.tensor_digests()[NORM] != worker.tensor_digests()["model.layers.0.input_layernorm.weight"]
    with pytest.raises(WorkerError, match="NaN"):
        worker.generate(PROMPTS, GREEDY)
    worker.sync_weights(place.model)
    assert tokens_of(worker.generate(PROMPTS[:1], GREEDY)) == [argmax_loop(place.model, PROMPTS[0], 10, EOS)]


# Groups


def test_w4_a_group_outlives_interruptions_and_updates(place):
    worker = place.worker
    group = RolloutGroup(worker, PROMPTS, LONG)
    worker.pause()
    parts = []
    for model, steps in ((place.model, 7), (place.other, 9)):
        worker.sync_weights(model)
        group.start()
        worker.step(steps)
        assert group.interrupt() == len(PROMPTS)
        parts.append((model, steps, worker.version))
    worker.sync_weights(place.model)
    worker.resume()
    group.start()
    for prompt, done in zip(PROMPTS, group.result(60), strict=True):
        tokens, versions = list(prompt), []
        for model, steps, version in (*parts, (place.model, 24, worker.version)):
            tokens += argmax_loop(model, tokens, steps)
            versions += [version] * steps
        assert (list(done.token_ids), list(done.versions), done.status) == (tokens[len(prompt) :], versions, "length")


# The kit


def test_the_kit_finds_nothing(place):
    """Preflight's checks and programs over requests, weights and memory, smallest counterexample first."""

    class Here:
        """The worker that runs; the kit closes what it makes."""

        def __init__(self, folder):
            self._worker = place.worker
            self.capabilities = place.worker.capabilities

        def __getattr__(self, name):
            return getattr(place.worker, name)

        def close(self):
            place.worker.resume()
            place.worker.abort()

    # What ends or replaces the engine's processes is tried on engines of its own, by preflight and tests/engines/hf.
    report = check_worker(Here, model=place.folder, only=ONLY, max_examples=6, timeout=60)
    assert report.ok, str(report)
