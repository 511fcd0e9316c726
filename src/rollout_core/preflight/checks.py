"""The checks of a rollout worker, in the order in which an operator wants to know. Each returns its figure or fails with words."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from rollout_core.bucketing import Bucket, BucketPlan, plan_buckets, specs_of
from rollout_core.errors import IntegrityError, RolloutCoreError, WorkerError
from rollout_core.preflight.models import eos_token_ids, greedy_reference, load_trainer, perturb
from rollout_core.workers.contract import Completion, SamplingParams, to_batch
from rollout_core.workers.hf import HFWorker
from rollout_core.workers.hf_model import named_weights, weight_digest

MakeWorker = Callable[[Path], HFWorker]


class CheckFailed(Exception):
    """A check does not hold; the message says what was expected and what was found."""


@dataclass
class Context:
    """What the checks share: the model folder, the trainer's copy, the worker once it runs."""

    folder: Path
    make_worker: MakeWorker
    capacity: int
    response_length: int = 12
    perturbation: float = 0.05
    trainer: Any = None
    worker: HFWorker | None = None
    prompts: list[list[int]] = field(default_factory=list)
    before: dict[str, str] = field(default_factory=dict)  # the worker's digests before the first sync

    def running(self) -> HFWorker:
        if self.worker is None:
            raise CheckFailed("the worker does not run")
        return self.worker


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailed(message)


def plan_agrees(context: Context) -> str:
    """The trainer's plan survives its manifest: what the worker will read is what the trainer planned."""
    context.trainer = load_trainer(context.folder)
    plan = plan_buckets(specs_of(context.trainer), context.capacity)
    manifest = plan.to_bytes()
    BucketPlan.from_bytes(manifest).require_same(plan)
    tied = sum(map(len, plan.tied.values()))
    return (
        f"{len(plan.specs)} tensors ({tied} tied), {plan.nbytes / 1e6:.1f} MB in {len(plan.buckets)} buckets, "
        f"manifest {len(manifest) / max(1, len(plan.specs)):.1f} B a tensor"
    )


def worker_starts(context: Context) -> str:
    context.worker = context.make_worker(context.folder)
    config = context.trainer.config.get_text_config()
    limit = min(int(config.vocab_size), 1000)
    eos = sorted(eos_token_ids(context.trainer))
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 3, 9, 17)
    context.prompts = [torch.randint(3, limit, (n,), generator=generator).tolist() for n in lengths]
    if eos:  # an EOS id inside a prompt ends nothing
        context.prompts[2][4] = eos[0]
    return f"{len(context.prompts)} prompts of {', '.join(map(str, lengths))} tokens ready"


def starts_equal(context: Context) -> str:
    """Before any sync the worker holds what the folder holds."""
    context.before = context.running().tensor_digests()
    return _compare(context, context.before)


def weights_arrive(context: Context) -> str:
    """Every parameter and buffer of the changed trainer, read back from the worker, bit for bit."""
    changed = perturb(context.trainer, context.perturbation)
    report = context.running().sync_weights(context.trainer, capacity=context.capacity)
    after = context.running().tensor_digests()
    figure = _compare(context, after)
    stale = [name for name in changed if after[name] == context.before[name]]
    _expect(not stale, f"{len(stale)} tensors were changed by the trainer and not in the worker, first {stale[:1]}")
    return f"{figure}, {report.buckets} buckets, {report.nbytes / report.seconds / 1e9:.2f} GB/s with readback"


def _compare(context: Context, found: dict[str, str]) -> str:
    """Hold the worker's digests against the trainer's tensors; the first that differs is fetched and shown."""
    weights = named_weights(context.trainer)
    missing = [name for name in weights if name not in found]
    _expect(not missing, f"the worker has no tensor {missing[:1]} ({len(missing)} missing)")
    wrong = [name for name, tensor in weights.items() if weight_digest(tensor) != found[name]]
    if wrong:
        raise CheckFailed(
            f"{len(wrong)} of {len(weights)} tensors differ, first " + _difference(context, wrong[0], weights[wrong[0]])
        )
    parameters = sum(1 for _ in context.trainer.named_parameters(remove_duplicate=False))
    return f"{parameters} parameters and {len(weights) - parameters} buffers equal"


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


def greedy_equals(context: Context) -> str:
    """The worker's greedy tokens are those of the trainer's model, one unpadded forward pass at a time."""
    eos = eos_token_ids(context.trainer)
    completions = context.running().generate(context.prompts, SamplingParams(response_length=context.response_length))
    nearest = float("inf")
    for prompt, completion in zip(context.prompts, completions, strict=True):
        expected, gap = greedy_reference(context.trainer, prompt, context.response_length, eos)
        nearest = min(nearest, gap)
        if list(completion.token_ids) != expected:
            pairs = enumerate(zip(completion.token_ids, expected, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(completion.token_ids)))
            raise CheckFailed(
                f"prompt {completion.prompt_index}: token {at} is {list(completion.token_ids)[at : at + 1]} from the worker and "
                f"{expected[at : at + 1]} from the trainer's model; nearest tie on the way {gap:.2g}"
            )
        _expect(completion.weight_version == context.running().version, f"weight version {completion.weight_version} on the tokens")
    count = sum(len(completion.token_ids) for completion in completions)
    return f"{count} tokens of {len(context.prompts)} prompts equal, nearest tie {nearest:.2g}"


