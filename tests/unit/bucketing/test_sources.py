"""B12 end and B16 sources: every kind of source, its errors, and every way to stop."""

from __future__ import annotations

import asyncio
import weakref
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.bucketing import (
    Packer,
    StreamUnpacker,
    Unpacker,
    aiter_buckets,
    apack,
    apack_stream,
    iter_buckets,
    pack,
    pack_stream,
    plan_buckets,
    specs_of,
    unpack,
    unpack_stream,
)
from rollout_core.errors import IncompleteStreamError, IntegrityError, PlanMismatchError, SourceError
from rollout_core.testing.oracles import picture
from support.tensors import capacities, named, patterned, plan_options

PAIRS = [(f"w{i}", patterned(torch.float32, i + 1, seed=i)) for i in range(6)]


def collect(source):
    async def run():
        return [item async for item in source]

    return asyncio.run(run())


async def as_async(pairs, closed=None, error=None):
    try:
        for pair in pairs:
            await asyncio.sleep(0)
            yield pair
        if error is not None:
            raise error
    finally:
        if closed is not None:
            closed.append(True)


# ---------------------------------------------------------------------------------------------------------------- B16 kinds


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("inv_freq", torch.ones(3), persistent=False)


def test_b16_a_module_gives_parameters_and_all_buffers():
    model = Model()
    assert [spec.name for spec in specs_of(model)] == ["linear.weight", "linear.bias", "mean", "inv_freq"]
    plan = plan_buckets(specs_of(model), 64)
    expected = [*model.named_parameters(), *model.named_buffers()]
    assert picture(unpack(plan, pack(plan, model))) == picture(expected)
    assert picture(unpack_stream(pack_stream(model, 64))) == picture(expected)
    assert picture([p for b in iter_buckets(model, 64) for p in b]) == picture(expected)


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        iter,
        dict,
        lambda pairs: (pair for pair in pairs),
        lambda pairs: [[name, tensor] for name, tensor in pairs],
        lambda pairs: dict(reversed(pairs)),
        lambda pairs: dict(pairs).items(),
    ],
    ids=["list", "tuple", "iterator", "dict", "generator", "lists for pairs", "dict in another order", "items view"],
)
def test_b16_sync_sources(make):
    plan = plan_buckets(specs_of(PAIRS), 32)
    assert picture(unpack(plan, pack(plan, make(PAIRS)))) == picture(PAIRS)
    assert picture(unpack(plan, collect(apack(plan, make(PAIRS))))) == picture(PAIRS)
    expected = {n: r for n, *r in picture(PAIRS)}
    assert {n: r for n, *r in picture(unpack_stream(pack_stream(make(PAIRS), 32)))} == expected
    assert {n: r for n, *r in picture(unpack_stream(collect(apack_stream(make(PAIRS), 32))))} == expected
    assert {n: r for n, *r in picture(p for b in collect(aiter_buckets(make(PAIRS), 32)) for p in b)} == expected


@given(st.data())
def test_b16_async_sources(data):
    pairs = data.draw(named(max_size=5))
    capacity = data.draw(capacities(pairs))
    plan = plan_buckets(specs_of(pairs), capacity, **data.draw(plan_options))
    expected = {n: r for n, *r in picture(pairs)}
    assert {n: r for n, *r in picture(unpack(plan, collect(apack(plan, as_async(pairs)))))} == expected
    assert picture(unpack_stream(collect(apack_stream(as_async(pairs), capacity)))) == picture(pairs)
    assert picture(p for b in collect(aiter_buckets(as_async(pairs), capacity)) for p in b) == picture(pairs)


class Sharded(torch.Tensor):
    """Acts as a DTensor does: a global shape, and bytes only after full_tensor()."""

    log: list[str]

    @staticmethod
    def __new__(cls, name, full, log):
        made = torch.Tensor._make_wrapper_subclass(cls, full.shape, dtype=full.dtype)
        made.log, made.name_, made.full = log, name, full
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called on a sharded tensor")

    def full_tensor(self):
        self.log.append(self.name_)
        return self.full


