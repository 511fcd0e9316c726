"""B8 ownership and B15 memory: who may write where, and what is kept alive."""

from __future__ import annotations

import asyncio
import gc
import weakref

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
from rollout_core.testing.oracles import bytes_of, picture
from support.tensors import capacities, named, patterned, plan_options


def memory(tensor: torch.Tensor) -> range:
    storage = tensor.untyped_storage()
    return range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    first, second = memory(a), memory(b)
    return max(first.start, second.start) < min(first.stop, second.stop)


def scribble(tensor: torch.Tensor) -> None:
    """Change every byte of a tensor's storage, whatever its dtype."""
    storage = tensor.detach().untyped_storage()
    if storage.nbytes():
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        whole ^= 0xFF


@given(st.data())
def test_b8_writing_to_a_source_after_its_bucket_changes_nothing(data):
    pairs = data.draw(named(max_size=5))
    expected = {name: rest for name, *rest in picture(pairs)}
    capacity, options = data.draw(capacities(pairs)), data.draw(plan_options)
    plan = plan_buckets(specs_of(pairs), capacity, **options)
    for buckets, read in (
        (list(pack(plan, pairs)), lambda b: unpack(plan, b)),
        (list(pack_stream(pairs, capacity)), unpack_stream),
        (list(iter_buckets(pairs, capacity)), lambda b: [pair for bucket in b for pair in bucket]),
    ):
        for storage in {t.untyped_storage().data_ptr(): t for _, t in pairs}.values():
            scribble(storage)
        assert {name: rest for name, *rest in picture(read(buckets))} == expected
        for storage in {t.untyped_storage().data_ptr(): t for _, t in pairs}.values():
            scribble(storage)  # back again


def scratch(pairs):
    """A source that yields one piece of memory under every name, as a trainer that gathers into a fixed buffer does."""
    buffer = torch.empty(max((t.numel() * t.dtype.itemsize for _, t in pairs), default=0), dtype=torch.uint8)
    for name, tensor in pairs:
        raw = (
            torch.frombuffer(bytearray(bytes_of(tensor)), dtype=torch.uint8)
            if tensor.numel()
            else torch.empty(0, dtype=torch.uint8)
        )
        view = buffer[: len(raw)]
        view.copy_(raw)
        yield name, view.view(tensor.dtype).view(tensor.shape)


@given(st.data())
def test_b8_a_generator_may_reuse_its_memory_for_every_tensor(data):
    pairs = [
        (name, tensor.clone() if not tensor.dtype.is_complex else patterned(torch.float32, 3))
        for name, tensor in data.draw(
            named(
                max_size=5, elements=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]).map(lambda d: patterned(d, 3, 5))
            )
        )
    ]
    capacity, options = data.draw(capacities(pairs)), data.draw(plan_options)
    groups = [[name for name, _ in pairs[:3:2]]] if sum(t.nbytes for _, t in pairs[:3:2]) + 200 <= capacity else []
    plan = plan_buckets(specs_of(pairs, aliases=False), capacity, groups=groups, **options)
    expected = {name: rest for name, *rest in picture(pairs)}
    assert {name: rest for name, *rest in picture(unpack(plan, pack(plan, scratch(pairs))))} == expected
    assert {name: rest for name, *rest in picture(unpack_stream(pack_stream(scratch(pairs), capacity, groups=groups)))} == expected
    lists = [pair for bucket in iter_buckets(scratch(pairs), capacity) for pair in bucket]
    assert {name: rest for name, *rest in picture(lists)} == expected


@given(st.data())
def test_b8_views_alias_only_their_bucket_and_copies_nothing(data):
    pairs = data.draw(named(max_size=6))
    capacity = data.draw(capacities(pairs))
    plan = plan_buckets(specs_of(pairs), capacity, **data.draw(plan_options))
    for copy in (False, True):
        unpacker, streamer = Unpacker(plan, copy=copy), StreamUnpacker(copy=copy)
        for receiver, buckets in ((unpacker, pack(plan, pairs)), (streamer, pack_stream(pairs, capacity))):
            seen = []
            for bucket in buckets:
                for name, tensor in receiver.feed(bucket):
                    aliases_bucket = overlap(tensor, bucket.buffer)
                    assert not (copy and aliases_bucket), name
                    exact = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.dtype.itemsize
                    assert aliases_bucket or exact, f"{name} keeps more memory alive than its bytes"
                    assert not any(overlap(tensor, source) for _, source in pairs)
                seen.append(bucket)
            assert all(bucket.buffer.untyped_storage().nbytes() == bucket.nbytes for bucket in seen), "buffers are exact"


