"""B9 names, B10 aliases, B11 groups."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.bucketing import (
    BucketPlan,
    Packer,
    TensorSpec,
    iter_buckets,
    pack,
    pack_stream,
    plan_buckets,
    specs_of,
    stream,
    unpack,
    unpack_stream,
)
from rollout_core.errors import (
    CapacityError,
    DuplicateNameError,
    IncompleteStreamError,
    PlanMismatchError,
    SourceError,
)
from rollout_core.testing.oracles import picture
from support.tensors import names, patterned

ONE = torch.ones(2)


# ---------------------------------------------------------------------------------------------------------------- B9 names


@given(st.lists(names, unique=True, min_size=1))
def test_b9_any_non_empty_str_is_a_name(keys):
    """Lone surrogates, NUL, line ends and separators included: over the manifest, plans and streams."""
    pairs = [(name, torch.tensor([i])) for i, name in enumerate(keys)]
    plan = BucketPlan.from_bytes(plan_buckets(specs_of(pairs), 64).to_bytes())
    assert picture(unpack(plan, pack(plan, pairs))) == picture(pairs)
    assert picture(unpack_stream(pack_stream(pairs, 64))) == picture(pairs)


@pytest.mark.parametrize("name", ["\ud800", "\ud83d\ude00", "😀", "\0", "a\nb", "\u2028"])
def test_b9_names_that_are_hard_to_encode(name):
    neighbours = [("\ud83d", ONE), (name, ONE.clone()), ("\ude00", ONE.clone())]
    plan = BucketPlan.from_bytes(plan_buckets(specs_of(neighbours), 64).to_bytes())
    assert [spec.name for spec in plan.specs] == [n for n, _ in neighbours]
    ties = {name + "'": name for name, _ in neighbours}
    source = [*neighbours, *((name + "'", ONE) for name, _ in neighbours)]
    assert {n for n, _ in unpack_stream(pack_stream(iter(source), 64, aliases=ties))} == {n for n, _ in source}


DUPLICATE = "name 'w' stands at places 1 and 3 of the source; names must be unique"


@pytest.mark.parametrize(
    "consume",
    [
        specs_of,
        lambda pairs: list(pack_stream(pairs, 64)),
        lambda pairs: list(iter_buckets(pairs, 64)),
        lambda pairs: plan_buckets([TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in pairs], 64),
    ],
    ids=["specs_of", "pack_stream", "iter_buckets", "plan_buckets"],
)
def test_b9_a_duplicate_name_says_where_both_are(consume):
    pairs = [("a", ONE), ("w", ONE.clone()), ("b", ONE.clone()), ("w", ONE.clone())]
    with pytest.raises(DuplicateNameError) as error:
        consume(pairs)
    assert str(error.value) == DUPLICATE


@pytest.mark.parametrize("name", ["", None, 3, b"w"])
@pytest.mark.parametrize(
    "consume",
    [specs_of, lambda p: list(pack_stream(iter(p), 64)), lambda p: list(iter_buckets(p, 64))],
    ids=["specs_of", "pack_stream", "iter_buckets"],
)
def test_b9_bad_names(consume, name):
    with pytest.raises(SourceError, match=r"names are non-empty str"):
        consume([("a", ONE), (name, ONE.clone())])


@pytest.mark.parametrize("name", ["", None, 3, b"w"])
def test_b9_bad_names_of_a_spec(name):
    with pytest.raises(SourceError, match="names are non-empty str"):
        TensorSpec(name, torch.uint8, (1,))


# -------------------------------------------------------------------------------------------------------------- B10 aliases


def test_b10_a_buffer_under_two_names_is_a_tie():
    model = torch.nn.Module()
    model.register_buffer("scale", torch.ones(2))
    model.register_buffer("again", model.scale)
    plan = plan_buckets(specs_of(model), 64)
    assert plan.tied == {"scale": ("again",)}
    assert [name for name, _ in unpack(plan, pack(plan, model))] == ["scale", "again"]


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 3)
        self.norm = torch.nn.LayerNorm(3)
        self.head = torch.nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.arange(3.0), persistent=False)


SOURCES = {
    "module": lambda m: m,
    "state dict": lambda m: {**m.state_dict(), "scale": m.scale},
    "parameters": lambda m: [*m.named_parameters(remove_duplicate=False), *m.named_buffers()],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_b10_tied_weights_travel_once_and_arrive_under_every_name(kind):
    model = Tied()
    source = SOURCES[kind](model)
    expected = {"embed.weight", "head.weight", "norm.weight", "norm.bias", "scale"}
    plan = plan_buckets(specs_of(source), 32)
    assert plan.tied == {"embed.weight": ("head.weight",)}
    assert plan.nbytes == 4 * (12 + 3 + 3 + 3)
    for out in (dict(unpack(plan, pack(plan, source))), dict(unpack_stream(pack_stream(source, 32)))):
        assert set(out) == expected
        assert out["head.weight"] is out["embed.weight"] or out["head.weight"].data_ptr() == out["embed.weight"].data_ptr()
        assert torch.equal(out["head.weight"], model.head.weight)
    streamed = sum(bucket.nbytes for bucket in pack_stream(source, 32))
    assert streamed == plan.nbytes, "a stream sends it once too"


def test_b10_a_tied_name_arrives_right_after_its_tensor():
    """Its bucket may be used again before the tied name's own place comes."""
    model = Tied()
    plan = plan_buckets(specs_of(model), 48)
    assert plan.arrival == ("embed.weight", "head.weight", "norm.weight", "norm.bias", "scale")
    assert [name for name, _ in unpack(plan, pack(plan, model))] == list(plan.arrival)