@pytest.mark.parametrize("make", [list, iter, dict], ids=["list", "iterator", "dict"])
@pytest.mark.parametrize("kind", ["plan", "packed", "stream", "lists"])
def test_b16_sharded_tensors_are_gathered_when_their_turn_comes_and_never_earlier(kind, make):
    log: list[str] = []
    sizes = [4, 4, 4, 20, 4]
    full = [(f"w{i}", patterned(torch.float32, n, seed=i)) for i, n in enumerate(sizes)]
    sharded = [(name, Sharded(name, tensor, log)) for name, tensor in full]
    specs = specs_of(sharded)
    assert log == [], "specs come from the global shape"
    plan = plan_buckets(specs, 32, order="packed" if kind == "packed" else "given")
    buckets = {
        "plan": lambda: pack(plan, make(sharded)),
        "packed": lambda: pack(plan, make(sharded)),
        "stream": lambda: pack_stream(make(sharded), 32),
        "lists": lambda: iter_buckets(make(sharded), 32),
    }[kind]()
    got, gathered_at = [], []
    for bucket in buckets:
        got.append(bucket)
        gathered_at.append(len(log))
    assert log == [name for name, _ in full], "each once, in order: on many ranks this is a collective"
    if kind in ("plan", "packed"):
        assert gathered_at == [2, 3, 4, 4, 5], "the second bucket is cut short by an oversize tensor, which then fills two"
    out = (
        unpack(plan, got) if kind in ("plan", "packed") else unpack_stream(got) if kind == "stream" else [p for b in got for p in b]
    )
    assert picture(out) == picture(full)


@pytest.mark.parametrize("source", [torch.ones(3), 5, None, object()])
def test_b16_what_is_no_source_says_so(source):
    with pytest.raises(SourceError, match="is no source of named tensors; pass pairs"):
        specs_of(source)


def test_b16_an_async_source_in_a_sync_function_says_where_to_go():
    source = as_async(PAIRS)
    with pytest.raises(SourceError, match="an async source needs apack, apack_stream or aiter_buckets"):
        list(pack_stream(source, 32))
    asyncio.run(source.aclose())


@pytest.mark.parametrize("item", ["ab", ("a",), ("a", torch.ones(1), 3), torch.ones(2), 7])
def test_b16_what_is_no_pair_says_so(item):
    kind = type(item).__name__
    with pytest.raises(SourceError, match=f"the source gave a {kind}, not a pair"):
        list(pack_stream(iter([item]), 32))
    with pytest.raises(SourceError, match=f"the source gave a {kind}, not a pair"):
        collect(apack_stream(as_async([item]), 32))


class Rows:
    """An async iterable that is no generator: it has nothing to close."""

    def __aiter__(self):
        return as_async(PAIRS)


def test_b16_an_async_iterable_object():
    assert picture(unpack_stream(collect(apack_stream(Rows(), 32)))) == picture(PAIRS)


class Loaded(torch.Tensor):
    """A subclass with memory of its own, as engines use for parameters with a weight loader."""


def test_b16_tensor_subclasses_with_memory_of_their_own():
    pairs = [(name, tensor.as_subclass(Loaded)) for name, tensor in PAIRS]
    plan = plan_buckets(specs_of(pairs), 32)
    for source in (pairs, iter(pairs)):
        out = list(unpack(plan, pack(plan, source)))
        assert picture(out) == picture(PAIRS)
        assert {type(tensor) for _, tensor in out} == {torch.Tensor}


# --------------------------------------------------------------------------------------------------------------- B16 errors


class Boom(Exception):
    pass


def failing(pairs, after, closed):
    try:
        yield from pairs[:after]
        raise Boom("inside the source")
    finally:
        closed.append(True)


MODES = {
    "plan": lambda source: pack(plan_buckets(specs_of(PAIRS), 32), source),
    "packed": lambda source: pack(plan_buckets(specs_of(PAIRS), 32, order="packed"), source),
    "stream": lambda source: pack_stream(source, 32),
    "lists": lambda source: iter_buckets(source, 32),
}
ASYNC_MODES = {
    "plan": lambda source: apack(plan_buckets(specs_of(PAIRS), 32), source),
    "stream": lambda source: apack_stream(source, 32),
    "lists": lambda source: aiter_buckets(source, 32),
}


def names_in(mode, buckets):
    if mode == "lists":
        return [name for bucket in buckets for name, _ in bucket]
    if mode == "stream":
        receiver = StreamUnpacker()
    else:
        receiver = Unpacker(plan_buckets(specs_of(PAIRS), 32, order="packed" if mode == "packed" else "given"))
    names = [name for bucket in buckets for name, _ in receiver.feed(bucket)]
    with pytest.raises(IncompleteStreamError):
        receiver.close()
    return names


@pytest.mark.parametrize("after", range(len(PAIRS) + 1))
@pytest.mark.parametrize("mode", MODES)
def test_b16_a_sources_error_comes_out_unchanged_and_no_partial_bucket_does(mode, after):
    got, closed = [], []
    with pytest.raises(Boom, match="inside the source") as error:
        for bucket in MODES[mode](failing(PAIRS, after, closed)):
            got.append(bucket)
    assert type(error.value) is Boom
    assert error.value.__cause__ is None
    assert closed == [True]
    names = names_in(mode, got)
    assert names == [name for name, _ in PAIRS[: len(names)]]
    assert len(names) <= after


