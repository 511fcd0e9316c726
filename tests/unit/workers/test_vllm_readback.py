"""Weights out of a vLLM model on a GPU: fused, padded and in 8 bits. The model is a stand-in of the same attributes."""

import pytest
import torch

from rollout_core.errors import WorkerError
from rollout_core.workers.vllm.readback import read_weight


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
