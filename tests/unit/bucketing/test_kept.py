"""What is kept from one round to the next is used only while it is true: a source that changed in any way is looked at again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping

import pytest
import torch

from rollout_core.bucketing import Packer, plan_buckets, specs_of, unpack
from rollout_core.bucketing.looks import Seen, alike_to
from rollout_core.bucketing.specs import are_specs_of
from rollout_core.testing.oracles import picture
from support.in_place import CHANGES, square
from support.tensors import patterned

REFUSED = {
    "sparse": lambda: torch.zeros(3, 3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3, 3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(3)]),
    "no tensor": lambda: 3,
    "lazy": torch.nn.UninitializedParameter,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_looks_otherwise_is_not_alike(change):
    tensors = [square(), square(), square()]
    alike = alike_to(tensors)
    assert alike is not None, "torch has no TensorGuards any more, or they changed: packing would be slower, not wrong"
    tensors[1].add_(1)
    assert alike(*tensors)
    place = tensors[1].data_ptr()
    CHANGES[change](tensors[1])
    assert tensors[1].data_ptr() == place
    assert not alike(*tensors)


@pytest.mark.parametrize(
    "other", [torch.zeros(2, dtype=torch.complex64).conj(), torch.nn.Parameter(torch.zeros(2)), torch.zeros(2, device="meta")]
)
def test_another_tensor_is_not_alike(other):
    before = torch.zeros(2, dtype=other.dtype)
    alike = alike_to([before])
    assert alike(before.clone())
    assert not alike(other)


def test_no_quick_answer_for_a_tensor_that_comes_twice_or_is_none_of_torchs_own():
    class Own(torch.Tensor):
        pass

    one = torch.zeros(3)
    assert alike_to([one, one]) is None
    assert alike_to([torch.zeros(3).as_subclass(Own)]) is None
    assert alike_to([torch.eye(3).to_sparse()]) is None


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("other", ["sparse", "compressed", "quantized", "nested", "jagged", "no tensor", "nothing", "lazy"])
def test_what_is_no_plain_tensor_is_not_alike(other):
    """torch's own check, asked about some of these, would end the process."""
    tensor = {
        **REFUSED,
        "compressed": lambda: torch.zeros(3, 3).to_sparse_csr(),
        "jagged": lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(3)], layout=torch.jagged),
        "nothing": lambda: None,
    }[other]()
    assert not alike_to([torch.zeros(3, 3)])(tensor)
    if isinstance(tensor, torch.Tensor) and other != "quantized":
        assert alike_to([tensor]) is None


def test_b15_what_is_known_of_tensors_keeps_none():
    tensors = [square(), square()]
    alike = alike_to(tensors)
    refs = [weakref.ref(tensor) for tensor in tensors] + [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
    del tensors
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4
    assert alike(square(), square())


def named():
    tied = square()
    return {"a": square(), "tied": tied, "also tied": tied, "b": torch.zeros(3)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_tensor_that_was_seen_is_noticed(change):
    tensors = named()
    seen = Seen(tensors)
    tensors["tied"] += 1
    assert seen.same(tensors)
    assert seen.same(dict(tensors))
    CHANGES[change](tensors["tied"])
    assert not seen.same(tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "a": t["a"].clone()},
        lambda t: {**t, "also tied": t["tied"].clone()},
        lambda t: {**t, "also tied": t["a"]},
        lambda t: {**t, "tied": t["a"], "also tied": t["tied"]},
        lambda t: {name: tensor for name, tensor in t.items() if name != "b"},
        lambda t: {**t, "c": t["b"]},
        lambda t: {("c" if name == "b" else name): tensor for name, tensor in t.items()},
        lambda t: {**t, "also tied": t["tied"].detach()},
    ],
    ids=["moved", "untied", "tied to another", "tied in turn", "one fewer", "one more", "renamed", "another of it"],
)
def test_others_than_were_seen_are_noticed(change):
    tensors = named()
    seen = Seen(tensors)
    assert not seen.same(change(tensors))


def test_b15_what_was_seen_is_not_kept():
    tensors = named()
    seen = Seen(tensors)
    refs = [weakref.ref(tensor.untyped_storage()) for tensor in tensors.values()]
    del tensors
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4
    assert not seen.same({})


def source():
    tied = square()
    return {
        "a": square(),
        "tied": tied,
        "b": patterned(torch.bfloat16, 5),
        "also tied": tied,
        "none": torch.zeros(0, 3),
        "nothing": torch.zeros(0),
        "scalar": torch.tensor(1.0),
    }


