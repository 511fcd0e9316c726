"""vLLM's output layer with a packed copy of its weights, as oneDNN makes one on some machines."""

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from rollout_core.workers.vllm.extension import RolloutExtension


class PackingExtension(RolloutExtension):
    def rollout_core_digests(self, names):
        if not getattr(self, "packed", False):
            self.packed = True
            for module in self._rollout_core_model().modules():
                if isinstance(module, VocabParallelEmbedding):
                    copy = module.weight.detach().clone()
                    module.cpu_linear = lambda x, weight, bias, copy=copy: torch.nn.functional.linear(x, copy, bias)
        return super().rollout_core_digests(names)
