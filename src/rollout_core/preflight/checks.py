"""The checks of a rollout worker, in the order in which an operator wants to know. Each returns its figure or fails with words."""

from __future__ import annotations

import copy
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from rollout_core.bucketing import Bucket, BucketPlan, plan_buckets, specs_of
from rollout_core.errors import IntegrityError, RolloutCoreError, TransferError, WorkerError
from rollout_core.preflight import models
from rollout_core.transfer.targets import named_weights, persistent_weights
from rollout_core.workers.contract import Completion, SamplingParams, to_batch
from rollout_core.workers.digests import weight_digest
from rollout_core.workers.link.supervisor import descendants, parents
from rollout_core.workers.worker import Worker

MakeWorker = Callable[[Path], Worker]


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
    worker: Worker | None = None
    prompts: list[list[int]] = field(default_factory=list)
    first_tokens: list[tuple[int, ...]] = field(default_factory=list)  # the worker's, greedy, before the first sync
    existing: set[str] = field(default_factory=set)  # what ``_resources`` gave before the worker started
    models: Any = models  # where the functions that know the model are found

    def weights(self) -> dict[str, torch.Tensor]:
        """The trainer's tensors that an update brings."""
        return named_weights(self.trainer) if self.running().takes_computed else persistent_weights(self.trainer)

    def running(self) -> Worker:
        if self.worker is None:
            raise CheckFailed("the worker does not run")
        return self.worker

    def stops(self) -> tuple[int, int, int]:
        """For requests that are stopped on their way: how many tokens they want, after how many steps, and the most they have then.
        An engine that samples on its own makes more before it stops."""
        steps = self.response_length // 3
        if self.running().steps_exactly:
            return self.response_length, steps, steps
        return 8 * self.response_length, steps, 8 * self.response_length


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailed(message)


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


def worker_starts(context: Context) -> str:
    context.existing = set(_resources())
    context.worker = context.make_worker(context.folder)
    config = context.trainer.config.get_text_config()
    limit = min(int(config.vocab_size), 1000)
    eos = sorted(context.models.eos_token_ids(context.trainer))
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 3, 9, 17)
    context.prompts = [torch.randint(3, limit, (n,), generator=generator).tolist() for n in lengths]
    if eos:  # an EOS id inside a prompt ends nothing
        context.prompts[2][4] = eos[0]
    return f"{len(context.prompts)} prompts of {', '.join(map(str, lengths))} tokens ready"


def starts_equal(context: Context) -> str:
    """Before any sync the worker holds what the folder holds."""
    return compare(context, context.running().tensor_digests())


def weights_arrive(context: Context) -> str:
    """Every parameter and buffer of the changed trainer, read back from the worker, bit for bit, as a newer version."""
    worker = context.running()
    version, before = worker.version, worker.tensor_digests()
    with suppress(Exception):  # a worker that cannot generate fails the checks of that
        context.first_tokens = [completion.token_ids for completion in _greedy(context)]
    changed = context.models.perturb(context.trainer, context.perturbation, computed=worker.takes_computed)
    report = worker.sync_weights(context.trainer, capacity=context.capacity)
    after = worker.tensor_digests()
    figure = compare(context, after)
    stale = [name for name in changed if after[name] == before.get(name)]
    _expect(not stale, f"{len(stale)} tensors were changed by the trainer and not in the worker, first {stale[:1]}")
    _expect(
        version < report.version == worker.version,
        f"the version was {version} before the sync; after it the report says {report.version} and the worker {worker.version}",
    )
    return f"{figure}, {report.buckets} buckets, {report.nbytes / report.seconds / 1e9:.2f} GB/s with readback"


def _greedy(context: Context) -> list[Completion]:
    return context.running().generate(context.prompts, SamplingParams(response_length=context.response_length))