@pytest.mark.parametrize(
    "other",
    [
        lambda t: t.clone(),
        lambda t: t[:2],
        lambda t: t.view(3, 4),
        lambda t: t.t().contiguous().t(),
        lambda t: t.view(torch.int32),
        lambda t: t.expand(1, 4, 3),
    ],
    ids=["a copy", "a slice", "another shape", "other strides", "another dtype", "another rank"],
)
def test_b10_only_the_same_storage_and_view_is_a_tie(other):
    base = patterned(torch.float32, 4, 3)
    pairs = [("a", base), ("b", other(base))]
    plan = plan_buckets(specs_of(pairs), 1 << 10)
    assert plan.tied == {}
    assert picture(unpack(plan, pack(plan, pairs))) == picture(pairs)


def test_b10_conjugate_of_a_tensor_is_no_tie():
    base = patterned(torch.complex64, 4)
    pairs = [("a", base), ("b", base.conj()), ("c", torch._neg_view(base))]
    plan = plan_buckets(specs_of(pairs), 1 << 10)
    assert plan.tied == {}
    assert picture(unpack(plan, pack(plan, pairs))) == picture(pairs)


def test_b10_memory_used_again_is_no_tie():
    """A freed tensor's address is likely the next one's: an address alone proves nothing."""
    made = ((f"w{i}", torch.full((1000,), float(i))) for i in range(20))
    assert all(spec.alias_of is None for spec in specs_of(made))


def test_b10_a_tie_that_no_longer_holds_is_refused():
    model = Tied()
    plan = plan_buckets(specs_of(model), 1 << 10)
    with torch.no_grad():
        model.head.weight = torch.nn.Parameter(model.head.weight + 1)
    for source in (model, dict(SOURCES["parameters"](model)), iter(SOURCES["parameters"](model))):
        source = {**source} if isinstance(source, dict) else source
        if not isinstance(source, torch.nn.Module) and not isinstance(source, dict):
            ordered = dict(source)
            source = iter([(spec.name, ordered[spec.name]) for spec in plan.specs])
        with pytest.raises(
            PlanMismatchError, match=r"the plan ties 'head.weight' to 'embed.weight', and the source gives it other"
        ):
            list(pack(plan, source))


