"""Packing small tensors in parallel: the same bytes, and no job left behind."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch

from rollout_core.bucketing import Packer, copying, plan_buckets, specs_of, unpack
from rollout_core.errors import PlanMismatchError
from rollout_core.testing.oracles import bytes_of, picture
from support.tensors import from_bytes, patterned


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        yield executor


@pytest.fixture(autouse=True)
def small_jobs(monkeypatch):
    """Jobs of a few tensors, so that small inputs are cut too."""
    monkeypatch.setattr(copying, "JOB", 64)


def test_b1_jobs_fill_every_byte(pool):
    pairs = {f"w{i}": patterned(torch.bfloat16, i % 4 + 1, 5, seed=i) for i in range(100)}
    plan = plan_buckets(specs_of(pairs), 700)
    packer = Packer(plan, executor=pool)
    for _ in range(2):
        out = dict(unpack(plan, packer.pack(pairs)))
        assert {name: bytes_of(tensor) for name, tensor in out.items()} == {name: bytes_of(t) for name, t in pairs.items()}


def test_jobs_are_really_cut(pool, monkeypatch):
    submitted = []
    original = pool.submit
    monkeypatch.setattr(pool, "submit", lambda *args, **kwargs: submitted.append(args) or original(*args, **kwargs))
    pairs = {f"w{i}": patterned(torch.bfloat16, 2, 5, seed=i) for i in range(20)}
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    list(Packer(plan, executor=pool).pack(pairs))
    assert len(submitted) == 20 * 20 // 64
    assert sum(len(job.args[0]) for (job,) in submitted) == 20


def test_a_buffer_elsewhere_is_filled_one_by_one(pool):
    pairs = {f"w{i}": patterned(torch.bfloat16, 2, 5, seed=i) for i in range(20)}
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    (run,) = copying.runs_of(plan.buckets[0])
    assert copying.write_run(torch.empty(plan.nbytes, dtype=torch.uint8, device="meta"), run, list(pairs.values()), pool) is False


def test_large_tensors_are_left_to_torch(pool, monkeypatch):
    monkeypatch.setattr(copying, "SMALL", 8)
    monkeypatch.setattr(pool, "submit", lambda *args: pytest.fail("a job was made"))
    pairs = {f"w{i}": patterned(torch.bfloat16, 2, 5, seed=i) for i in range(20)}
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    out = dict(unpack(plan, Packer(plan, executor=pool).pack(pairs)))
    assert {name: bytes_of(tensor) for name, tensor in out.items()} == {name: bytes_of(t) for name, t in pairs.items()}


def test_there_are_no_more_jobs_than_tensors(pool, monkeypatch):
    monkeypatch.setattr(copying, "JOB", 1)
    pairs = {f"w{i}": patterned(torch.bfloat16, 2, 5, seed=i) for i in range(3)}
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    assert copying._jobs(copying.Run(plan.buckets[0].slots, (20, 20, 20), alike=True), 10) == [
        (0, 1, 0, 2),
        (1, 2, 2, 4),
        (2, 3, 4, 6),
    ]
    out = dict(unpack(plan, Packer(plan, executor=pool).pack(pairs)))
    assert {name: bytes_of(tensor) for name, tensor in out.items()} == {name: bytes_of(t) for name, t in pairs.items()}


def test_parameters_that_require_grad_are_packed_in_jobs(pool):
    """Grad mode is a thread's own, and writing into memory from a tensor that requires grad is refused where it is on."""
    model = torch.nn.ParameterList([torch.nn.Parameter(patterned(torch.float32, 2, 3, seed=i)) for i in range(30)])
    plan = plan_buckets(specs_of(model), 1 << 20)
    out = dict(unpack(plan, Packer(plan, executor=pool).pack(model)))
    assert all(torch.equal(out[name], p) for name, p in model.named_parameters())


def test_a_wrong_tensor_in_one_job_is_named_and_no_job_outlives_it(pool):
    pairs = {f"w{i}": patterned(torch.float32, 2, 6, seed=i) for i in range(40)}
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    packer = Packer(plan, executor=pool)
    with pytest.raises(PlanMismatchError, match=r"tensor 'w33' of the source is f32\[3, 4\], and of the plan f32\[2, 6\]"):
        list(packer.pack({**pairs, "w33": torch.ones(3, 4)}))
    assert {n: bytes_of(t) for n, t in unpack(plan, packer.pack(pairs))} == {n: bytes_of(t) for n, t in pairs.items()}