def test_b8_unpacking_is_views():
    pairs = [("a", patterned(torch.bfloat16, 3)), ("b", patterned(torch.float32, 2, 2)), ("s", patterned(torch.uint8, 3))]
    plan = plan_buckets(specs_of(pairs), 64)
    (bucket,) = pack(plan, pairs)
    out = dict(Unpacker(plan).feed(bucket))
    bucket.buffer.zero_()
    assert all(not tensor.view(torch.uint8).any() for tensor in out.values())


@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_b8_a_buffer_at_an_odd_address_still_unpacks(shift):
    import dataclasses

    pairs = [("a", patterned(torch.complex128, 3)), ("b", patterned(torch.float32, 2, 2))]
    plan = plan_buckets(specs_of(pairs), 64)
    (bucket,) = pack(plan, pairs)
    moved = torch.empty(bucket.nbytes + shift, dtype=torch.uint8)[shift:]
    moved.copy_(bucket.buffer)
    for algorithm in ("xxh3-128", "multilinear-128", "block-multilinear-128"):
        (sealed,) = pack(plan, pairs, digest=algorithm)
        assert picture(unpack(plan, [dataclasses.replace(sealed, buffer=moved)])) == picture(pairs)


def test_b8_iter_buckets_copies_hold_exactly_their_bytes():
    big = patterned(torch.float32, 1000)
    ((_, part),) = next(iter(iter_buckets([("part", big[10:13])], 1 << 20)))
    assert part.untyped_storage().nbytes() == 12
    ((_, same),) = next(iter(iter_buckets([("part", big[10:13])], 1 << 20, copy=False)))
    assert same.data_ptr() == big[10:13].data_ptr()


def test_b8_a_packers_buckets_may_all_be_kept():
    """Reusing buffers must not make a list of buckets garbage."""
    pairs = [(f"w{i}", patterned(torch.uint8, 64, seed=i)) for i in range(8)]
    plan = plan_buckets(specs_of(pairs), 64)
    packer = Packer(plan)
    rounds = [list(packer.pack(pairs)) for _ in range(3)]
    for buckets in rounds:
        assert picture(unpack(plan, buckets)) == picture(pairs)


def test_b8_a_buffer_is_not_reused_while_only_an_unpacked_view_is_left():
    pairs = [(f"w{i}", patterned(torch.uint8, 64, seed=i)) for i in range(8)]
    plan = plan_buckets(specs_of(pairs), 64)
    packer = Packer(plan)
    out = dict(unpack(plan, packer.pack(pairs)))  # the buckets themselves are gone
    for _ in range(3):
        for bucket in packer.pack([(name, torch.zeros_like(tensor)) for name, tensor in pairs]):
            del bucket
    assert picture(out.items()) == picture(pairs)


def addresses(packer, source) -> list[int]:
    found = []
    for bucket in packer.pack(source):
        found.append(bucket.buffer.data_ptr())
        del bucket
    return found


@pytest.mark.parametrize("as_source", [list, iter, dict])
def test_b15_n_rounds_use_the_memory_of_one_bucket(as_source):
    pairs = [(f"w{i}", patterned(torch.uint8, 64, seed=i)) for i in range(20)]
    plan = plan_buckets(specs_of(pairs), 128)
    packer = Packer(plan)
    used = [address for _ in range(5) for address in addresses(packer, as_source(pairs))]
    assert len(used) == 50
    assert len(set(used)) == 1


@pytest.mark.parametrize("as_source", [list, iter, dict])
def test_b15_a_tensor_in_pieces_uses_the_memory_of_one_bucket(as_source):
    pairs = [("a", patterned(torch.uint8, 7)), ("big", patterned(torch.uint8, 1000)), ("z", patterned(torch.uint8, 50))]
    packer = Packer(plan_buckets(specs_of(pairs), 100))
    used = [address for _ in range(3) for address in addresses(packer, as_source(pairs))]
    assert len(used) == 36
    assert len(set(used)) == 1