def test_b10_a_copy_with_equal_bytes_still_counts_as_tied():
    """A gathered tied weight comes as two tensors of equal bytes."""
    model = Tied()
    plan = plan_buckets(specs_of(model), 1 << 10)
    values = dict(SOURCES["parameters"](model))
    for source in ({n: t.clone() for n, t in values.items()}, iter([(s.name, values[s.name].clone()) for s in plan.specs])):
        out = dict(unpack(plan, pack(plan, source)))
        assert torch.equal(out["head.weight"], model.embed.weight)


def test_b10_aliases_can_be_switched_off():
    specs = specs_of(Tied(), aliases=False)
    assert all(spec.alias_of is None for spec in specs)


@pytest.mark.parametrize(
    ("alias_of", "message"),
    [
        ("missing", "tensor 'b' is tied to 'missing', which is no untied tensor that comes before it"),
        ("c", "tensor 'b' is tied to 'c', which is no untied tensor that comes before it"),
        ("d", "tensor 'b' is tied to 'd', which is no untied tensor"),
        ("f16", r"tensor 'b' \(f32\[2\]\) is tied to 'f16', which is f16\[2\]"),
        ("long", r"tensor 'b' \(f32\[2\]\) is tied to 'long', which is f32\[3\]"),
    ],
)
def test_b10_bad_ties(alias_of, message):
    f32 = torch.float32
    specs = [
        TensorSpec("a", f32, (2,)),
        TensorSpec("f16", torch.float16, (2,)),
        TensorSpec("long", f32, (3,)),
        TensorSpec("d", f32, (2,), "a"),
        TensorSpec("b", f32, (2,), alias_of),
        TensorSpec("c", f32, (2,)),
    ]
    with pytest.raises(SourceError, match=message):
        plan_buckets(specs, 64)


def test_b10_a_generator_declares_its_ties():
    weight, other = patterned(torch.float32, 4), patterned(torch.float32, 2)
    source = [("embed", weight), ("other", other), ("head", weight.clone())]
    buckets = list(pack_stream(iter(source), 16, aliases={"head": "embed"}))
    assert sum(b.nbytes for b in buckets) == 24
    assert picture(unpack_stream(buckets)) == picture([source[0], ("head", weight), source[1]])


@pytest.mark.parametrize(
    ("source", "aliases", "error", "message"),
    [
        (
            [("a", ONE), ("b", ONE + 1)],
            {"b": "a"},
            PlanMismatchError,
            "'b' is declared tied to 'a', and the source gives it other bytes",
        ),
        ([("a", ONE), ("b", torch.ones(3))], {"b": "a"}, PlanMismatchError, "'b' of the source is f32"),
        ([("b", ONE), ("a", ONE)], {"b": "a"}, SourceError, "'b' is declared tied to 'a', which has not been sent before it"),
        ([("a", ONE)], {"b": "a"}, IncompleteStreamError, "ended without 'b', which is declared tied to 'a'"),
        ([("a", ONE)], {"b": "a", "c": "b"}, SourceError, "'c' is declared tied to 'b', which is tied itself"),
        ([("a", ONE)], {"a": "a"}, SourceError, "'a' is declared tied to 'a'"),
    ],
)
def test_b10_bad_declared_ties(source, aliases, error, message):
    with pytest.raises(error, match=message):
        list(pack_stream(iter(source), 64, aliases=aliases))


def test_b10_ties_hold_when_a_tensor_is_split():
    weight = patterned(torch.float32, 10)
    pairs = [("a", weight), ("x", ONE), ("b", weight)]
    plan = plan_buckets(specs_of(pairs), 12)
    for source in (pairs, dict(pairs), iter(pairs)):
        assert {n: b for n, _, _, b in picture(unpack(plan, pack(plan, source)))} == {n: b for n, _, _, b in picture(pairs)}
    out = dict(unpack_stream(pack_stream(pairs, 12)))
    assert out["a"] is out["b"]


# --------------------------------------------------------------------------------------------------------------- B11 groups

QKV = [(name, patterned(torch.float32, 2, seed=i)) for i, name in enumerate(["q", "x", "k", "y", "v", "z"])]


