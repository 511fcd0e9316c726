"""The small model in bfloat16 that engines on a GPU are tested with, other weights for it, and who uses the GPU's memory."""

from __future__ import annotations

import copy

import torch

POSITIONS = 512


class Place:
    """A running worker, the bytes that were in use before it, and models on the GPU that it is given."""

    def __init__(self, worker, models, before):
        self.worker, self.models, self.before = worker, models, before


def make_model():
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=[2, 7],
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).eval()


def changed(model, seed):
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in other.parameters():
            noise = 0.05 * torch.randn(tensor.shape, generator=generator)
            tensor += noise.to(tensor.dtype).to(tensor.device)
    return other


def used_memory():
    """Bytes of the GPU that are in use, by whomever."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free