@pytest.mark.parametrize("kind", ["list", "iterator", "async"])
def test_b15_async_packing_uses_the_memory_of_one_bucket(kind):
    pairs = [("a", patterned(torch.uint8, 7)), ("big", patterned(torch.uint8, 1000)), ("z", patterned(torch.uint8, 50))]
    packer = Packer(plan_buckets(specs_of(pairs), 100))

    async def made():
        for pair in pairs:
            yield pair

    async def run():
        found = []
        async for bucket in packer.apack({"list": lambda: pairs, "iterator": lambda: iter(pairs), "async": made}[kind]()):
            found.append(bucket.buffer.data_ptr())
            del bucket
        return found

    used = asyncio.run(run())
    assert len(used) == 12
    assert len(set(used)) == 1


@pytest.mark.parametrize("sizes", [[1000], [50] * 20, [7, 300, 50, 99, 120]], ids=["pieces", "like", "mixed"])
def test_b15_a_stream_uses_the_memory_of_two_buckets(sizes):
    """One is held back until it is known not to be the last."""
    used = []
    for bucket in pack_stream(((f"w{i}", patterned(torch.uint8, size)) for i, size in enumerate(sizes)), 100):
        used.append(bucket.buffer.data_ptr())
        del bucket
    assert len(used) >= 5
    assert len(set(used)) <= 2


def test_b15_buckets_of_all_sizes_use_the_memory_of_the_largest():
    sizes = [10, 100, 30, 7, 90, 64]
    pairs = [(f"w{i}", patterned(torch.uint8, size)) for i, size in enumerate(sizes)]
    packer = Packer(plan_buckets(specs_of(pairs), 100))
    used = [address for _ in range(3) for address in addresses(packer, pairs)]
    assert len(used) >= 12
    assert len(set(used)) == 1


class Watched:
    """A source that makes its tensors when asked and counts the bytes of those whose memory is alive, whoever looks at it."""

    def __init__(self, sizes):
        self.sizes = sizes
        self.memory = []
        self.made = 0
        self.peak = 0
        self.closed = False

    def __iter__(self):
        try:
            for i, size in enumerate(self.sizes):
                array = patterned(torch.uint8, size, seed=i).numpy().copy()
                self.memory.append(weakref.ref(array))
                tensor = torch.from_numpy(array)
                del array  # torch keeps it as long as anything is in its memory
                self.made += 1
                self.peak = max(self.peak, self.held())
                yield f"w{i}", tensor
                del tensor
        finally:
            self.closed = True

    def held(self) -> int:
        return sum(array.nbytes for ref in self.memory if (array := ref()) is not None)


@pytest.mark.parametrize("order", ["given", "packed"])
@pytest.mark.parametrize("kind", ["plan", "stream", "lists"])
def test_b15_a_generators_tensors_are_let_go_one_by_one(kind, order):
    sizes = [40, 30, 20, 100, 5, 60, 300, 7, 7]
    source = Watched(sizes)
    plan = plan_buckets(specs_of([(f"w{i}", patterned(torch.uint8, n)) for i, n in enumerate(sizes)]), 100, order=order)
    buckets = {
        "plan": lambda: pack(plan, iter(source)),
        "stream": lambda: pack_stream(iter(source), 100),
        "lists": lambda: iter_buckets(iter(source), 100),
    }[kind]()
    for bucket in buckets:
        assert source.held() <= max(sizes), "one tensor at a time, and between buckets no more than the next"
        del bucket
    assert source.peak == max(sizes), "when the next is made the last is gone"
    assert source.closed


@pytest.mark.parametrize("kind", ["plan", "stream", "lists"])
def test_b15_an_async_generators_tensors_are_let_go_one_by_one(kind):
    sizes = [40, 30, 20, 100, 5, 60, 300, 7, 7]
    source = Watched(sizes)
    plan = plan_buckets(specs_of([(f"w{i}", patterned(torch.uint8, n)) for i, n in enumerate(sizes)]), 100)

    async def made():
        for name, tensor in source:
            yield name, tensor
            del tensor

    async def run():
        buckets = {
            "plan": lambda: apack(plan, made()),
            "stream": lambda: apack_stream(made(), 100),
            "lists": lambda: aiter_buckets(made(), 100),
        }[kind]()
        return [0 async for _ in buckets]

    assert len(asyncio.run(run())) >= 5
    assert source.peak == max(sizes), "when the next is made the last is gone"
    assert source.closed