def test_b1_neighbours_that_no_concatenation_can_write(pool):
    """Scalars have no first dimension to be joined along, and rows of nothing have no size to divide by."""
    pairs = [(f"scalar{i}", patterned(torch.float32, 1, seed=i)[0]) for i in range(40)]
    pairs += [(f"empty{i}", torch.empty(0, 3)) for i in range(40)]
    pairs += [(f"rows of nothing{i}", torch.empty(3, 0)) for i in range(40)]
    pairs += [(f"empty again{i}", torch.empty(0, 3)) for i in range(2)]
    pairs += [(f"full{i}", patterned(torch.float32, 2, 3, seed=i)) for i in range(40)]
    pairs += [(f"empty after{i}", torch.empty(0, 3)) for i in range(2)]
    pairs += [(f"scalar after{i}", patterned(torch.float32, 1, seed=i)[0]) for i in range(3)]
    pairs += [
        ("vector", patterned(torch.float32, 5)),
        ("scalar again", patterned(torch.float32, 1)[0]),
        ("nothing", torch.empty(0)),
    ]
    for source in (pairs, pairs[::-1]):
        plan = plan_buckets(specs_of(source), 1 << 20)
        assert picture(unpack(plan, Packer(plan, executor=pool).pack(source))) == picture(source)


@pytest.mark.parametrize("make", [dict, list, tuple])
@pytest.mark.parametrize("jobs", [False, True])
@pytest.mark.parametrize("as_parameter", [False, True])
@pytest.mark.parametrize("count", [2, 30])
def test_like_tensors_are_never_copied_one_by_one(pool, monkeypatch, count, as_parameter, jobs, make):
    """That each call costs more than its bytes is why they are joined; the bytes alone would not show it."""
    monkeypatch.setattr("rollout_core.bucketing.target.write_slot", lambda *_: pytest.fail("one by one"))
    pairs = [(f"w{i}", patterned(torch.float32, i % 3 + 1, 5, 2, seed=i)) for i in range(count)]
    if as_parameter:
        pairs = [(name, torch.nn.Parameter(tensor)) for name, tensor in pairs]
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    out = unpack(plan, Packer(plan, executor=pool if jobs else None).pack(make(pairs)))
    assert picture(out) == picture(pairs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_b1_a_neg_view_among_plain_like_tensors_keeps_its_signalling_nans(dtype):
    raw = bytes.fromhex("017d") * 2 if dtype is torch.float16 else bytes.fromhex("817f") * 2
    values = from_bytes(raw, dtype, (2,))
    pairs = [("a", values), ("b", torch._neg_view(from_bytes(raw, dtype, (2,)))), ("c", values.clone())]
    plan = plan_buckets(specs_of(pairs), 64)
    assert picture(unpack(plan, Packer(plan).pack(pairs))) == picture(pairs)


def submitted_by(pool, monkeypatch, tensors: int, nbytes: int) -> int:
    """How many jobs a packer makes of so many like tensors of so many bytes."""
    submitted = []
    original = pool.submit
    monkeypatch.setattr(pool, "submit", lambda *args: submitted.append(args) or original(*args))
    pairs = {f"w{i}": patterned(torch.uint8, nbytes, seed=i) for i in range(tensors)}
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    assert picture(unpack(plan, Packer(plan, executor=pool).pack(pairs))) == picture(pairs.items())
    return len(submitted)


@pytest.mark.parametrize(
    ("tensors", "nbytes", "jobs"),
    [(4, 31, 0), (4, 32, 2), (4, 47, 2), (4, 48, 3), (4, 99, 4), (4, 100, 0), (200, 1, 3), (3, 5, 0)],
)
def test_jobs_are_as_many_as_the_bytes_are_worth(pool, monkeypatch, tensors, nbytes, jobs):
    """One for each 64 bytes, no more than tensors, none if only one came out, none for tensors that torch shares itself."""
    monkeypatch.setattr(copying, "SMALL", 100)
    assert submitted_by(pool, monkeypatch, tensors, nbytes) == jobs


def test_b8_a_job_that_is_refused_waits_for_those_that_were_not(pool):
    done = []

    def slow():
        time.sleep(0.1)
        done.append(True)
        return True

    def jobs():
        yield slow
        yield slow
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        copying.all_do(pool, jobs())
    assert len(done) == 2


def test_jobs_that_are_cancelled_are_not_waited_for():
    pool = ThreadPoolExecutor(1)
    pool.submit(time.sleep, 0.2)

    def jobs():
        for _ in range(3):
            yield lambda: True
        pool.shutdown(wait=False, cancel_futures=True)

    with pytest.raises(CancelledError):
        copying.all_do(pool, jobs())


def test_b8_an_error_in_one_job_waits_for_the_others(pool, monkeypatch):
    """None may write into the buffer when the caller has it back."""
    done = []

    def slow(tensors, sizes, out):
        if tensors[0][0, 0] == 0:
            raise MemoryError("in the first job")
        time.sleep(0.05)
        done.append(True)
        return True

    monkeypatch.setattr(copying, "_concatenate", slow)
    pairs = {f"w{i}": torch.full((2, 5), i) for i in range(10)}
    plan = plan_buckets(specs_of(pairs), 1 << 20)
    with pytest.raises(MemoryError, match="in the first job"):
        list(Packer(plan, executor=pool).pack(pairs))
    assert len(done) == 9