def compare(context: Context, found: dict[str, str]) -> str:
    """Hold the worker's digests against the trainer's tensors; the first that differs is fetched and shown."""
    weights, worker = context.weights(), context.running()
    how: dict[str, Any] = {"values": worker.reads_values, "algorithm": worker.digest_algorithm}
    missing = [name for name in weights if name not in found]
    _expect(not missing, f"the worker has no tensor {missing[:1]} ({len(missing)} missing)")
    wrong = [name for name, tensor in weights.items() if weight_digest(tensor, **how) != found[name]]
    if wrong:
        raise CheckFailed(
            f"{len(wrong)} of {len(weights)} tensors differ, first " + _difference(context, wrong[0], weights[wrong[0]])
        )
    parameters = sum(1 for _ in context.trainer.named_parameters(remove_duplicate=False))
    computed = len(named_weights(context.trainer)) - len(weights)
    own = f", {computed} are the engine's own" if computed else ""
    return f"{parameters} parameters and {len(weights) - parameters} buffers equal{own}"


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
    eos = context.models.eos_token_ids(context.trainer)
    completions = _greedy(context)
    _check_places(context, completions, 1)
    nearest = float("inf")
    for prompt, completion in zip(context.prompts, completions, strict=True):
        expected, gap = context.models.greedy_reference(context.trainer, prompt, context.response_length, eos)
        nearest = min(nearest, gap)
        found = list(completion.token_ids)
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
            mine, theirs = (str(tokens[at]) if at < len(tokens) else "missing" for tokens in (expected, found))
            raise CheckFailed(
                f"prompt {completion.prompt_index} ({len(prompt)} tokens): response token {at} is {theirs} from the worker and "
                f"{mine} from the trainer's model; nearest tie on the way {gap:.2g}"
            )
    count = sum(len(completion.token_ids) for completion in completions)
    figure = f"{count} tokens of {len(context.prompts)} prompts equal, nearest tie {nearest:.2g}"
    if not context.first_tokens:
        return figure
    changed = sum(completion.token_ids != first for completion, first in zip(completions, context.first_tokens, strict=True))
    _expect(changed > 0, "the changed weights change the tokens of no prompt, so tokens of the old weights would look the same")
    return f"{figure}, {changed} changed with the weights"


def batch_holds(context: Context) -> str:
    """The batch contract on sampled output: several samples a prompt, two response lengths, and a stop id that is met."""
    eos = context.models.eos_token_ids(context.trainer)
    samples, rows, ended = 4, 0, 0
    repeats = "seeds" in context.running().capabilities
    heat, seed = 1.0, 7 if repeats else None
    for length in (1, context.response_length):
        params = SamplingParams(response_length=length, n=samples, temperature=heat, seed=seed)
        completions = _check_rows(context, params, eos)
        if repeats:
            _expect(completions == context.running().generate(context.prompts, params), "the same seed gave other samples")
        rows += len(completions)
        ended += sum(completion.status == "stop" for completion in completions)
    if not repeats:  # greedy ones do
        heat = 0.0
        completions = _check_rows(context, SamplingParams(response_length=length, n=samples), eos)
    longest = max(completions, key=lambda completion: len(completion.token_ids))
    tokens = longest.token_ids
    stop = tokens[len(tokens) // 2]
    params = SamplingParams(response_length=length, n=samples, temperature=heat, seed=seed, stop_token_ids=(stop,))
    stopped = _check_rows(context, params, eos | {stop})
    cut = next(c.token_ids for c in stopped if (c.prompt_index, c.sample_index) == (longest.prompt_index, longest.sample_index))
    expected = tokens[: tokens.index(stop) + 1]
    _expect(cut == expected, f"{longest.place}: with stop id {stop} it is {list(cut)}, expected {list(expected)}")
    return f"{rows + len(stopped)} rows hold, {ended} ended by an EOS, and one by a stop id"


def _check_rows(context: Context, params: SamplingParams, ends: set[int]) -> list[Completion]:
    """Clause W3 for one call; returns its completions."""
    completions = context.running().generate(context.prompts, params)
    _check_places(context, completions, params.n)
    batch = to_batch(context.prompts, completions, response_length=params.response_length, pad_token_id=0, n=params.n)
    width = max(map(len, context.prompts))
    for row, completion in enumerate(completions):
        _check_row(completion, context.prompts[completion.prompt_index], width, params.response_length, ends, _row(batch, row))
    return completions


def _check_places(context: Context, completions: list[Completion], samples: int) -> None:
    """One completion for each sample of each prompt, in order, all of the worker's version."""
    rows = len(context.prompts) * samples
    _expect(len(completions) == rows, f"{len(completions)} completions for {len(context.prompts)} prompts of {samples} samples")
    version = context.running().version
    for row, completion in enumerate(completions):
        place = (completion.prompt_index, completion.sample_index)
        _expect(place == divmod(row, samples), f"completion {row} is of {completion.place}, expected prompt {row // samples}")
        _expect(
            completion.weight_version == version,
            f"{completion.place}: its tokens are of weight version {completion.weight_version}, and the worker says {version}",
        )
        others = set(completion.versions) - {version}
        _expect(not others, f"{completion.place}: tokens of weight versions {sorted(others)}, and the worker says {version}")


def _row(batch: Any, row: int) -> dict[str, list[int]]:
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: getattr(batch, name)[row].tolist() for name in names}


