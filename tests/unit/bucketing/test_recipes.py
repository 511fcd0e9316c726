"""How tensors are made of buckets: once for a plan, and of what is in it."""

from __future__ import annotations

import copy
import pickle

import torch

from rollout_core.bucketing import Unpacker, pack, plan_buckets, specs_of
from rollout_core.bucketing.recipes import Recipe
from support.tensors import patterned


def some_pairs():
    mixed = [(f"w{i}", patterned(dtype, 3, 5)) for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.uint8] * 4)]
    return [*mixed, ("empty", torch.zeros(0, 3)), ("scalar", torch.tensor(2.0)), ("split", patterned(torch.int16, 300))]


def test_of_whole_tensors_by_runs_of_one_dtype():
    pairs = [("a", torch.zeros(2, 3)), ("b", torch.ones(4)), ("c", torch.zeros(0, 3, dtype=torch.int8)), ("d", torch.zeros(1))]
    (recipe,) = plan_buckets(specs_of(pairs), 1 << 10).recipes
    first, second, third = recipe.wholes
    assert first == (torch.float32, (("a", (2, 3), (3, 1), 0), ("b", (4,), (1,), 6)))
    assert second[1][0][:3] == ("c", (0, 3), (3, 1))
    assert third == (torch.float32, (("d", (1,), (1,), 10),))
    assert [name for _, name, _, _ in recipe.steps] == ["a", "b", "c", "d"]


def test_none_for_what_is_split_or_has_two_names():
    pairs = [("a", one := torch.zeros(8)), ("b", one), ("c", torch.zeros(8)), ("d", torch.zeros(60))]
    recipes = plan_buckets(specs_of(pairs), 64, groups=[]).recipes
    assert [recipe.wholes is None for recipe in recipes] == [True] * len(recipes)
    assert [[strides for *_, strides in recipe.steps] for recipe in recipes] == [[(1,), (1,)], *[[None]] * 4]


def test_names_that_have_others_are_not_listed_for_every_bucket():
    """A manifest of 240 kB may have tens of thousands of both."""

    class Names:
        def __contains__(self, name):
            return name == "b"

    (layout,) = plan_buckets(specs_of([("a", torch.zeros(1)), ("b", torch.zeros(1))]), 64).buckets
    assert Recipe.of(layout.slots, Names()).wholes is None
    assert Recipe.of(layout.slots[:1], Names()).wholes is not None


def test_it_is_kept_with_the_plan_and_does_not_travel():
    pairs = some_pairs()
    plan = plan_buckets(specs_of(pairs), 256)
    fresh = pickle.dumps(plan)
    buckets = list(pack(plan, pairs))
    unpacker = Unpacker(plan)
    unpacked = [pair for bucket in buckets for pair in unpacker.feed(bucket)]
    assert plan.recipes is plan.recipes
    assert len(pickle.dumps(plan)) == len(fresh)
    for other in (pickle.loads(fresh), copy.deepcopy(plan)):
        assert other == plan
        assert hash(other) == hash(plan)
        assert other.digest == plan.digest
        again = Unpacker(other)
        assert [name for bucket in buckets for name, _ in again.feed(bucket)] == [name for name, _ in unpacked]
