"""What a model in bfloat16 may answer: transformers' forward pass over whole sequences, in float32 and in bfloat16.

SGLang's kernels on a GPU take no float32 (its norms and activations are for 16 bits), so that where two logits are nearly equal
either token is right (W1). How nearly is not chosen but measured: bfloat16 moves the reference's own logits by at most ``eps`` on
the sequences at hand, and a token may be behind the best by twice that.
"""

from __future__ import annotations

import copy

import torch


class Reference:
    """A bfloat16 model on the GPU, and the same weights computed with in float32."""

    def __init__(self, model):
        self.model = model
        self._exact = copy.deepcopy(model).float()

    @torch.no_grad()
    def check(self, prompts, responses, logprobs=None):
        """Raise ``AssertionError`` for a token that is behind the best by more than near ties are, and for a logprob that is off by
        more. Returns the part of tokens that are the best."""
        rows = [self._rows(prompt, list(tokens)) for prompt, tokens in zip(prompts, responses, strict=True) if tokens]
        near = 2 * max(float((exact - rounded).abs().max()) for exact, rounded, _ in rows)
        best = total = 0
        for place, (exact, _, tokens) in enumerate(rows):
            behind = exact.max(-1).values - exact.gather(1, tokens[:, None])[:, 0]
            assert float(behind.max()) <= near, (
                f"response {place}: a token is {float(behind.max()):.3g} behind, near ties {near:.3g}"
            )
            best, total = best + int((behind == 0).sum()), total + len(tokens)
        if logprobs is not None:
            given = [torch.tensor(one, device="cuda") for one in logprobs if len(one)]
            for (exact, _, tokens), found in zip(rows, given, strict=True):
                expected = exact.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
                assert float((expected - found).abs().max()) <= near
        return best / total

    def _rows(self, prompt, tokens):
        ids = torch.tensor([[*prompt, *tokens]], device="cuda")
        exact, rounded = (
            model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() for model in (self._exact, self.model)
        )
        return exact, rounded, torch.tensor(tokens, device="cuda")
