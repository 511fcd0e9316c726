"""Greedy tokens as transformers' model alone gives them: one unpadded forward pass for each."""

from __future__ import annotations

import torch


@torch.no_grad()
def argmax_loop(model, prompt, steps, ends=()):
    """At most ``steps`` tokens, the last of which may be one of ``ends``."""
    tokens = []
    while len(tokens) < steps and not (tokens and tokens[-1] in ends):
        ids = torch.tensor([prompt + tokens], device=model.device)
        tokens.append(int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
    return tokens
