"""What the ranks of the tests of sharded trainers do; each returns plain values, which the test looks at."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rollout_core.preflight.models import eos_token_ids, load_trainer, perturb
from rollout_core.testing.oracles import bytes_of
from rollout_core.transfer import sharded
from rollout_core.transfer.carriers.memory import MemorySender
from rollout_core.transfer.lockstep import Lockstep
from rollout_core.transfer.targets import named_weights
from rollout_core.workers import HFWorker, SamplingParams, ShardedHFWorker, sync_sharded, to_batch
from rollout_core.workers.hf.generate import generate

TIMEOUT = 60.0  # nothing waits for it to pass; a busy machine may need much of it
#: Of the worker, and of the trainer. On several GPUs each rank has one.
DEVICE = os.environ.get("ROLLOUT_CORE_DEVICE", "cpu")
TRAINER = os.environ.get("ROLLOUT_CORE_TRAINER", "cpu")
PROMPTS = [[5], [9, 8, 7], [3] * 20, [2, 11, 2]]


def trainer(folder: str, seed: int = 1) -> Any:
    """The whole model after a step of training, the same on every rank."""
    model = load_trainer(folder)
    perturb(model, 0.05, seed=seed)
    return model.to(TRAINER)


def shard(model: Any, **options: Any) -> Any:
    """FSDP2 as trainers apply it: each layer, then the model. Also on the CPU of a machine with a GPU, which it would take."""
    options.setdefault("mesh", init_device_mesh(TRAINER, (dist.get_world_size(),)))
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def failure(work: Any) -> tuple[str, str, list[str]]:
    """The class, text and notes of what some work raises."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error), list(getattr(error, "__notes__", ()))
    return "nothing", "", []


def differing(worker: HFWorker, whole: Any, cast: torch.dtype | None = None) -> list[str]:
    """Names of the worker's tensors whose bytes are not the whole model's."""
    parameters = dict(whole.named_parameters(remove_duplicate=False))
    wrong = []
    for name, tensor in named_weights(whole).items():
        expected = tensor.detach()
        if cast is not None and name in parameters:
            expected = expected.to(cast)
        if bytes_of(worker.read_tensor(name)) != bytes_of(expected.cpu()):
            wrong.append(name)
    return wrong


