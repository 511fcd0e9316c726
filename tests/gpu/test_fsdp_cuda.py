"""A trainer with FSDP2 on one GPU: its weights into a worker on the same GPU, in no more memory than was said; and rollouts by the
sharded model itself. One rank over NCCL, and two over gloo whose shards are on the CPU."""

from __future__ import annotations

import json
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from transformers import Qwen2Config, Qwen2ForCausalLM

from rollout_core.preflight.models import eos_token_ids, load_trainer, make_small_model
from rollout_core.testing.oracles import bytes_of
from rollout_core.workers import HFWorker, SamplingParams, ShardedHFWorker, sync_sharded
from rollout_core.workers.hf.generate import generate
from support.ranks import run_ranks, values_of

MIB = 1 << 20
#: Digests on a GPU take about 40 MiB while they are computed: ``bucketing.digest`` says so.
DIGESTS = 48 * MIB
PROMPTS = [[5], [9, 8, 7], [3] * 20, [2, 11, 2]]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    torch.cuda.set_device(0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=0, world_size=1, device_id=torch.device("cuda:0")
    )
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small")
    make_small_model(path)
    return str(path)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The folder of a model of 1 GB in bfloat16, whose largest parameter, the embeddings, has 250 MiB."""
    config = Qwen2Config(
        vocab_size=64_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=9,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path)
    del model
    torch.cuda.empty_cache()
    return str(path)


@pytest.fixture(scope="module")
def worker(large):
    with HFWorker(large, dtype="bfloat16", device="cuda") as made:
        yield made


def shard(model, mesh, **options):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def changed(model, factor):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


@pytest.mark.parametrize("offload", [False, True], ids=["on the GPU", "offloaded"])
@pytest.mark.parametrize(("capacity", "readback"), [(256 * MIB, True), (64 * MIB, False)], ids=["whole", "split"])
def test_b15_w2_a_sharded_gigabyte_within_two_buckets_and_the_largest_parameter(
    mesh, large, worker, offload, capacity, readback, record_property
):
    model = changed(load_trainer(large), 1.25 if offload else 0.75)  # float32
    model = shard(model if offload else model.cuda(), mesh, **({"offload_policy": CPUOffloadPolicy()} if offload else {}))
    largest = 2 * max(parameter.numel() for parameter in model.parameters())
    worker.free_buffers()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    report = sync_sharded(worker, model, capacity=capacity, readback=readback, dtype=torch.bfloat16, timeout=60.0)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before
    slots = worker.free_buffers()  # of the carrier, which are not torch's
    figures = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "carrier": report.carrier,
        "offload": offload,
        "readback": readback,
        "nbytes": report.nbytes,
        "buckets": report.buckets,
        "capacity": capacity,
        "largest": largest,
        "peak": peak,
        "slots": slots,
        "seconds": round(seconds, 4),
        "packing": round(report.packing, 4),
        "loading": round(report.loading, 4),
        "reading": round(report.reading, 4),
    }
    print("\nsharded update:", json.dumps(figures))
    record_property("figures", figures)
    assert report.nbytes > 1e9
    assert slots <= 2 * capacity
    assert peak <= largest + DIGESTS
    names = dict(model.named_parameters())
    for name in ("model.embed_tokens.weight", "model.layers.8.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.bias"):
        expected = names[name].detach().to_local().to(torch.bfloat16).cpu()  # of one rank, all of it
        assert bytes_of(worker.read_tensor(name)) == bytes_of(expected), name
    again = time.perf_counter()
    sync_sharded(worker, model, capacity=capacity, readback=False, dtype=torch.bfloat16, timeout=60.0)
    print("again, without reading back:", round(time.perf_counter() - again, 4), "s")


@pytest.mark.parametrize("offload", [False, True], ids=["on the GPU", "offloaded"])
def test_w1_rollouts_of_the_sharded_model_are_those_of_the_whole(mesh, small, offload):
    whole = load_trainer(small).cuda()
    model = load_trainer(small)
    model = shard(model if offload else model.cuda(), mesh, **({"offload_policy": CPUOffloadPolicy()} if offload else {}))
    worker = ShardedHFWorker(model, timeout=60.0)
    eos = sorted(eos_token_ids(whole))
    for params in (
        SamplingParams(response_length=12),
        SamplingParams(response_length=8, n=3, temperature=1.0, seed=3),
    ):
        expected = generate(whole, PROMPTS, params, eos_token_ids=eos, pad_token_id=0)
        assert [one.token_ids for one in worker.generate(PROMPTS, params)] == [one.token_ids for one in expected]


def test_b1_w1_two_ranks_over_gloo_to_a_worker_on_the_gpu(small):
    found = values_of(
        run_ranks(2, "support.sharded:scenarios", small, ["updates", "cast"], timeout=200.0, ROLLOUT_CORE_DEVICE="cuda")
    )
    for sender in range(2):
        mine = found[sender]["updates"][sender]
        assert mine["wrong"] == []
        assert mine["tokens"] == mine["expected"]
        assert [one["updates"][sender]["report"].version for one in found] == [1, 1]
    assert found[0]["cast"]["wrong"] == []
