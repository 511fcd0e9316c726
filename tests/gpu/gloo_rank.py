"""One rank of test_transfer_cuda.py's gloo group: two updates, whose weights' hash it prints."""

import hashlib
import sys

import torch
import torch.distributed as dist

from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.transfer import receive, send
from rollout_core.transfer.carriers.collective import CollectiveReceiver, CollectiveSender

rank, size, port = map(int, sys.argv[1:])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
end = CollectiveSender(device="cuda", host="127.0.0.1") if rank == 0 else CollectiveReceiver(device="cuda")
with end:
    for seed in range(2):
        if rank == 0:
            weights = {"w": torch.arange(300_001, device="cuda") * seed, "x": torch.full((5,), 0.5, device="cuda")}
            send(plan_buckets(specs_of(weights), 65_536), weights, end, timeout=60)
        else:
            weights = receive(end, timeout=60).weights
            assert {tensor.device.type for tensor in weights.values()} == {"cuda"}
        print(hashlib.sha256(b"".join(weights[name].cpu().numpy().tobytes() for name in "wx")).hexdigest(), flush=True)
dist.destroy_process_group()
