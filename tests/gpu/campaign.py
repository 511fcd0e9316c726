"""Everything that a GPU host can show, side by side on the GPUs it has, most telling first; a log of each, and a table at the end.

    python3 tests/gpu/campaign.py --logs DIR --site vllm=SITE --site sglang=SITE [--seconds 600] [--only NAME ...] [--list]

``SITE``: where a bundle of ``host/bundle.py`` was unpacked; without it what this Python has is used. Measurements and tests of
memory have a GPU to themselves, others share one. After ``--seconds`` nothing is begun, and what runs is interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
SHARING = 5  # at most on one GPU
PATIENCE = 15.0  # seconds between an interrupt and the end
TOLD = re.compile(r"^(FAILED|ERROR|E  )|\d (passed|failed|error)|MiB|ms each| x *│|tokens/s", re.ASCII)


@dataclass(frozen=True)
class Task:
    """``words``: of ``run.py``, or with ``bench`` of ``rollout-core bench``. ``site``: whose packages, ``+`` between two. ``gpus``:
    how many it needs. ``most``: seconds."""

    name: str
    site: str
    words: tuple[str, ...]
    bench: bool = False
    alone: bool = False
    gpus: int = 1
    most: float = 180.0


def bench(name: str, site: str, words: str, most: float = 280.0) -> Task:
    return Task(name, site, tuple(words.split()), bench=True, alone=True, most=most)


def suite(name: str, engine: str, places: str, *words: str, alone: bool = False, gpus: int = 1, site: str | None = None) -> Task:
    return Task(name, site or engine, (engine, *places.split(), "-v", "-s", *words), alone=alone, gpus=gpus)


def two(engine: str, site: str | None = None) -> Task:
    return Task(
        f"two-{engine}",
        site or engine,
        (f"two-{engine}", "-v", "-s", "-k", "not elsewhere and not fsdp_engine"),
        alone=True,
        gpus=2,
        most=280,
    )


def sharded(engine: str) -> Task:
    return Task(f"two-{engine}-fsdp", engine, (f"two-{engine}", "tests/gpu/two/test_fsdp_engine.py", "-v", "-s"), gpus=2, most=280)


def killed(engine: str, when: str) -> Task:
    words = (f"two-{engine}", "tests/gpu/two/test_tensor_parallel.py", "-v", "-s", "-k", f"elsewhere and {when}")
    return Task(f"two-{engine}-{when}", engine, words, gpus=2, most=240)


LOAD = (
    "--device cuda --dtype bfloat16 --graphs --capacity 2048 --concurrency 64 --requests 64 --repeats 3 "
    "--prompt-tokens 128 --response-tokens 64"
)
MOE = f"--shape Qwen3-30B-A3B --layers 24 {LOAD.replace('--graphs ', '')}"
CONTRACT = "tests/engines/contract"
SERVERS = "test_w4_no_request or test_workers_share or test_a_model_of_another or test_w7"
TASKS = (
    bench("sync-7b", "vllm", "sync --shape Qwen2.5-7B", most=90),
    bench("pack", "vllm+sglang", "pack --device cuda", most=150),
    suite(
        "packing",
        "hf",
        "tests/gpu/test_packing_cuda.py tests/gpu/test_updates_cuda.py "
        "tests/gpu/test_bucketing_cuda.py tests/gpu/test_transfer_cuda.py",
        alone=True,
        site="vllm",
    ),
    suite("vllm-bf16", "vllm", "tests/gpu/vllm/test_vllm_cuda.py", "-k", "not w6 and not t3"),
    suite("vllm-kit", "vllm", CONTRACT, "-k", "vllm-tied and (kit or repeatable or fill_all)"),
    suite("vllm-async", "vllm", CONTRACT, "-k", "vllm_async-tied"),
    suite("vllm-server", "vllm", CONTRACT, "-k", "vllm_server-untied"),
    suite("vllm-server-shared", "vllm", CONTRACT, "-k", SERVERS),
    suite("sglang-kit", "sglang", "tests/gpu/sglang/test_kit_cuda.py"),
    bench("rollout-vllm-7b", "vllm", f"rollout --worker vllm --shape Qwen2.5-7B {LOAD}"),
    suite("sglang-server", "sglang", "tests/gpu/sglang/test_sglang_server_cuda.py"),
    suite("fsdp", "hf", "tests/gpu/test_fsdp_cuda.py", site="vllm"),
    suite("hf-contract", "hf", CONTRACT, site="vllm"),
    suite("vllm-memory", "vllm", "tests/gpu/vllm/test_vllm_cuda.py", "-k", "w6 or t3", alone=True),
    suite("hf-memory", "hf", "tests/gpu/test_hf_worker_cuda.py", alone=True, site="vllm"),
    suite("sglang", "sglang", "tests/gpu/sglang/test_sglang_cuda.py", alone=True),
    bench("rollout-sglang-7b", "sglang", f"rollout --worker sglang --shape Qwen2.5-7B {LOAD}"),
    bench("sync-moe", "vllm", "sync --shape Qwen3-30B-A3B --layers 24", most=120),
    bench("rollout-vllm-moe", "vllm", f"rollout --worker vllm {MOE}"),
    bench("rollout-sglang-moe", "sglang", f"rollout --worker sglang {MOE}"),
    suite("vllm-fp8", "vllm", "tests/gpu/vllm/test_vllm_fp8.py"),
    suite("sglang-fp8", "sglang", "tests/gpu/sglang/test_sglang_fp8.py"),
    suite("vllm-contract", "vllm", CONTRACT, "-k", "vllm-tied or vllm-untied"),
    suite("vllm-experts", "vllm", f"{CONTRACT}/test_experts.py"),
    two("hf", site="vllm"),
    two("vllm"),
    two("sglang"),
    sharded("vllm"),
    sharded("sglang"),
    killed("vllm", "update"),
    killed("vllm", "abort"),
    killed("sglang", "update"),
    killed("sglang", "abort"),
)


@dataclass
class Running:
    task: Task
    gpus: tuple[int, ...]
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    end: float
    interrupted: bool = False
    begun: float = field(default_factory=time.monotonic)


def choose(task: Task, running: Mapping[str, Running], gpus: int) -> tuple[int, ...] | None:
    """The GPUs that a task may begin on now; None if none is free enough."""
    load = {gpu: [one for one in running.values() if gpu in one.gpus] for gpu in range(gpus)}
    free = [
        gpu
        for gpu, there in load.items()
        if not there or (not task.alone and len(there) < SHARING and not any(one.task.alone for one in there))
    ]
    # Those that share keep together, so that another GPU is free for who wants one alone.
    free.sort(key=lambda gpu: (bool(load[gpu]) is task.alone, gpu))
    return tuple(free[: task.gpus]) if len(free) >= task.gpus else None


def carry_out(
    tasks: Sequence[Task], gpus: int, seconds: float, begin: Callable[[Task, tuple[int, ...], float], Running]
) -> dict[str, tuple[int | None, float]]:
    """Each task's exit status (None: never begun) and seconds."""
    deadline = time.monotonic() + seconds
    left, running = list(tasks), dict[str, Running]()
    found: dict[str, tuple[int | None, float]] = {task.name: (None, 0.0) for task in tasks}
    while running or (left and time.monotonic() < deadline):
        for task in list(left) if time.monotonic() < deadline else ():
            place = choose(task, running, gpus)
            if place is not None:
                left.remove(task)
                running[task.name] = begin(task, place, min(task.most, deadline - time.monotonic()))
        for name, one in list(running.items()):
            now, status = time.monotonic(), one.process.poll()
            if status is not None:
                one.log.close()
                found[name] = (status, now - one.begun)
                print(f"{name}: {'ok' if status == 0 else f'status {status}'}, {now - one.begun:.0f} s", flush=True)
                del running[name]
            elif now > one.end + PATIENCE:
                os.killpg(one.process.pid, signal.SIGKILL)
            elif now > one.end and not one.interrupted:
                one.interrupted = True
                one.process.send_signal(signal.SIGINT)
        if left and not running and all(task.gpus > gpus for task in left):
            break
        time.sleep(0.2)
    return found


