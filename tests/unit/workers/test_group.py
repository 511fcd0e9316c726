"""Requests that outlive interruptions (W4, W5): the parts of each are one response, within one budget."""

from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_core.errors import WorkerError
from rollout_core.testing.fake_engine import FakeModels, FakeWorker
from rollout_core.workers import Completion, RolloutGroup, SamplingParams

PROMPTS = [[5], [17, 3, 60], [9, 2, 2, 12]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group") / "model"
    FakeModels.make_small_model(folder)
    with FakeWorker(folder) as worker:
        yield worker, FakeModels.load_trainer(folder)


def reference(model, prompt, length, ends=frozenset()):
    return FakeModels.greedy_reference(model, prompt, length, set(ends))[0]


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.integers(1, 7), max_size=5), length=st.integers(1, 20), ignore_eos=st.booleans())
def test_w4_interrupted_anywhere_it_ends_where_it_would_have(made, steps, length, ignore_eos):
    worker, model = made
    worker.sync_weights(model)
    group = RolloutGroup(worker, PROMPTS, SamplingParams(response_length=length, n=2, ignore_eos=ignore_eos))
    worker.pause()
    for count in steps:
        group.start()
        worker.step(count)
        waiting = group.interrupt()
        assert waiting == group.unfinished
        assert worker.abort() == []
    worker.resume()
    group.start()
    done = group.result(10)
    ends = frozenset() if ignore_eos else FakeModels.eos_token_ids(model)
    assert [(one.prompt_index, one.sample_index) for one in done] == [(p, s) for p in range(len(PROMPTS)) for s in range(2)]
    for one in done:
        expected = reference(model, PROMPTS[one.prompt_index], length, ends)
        assert list(one.token_ids) == expected
        assert one.status == ("stop" if expected[-1] in ends else "length")
        assert len(one.logprobs) == len(one.token_ids)


def test_w5_each_part_is_of_the_weights_that_it_was_sampled_with(made):
    worker, model = made
    before = worker.sync_weights(model).version
    group = RolloutGroup(worker, PROMPTS, SamplingParams(response_length=12, ignore_eos=True))
    worker.pause()
    group.start()
    worker.step(5)
    group.interrupt()
    first = group.partial()
    assert [len(one.token_ids) for one in first] == [5, 5, 5]
    old = {tuple(prompt): reference(model, prompt, 5) for prompt in PROMPTS}
    FakeModels.perturb(model, 1.0, seed=3)
    after = worker.sync_weights(model).version
    worker.resume()
    group.start()
    for one in group.result(10):
        prompt = PROMPTS[one.prompt_index]
        assert one.versions == (before,) * 5 + (after,) * 7
        assert list(one.token_ids[:5]) == old[tuple(prompt)]
        assert list(one.token_ids[5:]) == reference(model, prompt + old[tuple(prompt)], 7)


def test_some_rows_are_enough(made):
    worker, _ = made
    group = RolloutGroup(worker, PROMPTS, SamplingParams(response_length=200, ignore_eos=True))
    assert not group.wait(1)
    worker.pause()
    group.start()
    assert group.start() == 0  # nothing waits
    assert not group.wait(1, timeout=0.05)
    with pytest.raises(WorkerError, match="3 of 3 rows have not ended$"):
        group.result(0.05)
    worker.resume()
    assert group.wait(1, timeout=10)
    group.interrupt()
    if group.unfinished:
        with pytest.raises(WorkerError, match="were interrupted: call start"):
            group.result(1)
    group.start()
    assert len(group.result(10)) == 3


def test_an_abort_by_somebody_else_is_an_end(made):
    worker, _ = made
    worker.pause()
    group = RolloutGroup(worker, PROMPTS[:1], SamplingParams(response_length=50, ignore_eos=True))
    group.start()
    worker.step(3)
    worker.abort()
    worker.resume()
    (one,) = group.result(10)
    assert (one.status, len(one.token_ids)) == ("aborted", 3)
    assert group.start() == 0


def test_sampled_parts_do_not_repeat_their_chances(made):
    """Two samples of a prompt, and two parts of a sample, are drawn apart under one seed."""
    asked = []

    class Notes:
        def submit(self, prompts, params, *, request_ids):
            asked.append(params)
            return [Future() for _ in prompts]

        def abort(self, request_ids=None):
            for one in group._rows:
                tokens = (1,) * 2
                one.future.set_result(
                    Completion(token_ids=tokens, logprobs=None, status="aborted", weight_version=0, prompt_index=0, sample_index=0)
                )
            return list(request_ids)

    group = RolloutGroup(Notes(), [[1]], SamplingParams(response_length=9, n=3, temperature=1.0, seed=4))
    group.start()
    group.interrupt()
    group.start()
    assert [params.response_length for params in asked] == [9, 9, 9, 7, 7, 7]
    assert len({params.seed for params in asked}) == 6
    assert all(params.n == 1 and 0 <= params.seed < 2**31 for params in asked)


@pytest.mark.parametrize("status", ["length", "aborted"])
def test_w4_a_worker_that_passes_the_budget_is_found(status):
    class Generous:
        def submit(self, prompts, params, *, request_ids):
            future = Future()
            tokens = (3,) * (params.response_length + 1)
            assert len(prompts) == 1
            future.set_result(
                Completion(token_ids=tokens, logprobs=None, status=status, weight_version=0, prompt_index=0, sample_index=0)
            )
            return [future]

        def abort(self, request_ids=None):
            return []

    group = RolloutGroup(Generous(), [[1]], SamplingParams(response_length=4))
    group.start()
    with pytest.raises(WorkerError, match="prompt 0 sample 0 has 1 tokens more than its response_length"):
        group.result(1)


def test_a_request_that_does_not_end_when_aborted_is_reported():
    class Deaf:
        def submit(self, prompts, params, *, request_ids):
            return [Future() for _ in prompts]

        def abort(self, request_ids=None):
            return list(request_ids)

    group = RolloutGroup(Deaf(), [[1], [2]], SamplingParams(response_length=4))
    group.start()
    with pytest.raises(WorkerError, match="2 of 2 requests had not ended 0.05 s after they were aborted"):
        group.interrupt(timeout=0.05)


def test_params_are_looked_at():
    with pytest.raises(WorkerError, match="params is a dict"):
        RolloutGroup(None, [[1]], {"response_length": 3})
