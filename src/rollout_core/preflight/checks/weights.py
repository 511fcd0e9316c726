"""Weights: planned, sent and read back, bit for bit."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from rollout_core.bucketing import BucketPlan, plan_buckets, specs_of
from rollout_core.preflight.checks.context import CheckFailed, Context, expect, greedy, named_as_in
from rollout_core.transfer.targets import named_weights, persistent_weights
from rollout_core.workers.digests import weight_digest
from rollout_core.workers.names import canonical


def plan_agrees(context: Context) -> str:
    """The trainer's plan survives its manifest: what the worker will read is what the trainer planned."""
    context.trainer = context.models.load_trainer(context.folder)
    plan = plan_buckets(specs_of(context.trainer), context.capacity)
    manifest = plan.to_bytes()
    BucketPlan.from_bytes(manifest).require_same(plan)
    tied = sum(map(len, plan.tied.values()))
    return (
        f"{len(plan.specs)} tensors ({tied} tied), {plan.nbytes / 1e6:.1f} MB in {len(plan.buckets)} buckets, "
        f"manifest {len(manifest) / max(1, len(plan.specs)):.1f} B a tensor"
    )


def starts_equal(context: Context) -> str:
    """Before any sync the worker holds what the folder holds."""
    return compare(context, context.running().tensor_digests())


def weights_arrive(context: Context) -> str:
    """Every parameter and buffer of the changed trainer, read back from the worker, bit for bit, as a newer version."""
    worker = context.running()
    version, before = worker.version, worker.tensor_digests()
    with suppress(Exception):  # a worker that cannot generate fails the checks of that
        context.first_tokens = [completion.token_ids for completion in greedy(context)]
    changed = context.models.perturb(context.trainer, context.perturbation, computed=worker.takes_computed)
    report = worker.sync_weights(context.trainer, capacity=context.capacity)
    after = worker.tensor_digests()
    figure = compare(context, after)
    old, new = _by_canonical(before), _by_canonical(after)
    weights = context.weights()
    changed = list(named_as_in({name: weights[name] for name in changed}, after))
    stale = [name for name in changed if new[canonical(name)] == old.get(canonical(name))]
    expect(not stale, f"{len(stale)} tensors were changed by the trainer and not in the worker, first {stale[:1]}")
    expect(
        version < report.version == worker.version,
        f"the version was {version} before the sync; after it the report says {report.version} and the worker {worker.version}",
    )
    return f"{figure}, {report.buckets} buckets, {report.nbytes / report.seconds / 1e9:.2f} GB/s with readback"


def compare(context: Context, found: dict[str, str]) -> str:
    """Hold the worker's digests against the trainer's tensors; the first that differs is fetched and shown."""
    worker = context.running()
    own = context.weights()
    weights = named_as_in(own, found)
    how: dict[str, Any] = {"values": worker.reads_values, "algorithm": worker.digest_algorithm}
    known = _by_canonical(found)
    missing = [name for name in weights if canonical(name) not in known]
    expect(not missing, f"the worker has no tensor {missing[:1]} ({len(missing)} missing)")
    wrong = [name for name, tensor in weights.items() if weight_digest(tensor, **how) != known[canonical(name)]]
    if wrong:
        raise CheckFailed(
            f"{len(wrong)} of {len(weights)} tensors differ, first " + _difference(context, wrong[0], weights[wrong[0]])
        )
    parameters = sum(1 for _ in context.trainer.named_parameters(remove_duplicate=False))
    computed = len(named_weights(context.trainer)) - len(own)
    note = f", {computed} are the engine's own" if computed else ""
    return f"{parameters} parameters and {len(own) - parameters} buffers equal{note}"


def _by_canonical(digests: dict[str, str]) -> dict[str, str]:
    """Models that see have two names for their tensors, and a worker may know the other one."""
    return {canonical(name): digest for name, digest in digests.items()}


def _difference(context: Context, name: str, expected: torch.Tensor) -> str:
    """How the worker's tensor differs from the trainer's, in words."""
    found = context.running().read_tensor(name)
    expected = expected.detach().cpu()
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return f"{name!r}: {expected.dtype} {list(expected.shape)} sent, {found.dtype} {list(found.shape)} found"
    width = expected.dtype.itemsize
    mine = expected.contiguous().view(-1).view(torch.uint8).view(-1, width)
    theirs = found.contiguous().view(-1).view(torch.uint8).view(-1, width)
    places = (mine != theirs).any(dim=1).nonzero().view(-1)
    if not len(places):
        return f"{name!r}: its digest differed and its bytes do not any more"
    at = int(places[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(at), expected.shape)]
    return (
        f"{name!r}: {len(places)} of {expected.numel()} elements differ, first at {index}: "
        f"sent {expected.reshape(-1)[at].item()!r} ({bytes(mine[at].numpy()).hex()}), "
        f"found {found.reshape(-1)[at].item()!r} ({bytes(theirs[at].numpy()).hex()})"
    )


def put_back(context: Context) -> str:
    """The worker has its folder's weights again, for whoever owns it."""
    worker = context.running()
    trainer = context.models.load_trainer(context.folder)
    weights = named_weights(trainer) if worker.takes_computed else persistent_weights(trainer)
    return f"as version {worker.sync_weights(weights, capacity=context.capacity).version}"
