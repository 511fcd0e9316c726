"""Weights out of a vLLM model on a GPU: fused, padded and in 8 bits. The model is a stand-in of the same attributes."""

from types import SimpleNamespace

import pytest
import torch

from rollout_core.errors import WorkerError
from rollout_core.workers.experts import AbsentWeight
from rollout_core.workers.shards import WHOLE, Shard
from rollout_core.workers.vllm.readback import read_part, read_weight


class Layer(torch.nn.Module):
    """A linear layer as vLLM has it after loading."""

    def __init__(self, weight, sizes=None, **more):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        if sizes is not None:
            self.output_partition_sizes = sizes
        for name, value in more.items():
            setattr(self, name, value)


def model_of(**layers):
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleDict(layers)
    return model


def test_a_part_of_a_fused_layer_is_a_view_of_it():
    whole = torch.arange(32.0).view(8, 4)
    model = model_of(qkv_proj=Layer(whole.clone(), [4, 2, 2]))
    read = read_weight(model, "layers.k_proj.weight")
    assert torch.equal(read, whole[4:6])
    assert read.data_ptr() == model.layers["qkv_proj"].weight[4:6].data_ptr()  # nothing is copied: the digest is made on the spot


def test_padding_of_a_vocabulary_is_left_out():
    embeddings = Layer(torch.arange(12.0).view(6, 2), org_vocab_size=5)
    assert read_weight(model_of(embed_tokens=embeddings), "layers.embed_tokens.weight").shape == (5, 2)


def quantized(values, scale):
    return (values / scale).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", ["tensor", "rows", "blocks"])
def test_8_bits_are_read_as_what_they_multiply_by(turned, kind):
    torch.manual_seed(0)
    values = torch.randn(8, 8)
    scales = {"tensor": torch.tensor(0.5), "rows": torch.rand(8, 1) + 0.5, "blocks": torch.rand(2, 2) + 0.5}[kind]
    whole = {"blocks": lambda: scales.repeat_interleave(4, 0).repeat_interleave(4, 1)}.get(kind, lambda: scales)()
    bits = quantized(values, whole)
    more = {"weight_scale_inv": scales, "weight_block_size": [4, 4]} if kind == "blocks" else {"weight_scale": scales}
    weight = bits.t() if turned else bits  # as many rows as inputs, in the memory of as many rows as outputs
    model = model_of(qkv_proj=Layer(weight, [4, 2, 2], **more))
    expected = bits.float() * whole
    assert torch.equal(read_weight(model, "layers.q_proj.weight"), expected[:4])
    assert torch.equal(read_weight(model, "layers.v_proj.weight"), expected[6:])
    if kind == "tensor":  # the scale is part of what is read
        more["weight_scale"].mul_(2)
        assert torch.equal(read_weight(model, "layers.v_proj.weight"), 2 * expected[6:])


def test_8_bits_without_a_known_scale_are_refused():
    with pytest.raises(WorkerError, match="is quantized in a way that is not read back"):
        read_weight(model_of(o_proj=Layer(torch.zeros(4, 4).to(torch.float8_e4m3fn), [4])), "layers.o_proj.weight")


# Parts of ranks: cut here by hand, as Megatron-LM's paper (arXiv 1909.08053) lays layers out


def by_attribute(rank, ranks):
    """As vLLM's layers, and older ones of SGLang, say which rank they are of."""
    return {"tp_rank": rank, "tp_size": ranks}


def by_group(rank, ranks):
    """As newer ones of SGLang do."""
    group = SimpleNamespace(rank_in_group=rank, world_size=ranks)
    return {"tp_group": group, "kv_tp_group": group}


SAID = pytest.mark.parametrize("said", [by_attribute, by_group])


def numbered(*shape):
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)


def check(module, name, whole, expected, shard=None):
    """It is read as what it was cut to, and says where that is in the whole."""
    found, place = read_part(model_of(**{module[0]: module[1]}), f"layers.{name}", tuple(whole.shape))
    assert torch.equal(found, expected)
    assert torch.equal(place.of(whole), expected)
    if shard is not None:
        assert place == shard