class Live(TorchDispatchMode):
    """The most bytes of memory alive at once, of what operations in this thread gave while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Memory that was there before, of which operations give views, is not theirs.
        old = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if type(one) is torch.Tensor}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if type(tensor) is not torch.Tensor:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in old or key in self._known:
                continue
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            self._known[key] = weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, nbytes: int) -> None:
        del self._known[key]
        self.now -= nbytes


# Each of these is called with the rank, the model's folder, and a group that nothing else uses.


def updates(rank, folder, group):
    """From rank 0, in small buckets, and then from rank 1 in another order, cut along the second dimension."""
    found = {}
    with HFWorker(folder, device=DEVICE, process=False, timeout=TIMEOUT) as worker:
        for sender, options in ((0, {}), (1, {"shard_placement_fn": lambda tensor: Shard(tensor.ndim - 1)})):
            whole = trainer(folder, seed=sender + 1)
            model = shard(trainer(folder, seed=sender + 1), **options)
            report = sync_sharded(
                worker if rank == sender else None,
                model,
                capacity=10_000,
                order=("given", "packed")[sender],
                group=group,
                timeout=TIMEOUT,
            )
            kept = [type(one).__name__ for one in model.parameters()]
            found[sender] = {"report": report, "kept": kept, "tied": model.lm_head.weight is model.model.embed_tokens.weight}
            if rank == sender:
                params = SamplingParams(response_length=12)
                eos = sorted(eos_token_ids(whole))
                expected = generate(whole.to(DEVICE), PROMPTS, params, eos_token_ids=eos, pad_token_id=0)
                found[sender] |= {
                    "wrong": differing(worker, whole),
                    "digest": worker.weights_digest(),
                    "tokens": [one.token_ids for one in worker.generate(PROMPTS, params)],
                    "expected": [one.token_ids for one in expected],
                }
    return found


def cast(rank, folder, group):
    """Master weights in float32, sent as bfloat16, after a forward pass that left whole parameters in the model, and a step of the
    parts, of which an optimizer knows."""
    whole, model = trainer(folder), shard(trainer(folder))
    parts = list(model.parameters())
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]], device=TRAINER))
        for parameter in (*parts, *whole.parameters()):
            parameter.mul_(-0.5)
    before = [type(one).__name__ for one in model.parameters()]
    with HFWorker(folder, dtype="bfloat16", device=DEVICE, process=False, timeout=TIMEOUT) as worker:
        report = sync_sharded(worker if rank == 0 else None, model, dtype=torch.bfloat16, group=group, timeout=TIMEOUT)
        wrong = differing(worker, whole, torch.bfloat16) if rank == 0 else None
    return {"wrong": wrong, "nbytes": report.nbytes, "before": before}


def wrapped(rank, folder, group):
    """Under activation checkpointing, torch.compile's wrapper and a trainer's own module."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = trainer(folder)
    for place, layer in enumerate(model.model.layers):
        model.model.layers[place] = checkpoint_wrapper(layer)
    shard(model)
    outer = torch.nn.ModuleDict({"policy": torch.nn.ModuleDict({"_orig_mod": model})})
    names = [name for name, _ in outer.named_parameters()]
    with HFWorker(folder, device=DEVICE, process=False, timeout=TIMEOUT) as worker:
        sync_sharded(
            worker if rank == 0 else None, outer, rename=lambda name: name.removeprefix("policy."), group=group, timeout=TIMEOUT
        )
        return {"wrong": differing(worker, trainer(folder)) if rank == 0 else None, "names": names}


def memory(rank, folder, group):
    """What operations take at most, and what the buckets take, while a model is sent."""
    model = shard(trainer(folder))
    slots: list[int] = []
    lay_out = MemorySender.lay_out

    def spied(self, count, nbytes):
        slots.append(count * nbytes)
        return lay_out(self, count, nbytes)

    MemorySender.lay_out = spied
    try:
        with HFWorker(folder, device=DEVICE, process=False, timeout=TIMEOUT) as worker, Live() as live:
            sync_sharded(worker if rank == 0 else None, model, capacity=30_000, group=group, timeout=TIMEOUT)
    finally:
        MemorySender.lay_out = lay_out
    return {"peak": live.peak, "slots": slots, "largest": max(one.numel() * 4 for one in model.parameters())}


def refusals(rank, folder, group):
    """Errors of the engine and of ranks; after each the next update is made."""
    model = shard(trainer(folder))
    start = sharded.Way.start
    found: dict[str, Any] = {}

    def failing(self):
        if rank == 1 and self.name.endswith("layers.1.mlp.up_proj.weight"):
            raise MemoryError("no memory for a part")
        return start(self)

    with HFWorker(folder, device=DEVICE, process=False, timeout=TIMEOUT) as worker:
        mine = worker if rank == 0 else None

        def sync(source: Any = model, **options: Any) -> Any:
            return sync_sharded(mine, source, capacity=10_000, group=group, timeout=TIMEOUT, **options)

        found["name"] = failure(lambda: sync(rename=lambda name: name.replace("mlp", "ffn")))
        found["version"] = sync().version
        sharded.Way.start = failing
        found["part"] = failure(sync)
        sharded.Way.start = start
        if rank == 0:
            found["unusable"] = failure(lambda: worker.generate([[1]], SamplingParams(response_length=1)))
        found["after"] = sync().version
        other = dict(model.state_dict())
        if rank == 1:
            other["model.norm.weight"] = other["model.norm.weight"].to(torch.bfloat16)
        found["plans"] = failure(lambda: sync(other))
        found["none"] = failure(lambda: sync_sharded(None, model, group=group, timeout=TIMEOUT))
        found["two"] = failure(lambda: sync_sharded(worker, model, group=group, timeout=TIMEOUT))
        found["last"] = sync().version
        found["wrong"] = differing(worker, trainer(folder)) if rank == 0 else None
    return found


