"""One rank of test_collective_nccl.py, on the GPU of its number: updates by the carrier, and plain broadcasts of as many bytes.

The last line that it prints is JSON: a hash of the weights, their bytes, and the median seconds of each.
"""

import hashlib
import json
import sys
import time

import torch
import torch.distributed as dist

from rollout_core.bucketing import Packer, plan_buckets, specs_of
from rollout_core.transfer import DirectWeights, receive, send
from rollout_core.transfer.carriers.collective import CollectiveReceiver, CollectiveSender

CAPACITY, LAYERS, ROUNDS = 1 << 30, 64, 7  # layers of 128 MiB

rank, size, port = map(int, sys.argv[1:])
torch.cuda.set_device(rank)
device = torch.device("cuda", rank)
dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, device_id=device)
torch.manual_seed(rank)
weights = {f"layer{number}": torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for number in range(LAYERS)}
plan = plan_buckets(specs_of(weights), CAPACITY)
target = DirectWeights(weights)
end = CollectiveSender(host="127.0.0.1") if rank == 0 else CollectiveReceiver()
packers = {verify: Packer(plan, digest="auto" if verify else None) for verify in (False, True)}
times = {"unverified": [], "verified": [], "floor": []}


def timed(kind, work):
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    times[kind].append(time.perf_counter() - start)


def update(verify):
    if rank == 0:
        send(plan, weights, end, packer=packers[verify], timeout=60)
    else:
        receive(end, target, verify=verify, timeout=60)


buffers = [torch.empty(bucket.nbytes, dtype=torch.uint8, device=device) for bucket in plan.buckets]


def broadcasts():
    for buffer in buffers:
        dist.broadcast(buffer, 0)


with end:
    for _ in range(ROUNDS):
        timed("unverified", lambda: update(False))
        timed("verified", lambda: update(True))
        timed("floor", broadcasts)
state = hashlib.sha256()
for name in sorted(weights):
    state.update(weights[name].cpu().view(torch.uint8).numpy().data)
found = {kind: sorted(seconds[1:])[(ROUNDS - 1) // 2] for kind, seconds in times.items()}  # the first makes NCCL's connections
print(json.dumps({"hash": state.hexdigest(), "nbytes": plan.nbytes, **found}), flush=True)
dist.destroy_process_group()