@SAID
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_w9_rows_columns_and_copies(said, ranks):
    whole = numbered(8, 12)
    for rank in range(ranks):
        rows, columns = whole.chunk(ranks)[rank], whole.chunk(ranks, 1)[rank]
        check(("up", Layer(rows, [8 // ranks], **said(rank, ranks))), "up.weight", whole, rows)
        check(("down", Layer(columns, [8], **said(rank, ranks))), "down.weight", whole, columns)
        check(("norm", Layer(whole[0])), "norm.weight", whole[0], whole[0], WHOLE)


@SAID
@pytest.mark.parametrize(("ranks", "heads", "kv_heads"), [(2, 4, 2), (4, 4, 2), (4, 8, 1), (8, 8, 4), (1, 4, 2)])
def test_w9_heads_of_which_several_ranks_have_one(said, ranks, heads, kv_heads):
    """Queries are dealt out; heads of keys and values, if there are fewer than ranks, go to as many ranks in a row."""
    size = 3
    query, key, value = numbered(heads * size, 5), 100 + numbered(kv_heads * size, 5), 200 + numbered(kv_heads * size, 5)
    for rank in range(ranks):
        own = range(rank * heads // ranks, (rank + 1) * heads // ranks)
        shared = sorted({head * kv_heads // heads for head in own})
        q, k, v = (
            torch.cat([whole.view(-1, size, 5)[head] for head in chosen])
            for whole, chosen in ((query, own), (key, shared), (value, shared))
        )
        more = {
            "total_num_heads": heads,
            "total_num_kv_heads": kv_heads,
            "head_size": size,
            "num_kv_head_replicas": max(1, ranks // kv_heads),
            **said(rank, ranks),
        }
        sizes = [len(q), len(k), len(v)]
        for name, whole, expected in (("q_proj", query, q), ("k_proj", key, k), ("v_proj", value, v)):
            check(("qkv_proj", Layer(torch.cat([q, k, v]), sizes, **more)), f"{name}.weight", whole, expected)
        # A checkpoint that has them fused, too, as those of models that see have it.
        check(
            ("qkv", Layer(torch.cat([q, k, v]), sizes, **more)), "qkv.weight", torch.cat([query, key, value]), torch.cat([q, k, v])
        )


@SAID
def test_w9_a_layer_that_is_fused_in_the_checkpoint_too(said):
    gate, up = numbered(8, 3), 100 + numbered(4, 3)
    for rank in range(2):
        local = torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
        layer = Layer(local, [4, 2], output_sizes=[8, 4], **said(rank, 2))
        check(("gate_up_proj", layer), "gate_up_proj.weight", torch.cat([gate, up]), local)
        layer = Layer(local, [4, 2], output_sizes=[8, 3], **said(rank, 2))
        with pytest.raises(WorkerError, match=r"is fused of \[8, 3\] here, and has 12 rows"):
            read_part(model_of(gate_up_proj=layer), "layers.gate_up_proj.weight", (12, 3))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_w9_a_vocabulary_is_padded_behind_its_last_row(ranks):
    whole, padded = numbered(10, 4), 12
    for rank in range(ranks):
        start, end = (min(place * padded // ranks, 10) for place in (rank, rank + 1))
        local = torch.zeros(padded // ranks, 4)
        local[: end - start] = whole[start:end]
        indices = SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=end)
        check(("embed", Layer(local, org_vocab_size=10, shard_indices=indices)), "embed.weight", whole, whole[start:end])


@SAID
def test_w9_padding_has_to_be_zero(said):
    """As SGLang pads layers on a CPU: the last rank has fewer rows, or columns, and zeros behind them."""
    whole = numbered(10, 3)
    for dim, tensor in ((0, whole), (1, whole.t().contiguous())):
        for rank, size in ((0, 6), (1, 4)):
            expected = tensor.narrow(dim, rank * 6, size)
            local = torch.zeros_like(tensor.narrow(dim, 0, 6))
            local.narrow(dim, 0, size).copy_(expected)
            check(("up", Layer(local, [local.shape[0]], **said(rank, 2))), "up.weight", tensor, expected)
        local[-1, -1] = 1
        with pytest.raises(WorkerError, match="the padding of 'layers.up.weight'.* is not zero"):
            read_part(model_of(up=Layer(local, [local.shape[0]], **said(1, 2))), "layers.up.weight", tuple(tensor.shape))


def test_w9_a_rank_for_which_no_rows_are_left():
    layer = Layer(torch.zeros(6, 3), [6], **by_attribute(2, 3))
    found, shard = read_part(model_of(up=layer), "layers.up.weight", (10, 3))
    assert (tuple(found.shape), shard) == ((0, 3), Shard(0, ((10, 10),)))


def test_w9_what_is_laid_out_in_a_way_that_is_not_known_is_refused():
    for local, shape in (((4, 3), (8, 6)), ((4, 3), (8, 3, 2)), ((4, 3), (8, 3))):
        layer = Layer(torch.zeros(local), None, **(by_attribute(0, 2) if shape != (8, 3) else {}))
        with pytest.raises(WorkerError, match="in a way that is not known"):
            read_part(model_of(up=layer), "layers.up.weight", shape)
    with pytest.raises(AbsentWeight):
        read_part(model_of(), "layers.up.weight", (8, 3))


@SAID
def test_w9_a_padded_part_may_have_the_shape_of_the_whole(said):
    """SGLang on a CPU: one head of keys on two ranks becomes two, and the second is of zeros."""
    whole = numbered(4, 3)
    more = {"total_num_kv_heads": 2, "num_kv_head_replicas": 1, "output_size": 16, "output_size_per_partition": 8}
    for rank, expected in ((0, whole), (1, whole[:0])):
        local = torch.cat([torch.zeros(2, 3), whole if rank == 0 else torch.zeros(4, 3), torch.zeros(2, 3)])
        check(("qkv_proj", Layer(local, [2, 4, 2], **more, **said(rank, 2))), "k_proj.weight", whole, expected)
    columns = {"input_size": 8, "input_size_per_partition": 4, "output_size": 4, "output_size_per_partition": 4}
    wide = numbered(4, 4)
    check(("o_proj", Layer(wide, [4], **columns, **said(0, 2))), "o_proj.weight", wide, wide)
    check(("o_proj", Layer(torch.zeros(4, 4), [4], **columns, **said(1, 2))), "o_proj.weight", wide, wide[:, :0])
    bias = Layer(wide, [4], **columns, **said(1, 2))
    bias.bias = torch.nn.Parameter(wide[0], requires_grad=False)
    check(("o_proj", bias), "o_proj.bias", wide[0], wide[0], WHOLE)
