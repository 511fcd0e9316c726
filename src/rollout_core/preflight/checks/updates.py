"""Updates that go wrong, and weights that were let go of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from rollout_core.bucketing import Bucket, plan_buckets, specs_of
from rollout_core.errors import IntegrityError, WorkerError
from rollout_core.preflight.checks.context import CheckFailed, Context, expect, greedy, named_as_in
from rollout_core.preflight.checks.weights import compare
from rollout_core.workers.contract import SamplingParams
from rollout_core.workers.worker import Worker


def damage_is_refused(context: Context) -> str:
    """One flipped bit: the worker refuses the bucket, keeps its version, does not generate, and takes the next good update."""
    worker = context.running()
    version = worker.version
    flipped: list[int] = []

    def flip(bucket: Bucket) -> Bucket:
        if not flipped and bucket.nbytes:
            flipped.append(bucket.index)
            bucket.buffer[bucket.nbytes // 2] ^= 1
        return bucket

    try:
        worker.sync_weights(context.trainer, capacity=context.capacity, inject=flip)
    except IntegrityError as error:
        refusal = str(error).removeprefix("the receiver: ").split(":")[0]
    except WorkerError as error:
        raise CheckFailed(f"a flipped bit in bucket {flipped} got past the bucket's digest: {error}") from error
    else:
        raise CheckFailed(f"a flipped bit in bucket {flipped} was not noticed")
    _same_version(worker, version)
    report = worker.sync_weights(context.trainer, capacity=context.capacity)
    compare(context, worker.tensor_digests())
    return f"{refusal!r}; recovered as version {report.version}"


def _same_version(worker: Worker, version: int) -> None:
    expect(worker.version == version, f"the version went from {version} to {worker.version} in an update that failed")


class Failing(Mapping[str, torch.Tensor]):
    """Weights of which one can be read once, for the plan, and fails when it is to be sent."""

    def __init__(self, weights: Mapping[str, torch.Tensor], name: str) -> None:
        self._weights, self._name, self._reads = weights, name, 0
        self.error = ArithmeticError("planted by preflight")

    def __getitem__(self, name: str) -> torch.Tensor:
        self._reads += name == self._name
        if name == self._name and self._reads > 1:
            raise self.error
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def half_an_update_is_no_update(context: Context) -> str:
    """A source that fails halfway: its error comes out unchanged, and half-loaded weights are never sampled from."""
    worker = context.running()
    version = worker.version
    weights = named_as_in(context.weights(), worker.tensor_digests())
    specs = specs_of(weights)
    capacity = max(16, plan_buckets(specs, context.capacity).nbytes // 4)
    plan = plan_buckets(specs, capacity)
    late = [slot.name for layout in plan.buckets[1:] for slot in layout.slots if slot.start == 0]
    expect(bool(late), "the model has one tensor, and half an update cannot be made of it")
    source = Failing(weights, late[-1])
    sent: list[int] = []

    def count(bucket: Bucket) -> Bucket:
        sent.append(bucket.index)
        return bucket

    try:
        worker.sync_weights(source, capacity=capacity, inject=count)
    except Exception as error:
        if error is not source.error:
            raise CheckFailed(f"the source failed with {source.error!r}, and what came out is {error!r}") from error
    else:
        raise CheckFailed(f"the source failed at {late[-1]!r}, and no error came out")
    _same_version(worker, version)
    try:
        worker.generate(context.prompts[:1], SamplingParams(response_length=1))
    except WorkerError as error:
        refusal = str(error)
    else:
        raise CheckFailed(f"the worker generated with {len(sent)} of {len(plan.buckets)} buckets of an update loaded")
    expect("unusable" in refusal, f"the worker refused to generate for another reason: {refusal}")
    worker.sync_weights(weights, capacity=capacity)
    compare(context, worker.tensor_digests())
    return f"stopped after {len(sent)} of {len(plan.buckets)} buckets; generation refused until the next sync"


def memory_comes_back(context: Context) -> str:
    """Memory is released, twice too; nothing is sampled without weights; with them all is as it was."""
    worker = context.running()
    if "memory" not in worker.capabilities:
        return "this worker keeps its memory, and says so"
    worker.sync_weights(context.trainer, capacity=context.capacity)
    before = greedy(context)
    freed = worker.release_memory()
    again = worker.release_memory()
    expect(again == 0, f"a second release says that it freed {again} bytes")
    worker.resume_memory()
    worker.resume_memory()
    try:
        greedy(context)
    except WorkerError as error:
        expect("unusable" in str(error), f"without weights the worker refused to generate for another reason: {error}")
    else:
        raise CheckFailed("the worker generated after its memory was released, before any weights came")
    version = worker.sync_weights(context.trainer, capacity=context.capacity).version
    tokens = [completion.token_ids for completion in greedy(context)]
    expect(tokens == [completion.token_ids for completion in before], "the same weights gave other tokens after a release")
    return f"{freed / 1e6:.1f} MB freed, as it says; the same tokens with version {version}"
