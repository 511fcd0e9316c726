"""Workers whose engine has several ranks (W9): each has its part of one update, and what goes wrong in one fails for all."""

import time

import pytest
import torch
import xxhash

from rollout_core.errors import IntegrityError, TransferError, WorkerError
from rollout_core.testing.fake_engine import FakeModels, FakeWorker
from rollout_core.transfer.targets import named_weights
from rollout_core.workers import SamplingParams
from rollout_core.workers.shards import WHOLE, Shard, gap_in, joined
from support.ranked import BIAS, EMBEDDING, NORM, PROJ, RankedWorker

GREEDY = SamplingParams(response_length=6, ignore_eos=True)
PROMPTS = [[5], [3, 9]]
LARGE, SMALL = 1 << 20, 64  # bytes of a bucket: all at once, and the embeddings in many pieces


@pytest.fixture
def folder(tmp_path):
    FakeModels.make_small_model(tmp_path)
    return tmp_path


@pytest.fixture
def start(folder):
    """A worker on so many ranks, and a model for it."""
    workers = []

    def start(ranks, **options):
        workers.append(RankedWorker(folder, ranks=ranks, **options))
        return workers[-1], changed(folder, 3)

    yield start
    for worker in workers:
        worker.close()


def changed(folder, seed):
    model = FakeModels.load_trainer(folder)
    FakeModels.perturb(model, 1.0, seed)
    return model


def digests_of(model):
    return {name: xxhash.xxh3_128_hexdigest(tensor.detach().numpy()) for name, tensor in named_weights(model).items()}


def tokens_of(worker):
    return [list(one.token_ids) for one in worker.generate(PROMPTS, GREEDY)]


def fault(worker, words):
    worker.call("fault", words.encode())


def versions(worker):
    return [int(version) for version in worker.call("versions").split()]


@pytest.mark.parametrize("capacity", [LARGE, SMALL])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 16])
def test_w9_each_rank_has_its_part_of_one_update(start, ranks, capacity):
    """61 rows of embeddings on 2, 3, 5 and 16 ranks: some have fewer, and with 16 some have none."""
    worker, model = start(ranks)
    assert worker.ranks == ranks
    for version in (1, 2):
        FakeModels.perturb(model, 1.0, version)
        report = worker.sync_weights(model, capacity=capacity)
        assert report.version == version
        assert versions(worker) == [version] * ranks
        assert worker.tensor_digests() == digests_of(model)
        assert report.digest == worker.weights_digest()
        assert tokens_of(worker) == [FakeModels.greedy_reference(model, prompt, 6, set())[0] for prompt in PROMPTS]
    assert torch.equal(worker.read_tensor(PROJ), model.model.proj.weight)


def test_the_digest_of_an_update_does_not_depend_on_the_ranks(start, folder):
    with FakeWorker(folder) as whole:
        expected = whole.sync_weights(changed(folder, 3)).digest
    for ranks in (2, 3):
        worker, model = start(ranks)
        assert worker.sync_weights(model).digest == expected


@pytest.mark.parametrize("capacity", [LARGE, SMALL])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("name", [EMBEDDING, PROJ, BIAS, NORM, "lm_head.weight"])
def test_w9_one_value_of_one_rank_is_seen_with_its_rank_and_name(start, name, rank, capacity):
    worker, model = start(3)
    fault(worker, f"{rank} changes {name}")
    with pytest.raises(WorkerError, match=rf"1 parts of tensors .*on ranks \[{rank}\] of 3, first '{name}' on rank {rank}: sent"):
        worker.sync_weights(model, capacity=capacity)
    assert worker.version == 0
    with pytest.raises(WorkerError, match="weights are unusable"):
        tokens_of(worker)
    fault(worker, f"{rank} ")
    assert worker.sync_weights(model).digest == worker.weights_digest()


def test_copies_that_differ_are_not_read_as_one_tensor(start):
    worker, model = start(2)
    fault(worker, f"1 changes {NORM}")
    worker.sync_weights(model, readback=False)
    with pytest.raises(WorkerError, match=f"rank 1 has other values of tensor '{NORM}' than a rank before it"):
        worker.read_tensor(NORM)
    with pytest.raises(WorkerError, match=f"rank 1 has other values of tensor '{NORM}'"):
        worker.tensor_digests()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("kind", "message"), [("refuses", "this rank has no room"), ("fails", "this rank cannot load"), ("is gone", "closed its end")]
)
def test_w9_a_rank_that_fails_fails_all(start, kind, message, rank):
    """None of them advances, and the next update is everybody's again."""
    worker, model = start(3)
    worker.sync_weights(model)
    before = tokens_of(worker)
    FakeModels.perturb(model, 1.0, 8)
    fault(worker, f"{rank} {kind}")
    with pytest.raises((WorkerError, TransferError), match=f"receiver {rank}: .*{message}"):
        worker.sync_weights(model, capacity=SMALL)
    assert worker.version == 1
    assert set(versions(worker)) == {1}
    if kind == "refuses":
        assert tokens_of(worker) == before
    fault(worker, f"{rank} ")
    assert worker.sync_weights(model).version == 2
    assert versions(worker) == [2, 2, 2]
    assert tokens_of(worker) != before