def begin_with(sites: Mapping[str, str], logs: Path) -> Callable[[Task, tuple[int, ...], float], Running]:
    def begin(task: Task, gpus: tuple[int, ...], most: float) -> Running:
        command = (
            [sys.executable, "-m", "rollout_core.cli", "bench"] if task.bench else [sys.executable, str(ROOT / "tests/gpu/run.py")]
        )
        more = ("--json", str(logs / f"{task.name}.json")) if task.bench else ()
        theirs = [sites.get(site, "") for site in task.site.split("+")]
        path = os.pathsep.join(filter(None, [str(ROOT / "src"), *theirs, os.environ.get("PYTHONPATH", "")]))
        ours = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "HF_HUB_OFFLINE": "1"}
        log = (logs / f"{task.name}.log").open("wb")
        process = subprocess.Popen(
            [*command, *task.words, *more],
            cwd=ROOT,
            env={"PYTHONUNBUFFERED": "1", "COLUMNS": "160", **os.environ, **ours},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return Running(task, gpus, process, log, time.monotonic() + most)

    return begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=Path("gpu-logs"))
    parser.add_argument("--site", action="append", default=[], metavar="ENGINE=FOLDER")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--only", nargs="+", choices=[task.name for task in TASKS], default=[])
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    tasks = [task for task in TASKS if not given.only or task.name in given.only]
    if given.list:
        for task in tasks:
            print(f"{task.name}: {'bench' if task.bench else 'tests'} {' '.join(task.words)}")
        return 0
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        parser.error("torch sees no GPU")
    given.logs.mkdir(parents=True, exist_ok=True)
    sites = dict(word.split("=", 1) for word in given.site)
    print(f"{gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    found = carry_out(tasks, gpus, given.seconds, begin_with(sites, given.logs))
    for name, (status, took) in found.items():
        words = "not begun" if status is None else f"{'ok' if status == 0 else f'status {status}'}, {took:.0f} s"
        print(f"== {name}: {words}")
        log = given.logs / f"{name}.log"
        told = [line for line in log.read_text(errors="replace").splitlines() if TOLD.search(line)] if status is not None else []
        print("\n".join(line[:220] for line in told[-8:]))
    return int(any(status != 0 for status, _ in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