@pytest.mark.parametrize("after", [0, 3, 6])
@pytest.mark.parametrize("mode", ASYNC_MODES)
def test_b16_an_async_sources_error_comes_out_unchanged(mode, after):
    got, closed = [], []

    async def run():
        async for bucket in ASYNC_MODES[mode](as_async(PAIRS[:after], closed, Boom("inside"))):
            got.append(bucket)

    with pytest.raises(Boom, match="inside"):
        asyncio.run(run())
    assert closed == [True]
    assert len(names_in(mode, got)) <= after


@pytest.mark.parametrize("taken", [0, 1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_b16_closing_early_closes_the_source(mode, taken):
    closed = []
    source = failing(PAIRS, len(PAIRS), closed)
    buckets = MODES[mode](source)
    for _ in range(taken):
        next(buckets)
    buckets.close()
    assert closed == [True] * (taken > 0), "a generator that never started has nothing to release"
    assert next(source, "exhausted") == "exhausted" if taken else True


@pytest.mark.parametrize("mode", ASYNC_MODES)
def test_b16_closing_an_async_stream_early_closes_the_source(mode):
    closed = []

    async def run():
        buckets = ASYNC_MODES[mode](as_async(PAIRS, closed))
        await anext(buckets)
        await buckets.aclose()

    asyncio.run(run())
    assert closed == [True]


@pytest.mark.parametrize("mode", ASYNC_MODES)
def test_b16_an_async_source_is_closed_when_the_stream_is_and_not_with_the_loop(mode):
    closed = []

    async def run():
        buckets = ASYNC_MODES[mode](as_async(PAIRS, closed))
        await anext(buckets)
        await buckets.aclose()
        assert closed == [True]

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["plan", "packed"])
def test_b16_an_error_that_is_kept_keeps_no_source_open(mode):
    """A traceback keeps the frames that it went through, and what they hold."""
    closed = []
    wrong = [*PAIRS[:3], ("other", torch.ones(1)), *PAIRS[4:]]
    with pytest.raises(PlanMismatchError) as error:
        list(MODES[mode](failing(wrong, len(wrong), closed)))
    assert closed == [True]
    assert error.value.__traceback__ is not None


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_b15_an_error_that_is_kept_keeps_no_buffer(mode):
    watch = []

    def allocate(nbytes):
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        watch.append(weakref.ref(buffer))
        return buffer

    plan = plan_buckets(specs_of(PAIRS), 32)
    with pytest.raises(Boom) as error:
        if mode == "sync":
            list(pack(plan, failing(PAIRS, 1, []), allocate=allocate))
        else:
            collect(apack(plan, as_async(PAIRS[:1], error=Boom("inside")), allocate=allocate))
    assert [ref() for ref in watch] == [None]
    assert error.value.__traceback__ is not None


def test_b16_an_error_thrown_into_an_async_stream_closes_a_sync_source():
    closed = []

    async def run():
        buckets = apack_stream(failing(PAIRS, len(PAIRS), closed), 32)
        await anext(buckets)
        with pytest.raises(Boom) as error:
            await buckets.athrow(Boom("of the consumer"))
        assert closed == [True]
        assert error.value.__traceback__ is not None

    asyncio.run(run())


class Reusable:
    """Something that can be read again, and that its owner closes."""

    closed = False

    def __iter__(self):
        return iter(PAIRS)

    def close(self):
        self.closed = True


class AsyncReusable(Reusable):
    def __aiter__(self):
        return as_async(PAIRS)

    async def aclose(self):
        self.closed = True


def test_b16_what_can_be_read_again_is_not_closed():
    source, later = Reusable(), AsyncReusable()
    for _ in range(2):
        assert picture(unpack_stream(pack_stream(source, 32))) == picture(PAIRS)
        assert picture(unpack_stream(collect(apack_stream(later, 32)))) == picture(PAIRS)
    assert not source.closed
    assert not later.closed


class AsyncIteratorWithoutEnd:
    """An async iterator by hand: nothing to close."""

    def __init__(self):
        self.rest = iter(PAIRS)

    def __aiter__(self):
        return self

    async def __anext__(self):
        try:
            return next(self.rest)
        except StopIteration:
            raise StopAsyncIteration from None


def test_b16_an_async_iterator_that_cannot_be_closed():
    assert picture(unpack_stream(collect(apack_stream(AsyncIteratorWithoutEnd(), 32)))) == picture(PAIRS)


class Named(NamedTuple):
    name: str
    tensor: torch.Tensor


@pytest.mark.parametrize("kind", [list, tuple, Named._make], ids=["list", "tuple", "named tuple"])
def test_b16_pairs_of_any_kind(kind):
    pairs = [kind(pair) for pair in PAIRS]
    assert picture(unpack_stream(pack_stream(iter(pairs), 32))) == picture(PAIRS)
    assert picture(unpack_stream(collect(apack_stream(as_async(pairs), 32)))) == picture(PAIRS)


def test_b16_a_packer_works_on_after_a_failed_round():
    plan = plan_buckets(specs_of(PAIRS), 32)
    packer = Packer(plan)
    with pytest.raises(Boom):
        list(packer.pack(failing(PAIRS, 3, [])))
    abandoned = packer.pack(PAIRS)
    next(abandoned)
    assert picture(unpack(plan, packer.pack(PAIRS))) == picture(PAIRS)


# ------------------------------------------------------------------------------------------------- the source is not the plan's


@pytest.mark.parametrize("make", [list, iter], ids=["list", "iterator"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:-1], "the source ended after 5 of 6 tensors; the plan's next is 'w5'"),
        (lambda p: [], "the source ended after 0 of 6 tensors; the plan's next is 'w0'"),
        (lambda p: [*p, ("more", torch.ones(1))], "the source goes on with 'more' after the plan's 6 tensors"),
        (lambda p: [*p[:2], p[3], p[2], *p[4:]], "tensor 2 of the source is 'w3', and of the plan 'w2'"),
        (lambda p: [*p[:2], ("w2", torch.ones(7)), *p[3:]], r"tensor 'w2' of the source is f32\[7\], and of the plan f32\[3\]"),
        (lambda p: [*p[:2], ("w2", p[2][1].half()), *p[3:]], r"tensor 'w2' of the source is f16\[3\], and of the plan f32\[3\]"),
        (lambda p: [*p[:2], ("w2", p[2][1].to("meta")), *p[3:]], "tensor 'w2' is on the meta device and has no data to pack"),
        (lambda p: [*p[:2], ("w2", None), *p[3:]], "tensor 'w2' is a NoneType, not a torch.Tensor"),
    ],
)
def test_a_source_that_is_not_the_plans(change, message, make):
    plan = plan_buckets(specs_of(PAIRS), 32)
    got = []
    with pytest.raises((PlanMismatchError, SourceError), match=message):
        for bucket in pack(plan, make(change(PAIRS))):
            got.append(bucket)
    assert len(got) < len(plan.buckets), "the last bucket waits until the source has ended as planned"


