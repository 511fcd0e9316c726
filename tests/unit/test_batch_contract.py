"""The batch contract (W3) against an oracle of plain Python lists, and the refusals of the shared worker values."""

import json
import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_core.errors import WorkerError
from rollout_core.workers.contract import STATUSES, Completion, RolloutBatch, SamplingParams, to_batch

FIELDS = ("prompts", "responses", "input_ids", "attention_mask", "position_ids", "response_mask", "logprobs")


def completion(prompt_index: int, sample_index: int, /, *token_ids: int, **changes: Any) -> Completion:
    values = {
        "token_ids": token_ids,
        "logprobs": tuple(-0.5 - place for place in range(len(token_ids))),
        "status": "stop",
        "weight_version": 0,
        "prompt_index": prompt_index,
        "sample_index": sample_index,
    }
    return Completion(**{**values, **changes})


def oracle(
    prompts: list[list[int]], samples: list[list[tuple[tuple[int, ...], tuple[float, ...]]]], length: int, pad: int
) -> dict[str, list[list[Any]]]:
    """The seven tables written out cell by cell; samples[i][j] is the (tokens, logprobs) of prompt i's sample j."""
    wide = 0
    for prompt in prompts:
        if len(prompt) > wide:
            wide = len(prompt)
    table: dict[str, list[list[Any]]] = {field: [] for field in FIELDS}
    for prompt, of_prompt in zip(prompts, samples, strict=True):
        for tokens, scores in of_prompt:
            left, right = wide - len(prompt), length - len(tokens)
            ids = [pad] * left + prompt + list(tokens) + [pad] * right
            mask = [0] * left + [1] * len(prompt) + [1] * len(tokens) + [0] * right
            positions = [0] * left
            for place in range(len(prompt) + length):
                positions.append(place)
            table["prompts"].append(ids[:wide])
            table["responses"].append(ids[wide:])
            table["input_ids"].append(ids)
            table["attention_mask"].append(mask)
            table["position_ids"].append(positions)
            table["response_mask"].append(mask[wide:])
            table["logprobs"].append(list(scores) + [0.0] * right)
    return table


def as_lists(batch: RolloutBatch) -> dict[str, list[list[Any]]]:
    return {field: getattr(batch, field).tolist() for field in FIELDS}


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[list[int]], list[list[tuple[tuple[int, ...], tuple[float, ...]]]], int, int]:
    # Five ids only, so that pad and EOS ids turn up everywhere: inside prompts, at their ends, inside responses.
    token = st.integers(0, 4)
    length, n = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=4))
    score = st.floats(-50, 0, width=32)
    samples = []
    for _ in prompts:
        lengths = draw(st.lists(st.integers(0, length), min_size=n, max_size=n))
        samples.append([(tuple(draw(st.tuples(*[token] * size))), tuple(draw(st.tuples(*[score] * size)))) for size in lengths])
    return prompts, samples, length, draw(token)


@settings(deadline=None, max_examples=200)
@given(call=calls(), random=st.randoms(use_true_random=False))
def test_batch_is_the_oracles_whatever_the_order(call, random):
    prompts, samples, length, pad = call
    given_rows = [
        completion(index, place, *tokens, logprobs=scores)
        for index, of_prompt in enumerate(samples)
        for place, (tokens, scores) in enumerate(of_prompt)
    ]
    random.shuffle(given_rows)
    batch = to_batch(prompts, given_rows, response_length=length, pad_token_id=pad)
    assert as_lists(batch) == oracle(prompts, samples, length, pad)
    assert batch.logprobs is not None
    assert batch.logprobs.dtype == torch.float32
    assert {getattr(batch, field).dtype for field in FIELDS if field != "logprobs"} == {torch.int64}


def test_the_contract_written_out():
    """Two prompts of two samples, pad 0 equal to EOS 0, and an EOS inside a prompt and at a response's end."""
    rows = [completion(1, 1), completion(0, 1, 8, 0), completion(1, 0, 5, 6, 7), completion(0, 0, 0)]
    batch = to_batch([[3, 0, 4], [9]], rows, response_length=3, pad_token_id=0)
    assert as_lists(batch) == {
        "prompts": [[3, 0, 4], [3, 0, 4], [0, 0, 9], [0, 0, 9]],
        "responses": [[0, 0, 0], [8, 0, 0], [5, 6, 7], [0, 0, 0]],
        "input_ids": [[3, 0, 4, 0, 0, 0], [3, 0, 4, 8, 0, 0], [0, 0, 9, 5, 6, 7], [0, 0, 9, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3], [0, 0, 0, 1, 2, 3]],
        "response_mask": [[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]],
        "logprobs": [[-0.5, 0.0, 0.0], [-0.5, -1.5, 0.0], [-0.5, -1.5, -2.5], [0.0, 0.0, 0.0]],
    }


