"""The start and the end of a worker, and what is left of it."""

from __future__ import annotations

import gc
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch

from rollout_core.errors import TransferError, WorkerError
from rollout_core.preflight import vision_models
from rollout_core.preflight.checks.context import CheckFailed, Context, expect, greedy
from rollout_core.workers.contract import SamplingParams
from rollout_core.workers.link.supervisor import descendants, parents


def worker_starts(context: Context) -> str:
    context.existing = set(resources())
    context.worker = context.make_worker(context.folder)
    config = context.trainer.config.get_text_config()
    limit = min(int(config.vocab_size), 1000)
    eos = sorted(context.models.eos_token_ids(context.trainer))
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 3, 9, 17)
    # A placeholder would be taken for the place of a picture.
    ids = [token for token in range(3, limit) if token not in vision_models.placeholders(context.trainer.config)]
    drawn = [torch.randint(0, len(ids), (n,), generator=generator).tolist() for n in lengths]
    context.prompts = [[ids[place] for place in places] for places in drawn]
    if eos:  # an EOS id inside a prompt ends nothing
        context.prompts[2][4] = eos[0]
    return f"{len(context.prompts)} prompts of {', '.join(map(str, lengths))} tokens ready"


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
    expect(statuses <= {"failed", "length"}, f"requests ended as {', '.join(sorted(statuses))} when the engine was killed")
    for what, call in (
        ("generate", lambda: greedy(context)),
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
    left = [words for resource, words in resources().items() if resource not in context.existing]
    orphans = below & parents().keys() - set(descendants(os.getpid()))
    left += [f"process {process}, whose parent has ended" for process in sorted(orphans)]
    expect(not left, f"left behind: {', '.join(left)}")
    return "no process, shared memory or socket"


def resources() -> dict[str, str]:
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