def _check_row(
    completion: Completion, prompt: list[int], width: int, length: int, stops: set[int], row: dict[str, list[int]]
) -> None:
    """Clause W3 for one row, in plain lists."""
    where, tokens = completion.place, list(completion.token_ids)
    pad = width - len(prompt)
    ends = [i for i, token in enumerate(tokens) if token in stops]
    _expect(0 < len(tokens) <= length, f"{where}: {len(tokens)} tokens for a response length of {length}")
    _expect(ends in ([], [len(tokens) - 1]), f"{where}: tokens go on after an EOS or stop id: {tokens}")
    _expect(
        completion.status == ("stop" if ends else "length"), f"{where}: status {completion.status} with an EOS or stop id at {ends}"
    )
    _expect(bool(ends) or len(tokens) == length, f"{where}: stopped at {len(tokens)} tokens without an EOS")
    _expect(completion.logprobs is not None and max(completion.logprobs) <= 0, f"{where}: logprobs {completion.logprobs}")
    _expect(row["input_ids"][pad : width + len(tokens)] == prompt + tokens, f"{where}: ids are not prompt and response")
    mask = [0] * pad + [1] * (len(prompt) + len(tokens)) + [0] * (length - len(tokens))
    _expect(row["attention_mask"] == mask, f"{where}: attention mask {row['attention_mask']}, expected {mask}")
    positions = [0] * pad + list(range(len(prompt) + length))
    _expect(row["position_ids"] == positions, f"{where}: positions {row['position_ids']}, expected {positions}")


