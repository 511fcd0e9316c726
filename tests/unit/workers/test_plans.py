"""A worker's plan is kept while it is that of its source, and made anew when that, or an option, changes."""

import pytest
import torch

from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.errors import CapacityError, SourceError
from rollout_core.workers.plans import Plans


def source():
    tied = torch.ones(5)
    return {"a": torch.zeros(3, 2), "tied": tied, "also tied": tied}


def test_it_is_kept_over_other_values_and_other_memory():
    plans, weights = Plans(), source()
    packer = plans.packer_for(weights, 100)
    assert packer.plan == plan_buckets(specs_of(weights), 100)
    weights["a"] += 1
    assert plans.packer_for(weights, 100) is packer
    assert plans.packer_for(source(), 100) is packer
    assert plans.packer_for(list(source().items()), 100) is packer


@pytest.mark.parametrize("wrapped", [lambda s: s.items(), iter], ids=["items", "iterator"])
def test_it_is_kept_for_sources_that_are_looked_at_one_by_one(wrapped):
    plans = Plans()
    packer = plans.packer_for(source(), 100)
    assert plans.packer_for(wrapped(source().items() if wrapped is iter else source()), 100) is packer


CHANGES = {
    "shape": lambda s: {**s, "a": torch.zeros(2, 3)},
    "dtype": lambda s: {**s, "a": torch.zeros(3, 2).to(torch.int32)},
    "name": lambda s: {("b" if name == "a" else name): tensor for name, tensor in s.items()},
    "tie": lambda s: {**s, "also tied": torch.ones(5)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_source_has_another_plan(change):
    plans = Plans()
    packer = plans.packer_for(source(), 100)
    other = CHANGES[change](source())
    changed = plans.packer_for(other, 100)
    assert changed.plan == plan_buckets(specs_of(other), 100)
    assert changed.plan != packer.plan


@pytest.mark.parametrize("options", [{"capacity": 50}, {"oversize": "own"}, {"order": "packed"}])
def test_other_options_make_another_plan(options):
    plans, weights = Plans(), source()
    plans.packer_for(weights, 100)
    given = {"capacity": 100, **options}
    assert plans.packer_for(weights, **given).plan == plan_buckets(specs_of(weights), **given)


def test_what_cannot_be_planned_is_refused_each_time():
    plans = Plans()
    packer = plans.packer_for(source(), 100)
    for _ in range(2):
        with pytest.raises(CapacityError):
            plans.packer_for(source(), 0)
        with pytest.raises(SourceError):
            plans.packer_for({**source(), "a": 3}, 100)
    assert plans.packer_for(source(), 100) is packer


def test_it_is_let_go_of():
    plans = Plans()
    packer = plans.packer_for(source(), 100)
    plans.clear()
    assert plans.packer_for(source(), 100) is not packer