def test_each_token_keeps_its_weight_version():
    """One completion over two updates, one of a single version, and one without a token."""
    rows = [completion(0, 0, 5, 6, 7, token_versions=(1, 1, 3), weight_version=3), completion(1, 0, 8, weight_version=2)]
    batch = to_batch([[1], [2], [3]], [*rows, completion(2, 0)], response_length=4, pad_token_id=0)
    assert batch.weight_versions.tolist() == [[1, 1, 3, -1], [2, -1, -1, -1], [-1, -1, -1, -1]]
    assert batch.weight_versions.dtype == torch.int64


def test_no_prompts_give_an_empty_batch():
    batch = to_batch([], [], response_length=2, pad_token_id=0)
    assert batch.prompts.shape == (0, 0)
    assert batch.position_ids.shape == batch.attention_mask.shape == batch.input_ids.shape == (0, 2)
    assert batch.responses.shape == batch.response_mask.shape == (0, 2)


def test_logprobs_are_none_only_if_no_completion_with_tokens_has_any():
    none = [completion(0, 0, 5, logprobs=None), completion(0, 1, logprobs=())]
    assert to_batch([[1]], none, response_length=1, pad_token_id=0).logprobs is None
    some = [completion(0, 0, 5), completion(0, 1, logprobs=None, status="aborted")]
    logprobs = to_batch([[1]], some, response_length=1, pad_token_id=0).logprobs
    assert logprobs is not None
    assert logprobs.tolist() == [[-0.5], [0.0]]
    mixed = [completion(0, 0, 5), completion(0, 1, 6, logprobs=None)]
    with pytest.raises(WorkerError, match="prompt 0 sample 1 has no logprobs but others have"):
        to_batch([[1]], mixed, response_length=1, pad_token_id=0)


@pytest.mark.parametrize(
    ("rows", "n", "message"),
    [
        ([], None, "prompt 0 sample 0 has no completion"),
        ([(0, 0)], None, "prompt 1 sample 0 has no completion"),
        ([(0, 0), (0, 1), (1, 1)], None, "prompt 1 sample 0 has no completion"),
        ([(0, 0), (1, 0)], 2, "prompt 0 sample 1 has no completion"),
        ([(0, 0), (1, 0), (0, 0)], None, "prompt 0 sample 0 has two completions"),
        ([(0, 0), (1, 0), (2, 0)], None, "prompt 2 sample 0 is not among 2 prompts of 1"),
        ([(0, 0), (1, 0), (1, 1)], 1, "prompt 1 sample 1 is not among 2 prompts of 1"),
        ([(0, 0), (1, 10**15)], None, "prompt 0 sample 1 has no completion"),
    ],
    ids=["none", "prompt", "sample", "n says more", "repeated", "prompt unknown", "n says fewer", "far sample index"],
)
def test_missing_repeated_and_foreign_completions_are_named(rows, n, message):
    with pytest.raises(WorkerError, match=message):
        to_batch([[1], [2]], [completion(*row, 5) for row in rows], response_length=1, pad_token_id=0, n=n)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [2, -1]], {}, r"prompt 1\[1\] is -1, no token id"),
        ([[1], [True]], {}, r"prompt 1\[0\] is True, no token id"),
        ([[1], [2**63]], {}, r"prompt 1\[0\] is 9223372036854775808, no token id"),
        ([[1], [2]], {"response_length": 1}, "prompt 1 sample 0 has 2 tokens: pass a response_length of that, not 1"),
        ([[1], [2]], {"response_length": 0}, "response_length is 0"),
        ([[1], [2]], {"pad_token_id": -1}, "pad_token_id is -1"),
        ([[1], [2]], {"pad_token_id": None}, "pad_token_id is None"),
        ([[1], [2]], {"n": 0}, "n is 0"),
    ],
    ids=["empty", "negative", "bool", "too large", "too long", "length", "pad", "no pad", "n"],
)
def test_bad_input_is_named(prompts, changes, message):
    rows = [completion(0, 0, 5), completion(1, 0, 5, 6)]
    with pytest.raises(WorkerError, match=f"^{message}"):
        to_batch(prompts, rows, **{"response_length": 2, "pad_token_id": 0, **changes})


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        *(("response_length", bad) for bad in (0, -1, True, 1.0, None, math.nan, 2**63)),
        *(("n", bad) for bad in (0, -1, True, 1.5)),
        *(("temperature", bad) for bad in (-0.1, math.nan, math.inf, True, None, "1", 1e-9, 1e39, 10**400)),
        *(("top_p", bad) for bad in (0.0, -0.5, 1.5, math.nan, True, None)),
        *(("top_k", bad) for bad in (-1, True, 2.0)),
        *(("seed", bad) for bad in (-1, True, 1.0)),
        *(("stop_token_ids", bad) for bad in ([1], 1, (True,), (-1,), (1.0,))),
        *(("ignore_eos", bad) for bad in (1, None)),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:24],
)
def test_sampling_params_refuse(field, bad):
    with pytest.raises(WorkerError, match=rf"^SamplingParams\.{field}\b"):
        SamplingParams(**{"response_length": 4, field: bad})


