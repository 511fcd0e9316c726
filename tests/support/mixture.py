"""A small mixture of experts."""

from __future__ import annotations

import torch
import transformers

from support.engines import POSITIONS


def make_mixture(positions=POSITIONS, head_dim=32):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=200,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=[2, 7],
        pad_token_id=0,
    )
    return transformers.Qwen3MoeForCausalLM(config).float().eval()