@pytest.mark.parametrize("kind", ["plan", "stream", "lists"])
def test_b15_never_looks_further_ahead_than_it_must(kind):
    """A planned bucket asks for its own tensors only; without a plan the next has to be seen to know that it does not fit."""
    source = Watched([50, 50, 50, 50, 50, 50])
    plan = plan_buckets(specs_of([(f"w{i}", patterned(torch.uint8, 50)) for i in range(6)]), 100)
    buckets = {
        "plan": lambda: pack(plan, iter(source)),
        "stream": lambda: pack_stream(iter(source), 100),
        "lists": lambda: iter_buckets(iter(source), 100),
    }[kind]()
    ahead = 0 if kind == "plan" else 1
    assert source.made == 0, "nothing is asked for before the first bucket is"
    for number, _ in enumerate(buckets, 1):
        assert source.made <= min(2 * number + ahead, 6)


def test_b15_nothing_of_a_source_is_kept_between_rounds():
    source = {f"w{i}": patterned(torch.uint8, 64) for i in range(4)}
    watch = [weakref.ref(tensor) for tensor in source.values()]
    plan = plan_buckets(specs_of(source), 128)
    packer = Packer(plan)
    for bucket in packer.pack(source):
        del bucket
    del source
    gc.collect()
    assert [ref() for ref in watch] == [None] * 4


def test_b15_idle_buffers_are_let_go():
    """After a caller kept a whole round and dropped it, the packer keeps what it needs and not the model."""
    pairs = [(f"w{i}", patterned(torch.uint8, 64)) for i in range(10)]
    plan = plan_buckets(specs_of(pairs), 64)
    packer = Packer(plan)
    kept = list(packer.pack(pairs))
    assert len(packer._pool._buffers) == 10
    del kept
    addresses(packer, pairs)
    assert len(packer._pool._buffers) <= 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: torch.empty(n + 1, dtype=torch.uint8), r"allocate\(12\) returned torch.uint8 of shape \[13\]"),
        (lambda n: torch.empty(n // 4), r"allocate\(12\) returned torch.float32 of shape \[3\]"),
        (lambda n: torch.empty(2 * n, dtype=torch.uint8)[::2], "contiguous"),
        (lambda n: torch.empty(n + 1, dtype=torch.uint8)[1:], "does not start at a multiple of 16 bytes"),
    ],
)
def test_b8_an_allocator_that_returns_something_else_is_refused(returned, message):
    pairs = [("a", torch.ones(3))]
    plan = plan_buckets(specs_of(pairs), 12)
    with pytest.raises(ValueError, match=message):
        list(pack(plan, pairs, allocate=returned))
    with pytest.raises(ValueError, match=message):
        list(pack_stream(pairs, 12, allocate=returned))


def test_b8_an_allocators_memory_is_where_the_bytes_go():
    arena = torch.full((1024,), 0xEE, dtype=torch.uint8)
    given_out = []

    def allocate(nbytes):
        start = 64 * len(given_out)
        given_out.append(start)
        return arena[start : start + nbytes]

    pairs = [("a", patterned(torch.float32, 8)), ("b", patterned(torch.float32, 8, seed=5))]
    plan = plan_buckets(specs_of(pairs), 32)
    assert picture(unpack(plan, pack(plan, pairs, allocate=allocate))) == picture(pairs)
    assert bytes(arena[:32].numpy()) == bytes_of(pairs[0][1])
    assert bytes(arena[64:96].numpy()) == bytes_of(pairs[1][1])
    given_out.clear()
    assert picture(unpack_stream(pack_stream([("a", pairs[0][1])], 64, allocate=allocate))) == picture(pairs[:1])


def test_buffers_are_made_on_the_sources_device():
    """Seen on the meta device, which is the other one that every machine has."""
    from rollout_core.bucketing.buffers import BufferPool

    pool = BufferPool()
    assert pool.take(8, torch.device("meta")).device.type == "meta"
    buffer = pool.take(8, torch.device("cpu"), room=64)
    assert (buffer.shape, buffer.untyped_storage().nbytes()) == ((8,), 8)
    assert pool.trim(torch.empty(8, dtype=torch.uint8), 3).shape == (3,), "what is not the pool's is sliced"
    address = buffer.data_ptr()
    del buffer
    assert pool.take(64, torch.device("cpu")).data_ptr() == address, "there was room for more"