def rollouts(rank, folder, group):
    """Ranks with other prompts, parameters and lengths than each other, held against the whole model; and after a step."""
    whole, model = trainer(folder), shard(trainer(folder))
    worker = ShardedHFWorker(model, group=group, timeout=TIMEOUT)
    eos = sorted(eos_token_ids(whole))
    calls = [
        (PROMPTS, SamplingParams(response_length=12)) if rank == 0 else (PROMPTS[:1], SamplingParams(response_length=3)),
        ([], SamplingParams(response_length=2)) if rank == 0 else (PROMPTS[1:], SamplingParams(response_length=9, ignore_eos=True)),
        (PROMPTS[: 3 - rank], SamplingParams(response_length=8, n=3, temperature=1.0, top_k=50, seed=7 + rank)),
    ]
    found = []
    for version in range(2):
        for prompts, params in calls:
            mine = worker.generate(prompts, params, max_batch=2)
            theirs = generate(whole, prompts, params, eos_token_ids=eos, pad_token_id=0, weight_version=version, max_batch=2)
            length = params.response_length
            batches = [to_batch(prompts, one, response_length=length, pad_token_id=0, n=params.n) for one in (mine, theirs)]
            fields = ("prompts", "responses", "input_ids", "attention_mask", "position_ids", "response_mask", "weight_versions")
            pairs = [pair for one, two in zip(mine, theirs, strict=True) for pair in zip(one.logprobs, two.logprobs, strict=True)]
            found.append(
                {
                    "tokens": [one.token_ids for one in mine],
                    "expected": [one.token_ids for one in theirs],
                    "unequal": [name for name in fields if not torch.equal(*(getattr(batch, name) for batch in batches))],
                    "far": max((abs(one - two) for one, two in pairs), default=0.0),
                    "versions": {one.weight_version for one in mine},
                    "kept": {type(one).__name__ for one in model.parameters()},
                }
            )
        with torch.no_grad():  # a step, of each rank's part and of the whole model
            for parameter in model.parameters():
                parameter.mul_(-0.5)
            for parameter in whole.parameters():
                parameter.mul_(-0.5)
        worker.advance()
    return found


def bad_rollouts(rank, folder, group):
    """A refused prompt, versions that differ, weights that are NaN, and in the end an error within a forward pass."""
    model = shard(trainer(folder))
    worker = ShardedHFWorker(model, group=group, timeout=TIMEOUT)
    params = SamplingParams(response_length=4)
    found = {"prompt": failure(lambda: worker.generate([[5], [999]] if rank else PROMPTS, params))}
    if rank:
        worker.advance()
    found["versions"] = failure(lambda: worker.generate(PROMPTS, params))
    worker.version = 1
    found["tokens"] = len(worker.generate(PROMPTS, params))
    weight = model.model.norm.weight.to_local()
    kept = weight.clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
        found["nan"] = failure(lambda: worker.generate(PROMPTS[rank : rank + 2], params, max_batch=1))
        weight.copy_(kept)
    found["after nan"] = len(worker.generate(PROMPTS, params))
    worker = ShardedHFWorker(model, group=group, timeout=3.0)
    calls = []

    def broken(module, args, output):
        calls.append(1)
        if rank and len(calls) == 3:
            raise ValueError("a kernel failed")

    model.model.layers[1].register_forward_hook(broken)
    start = time.monotonic()
    found["forward"] = failure(lambda: worker.generate(PROMPTS, params))
    found["seconds"] = time.monotonic() - start
    ended = Path(folder) / "ended"
    if rank == 0:
        ended.touch()
    while not ended.exists() and time.monotonic() < start + TIMEOUT:  # alive: nothing but the timeout can end the other rank
        time.sleep(0.05)
    found["again"] = failure(lambda: worker.generate(PROMPTS, params))
    return found


