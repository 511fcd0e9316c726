"""The arena: what is leased stays leased, what is held stays readable, and memory goes back."""

import gc
import os

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rollout_core.errors import TransferError
from rollout_core.testing.oracles import bytes_of
from rollout_core.transfer.arena import Arena

PAGE = 4096


@pytest.fixture
def arena():
    arena = Arena()
    yield arena
    arena.close()


def pages_of(arena: Arena) -> int:
    """Bytes of memory behind the memfd, as the kernel counts them (in blocks of 512)."""
    return os.fstat(arena.fd).st_blocks * 512


def open_memfds() -> list[str]:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the listing's own
            continue
    return [link for link in links if "rollout-core-arena" in link]


def test_both_sides_see_the_same_bytes(arena):
    total = arena.resize(2, 5000)
    other = Arena(os.dup(arena.fd))
    other.attach(total)
    offset = arena.lease()
    arena.view(offset, 5000)[:] = torch.arange(5000, dtype=torch.int64).to(torch.uint8)
    assert bytes_of(other.view(offset, 5000)) == bytes(i % 256 for i in range(5000))
    other.view(offset, 1)[0] = 77
    assert arena.view(offset, 1)[0] == 77
    other.close()


@pytest.mark.parametrize(
    ("slots", "nbytes", "total"), [(1, 0, PAGE), (2, 1, 2 * PAGE), (2, PAGE, 2 * PAGE), (3, PAGE + 1, 6 * PAGE)]
)
def test_slots_are_whole_pages(arena, slots, nbytes, total):
    assert arena.resize(slots, nbytes) == total
    assert os.fstat(arena.fd).st_size == total
    offsets = [arena.lease() for _ in range(slots)]
    assert sorted(offsets) == [slot * total // slots for slot in range(slots)]


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(-1, 1), (0, -1), (0, 2 * PAGE + 1), (2 * PAGE, 1), (2 * PAGE + 1, 0), (1 << 70, 0)]
)
def test_a_view_out_of_bounds_is_refused(arena, offset, nbytes):
    arena.resize(2, PAGE)
    with pytest.raises(TransferError, match=f"bytes {offset} to {offset + nbytes} are not in the shared memory"):
        arena.view(offset, nbytes)


@pytest.mark.parametrize("offset", [0, 1, 2 * PAGE])
def test_a_view_of_no_bytes_is_an_empty_tensor(arena, offset):
    arena.resize(2, PAGE)
    view = arena.view(offset, 0)
    assert (view.dtype, tuple(view.shape)) == (torch.uint8, (0,))


def test_without_memory_there_is_no_view_and_no_slot(arena):
    for _ in range(2):
        with pytest.raises(TransferError, match="not in the shared memory"):
            arena.view(0, 0)
        assert not arena.has_free_slot
        with pytest.raises(TransferError, match="all 0 slots"):
            arena.lease()
        arena.resize(2, 10)
        arena.vacate()


@pytest.mark.parametrize(("slots", "nbytes"), [(0, 10), (-1, 10), (1, -1), (1, 1 << 62), (1, 1 << 80)])
def test_a_size_that_cannot_be_had_is_refused(arena, slots, nbytes):
    with pytest.raises(TransferError, match="shared memory cannot be had|at least one slot"):
        arena.resize(slots, nbytes)
    assert arena.resize(1, 10) == PAGE
    arena.view(0, 10)


@pytest.mark.parametrize("nbytes", [PAGE + 1, 0, -1])
def test_attaching_to_what_is_not_there_is_refused(arena, nbytes):
    arena.resize(1, PAGE)
    other = Arena(os.dup(arena.fd))
    with pytest.raises(TransferError, match=f"has {PAGE} bytes, and the sender says {nbytes}"):
        other.attach(nbytes)
    other.close()


def test_a_slot_is_released_once(arena):
    arena.resize(2, 10)
    offset = arena.lease()
    arena.release(offset)
    for wrong in (offset, 12345):
        with pytest.raises(TransferError, match=f"offset {wrong} .* is not a slot in use"):
            arena.release(wrong)
    assert len({arena.lease(), arena.lease()}) == 2
    assert not arena.has_free_slot


def test_a_slot_of_before_a_resize_cannot_be_released_after_it(arena):
    arena.resize(2, 10)
    old = arena.lease()
    arena.resize(2, 10)
    with pytest.raises(TransferError, match="not a slot in use"):
        arena.release(old)


