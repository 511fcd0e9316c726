"""Matrices of experts out of the tensors that engines have for all of a layer. The layers are stand-ins of the same attributes."""

from types import SimpleNamespace

import pytest
import torch

from rollout_core.errors import WorkerError
from rollout_core.workers.experts import AbsentWeight, UnknownLayout
from rollout_core.workers.shards import WHOLE, Shard
from rollout_core.workers.vllm.readback import read_part, read_weight

EXPERTS, HIDDEN, WIDTH = 3, 4, 6
MATRICES = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}


def matrices():
    """By expert and matrix, no two values alike."""
    start, found = 1, []
    for _ in range(EXPERTS):
        found.append({})
        for name, (rows, columns) in MATRICES.items():
            found[-1][name] = torch.arange(start, start + rows * columns).float().view(rows, columns)
            start += rows * columns
    return found


class Experts(torch.nn.Module):
    def __init__(self, w13, w2, **more):
        super().__init__()
        self.w13_weight, self.w2_weight = torch.nn.Parameter(w13), torch.nn.Parameter(w2)
        for name, value in more.items():
            setattr(self, name, value)


def stacked(found, *, up_first=False, rows=slice(None), padded=0):
    """As an engine stacks them, with so many rows of padding in the intermediate size, of which a rank has ``rows``."""
    pad = torch.zeros(padded, HIDDEN)
    order = ("up_proj", "gate_proj") if up_first else ("gate_proj", "up_proj")
    w13 = torch.stack([torch.cat([part for name in order for part in (one[name][rows], pad)]) for one in found])
    w2 = torch.stack([torch.cat([one["down_proj"][:, rows], pad.t()], 1) for one in found])
    return w13, w2


def vllm(w13, w2, backend="TRITON", rank=0, ranks=1, width=WIDTH, **more):
    config = SimpleNamespace(
        tp_rank=rank, tp_size=ranks, intermediate_size_per_partition_unpadded=width, hidden_dim_unpadded=HIDDEN
    )
    method = SimpleNamespace(unquantized_backend=SimpleNamespace(name=backend), moe_kernel=None)
    model = torch.nn.Module()
    model.mlp = torch.nn.Module()
    model.mlp.experts = torch.nn.Module()
    model.mlp.experts.routed_experts = Experts(w13, w2, moe_config=config, quant_method=method, **more)
    return model


def sglang(w13, w2, rank=0, ranks=1, **more):
    model = torch.nn.Module()
    model.mlp = torch.nn.Module()
    model.mlp.experts = Experts(w13, w2, moe_tp_rank=rank, moe_tp_size=ranks, **more)
    return model


def names():
    return [(number, name, f"mlp.experts.{number}.{name}.weight") for number in range(EXPERTS) for name in MATRICES]


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(lambda found: vllm(*stacked(found)), id="vllm"),
        pytest.param(lambda found: vllm(*stacked(found, up_first=True), "FLASHINFER_CUTLASS"), id="vllm-up-first"),
        pytest.param(lambda found: vllm(*stacked(found, padded=2)), id="vllm-padded"),
        pytest.param(lambda found: vllm(*stacked(found), "CPU"), id="vllm-cpu-without-a-kernel"),
        pytest.param(lambda found: sglang(*stacked(found)), id="sglang"),
        pytest.param(
            lambda found: sglang(*stacked(found, up_first=True), quant_method=SimpleNamespace(load_up_proj_weight_first=True)),
            id="sglang-up-first",
        ),
        pytest.param(
            lambda found: sglang(*(one.transpose(1, 2).contiguous() for one in stacked(found)), use_triton_kernels=True),
            id="sglang-columns-first",
        ),
    ],
)
def test_every_matrix_of_every_expert_is_read(made):
    found = matrices()
    model = made(found)
    for number, name, place in names():
        assert torch.equal(read_weight(model, place), found[number][name]), place


@pytest.mark.parametrize("kind", [vllm, sglang])
def test_names_of_mixtral(kind):
    found = matrices()
    model = kind(*stacked(found))
    for short, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        assert torch.equal(read_weight(model, f"mlp.experts.1.{short}.weight"), found[1][name])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", [vllm, sglang])
