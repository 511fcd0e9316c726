"""A receiving process of test_transfer_cuda.py: NAME, direct or staged, how many updates, and what it does besides."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from rollout_core.errors import PlanMismatchError
from rollout_core.testing.oracles import bytes_of
from rollout_core.transfer import DirectWeights, StagedWeights, receive
from rollout_core.transfer.carriers.cuda_ipc import CudaIpcReceiver
from support.tensors import patterned


def main(name: str, kind: str, updates: str, *rest: str) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    model = {f"{dtype}".removeprefix("torch."): torch.zeros_like(patterned(dtype, 100_003)).cuda() for dtype in dtypes}
    model |= {"strided": torch.zeros(200, 300, device="cuda"), "tied": model["float32"], "empty": torch.empty(0, device="cuda")}
    target = {"direct": DirectWeights, "staged": StagedWeights}[kind](model)

    def observe(step):
        if "killed" in rest and str(step) == "load 2":
            os.kill(os.getpid(), signal.SIGKILL)

    with CudaIpcReceiver.connect(name) as end:
        for _ in range(int(updates)):
            try:
                receive(end, target, timeout=60, observe=observe)
            except PlanMismatchError:
                assert "refuses" in rest
            found = {name: hashlib.sha256(bytes_of(tensor.cpu())).hexdigest() for name, tensor in target.tensors.items()}
            print(json.dumps({"version": target.version, "unusable": target.unusable, "weights": found}), flush=True)


main(*sys.argv[1:])