SOURCES = {
    "renamed": lambda s: {("c" if name == "a" else name): tensor for name, tensor in s.items()},
    "in another order": lambda s: dict(reversed(s.items())),
    "one fewer": lambda s: {name: tensor for name, tensor in s.items() if name != "b"},
    "one more": lambda s: {**s, "z": square()},
    "another dtype": lambda s: {**s, "a": s["a"].double()},
    "another width": lambda s: {**s, "a": s["a"].view(torch.int32)},
    "another shape": lambda s: {**s, "a": s["a"].view(2, 8)},
    "untied": lambda s: {**s, "also tied": s["tied"].clone()},
    "tied to another": lambda s: {**s, "also tied": s["a"]},
    "tied as well": lambda s: {**s, "a": s["tied"]},
    "one view of it": lambda s: {**s, "a": s["tied"][:]},
    "another view of it": lambda s: {**s, "also tied": s["tied"].t()},
    "empty": lambda s: {},
    "moved": lambda s: {**s, "a": s["a"].clone()},
    "strided": lambda s: {**s, "a": torch.zeros(4, 8)[:, ::2]},
    "a parameter": lambda s: {**s, "a": torch.nn.Parameter(s["a"])},
    "on meta": lambda s: {**s, "a": s["a"].to("meta")},
    "the same": lambda s: s,
}


@pytest.mark.parametrize("change", SOURCES)
@pytest.mark.parametrize("form", [dict, lambda s: list(s.items())], ids=["dict", "list"])
def test_b6_specs_are_kept_only_for_a_source_that_has_them(change, form):
    specs = specs_of(source())
    other = SOURCES[change](source())
    assert are_specs_of(specs, form(other)) == (specs_of(other) == specs)


def test_b6_specs_of_modules_are_kept_too():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    specs = specs_of(module)
    assert are_specs_of(specs, module)
    module[0].weight = torch.nn.Parameter(torch.zeros(4, 2))
    assert not are_specs_of(specs, module)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("bad", REFUSED)
def test_what_specs_of_refuses_has_no_specs(bad):
    specs = specs_of({"w": torch.zeros(3, 3)})
    assert not are_specs_of(specs, {"w": REFUSED[bad]()})


def test_a_source_that_makes_its_tensors_is_not_looked_at():
    class Lazy(Mapping):
        def __getitem__(self, name):
            raise AssertionError("a tensor was made")

        def __iter__(self):
            return iter(["w"])

        def __len__(self):
            return 1

    specs = specs_of({"w": torch.zeros(3)})
    assert not are_specs_of(specs, Lazy())
    assert not are_specs_of(specs, iter([("w", torch.zeros(3))]))


class Making(Mapping):
    """Makes each tensor when it is asked for, and knows how many of those it made are there at once."""

    def __init__(self, names):
        self._names, self._made, self.most = names, weakref.WeakSet(), 0

    def __getitem__(self, name):
        gc.collect()
        self.most = max(self.most, len(self._made) + 1)
        tensor = torch.full((4,), float(self._names.index(name)))
        self._made.add(tensor)
        return tensor

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


@pytest.mark.parametrize("capacity", [16, 64])
def test_b15_a_mapping_that_makes_its_tensors_has_one_at_a_time(capacity):
    making = Making(["a", "b", "c", "d"])
    plan = plan_buckets(specs_of({name: torch.zeros(4) for name in making}), capacity)
    assert picture(unpack(plan, Packer(plan).pack(making))) == picture(
        [(n, torch.full((4,), float(i))) for i, n in enumerate(making)]
    )
    assert making.most == 1


def test_a_rounds_own_memory_is_used_for_it_alone():
    pairs = [("a", patterned(torch.float32, 4)), ("b", patterned(torch.float32, 4, seed=1))]
    plan = plan_buckets(specs_of(pairs), 16)
    own, given = torch.zeros(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)
    packer = Packer(plan, allocate=lambda nbytes: own[:nbytes])
    first, second = packer.pack(pairs), packer.pack(dict(pairs), allocate=lambda nbytes: given[:nbytes])
    assert [next(one).buffer.data_ptr() for one in (first, second, first, second)] == [
        memory.data_ptr() for memory in (own, given, own, given)
    ]


def test_a_manifest_is_made_once():
    plan = plan_buckets(specs_of(source()), 100)
    assert plan.to_bytes() is plan.to_bytes()