class Leases(RuleBasedStateMachine):
    """A slot in use is never handed out, and its bytes are nobody else's (clause T1)."""

    def __init__(self):
        super().__init__()
        self.arena = Arena()
        self.held: dict[int, int] = {}  # offset -> the byte that fills the slot
        self.serial = 0

    @initialize(slots=st.integers(1, 4), nbytes=st.integers(0, 3 * PAGE))
    def start(self, slots, nbytes):
        self.resize(slots, nbytes)

    @rule(slots=st.integers(1, 4), nbytes=st.integers(0, 3 * PAGE))
    def resize(self, slots, nbytes):
        self.arena.resize(slots, nbytes)
        self.slots, self.nbytes = slots, nbytes
        self.held.clear()

    @rule()
    def lease(self):
        if len(self.held) == self.slots:
            with pytest.raises(TransferError, match="in use"):
                self.arena.lease()
            return
        offset = self.arena.lease()
        assert offset not in self.held
        self.serial = self.serial % 255 + 1
        self.held[offset] = self.serial
        self.arena.view(offset, self.nbytes).fill_(self.serial)

    @precondition(lambda self: self.held)
    @rule(choice=st.integers(0, 3))
    def release(self, choice):
        offset = sorted(self.held)[choice % len(self.held)]
        self.arena.release(offset)
        del self.held[offset]

    @rule(offset=st.integers(0, 4).map(lambda slot: slot * PAGE))
    def release_what_may_not_be_leased(self, offset):
        if offset not in self.held:
            with pytest.raises(TransferError, match="not a slot in use"):
                self.arena.release(offset)

    @invariant()
    def what_is_held_is_untouched(self):
        for offset, byte in self.held.items():
            assert bytes_of(self.arena.view(offset, min(self.nbytes, 3))) == bytes([byte]) * min(self.nbytes, 3)
            assert self.nbytes == 0 or int(self.arena.view(offset, self.nbytes)[-1]) == byte
        assert self.arena.has_free_slot == (len(self.held) < getattr(self, "slots", 0))

    def teardown(self):
        self.arena.close()


TestLeases = Leases.TestCase


@pytest.mark.parametrize("nbytes", [10, 100 * PAGE])
def test_resizing_keeps_old_views_readable(arena, nbytes):
    arena.resize(2, 10 * PAGE)
    view = arena.view(9 * PAGE, PAGE)
    view.fill_(42)
    arena.resize(2, nbytes)  # smaller, too: the last page of the old view is past the new end
    assert bytes_of(view) == bytes([42]) * PAGE


def test_vacating_frees_the_pages_and_old_views_read_zeros(arena):
    arena.resize(2, 8 * PAGE)
    view = arena.view(0, 16 * PAGE)
    view.fill_(9)
    assert pages_of(arena) == 16 * PAGE
    arena.vacate()
    assert pages_of(arena) == 0
    assert not view.any()
    arena.resize(1, PAGE)
    assert not arena.view(0, PAGE).any()


def test_vacating_frees_what_an_earlier_larger_size_left(arena):
    arena.resize(2, 8 * PAGE)
    arena.view(0, 16 * PAGE).fill_(9)
    arena.resize(1, 1)
    arena.vacate()
    assert pages_of(arena) == 0


def test_vacating_is_harmless_at_any_time(arena):
    arena.vacate()
    arena.resize(1, 1)
    arena.vacate()
    arena.vacate()
    arena.close()
    arena.vacate()


def test_closing_twice_closes_one_file(arena):
    fd = arena.fd
    arena.resize(1, 1)
    arena.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    unrelated = os.open("/dev/null", os.O_RDONLY)
    assert unrelated == fd, "the number is used again, so that a second close would show"
    arena.close()
    os.fstat(unrelated)
    os.close(unrelated)
    with pytest.raises(TransferError, match="cannot be had"):
        arena.resize(1, 1)


def test_a_forgotten_arena_leaves_no_memory():
    gc.collect()
    before = open_memfds()
    arena = Arena()
    arena.resize(2, PAGE)
    view = arena.view(0, 10)
    del arena
    view.fill_(3)  # what is held is still there
    assert bytes_of(view) == bytes([3]) * 10
    del view
    gc.collect()
    assert open_memfds() == before