def test_a_mapping_that_is_not_the_plans():
    plan = plan_buckets(specs_of(PAIRS), 32)
    short = dict(PAIRS[:4])
    with pytest.raises(PlanMismatchError, match=r"the source has no tensor 'w4', and the plan has \(2 missing\)"):
        list(pack(plan, short))
    with pytest.raises(PlanMismatchError, match="the source has a tensor 'extra' that the plan has not; plan again with specs_of"):
        list(pack(plan, {**dict(PAIRS), "extra": torch.ones(1)}))


def test_like_tensors_of_which_one_differs_are_named():
    """On the fast path too, and where the bytes would fit."""
    pairs = [(f"w{i}", patterned(torch.float32, 2, 6, seed=i)) for i in range(5)]
    plan = plan_buckets(specs_of(pairs), 1 << 10)
    for wrong in (torch.ones(3, 4), torch.ones(12), torch.ones(6, 2), torch.ones(2, 6, dtype=torch.int32), torch.ones(2, 7)):
        for place in (0, 3):
            changed = [(n, wrong if i == place else t) for i, (n, t) in enumerate(pairs)]
            with pytest.raises(PlanMismatchError, match=f"tensor 'w{place}' of the source is"):
                list(pack(plan, changed))
    all_wrong = [(n, t.view(-1)) for n, t in pairs]
    with pytest.raises(PlanMismatchError, match=r"tensor 'w0' of the source is f32\[12\], and of the plan f32\[2, 6\]"):
        list(pack(plan, all_wrong))


def test_like_tensors_whose_sizes_make_up_for_each_other_are_named():
    """Their bytes would fill the run exactly, each in the other's place."""
    pairs = [("a", patterned(torch.float32, 1, 5)), ("b", patterned(torch.float32, 2, 5))]
    plan = plan_buckets(specs_of(pairs), 1 << 10)
    with pytest.raises(PlanMismatchError, match=r"tensor 'a' of the source is f32\[2, 5\], and of the plan f32\[1, 5\]"):
        list(pack(plan, [("a", pairs[1][1]), ("b", pairs[0][1])]))