def scenarios(rank: int, folder: str, names: list[str]) -> dict[str, Any]:
    """Each in a group of its own, so that one that fails takes no other with it."""
    found = {}
    for name in names:
        group = dist.new_group(list(range(dist.get_world_size())))
        start = time.monotonic()
        try:
            found[name] = globals()[name](rank, folder, group)
        except Exception:
            found[name] = traceback.format_exc()
        print(rank, name, round(time.monotonic() - start, 2), flush=True)
    return found


def dies(rank: int, folder: str, who: int, how: str) -> Any:
    """A rank ends, or stops, in the middle of an update."""
    model = shard(trainer(folder))
    start = sharded.Way.start

    def dying(self):
        if rank == who and self.name.endswith("layers.1.mlp.up_proj.weight"):
            if how == "exit":
                os._exit(7)
            time.sleep(120.0)
        return start(self)

    sharded.Way.start = dying
    with HFWorker(folder, device=DEVICE, process=False, timeout=TIMEOUT) as worker:
        dist.barrier()
        begun = time.monotonic()
        timeout = 3.0 if how == "stop" else TIMEOUT
        error = failure(lambda: sync_sharded(worker if rank == 0 else None, model, capacity=10_000, timeout=timeout))
        seconds = time.monotonic() - begun
        usable = failure(lambda: worker.generate([[1]], SamplingParams(response_length=1))) if rank == 0 else None
    return {"error": error, "seconds": seconds, "usable": usable}


def engine_dies(rank: int, folder: str) -> Any:
    """The process of the worker's engine is killed in the middle of an update."""
    model = shard(trainer(folder))
    start = sharded.Way.start

    def killing(self):
        if rank == 0 and self.name.endswith("layers.1.mlp.up_proj.weight"):
            for process in worker.processes():
                os.kill(process, signal.SIGKILL)
        return start(self)

    sharded.Way.start = killing
    with HFWorker(folder, device=DEVICE, timeout=TIMEOUT) if rank == 0 else nullcontext() as worker:
        error = failure(lambda: sync_sharded(worker, model, capacity=10_000, timeout=TIMEOUT))
    return {"error": error, "agreed": Lockstep(None, TIMEOUT).agree(rank)}


DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)


def meshes(rank: int, cases: int) -> list[str]:
    """Tensors of many shapes, dtypes and placements on meshes of four ranks, made whole on each rank in turn: what is wrong."""
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    chance = random.Random(0)
    wholes, parts = {}, {}
    for case in range(cases):
        shape = [chance.choice((1, 2, 3, 4, 5, 7, 8, 9)) for _ in range(chance.randint(1, 3))]
        dtype = chance.choice(DTYPES)
        generator = torch.Generator().manual_seed(case)
        raw = torch.randint(0, 256, [*shape, dtype.itemsize], dtype=torch.uint8, generator=generator)
        whole = (raw % 2 if dtype == torch.bool else raw).view(dtype)[..., 0]
        mesh = chance.choice((flat, square))
        placements = [chance.choice((Replicate(), *map(Shard, range(len(shape))))) for _ in range(mesh.ndim)]
        name = f"{case} {dtype} {shape} {placements}"
        if mesh is square and not any(isinstance(one, Replicate) for one in placements):
            # Left to torch, which gathers over gloo neither every dtype nor unevenly nested parts.
            whole = torch.randn([4 * size for size in shape], generator=generator)
        wholes[name], parts[name] = whole, distribute_tensor(whole, mesh, placements, src_data_rank=None)
    steps = Lockstep(None, TIMEOUT)
    wrong = []
    for sender in range(4):
        made = sharded.Parts(steps, parts)
        for name, tensor in made.tensors.items():
            if tuple(tensor.shape) != tuple(wholes[name].shape) or tensor.dtype != wholes[name].dtype:
                wrong.append(f"spec of {name}")
        if rank != sender:
            made.follow()
            continue
        for name, tensor in made.tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, sharded.Deferred) else tensor
            if bytes_of(full) != bytes_of(wholes[name]):
                wrong.append(name)
        made.end()
    return wrong