def test_w9_a_damaged_bucket_is_refused_by_every_rank(start):
    worker, model = start(2)
    before = tokens_of(worker)

    def flip(bucket):
        bucket.buffer[0] ^= 1
        return bucket

    with pytest.raises(IntegrityError, match="bucket 0"):
        worker.sync_weights(model, inject=flip)
    assert tokens_of(worker) == before
    assert worker.sync_weights(model).version == 1


def test_w9_a_rank_that_counts_otherwise_fails_all(start):
    worker, model = start(2)
    fault(worker, "1 miscounts")
    with pytest.raises(WorkerError, match="rank 1 has version 2"):
        worker.sync_weights(model)
    assert worker.version == 0


def test_w9_a_rank_that_is_silent_is_waited_for_no_longer_than_the_timeout(start):
    worker, model = start(2, process=True, timeout=2.0)
    fault(worker, "1 hangs")
    began = time.monotonic()
    with pytest.raises(TransferError, match="receiver 1: "):
        worker.sync_weights(model)
    assert time.monotonic() - began < 8  # the update's timeout, and that of the question after it
    assert worker.version == 0
    assert worker._link.host.process.poll() is not None  # the engine is not left to go on


def test_a_part_that_is_on_no_known_rank_is_refused_before_anything_is_sent(start):
    worker, model = start(2)
    fault(worker, f"0 hides {EMBEDDING}")
    before = tokens_of(worker)
    with pytest.raises(WorkerError, match=f"31 to 61 of its dimension 0 of tensor '{EMBEDDING}'.*readback=False"):
        worker.sync_weights(model)
    assert tokens_of(worker) == before
    assert worker.sync_weights(model, readback=False).version == 1
    assert tokens_of(worker) != before


# Parts of tensors


def parts(*ranges, dim=0):
    return Shard(dim, tuple(ranges))


@pytest.mark.parametrize(
    ("shards", "gap"),
    [
        ([WHOLE], None),
        ([WHOLE, parts((0, 1))], None),
        ([parts((0, 3)), parts((3, 6))], None),
        ([parts((3, 6)), parts((0, 3)), parts((0, 3))], None),  # heads that two ranks have
        ([parts((0, 1), (4, 5)), parts((1, 4), (5, 6))], None),  # fused
        ([parts((0, 6)), parts((6, 6))], None),
        ([], "any of it"),
        ([parts((0, 3))], "3 to 6 of its dimension 0"),
        ([parts((1, 6))], "0 to 1 of its dimension 0"),
        ([parts((0, 2)), parts((3, 6))], "2 to 3 of its dimension 0"),
        ([parts((0, 2), dim=1)], "2 to 4 of its dimension 1"),
        ([parts((0, 6)), parts((0, 4), dim=1)], "it cut along one dimension"),
    ],
)
def test_what_no_rank_has_is_said(shards, gap):
    assert gap_in((6, 4), shards) == gap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_parts_are_joined_to_what_they_were_cut_from(dtype):
    whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for shards in (
        [parts((0, 4)), parts((4, 6)), parts((4, 6))],
        [parts((0, 1), (4, 5)), parts((1, 4), (5, 6))],
        [parts((0, 3), dim=1), parts((3, 4), dim=1), parts((4, 4), dim=1)],
        [WHOLE, WHOLE],
    ):
        found = joined("w", (6, 4), {rank: (shard, shard.of(whole).clone()) for rank, shard in enumerate(shards)})
        assert torch.equal(found.view(torch.uint8), whole.view(torch.uint8))
    with pytest.raises(WorkerError, match="no rank has 4 to 6 of its dimension 0 of tensor 'w'"):
        joined("w", (6, 4), {0: (parts((0, 4)), whole[:4])})
    with pytest.raises(WorkerError, match="has no tensor 'w'"):
        joined("w", (6, 4), {})