def test_sampling_params_default_to_greedy_and_travel_as_json():
    params = SamplingParams(response_length=4)
    assert (params.n, params.temperature, params.top_p, params.top_k, params.seed) == (1, 0.0, 1.0, 0, None)
    assert (params.stop_token_ids, params.ignore_eos) == ((), False)
    assert SamplingParams(response_length=4, n=3, temperature=1).temperature == 1
    sent = msgspec.json.encode(SamplingParams(response_length=4, temperature=0.7, stop_token_ids=(1, 2), seed=3))
    assert msgspec.json.decode(sent, type=SamplingParams).stop_token_ids == (1, 2)
    with pytest.raises(msgspec.ValidationError, match="temprature"):
        msgspec.json.decode(json.dumps({"response_length": 4, "temprature": 1.0}), type=SamplingParams)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": (1, -2)}, r"prompt 3 sample 2: token_ids\[1\] is -2"),
        ({"token_ids": [1, 2]}, "prompt 3 sample 2: token_ids is a list"),
        ({"logprobs": (-1.0,)}, "prompt 3 sample 2: logprobs must be a tuple of one float for each of 2 tokens"),
        ({"logprobs": [-1.0, -1.0]}, "prompt 3 sample 2: logprobs must be a tuple"),
        ({"logprobs": (-1.0, math.nan)}, r"prompt 3 sample 2: logprobs\[1\] is nan"),
        ({"logprobs": (-math.inf, -1.0)}, r"prompt 3 sample 2: logprobs\[0\] is -inf"),
        ({"logprobs": (-1.0, -1e39)}, r"prompt 3 sample 2: logprobs\[1\] is -1e\+39"),
        ({"logprobs": (-1.0, None)}, r"prompt 3 sample 2: logprobs\[1\] is None"),
        ({"status": "eos"}, "prompt 3 sample 2: status is 'eos': use one of stop, length, aborted, failed"),
        ({"weight_version": -1}, "prompt 3 sample 2: weight_version is -1"),
        ({"token_versions": (1,)}, "prompt 3 sample 2: token_versions must be a tuple of one version for each of 2 tokens"),
        ({"token_versions": [0, 0]}, "prompt 3 sample 2: token_versions must be a tuple"),
        ({"token_versions": (2, 1), "weight_version": 1}, "prompt 3 sample 2: token_versions .* that never fall"),
        ({"token_versions": (-1, 1), "weight_version": 1}, "prompt 3 sample 2: token_versions .* whole numbers"),
        ({"token_versions": (1, 2), "weight_version": 3}, "prompt 3 sample 2: weight_version is 3, and the last token's is 2"),
        ({"prompt_index": -1}, "prompt_index is -1"),
        ({"sample_index": False}, "sample_index is False"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value),
)
def test_completions_refuse(changes, message):
    with pytest.raises(WorkerError, match=message):
        completion(3, 2, 7, 8, **changes)


def test_every_status_makes_a_completion_and_values_are_frozen():
    assert STATUSES == ("stop", "length", "aborted", "failed")
    made = [completion(0, 0, 5, status=status) for status in STATUSES]
    with pytest.raises(AttributeError):
        made[0].status = "length"
    with pytest.raises(AttributeError):
        to_batch([[1]], [made[0]], response_length=1, pad_token_id=0).prompts = torch.zeros(1)