@given(st.data())
def test_b11_a_group_lands_in_one_bucket_and_keeps_its_order(data):
    count = data.draw(st.integers(2, 12))
    pairs = [(f"t{i}", patterned(data.draw(st.sampled_from([torch.float32, torch.uint8])), 3, seed=i)) for i in range(count)]
    shuffled = data.draw(st.permutations([name for name, _ in pairs]))
    cut = data.draw(st.integers(1, count))
    groups = [g for g in (shuffled[:cut][:4], shuffled[cut:][:3]) if g]
    order = data.draw(st.sampled_from(["given", "packed"]))
    plan = plan_buckets(specs_of(pairs), data.draw(st.integers(64, 200)), groups=groups, order=order)
    home = {slot.name: layout.index for layout in plan.buckets for slot in layout.slots}
    places = {name: i for i, (name, _) in enumerate(pairs)}
    for group in groups:
        assert len({home[name] for name in group}) == 1
        arrived = [name for name in plan.arrival if name in group]
        assert arrived == sorted(group, key=places.__getitem__)
    expected = {name: rest for name, *rest in picture(pairs)}
    for source in (pairs, iter(pairs), dict(pairs)):
        out = list(unpack(plan, pack(plan, source)))
        assert [name for name, _ in out] == list(plan.arrival)
        assert {name: rest for name, *rest in picture(out)} == expected
    assert BucketPlan.from_bytes(plan.to_bytes()) == plan
    buckets = list(pack_stream(iter(pairs), plan.capacity, groups=groups))
    assert {name: rest for name, *rest in picture(unpack_stream(buckets))} == expected


def test_b11_a_group_comes_where_its_last_member_stands():
    plan = plan_buckets(specs_of(QKV), 24, groups=[["v", "q", "k"]])
    assert [[slot.name for slot in layout.slots] for layout in plan.buckets] == [["x", "y"], ["q", "k", "v"], ["z"]]
    buckets = list(pack_stream(iter(QKV), 24, groups=[["v", "q", "k"]]))
    assert [[name for name, _ in unpack_stream(buckets)]] == [["x", "y", "q", "k", "v", "z"]]
    assert [b.nbytes for b in buckets] == [16, 24, 8]


def test_b11_a_group_over_capacity_is_an_error():
    message = r"the group \('q', 'k', 'v'\) needs 24 bytes in one bucket, and the capacity is 23; raise the capacity or ungroup it"
    for oversize in ("split", "own", "error"):
        with pytest.raises(CapacityError, match=message):
            plan_buckets(specs_of(QKV), 23, groups=[["q", "k", "v"]], oversize=oversize)
    with pytest.raises(CapacityError, match="the group"):
        list(pack_stream(iter(QKV), 23, groups=[["q", "k", "v"]]))


def test_b11_a_long_groups_error_stays_short():
    specs = [TensorSpec(f"t{i}", torch.uint8, (2,)) for i in range(100)]
    with pytest.raises(CapacityError, match=r"the group \('t0', 't1', 't2', 't3', ...\) needs 200 bytes"):
        plan_buckets(specs, 100, groups=[[spec.name for spec in specs]])


@pytest.mark.parametrize(
    ("count", "words"),
    [(2, "'t0', 't1'"), (3, "'t0', 't1', 't2'"), (4, "'t0', 't1', 't2', 't3'"), (5, "'t0', 't1', 't2', 't3', ...")],
)
def test_b11_a_groups_error_names_four(count, words):
    specs = [TensorSpec(f"t{i}", torch.uint8, (2,)) for i in range(count)]
    with pytest.raises(CapacityError, match=rf"the group \({words}\) needs {2 * count} bytes"):
        plan_buckets(specs, 2 * count - 1, groups=[[spec.name for spec in specs]])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["q", "nope", "k", "never"]], r"group 0 never completes: no tensor is named 'nope' \(2 missing\)"),
        ([["q", "nope"]], r"group 0 never completes: no tensor is named 'nope' \(1 missing\)"),
        ([["q", "k"], ["k", "v"]], "tensor 'k' is in groups 0 and 1; it can be in one"),
        (["qk"], "group 0 is the str 'qk'; a group is a list of names"),
    ],
)
def test_b11_bad_groups(groups, message):
    with pytest.raises(SourceError, match=message):
        plan_buckets(specs_of(QKV), 64, groups=groups)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([["q", "nope"]], IncompleteStreamError, "a group never completed: the source ended without 'nope'"),
        ([["q", "k"], ["k", "v"]], SourceError, "tensor 'k' is in two groups; it can be in one"),
        (["qk"], SourceError, "group 0 is the str 'qk'; a group is a list of names"),
    ],
)
def test_b11_bad_groups_of_a_stream(groups, error, message):
    with pytest.raises(error, match=message):
        list(pack_stream(iter(QKV), 64, groups=groups))