def batch_holds(context: Context) -> str:
    """The batch contract on sampled output: two samples a prompt, two response lengths."""
    eos = eos_token_ids(context.trainer)
    rows = 0
    for length in (1, context.response_length):
        params = SamplingParams(response_length=length, n=2, temperature=1.0, seed=7)
        completions = context.running().generate(context.prompts, params)
        again = context.running().generate(context.prompts, params)
        _expect(completions == again, "the same seed gave other samples")
        batch = to_batch(context.prompts, completions, response_length=length, pad_token_id=0)
        width = max(map(len, context.prompts))
        for row, completion in enumerate(completions):
            _expect((completion.prompt_index, completion.sample_index) == divmod(row, 2), f"row {row} is {completion.place}")
            _check_row(completion, context.prompts[row // 2], width, length, eos, _row(batch, row))
            rows += 1
    return f"{rows} rows hold"


def _row(batch: Any, row: int) -> dict[str, list[int]]:
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: getattr(batch, name)[row].tolist() for name in names}


def _check_row(
    completion: Completion, prompt: list[int], width: int, length: int, eos: set[int], row: dict[str, list[int]]
) -> None:
    """Clause W3 for one row, in plain lists."""
    where, tokens = completion.place, list(completion.token_ids)
    pad = width - len(prompt)
    ends = [i for i, token in enumerate(tokens) if token in eos]
    _expect(0 < len(tokens) <= length, f"{where}: {len(tokens)} tokens for a response length of {length}")
    _expect(ends in ([], [len(tokens) - 1]), f"{where}: tokens go on after an EOS")
    _expect(completion.status == ("stop" if ends else "length"), f"{where}: status {completion.status} with EOS at {ends}")
    _expect(bool(ends) or len(tokens) == length, f"{where}: stopped at {len(tokens)} tokens without an EOS")
    _expect(completion.logprobs is not None and max(completion.logprobs) <= 0, f"{where}: logprobs {completion.logprobs}")
    _expect(row["input_ids"][pad : width + len(tokens)] == prompt + tokens, f"{where}: ids are not prompt and response")
    mask = [0] * pad + [1] * (len(prompt) + len(tokens)) + [0] * (length - len(tokens))
    _expect(row["attention_mask"] == mask, f"{where}: attention mask {row['attention_mask']}, expected {mask}")
    positions = [0] * pad + list(range(len(prompt) + length))
    _expect(row["position_ids"] == positions, f"{where}: positions {row['position_ids']}, expected {positions}")


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
        refusal = str(error).split(":")[0]
    else:
        raise CheckFailed(f"a flipped bit in bucket {flipped} was not noticed")
    _expect(worker.version == version, f"the version went from {version} to {worker.version} in an update that failed")
    report = worker.sync_weights(context.trainer, capacity=context.capacity)
    _compare(context, worker.tensor_digests())
    return f"{refusal!r}; recovered as version {report.version}"


def half_an_update_is_no_update(context: Context) -> str:
    """A source that fails halfway: its error comes out unchanged, and half-loaded weights are never sampled from."""
    worker = context.running()
    weights = named_weights(context.trainer)
    capacity = max(1, sum(t.numel() * t.dtype.itemsize for t in weights.values()) // 4)
    seen = 0

    def fail_later(bucket: Bucket) -> Bucket:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise ArithmeticError("planted by preflight")
        return bucket

    try:
        worker.sync_weights(weights, capacity=capacity, inject=fail_later)
    except ArithmeticError:
        pass
    else:
        raise CheckFailed("the planted error did not come out")
    try:
        worker.generate(context.prompts[:1], SamplingParams(response_length=1))
    except WorkerError as error:
        refusal = str(error)
    else:
        raise CheckFailed("the worker generated with half an update loaded")
    _expect("unusable" in refusal, f"the worker refused for another reason: {refusal}")
    worker.sync_weights(weights, capacity=capacity)
    _compare(context, worker.tensor_digests())
    return f"stopped after {seen - 1} buckets; generation refused until the next sync"


def nothing_is_left(context: Context) -> str:
    """After close no process of the worker, and no shared memory, is left."""
    context.running().close()
    left = [link for link in map(_link_target, _open_files()) if "rollout-core" in link]
    _expect(not left, f"shared memory still open: {left}")
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    names = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children.read_text().split()] if children.exists() else []
    _expect(not any(b"rollout_core.workers" in name for name in names), "the worker's process is still there")
    return "no process, no shared memory"


def _open_files() -> list[str]:
    return [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]


def _link_target(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


@dataclass(frozen=True)
class Check:
    """One line of the report. Without ``needs`` having passed it cannot be judged."""

    id: str
    clause: str
    run: Callable[[Context], str]
    needs: str | None = None


CHECKS: Final = (
    Check("plan agrees with its manifest", "B7", plan_agrees),
    Check("worker starts", "-", worker_starts, "plan agrees with its manifest"),
    Check("weights equal at the start", "W2", starts_equal, "worker starts"),
    Check("changed weights arrive", "B1 W2", weights_arrive, "worker starts"),
    Check("greedy tokens equal", "W1 W5", greedy_equals, "changed weights arrive"),
    Check("batch shapes", "W3", batch_holds, "worker starts"),
    Check("a flipped bit is refused", "B13 T5", damage_is_refused, "changed weights arrive"),
    Check("half an update is refused", "B16 T5", half_an_update_is_no_update, "changed weights arrive"),
    Check("nothing is left behind", "T3", nothing_is_left, "worker starts"),
)

EXPECTED: Final = (CheckFailed, RolloutCoreError)