# ------------------------------------------------------------------------------------------------------------------ B12 end


def test_b12_the_empty_model_round_trips():
    plan = plan_buckets(specs_of([]), 8)
    assert plan.buckets == ()
    assert list(unpack(plan, pack(plan, []))) == []
    assert list(unpack(plan, pack(plan, iter([])))) == []
    assert list(unpack(plan, collect(apack(plan, as_async([]))))) == []
    buckets = list(pack_stream(iter([]), 8))
    assert len(buckets) == 1, "the end itself has to travel"
    assert list(unpack_stream(buckets)) == []
    assert list(iter_buckets([], 8)) == []
    with pytest.raises(PlanMismatchError, match="the source goes on with 'w0' after the plan's 0 tensors"):
        list(pack(plan, PAIRS))


@given(st.data())
def test_b12_a_stream_cut_anywhere_raises_and_names_what_is_missing(data):
    pairs = data.draw(named().filter(bool))
    plan = plan_buckets(specs_of(pairs), data.draw(capacities(pairs)))
    buckets = list(pack(plan, pairs))
    cut = data.draw(st.integers(0, len(buckets) - 1))
    unpacker = Unpacker(plan)
    arrived = [name for bucket in buckets[:cut] for name, _ in unpacker.feed(bucket)]
    with pytest.raises(IncompleteStreamError) as error:
        unpacker.close()
    assert f"the stream ended after {cut} of {len(buckets)} buckets" in str(error.value)
    missing = [spec.name for spec in plan.specs if spec.alias_of is None and spec.name not in arrived]
    assert all(repr(name) in str(error.value) for name in missing[:3])
    streamed = list(pack_stream(pairs, plan.capacity))
    with pytest.raises(IncompleteStreamError, match="its last bucket is missing"):
        list(unpack_stream(streamed[: data.draw(st.integers(0, len(streamed) - 1))]))


def test_b12_a_stream_cut_inside_a_tensor_says_which():
    buckets = list(pack_stream([("big", torch.ones(10))], 16))
    with pytest.raises(
        IncompleteStreamError, match="ended after 2 buckets in the middle of tensor 'big'; its last bucket is missing"
    ):
        list(unpack_stream(buckets[:2]))


def receivers():
    plan = plan_buckets(specs_of(PAIRS), 32)
    yield Unpacker(plan), list(pack(plan, PAIRS))
    yield StreamUnpacker(), list(pack_stream(PAIRS, 32))


def test_b12_fed_twice_out_of_order_or_after_the_end():
    for receiver, buckets in receivers():
        with pytest.raises(IncompleteStreamError, match="bucket 1 is out of order; the next one is bucket 0"):
            receiver.feed(buckets[1])
        receiver.feed(buckets[0])
        with pytest.raises(IncompleteStreamError, match="bucket 0 was fed already; the next one is bucket 1"):
            receiver.feed(buckets[0])
        for bucket in buckets[1:]:
            receiver.feed(bucket)
        receiver.close()
        for bucket in (buckets[0], buckets[-1]):
            with pytest.raises(IncompleteStreamError, match=f"bucket {bucket.index} came after the"):
                receiver.feed(bucket)


def test_b12_a_round_can_be_begun_again():
    plan = plan_buckets(specs_of(PAIRS), 8)
    unpacker = Unpacker(plan)
    buckets = list(pack(plan, PAIRS, version=3))
    unpacker.feed(buckets[0])
    assert unpacker.version == 3
    unpacker.restart()
    assert unpacker.version is None
    out = [pair for bucket in buckets for pair in unpacker.feed(bucket)]
    unpacker.close()
    assert picture(out) == picture(PAIRS)


def test_b12_a_streams_version_is_checked():
    buckets = list(pack_stream(PAIRS, 32, version=4))
    with pytest.raises(IntegrityError, match="bucket 0 is of version 4, and this stream is version 5"):
        list(unpack_stream(buckets, version=5))
    assert picture(unpack_stream(buckets, version=4)) == picture(PAIRS)


def test_b12_buckets_of_two_streams_do_not_mix():
    first = list(pack_stream(PAIRS, 32))
    second = list(pack_stream([(n + "x", t) for n, t in PAIRS], 32))
    with pytest.raises(PlanMismatchError, match="bucket 1 does not follow the buckets fed before it: it is of another stream"):
        list(unpack_stream([first[0], second[1]]))