def test_b11_an_incomplete_groups_error_names_three():
    groups = [["q", *(f"never{i}" for i in range(20))]]
    with pytest.raises(IncompleteStreamError) as error:
        list(pack_stream(iter(QKV), 64, groups=groups))
    assert str(error.value) == "a group never completed: the source ended without 'never0', 'never1', 'never10'"


def test_b15_copies_of_a_group_are_let_go_when_it_was_sent(monkeypatch):
    copies = []
    original = stream.own_copy
    monkeypatch.setattr(stream, "own_copy", lambda t: copies.append(original(t)) or copies[-1])
    pairs = [*QKV, ("more", patterned(torch.float32, 2)), ("end", patterned(torch.float32, 2))]
    buckets = pack_stream(iter(pairs), 24, groups=[["q", "k", "v"]])
    next(buckets)
    next(buckets)
    watch = [weakref.ref(copy) for copy in copies]
    copies.clear()
    assert [ref() for ref in watch] == [None, None]


def test_b11_a_group_that_never_completes_lets_no_last_bucket_out():
    got = []
    with pytest.raises(IncompleteStreamError):
        for bucket in pack_stream(iter(QKV), 16, groups=[["q", "nope"]]):
            got.append(bucket)
    with pytest.raises(IncompleteStreamError, match="its last bucket is missing"):
        list(unpack_stream(got))


def test_b11_a_tied_name_stands_for_its_tensor_in_a_group():
    pairs = [("a", QKV[0][1]), ("x", QKV[1][1]), ("b", QKV[0][1]), ("c", QKV[2][1])]
    plan = plan_buckets(specs_of(pairs), 16, groups=[["b", "c"]])
    assert plan.groups == (("a", "c"),)
    assert {n: r for n, *r in picture(unpack(plan, pack(plan, pairs)))} == {n: r for n, *r in picture(pairs)}
    assert plan_buckets(specs_of(pairs), 16, groups=[["a", "b"]]).groups == (), "one tensor is no group"


@pytest.mark.parametrize("kind", ["plan", "stream"])
def test_b11_members_that_wait_are_copies(kind):
    """A source that uses one piece of memory for all its tensors overwrites what its group still waits for."""
    groups = [["q", "k", "v"]]

    def scratch():
        memory = torch.empty(2)
        for name, tensor in QKV:
            memory.copy_(tensor)
            yield name, memory

    plan = plan_buckets(specs_of(QKV), 24, groups=groups)
    out = unpack(plan, pack(plan, scratch())) if kind == "plan" else unpack_stream(pack_stream(scratch(), 24, groups=groups))
    assert {n: r for n, *r in picture(out)} == {n: r for n, *r in picture(QKV)}


def test_b11_groups_and_pieces_in_a_later_round():
    pairs = [("q", patterned(torch.float32, 2)), ("big", patterned(torch.uint8, 100)), ("k", patterned(torch.float32, 2, seed=9))]
    plan = plan_buckets(specs_of(pairs), 16, groups=[["q", "k"]])
    packer = Packer(plan)
    for source in (pairs, iter(pairs), dict(pairs)):
        assert {n: r for n, *r in picture(unpack(plan, packer.pack(source)))} == {n: r for n, *r in picture(pairs)}
    assert dataclasses.replace(plan) == plan
