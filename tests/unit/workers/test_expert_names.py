"""A trainer's stacked experts by the names of a checkpoint."""

import weakref
from types import MappingProxyType

import pytest
import torch

from rollout_core.bucketing import TensorSpec, specs_of
from rollout_core.errors import DuplicateNameError
from rollout_core.transfer.sharded import Deferred
from rollout_core.workers.expert_names import in_checkpoint_names

PLACE = "model.layers.0.mlp.experts"


def wanted(experts=2, width=3, hidden=4):
    sizes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    named = {f"{PLACE}.{number}.{name}.weight": shape for number in range(experts) for name, shape in sizes.items()}
    return {name: TensorSpec(name, torch.float32, shape) for name, shape in {"norm": (4,), **named}.items()}


def stacked():
    return {
        "norm": torch.ones(4),
        f"{PLACE}.gate_up_proj": torch.arange(48.0).view(2, 6, 4),
        f"{PLACE}.down_proj": torch.arange(24.0).view(2, 4, 3),
    }


@pytest.mark.parametrize("kind", [dict, lambda source: list(source.items())])
def test_each_expert_is_a_view_by_its_own_name(kind):
    source = stacked()
    found = dict(in_checkpoint_names(kind(source), wanted()))
    assert {spec.name: spec for spec in specs_of(found)} == wanted()
    assert found["norm"] is source["norm"]
    for number in range(2):
        both = source[f"{PLACE}.gate_up_proj"][number]
        assert torch.equal(found[f"{PLACE}.{number}.gate_proj.weight"], both[:3])
        assert torch.equal(found[f"{PLACE}.{number}.up_proj.weight"], both[3:])
        down = found[f"{PLACE}.{number}.down_proj.weight"]
        assert torch.equal(down, source[f"{PLACE}.down_proj"][number])
        assert down.data_ptr() == source[f"{PLACE}.down_proj"][number].data_ptr()


def test_what_needs_no_other_names_is_left_as_it_is():
    source = {"norm": torch.ones(4)}
    assert in_checkpoint_names(source, wanted()) is source
    assert in_checkpoint_names("a/folder", wanted()) == "a/folder"
    lazy = MappingProxyType(stacked())
    assert in_checkpoint_names(lazy, wanted()) is lazy, "it may make tensors when they are asked for"
    source = stacked()
    assert in_checkpoint_names(source, ()) is source, "an engine that says no names looks at them itself"
    source = stacked()
    own = {spec.name: spec for spec in specs_of(source)}
    assert dict(in_checkpoint_names(source, own)) == source, "the engine has them stacked, too"


@pytest.mark.parametrize("shape", [(2, 5, 4), (3, 6, 4), (12, 4)])
def test_other_shapes_are_left_for_the_check_that_names_them(shape):
    name = f"{PLACE}.gate_up_proj"
    source = {**stacked(), name: torch.zeros(shape)}
    assert in_checkpoint_names(source, wanted())[name] is source[name]


def test_b9_an_expert_that_comes_both_ways_is_refused():
    name = f"{PLACE}.0.up_proj.weight"
    for source in ({**stacked(), name: torch.ones(3, 4)}, {name: torch.ones(3, 4), **stacked()}):
        with pytest.raises(DuplicateNameError, match=f"'{name}' is in the source by itself, and in the tensor of all"):
            in_checkpoint_names(source, wanted())


@pytest.mark.parametrize("item", [(1, torch.ones(1)), ("a", None), ("a", torch.ones(1), 3), None, "a"])
def test_what_is_no_source_is_left_for_who_says_so(item):
    pairs = [*stacked().items(), item]
    assert in_checkpoint_names(pairs, wanted()) is pairs


def test_experts_without_a_gate():
    names = [f"{PLACE}.{number}.{leaf}.weight" for number in range(2) for leaf in ("up_proj", "down_proj")]
    source = {f"{PLACE}.up_proj": torch.arange(24.0).view(2, 3, 4), f"{PLACE}.down_proj": torch.arange(24.0).view(2, 4, 3)}
    found = in_checkpoint_names(source, names)
    assert sorted(found) == sorted(names)
    assert torch.equal(found[names[2]], source[f"{PLACE}.up_proj"][1])


def test_the_names_of_models_that_see():
    """Whose modules have another prefix than checkpoints."""
    source = {name.replace("model.", "model.language_model."): tensor for name, tensor in stacked().items()}
    found = in_checkpoint_names(source, wanted())
    assert f"{PLACE.replace('model.', 'model.language_model.')}.1.up_proj.weight" in found


def test_b15_what_is_sharded_is_gathered_once_and_let_go_of_with_its_last_part():
    source, gathered = stacked(), []

    def make(name):
        def gather():
            whole = source[name].clone()
            gathered.append(weakref.ref(whole.untyped_storage()))
            return whole

        return gather

    deferred = {
        name: Deferred(tensor, tensor.dtype, tensor.device, make(name)) if tensor.dim() == 3 else tensor
        for name, tensor in source.items()
    }
    found = in_checkpoint_names(deferred, wanted())
    assert {spec.name: spec for spec in specs_of(found)} == wanted()
    assert not gathered
    for _ in range(2):  # again with the next update
        gathered.clear()
        alive = []
        for name, tensor in found.items():
            if name == "norm":
                continue
            part = tensor.full_tensor().clone()
            assert torch.equal(part, in_checkpoint_names(source, wanted())[name]), name
            alive.append(sum(one() is not None for one in gathered))
        assert len(gathered) == 2
        assert alive == [1, 1, 1, 0, 1, 0]