def aborts_end(context: Context) -> str:
    """Requests that are aborted in the queue and while they decode end once, with a prefix; others go on, and a prefix can be."""
    worker = context.running()
    length, steps, most = context.stops()
    params = SamplingParams(response_length=length, ignore_eos=True)
    ids = [f"preflight-{place}" for place in range(len(context.prompts))]
    full = [context.models.greedy_reference(context.trainer, prompt, length, set())[0] for prompt in context.prompts]
    worker.pause()
    try:
        futures = worker.submit(context.prompts, params, request_ids=ids)
        queued = worker.abort([ids[0], "preflight-unknown"])
        _expect(queued == ids[:1], f"aborting {ids[0]!r} in the queue, and an unknown id, ended {queued}")
        worker.step(steps)
        decoding = worker.abort(ids[:2])
        _expect(decoding == ids[1:2], f"aborting {ids[1]!r} while it decodes, and {ids[0]!r} again, ended {decoding}")
        ended = [future.done() for future in futures]
        _expect(ended[:2] == [True, True] and not any(ended[2:]), f"after two aborts these requests have ended: {ended}")
    finally:
        worker.resume()
    for future, expected, place in zip(futures, full, range(len(full)), strict=True):
        done = future.result(worker.timeout)
        status = "aborted" if place < 2 else "length"
        _expect(done.status == status, f"{done.place}: status {done.status}, expected {status}")
        found = list(done.token_ids)
        _expect(found == expected[: len(found)], f"{done.place}: {found} is no prefix of {expected}")
        _expect((len(found) == length) == (place > 1), f"{done.place}: {len(found)} tokens, and its status is {status}")
    prefix = list(futures[1].result().token_ids)
    _expect(0 < len(prefix) <= most, f"{len(prefix)} tokens came in {steps} steps")
    rest = SamplingParams(response_length=length - len(prefix), ignore_eos=True)
    (resumed,) = worker.submit([context.prompts[1] + prefix], rest)
    found = prefix + list(resumed.result(worker.timeout).token_ids)
    _expect(found == full[1], f"resumed from {len(prefix)} tokens it is {found}, uninterrupted {full[1]}")
    return f"2 of {len(ids)} requests ended, 0 and {len(prefix)} tokens; resumed to the same {length}"


