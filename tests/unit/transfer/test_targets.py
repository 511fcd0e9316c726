"""Clause T5: what an update leaves of the weights that it is loaded into."""

from __future__ import annotations

import pytest
import torch

from rollout_core.bucketing import TensorSpec, plan_buckets, specs_of
from rollout_core.errors import PlanMismatchError, TransferError
from rollout_core.testing.oracles import bytes_of
from rollout_core.transfer import CollectedWeights, DirectWeights, StagedWeights, Target
from support.tensors import patterned


def model() -> dict[str, torch.Tensor]:
    return {"a": patterned(torch.float32, 6, seed=1), "b": patterned(torch.bfloat16, 4, seed=2)}


def new() -> dict[str, torch.Tensor]:
    return {"a": patterned(torch.float32, 6, seed=11), "b": patterned(torch.bfloat16, 4, seed=12)}


def picture(tensors) -> dict[str, bytes]:
    return {name: bytes_of(tensor) for name, tensor in tensors.items()}


def load_all(target, weights, version=1):
    target.begin(plan_buckets(specs_of(weights), 1 << 20), version)
    target.load(list(weights.items()))
    target.prepare()


@pytest.mark.parametrize("kind", [DirectWeights, StagedWeights])
def test_an_update_changes_bytes_and_version_at_its_end(kind):
    weights = model()
    target = kind(weights, version=4)
    assert isinstance(target, Target)
    load_all(target, new(), 7)
    assert target.version == 4
    target.commit(7)
    assert (target.version, target.unusable) == (7, None)
    assert picture(weights) == picture(new())


def test_a_direct_update_that_fails_says_that_the_weights_are_unusable_until_one_completes():
    weights = model()
    target = DirectWeights(weights)
    target.begin(None, 1)
    target.load([("a", new()["a"])])
    target.abort(1)
    assert target.version == 0
    with pytest.raises(TransferError, match="unusable: the update to version 1 was not completed; send them again"):
        target.check_usable()
    load_all(target, new(), 2)
    with pytest.raises(TransferError, match="version 1"):
        target.check_usable()
    target.commit(2)
    target.check_usable()


def test_a_direct_update_that_fails_before_its_first_tensor_changes_nothing():
    weights = model()
    target = DirectWeights(weights)
    target.begin(plan_buckets(specs_of(new()), 8), 1)
    target.abort(1)
    target.check_usable()
    assert picture(weights) == picture(model())


def test_a_staged_update_that_fails_leaves_the_old_weights():
    weights = model()
    target = StagedWeights(weights)
    load_all(target, new())
    target.abort(1)
    target.check_usable()
    assert picture(weights) == picture(model())


def test_a_staged_update_keeps_no_view_of_what_it_was_given():
    weights, given = model(), new()
    target = StagedWeights(weights)
    load_all(target, given)
    given["a"].zero_()
    target.commit(1)
    assert picture(weights) == picture(new())


@pytest.mark.parametrize("kind", [DirectWeights, StagedWeights])
def test_an_interrupt_right_after_the_commit_is_taken_back(kind):
    target = kind(model(), version=3)
    load_all(target, new(), 5)
    target.commit(5)
    target.abort(5)
    assert target.version == 3
    with pytest.raises(TransferError, match="version 5 was not completed"):
        target.check_usable()


@pytest.mark.parametrize("kind", [DirectWeights, StagedWeights])
def test_a_split_tensor_is_joined_in_its_place(kind):
    weights = model()
    target = kind(weights)
    target.begin(plan_buckets(specs_of(new()), 8), 1)
    spec = TensorSpec("a", torch.float32, (6,))
    joined = target.memory_for(spec)
    assert (joined.data_ptr() == weights["a"].data_ptr()) == (kind is DirectWeights)
    assert (target.unusable is not None) == (kind is DirectWeights)  # from here on its bytes may change
    joined.copy_(torch.frombuffer(bytearray(bytes_of(new()["a"])), dtype=torch.uint8))
    whole = joined.view(torch.float32)
    target.load([("a", whole)])
    target.load([("b", new()["b"])])
    target.prepare()
    target.commit(1)
    assert picture(weights) == picture(new())


def test_a_strided_parameter_is_no_place_to_join_in():
    weights = {"a": torch.zeros(3, 2).t()}
    target = DirectWeights(weights)
    target.begin(None, 1)
    assert target.memory_for(TensorSpec("a", torch.float32, (2, 3))) is None
    target.load([("a", torch.arange(6.0).view(2, 3))])
    assert torch.equal(weights["a"], torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize("kind", [DirectWeights, StagedWeights])
@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ({"c": torch.zeros(1)}, "the update has a tensor 'c' .f32.1.., and the model has none of that name"),
        ({"a": torch.zeros(7)}, r"tensor 'a' is f32\[7\] in the update and f32\[6\] in the model"),
        ({"a": torch.zeros(6)}, "the model's tensor 'b' is not in the update"),
    ],
)
def test_other_tensors_are_refused_with_a_plan_before_anything_and_in_a_stream_when_they_come(kind, sent, words):
    weights = model()
    target = kind(weights)
    with pytest.raises(PlanMismatchError, match=words):
        target.begin(plan_buckets(specs_of(sent), 1 << 20), 1)
    target.begin(None, 1)
    with pytest.raises(PlanMismatchError, match=words):
        target.load(list(sent.items()))
        target.prepare()
    if kind is StagedWeights or "a" not in sent or sent["a"].numel() == 7:
        assert picture(weights) == picture(model())


def test_tied_tensors_stay_one_in_collected_weights():
    tied = new()["a"]
    target = CollectedWeights(version=2)
    target.begin(None, 3)
    target.load([("a", tied), ("head", tied)])
    target.prepare()
    assert target.weights == {}
    target.commit(3)
    assert target.version == 3
    assert target.weights["a"] is target.weights["head"]
    assert target.weights["a"].data_ptr() != tied.data_ptr()


def test_collected_weights_of_an_update_that_failed_are_those_of_the_one_before():
    target = CollectedWeights()
    for version in (1, 2):
        target.begin(None, version)
        target.load([("a", torch.full((2,), float(version)))])
        if version == 1:
            target.commit(1)
        else:
            target.abort(2)
    assert target.version == 1
    assert target.weights["a"].tolist() == [1.0, 1.0]
