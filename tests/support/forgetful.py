"""A VLLMEngine with a door for tests: it can be made to forget pictures, as vLLM may at any time."""

from __future__ import annotations

import torch

from rollout_core.workers.vllm.engine import VLLMEngine

FORGET = "forget all pictures"


class ForgetfulEngine(VLLMEngine):
    def read_tensor(self, name: str) -> torch.Tensor:
        if name == FORGET:
            self._engine.reset_mm_cache()
            return torch.empty(0)
        return super().read_tensor(name)