def test_w9_a_rank_says_which_part_of_each_it_has(kind, rank):
    found = matrices()
    half = WIDTH // 2
    mine = slice(rank * half, (rank + 1) * half)
    more = {"width": half} if kind is vllm else {}
    model = kind(*stacked(found, rows=mine), rank=rank, ranks=2, **more)
    for number, name, place in names():
        whole = found[number][name]
        part, shard = read_part(model, place, tuple(whole.shape))
        dim = 1 if name == "down_proj" else 0
        assert shard == Shard(dim, ((rank * half, (rank + 1) * half),))
        assert torch.equal(part, whole.narrow(dim, rank * half, half)), place
    whole, shard = read_part(vllm(*stacked(found)), "mlp.experts.0.up_proj.weight", (WIDTH, HIDDEN))
    assert shard == WHOLE
    assert torch.equal(whole, found[0]["up_proj"])


def test_w9_experts_of_other_ranks_are_absent():
    """With expert parallelism a rank has whole experts, and not all."""
    found = matrices()
    w13, w2 = stacked(found[1:])
    model = vllm(w13, w2, _map_global_expert_id_to_local_expert_id=lambda number: number - 1)
    assert torch.equal(read_weight(model, "mlp.experts.2.down_proj.weight"), found[2]["down_proj"])
    with pytest.raises(AbsentWeight, match=r"no expert 'mlp\.experts\.0\.gate_proj'"):
        read_weight(model, "mlp.experts.0.gate_proj.weight")
    with pytest.raises(AbsentWeight):
        read_weight(vllm(*stacked(found)), "mlp.experts.3.gate_proj.weight")


def test_padding_that_is_computed_with_is_an_error():
    w13, w2 = stacked(matrices(), padded=2)
    w13[1, WIDTH + 1, 0] = 1
    model = vllm(w13, w2)
    with pytest.raises(WorkerError, match="the padding of 'mlp.experts' is not zero"):
        read_weight(model, "mlp.experts.1.gate_proj.weight")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        pytest.param(lambda w13, w2: vllm(w13, w2, "FLASHINFER_TRTLLM"), "FLASHINFER_TRTLLM kernels", id="blocks"),
        pytest.param(lambda w13, w2: sglang(w13, w2, use_intel_amx_backend=True), "packed for SGLang", id="amx"),
        pytest.param(lambda w13, w2: sglang(w13[..., None], w2), "packed for SGLang", id="sglang-blocks"),
        pytest.param(
            lambda w13, w2: sglang(w13, w2, quant_method=SimpleNamespace(w13_swiglu_interleaved=True)),
            "packed for SGLang",
            id="row-by-row",
        ),
        pytest.param(lambda w13, w2: vllm(w13.to(torch.float8_e4m3fn), w2.to(torch.float8_e4m3fn)), "are quantized", id="8-bits"),
    ],
)
def test_a_layout_that_is_not_known_is_not_guessed(made, words):
    with pytest.raises(UnknownLayout, match=f"{words}.*readback=False"):
        read_weight(made(*stacked(matrices())), "mlp.experts.0.gate_proj.weight")


def test_experts_without_a_gate():
    """Such as Nemotron-H's, which square a ReLU."""
    found = matrices()
    w13, w2 = torch.stack([one["up_proj"] for one in found]), stacked(found)[1]
    plain = vllm(w13, w2)
    plain.mlp.experts.routed_experts.moe_config.is_act_and_mul = False
    for model in (plain, sglang(w13, w2, moe_runner_config=SimpleNamespace(is_gated=False))):
        assert torch.equal(read_weight(model, "mlp.experts.2.up_proj.weight"), found[2]["up_proj"])
        assert torch.equal(read_weight(model, "mlp.experts.2.down_proj.weight"), found[2]["down_proj"])
        with pytest.raises(AbsentWeight):
            read_weight(model, "mlp.experts.2.gate_proj.weight")


def test_one_layer_at_a_time_is_kept():
    """What is unpacked is a copy."""
    from rollout_core.workers.vllm.readback import Directory

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([vllm(*stacked(matrices())) for _ in range(3)])
    directory = Directory(model)
    for layer in range(3):
        for name in MATRICES:
            read_weight(model, f"layers.{layer}.mlp.experts.0.{name}.weight", directory)
        assert list(directory.experts) == [f"layers.{layer}.mlp.experts"]


def test_other_names_are_none_of_experts():
    model = vllm(*stacked(matrices()))
    for name in ("mlp.experts.0.gate_proj.bias", "mlp.experts.0.router.weight", "mlp.expert.0.gate_proj.weight"):
        with pytest.raises(AbsentWeight):
            read_weight(model, name)