def weights_change_under_requests(context: Context) -> str:
    """Pause, swap, resume: each token is of the weights whose version it carries, and none of the old ones comes after the swap."""
    worker = context.running()
    length, steps, most = context.stops()
    before = copy.deepcopy(context.trainer)
    worker.pause()
    try:
        futures = worker.submit(context.prompts, SamplingParams(response_length=length, ignore_eos=True))
        worker.step(steps)
        context.models.perturb(context.trainer, context.perturbation, seed=1, computed=worker.takes_computed)
        old, new = worker.version, worker.sync_weights(context.trainer, capacity=context.capacity).version
    finally:
        worker.resume()
    kept = 0
    for prompt, future in zip(context.prompts, futures, strict=True):
        done = future.result(worker.timeout)
        tokens, count = list(done.token_ids), done.versions.count(old)
        kept += count
        _expect(done.status == "length", f"{done.place}: status {done.status} after the weights changed ({done.error})")
        expected = (old,) * count + (new,) * (length - count)
        _expect(done.versions == expected and count <= most, f"{done.place}: versions {done.versions} of {length} tokens")
        first = context.models.greedy_reference(before, prompt, count, set())[0]
        _expect(tokens[:count] == first, f"{done.place}: {tokens[:count]} before the change, expected {first}")
        then = context.models.greedy_reference(context.trainer, prompt + tokens[:count], length - count, set())[0]
        _expect(tokens[count:] == then, f"{done.place}: {tokens[count:]} after the change, expected {then}")
    return f"{kept} tokens of version {old}, {length * len(futures) - kept} of version {new}, each as its model says"


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
    _expect(worker.version == version, f"the version went from {version} to {worker.version} in an update that failed")


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
    weights = context.weights()
    specs = specs_of(weights)
    capacity = max(16, plan_buckets(specs, context.capacity).nbytes // 4)
    plan = plan_buckets(specs, capacity)
    late = [slot.name for layout in plan.buckets[1:] for slot in layout.slots if slot.start == 0]
    _expect(bool(late), "the model has one tensor, and half an update cannot be made of it")
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
    _expect("unusable" in refusal, f"the worker refused to generate for another reason: {refusal}")
    worker.sync_weights(weights, capacity=capacity)
    compare(context, worker.tensor_digests())
    return f"stopped after {len(sent)} of {len(plan.buckets)} buckets; generation refused until the next sync"


def memory_comes_back(context: Context) -> str:
    """Memory is released, twice too; nothing is sampled without weights; with them all is as it was."""
    worker = context.running()
    if "memory" not in worker.capabilities:
        return "this worker keeps its memory, and says so"
    worker.sync_weights(context.trainer, capacity=context.capacity)
    before = _greedy(context)
    freed = worker.release_memory()
    again = worker.release_memory()
    _expect(again == 0, f"a second release says that it freed {again} bytes")
    worker.resume_memory()
    worker.resume_memory()
    try:
        _greedy(context)
    except WorkerError as error:
        _expect("unusable" in str(error), f"without weights the worker refused to generate for another reason: {error}")
    else:
        raise CheckFailed("the worker generated after its memory was released, before any weights came")
    version = worker.sync_weights(context.trainer, capacity=context.capacity).version
    tokens = [completion.token_ids for completion in _greedy(context)]
    _expect(tokens == [completion.token_ids for completion in before], "the same weights gave other tokens after a release")
    return f"{freed / 1e6:.1f} MB freed, as it says; the same tokens with version {version}"


def death_is_reported(context: Context) -> str:
    """The engine's processes are killed under requests: each request fails, in time, and so does what is asked after."""
    worker = context.running()
    processes = worker.processes()
    if not processes:
        return "it has no process of its own"
    futures = worker.submit(context.prompts, SamplingParams(response_length=64, ignore_eos=True))
    start = time.perf_counter()
    for process in reversed(processes):  # children first, whose end their parents notice
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    statuses = {future.result(worker.timeout).status for future in futures}
    _expect(statuses <= {"failed", "length"}, f"requests ended as {', '.join(sorted(statuses))} when the engine was killed")
    for what, call in (
        ("generate", lambda: _greedy(context)),
        ("sync_weights", lambda: worker.sync_weights(context.trainer, capacity=context.capacity)),
    ):
        try:
            call()
        except (TransferError, WorkerError):
            continue
        raise CheckFailed(f"{what} returned after the engine was killed")
    return f"{len(processes)} processes killed, reported within {time.perf_counter() - start:.1f} s"


def nothing_is_left(context: Context) -> str:
    """After close there is no process, shared memory or socket that was not there before the worker."""
    below = set(descendants(os.getpid()))
    context.running().close()
    gc.collect()  # errors of earlier checks hold the frames they came through, and buckets within
    left = [words for resource, words in _resources().items() if resource not in context.existing]
    orphans = below & parents().keys() - set(descendants(os.getpid()))
    left += [f"process {process}, whose parent has ended" for process in sorted(orphans)]
    _expect(not left, f"left behind: {', '.join(left)}")
    return "no process, shared memory or socket"


def _resources() -> dict[str, str]:
    """This process's children, ended ones that nobody waited for included, shared memory and sockets, each with its words."""
    found: dict[str, str] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended while we looked
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
            if int(parent) == os.getpid():
                command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                pid = stat.parent.name
                found[f"process {pid}"] = f"process {pid} ({command[:80] or 'ended, not waited for'}, state {state})"
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            target = os.readlink(link)
            if target.startswith(("/memfd:", "socket:")):
                found[f"{link.name} {target}"] = f"file descriptor {link.name} ({target})"
    return found


def put_back(context: Context) -> str:
    """The worker has its folder's weights again, for whoever owns it."""
    worker = context.running()
    trainer = context.models.load_trainer(context.folder)
    weights = named_weights(trainer) if worker.takes_computed else persistent_weights(trainer)
    return f"as version {worker.sync_weights(weights, capacity=context.capacity).version}"


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
    Check("aborts end", "W4", aborts_end, "changed weights arrive"),
    Check("weights change under requests", "W5", weights_change_under_requests, "changed weights arrive"),
    Check("a flipped bit is refused", "B13 T5", damage_is_refused, "changed weights arrive"),
    Check("half an update is refused", "B16 T5", half_an_update_is_no_update, "changed weights arrive"),
    Check("memory comes back", "W6", memory_comes_back, "changed weights arrive"),
    Check("death is reported", "W7 T2", death_is_reported, "changed weights arrive"),
    Check("nothing is left behind", "T3", nothing_is_left, "worker starts"),
)

EXPECTED: Final = (CheckFailed, RolloutCoreError)
