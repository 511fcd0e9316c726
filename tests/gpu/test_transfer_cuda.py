"""Clauses T on CUDA memory: slots that another process maps (CUDA IPC), and gloo broadcasts of GPU tensors."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.errors import PlanMismatchError, TransferError
from rollout_core.testing.oracles import bytes_of
from rollout_core.transfer import DirectWeights, receive, send
from rollout_core.transfer.carriers.cuda_ipc import CudaIpcReceiver, CudaIpcSender
from rollout_core.transfer.carriers.local import local_carrier
from support.tensors import patterned

RECEIVER = Path(__file__).with_name("receiver_process.py")
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Named tensors of several dtypes, some split by the capacity, one strided, two tied."""
    found = {f"{dtype}".removeprefix("torch."): patterned(dtype, 100_003, seed=seed + 1).cuda() for dtype in DTYPES}
    found["strided"] = (torch.arange(60_000, dtype=torch.float32, device="cuda") + seed).view(300, 200).t()
    found["tied"] = found["float32"]
    found["empty"] = torch.empty(0, device="cuda")
    return found


def start(name: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, RECEIVER, name, *arguments], stdout=subprocess.PIPE, text=True)


def picture(pairs) -> dict[str, str]:
    """What the receiver's process prints: the bytes of each tensor, as a hexadecimal hash of the standard library's."""
    return {name: hashlib.sha256(bytes_of(tensor.cpu())).hexdigest() for name, tensor in pairs}


@pytest.mark.parametrize("kind", ["direct", "staged"])
def test_updates_over_cuda_ipc_arrive_and_leave_no_memory(kind):
    three_updates(f"ipc-{os.getpid()}-{kind}-warm", kind)  # loads the kernels, which stay
    before, files = free_memory(), shared_files(os.getpid())  # CUDA's own for a process stay as long as it
    child = three_updates(f"ipc-{os.getpid()}-{kind}", kind)
    assert before - free_memory() < 1 << 20
    assert shared_files(os.getpid()) == files
    assert shared_files(child) == set()


def three_updates(name: str, kind: str) -> int:
    """The process that received them, which has ended."""
    with start(name, kind, "3") as child, CudaIpcSender.listen(name) as end:
        for seed in range(3):
            source = weights(seed)
            report = send(plan_buckets(specs_of(source), 65_536), source, end, timeout=60)
            assert report.version == seed + 1
            line = json.loads(child.stdout.readline())
            assert line == {"version": seed + 1, "unusable": None, "weights": picture(source.items())}
        assert child.wait(60) == 0
    return child.pid


def shared_files(pid: int) -> set[str]:
    """In shared memory, of this process and no other: CUDA names them after it in hexadecimal, torch in decimal."""
    names = {f"{pid:d}", f"{pid:x}"}
    return {name for name in os.listdir("/dev/shm") if re.match("torch|cuda", name) and names & set(re.split("[._]", name))}


def free_memory() -> int:
    """Bytes free on the GPU, once torch has let go of what it keeps for later."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_t2_a_killed_receiver_is_noticed_and_the_memory_is_freed():
    name = f"ipc-killed-{os.getpid()}"
    with start(name, "direct", "1", "killed") as child, CudaIpcSender.listen(name) as end:
        source = weights(1)
        with pytest.raises(TransferError, match="the receiver: the other process closed its end"):
            send(plan_buckets(specs_of(source), 65_536), source, end, timeout=60)
        assert child.wait(60) == -signal.SIGKILL


def test_b7_a_receiver_with_other_tensors_refuses_and_serves_the_next_update():
    name = f"ipc-other-{os.getpid()}"
    source = weights(1)
    with start(name, "direct", "2", "refuses") as child, CudaIpcSender.listen(name) as end:
        with pytest.raises(PlanMismatchError, match="unknown"):
            other = {"unknown": torch.zeros(3, device="cuda")}
            send(plan_buckets(specs_of(other), 65_536), other, end, timeout=60)
        assert send(plan_buckets(specs_of(source), 65_536), source, end, timeout=60).version == 1
        assert child.wait(60) == 0


def test_t4_a_receiver_on_another_stream_sees_complete_data():
    import threading

    sender, (receiver,) = local_carrier(device="cuda")
    source = {"w": torch.zeros(64 << 20, device="cuda")}
    target = DirectWeights({"w": torch.empty(64 << 20, device="cuda")})

    def other_stream():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                receive(receiver, target, timeout=60)

    thread = threading.Thread(target=other_stream)
    thread.start()
    with sender, receiver:
        for value in range(1, 6):
            for _ in range(20):  # work that the update has to wait for
                source["w"].mul_(0).add_(value)
            send(plan_buckets(specs_of(source), 32 << 20), source, sender, timeout=60)
            assert bool((target.tensors["w"] == value).all())
        thread.join()


def test_a_device_that_is_no_gpu_is_refused():
    with pytest.raises(TransferError, match="'cpu'"):
        CudaIpcReceiver(None, device="cpu")


def test_gloo_broadcasts_of_gpu_tensors():
    port = 20_000 + os.getpid() % 20_000
    ranks = [
        subprocess.Popen([sys.executable, RECEIVER.with_name("gloo_rank.py"), str(rank), "2", str(port)], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0].decode().split() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert printed[0] == printed[1]
    assert len(printed[0]) == 2
