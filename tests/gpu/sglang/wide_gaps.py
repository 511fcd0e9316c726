"""``rollout_core.preflight.models`` with a model of which no rounding changes a greedy token, for the kit on an engine in bfloat16.

The output layer has, for each token, the embedding of the token before it in a cycle of all, so that the largest logit is far above
the others whatever the layers add. Which cycle that is changes with the weights. What attention does is not seen in its tokens:
that is for tests with near ties.
"""

from __future__ import annotations

import torch

from rollout_core.preflight import models

eos_token_ids = models.eos_token_ids
VOCABULARY = 251


def make_small_model(folder, **shape):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    assert not shape
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=[2, 7, 100, 200],
        pad_token_id=0,
        initializer_range=0.02,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
        with torch.no_grad():
            model.model.embed_tokens.weight.normal_()
    _set_cycle(model, seed=0)
    model.save_pretrained(folder)


def load_trainer(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()


def perturb(model, scale, seed=0, *, computed=True):
    changed = models.perturb(model, scale, seed, computed=computed)
    _set_cycle(model, seed=seed + 1)
    return changed


def greedy_reference(model, prompt, length, eos):
    """With an error where a tie came near: then these weights are of no use for it."""
    tokens, gap = models.greedy_reference(model, prompt, length, eos)
    assert gap > 1, f"two logits are {gap} apart"
    return tokens, gap


@torch.no_grad()
def _set_cycle(model, seed):
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    embedding = model.model.embed_tokens.weight
    model.lm_head.weight[order.roll(-1)] = embedding[order] / 4
