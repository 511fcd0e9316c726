"""The models that preflight works on: a small one made on the spot (``vision_models`` has one that sees), or a folder, and the
trainer's changed copy of it."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch

from rollout_core.errors import WorkerError
from rollout_core.transfer.targets import named_weights, persistent_weights


def make_small_model(folder: Path, *, heads: int = 6, head_dim: int = 20) -> None:
    """Write a random Qwen2 of about 0.4 million float32 parameters: tied embeddings, biases, odd sizes, and a vocabulary so small
    that its four EOS ids are met. ``heads`` of ``head_dim`` (engines have kernels for some sizes only) make the hidden size."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=251,
        hidden_size=heads * head_dim,
        intermediate_size=250,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=[2, 7, 100, 200],
        pad_token_id=0,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)


def load_trainer(folder: Path) -> Any:
    """The trainer's model, of text or of pictures and text, in float32 on the CPU. ``WorkerError`` if the folder holds none."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(str(folder), **where)
        # Given the config of a model that sees, the causal auto class would build its language model alone.
        loader = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model = loader.from_pretrained(str(folder), dtype=torch.float32, **where)
    except Exception as error:  # transformers raises many kinds; what the operator needs is the folder and the cause
        raise WorkerError(f"the model in {folder} could not be loaded: {type(error).__name__}: {error}") from error
    return model.eval()


def perturb(
    model: torch.nn.Module, scale: float, seed: int = 0, *, computed: bool = True, only: Container[str] | None = None
) -> list[str]:
    """Change every floating-point parameter and buffer by noise of ``scale`` times its root mean square (taken as 0.01 at least),
    as a training step would; ``computed``: also buffers that a state dict leaves out; ``only``: no others than these. Returns the
    names of what was changed; a tied tensor is changed once."""
    generator = torch.Generator().manual_seed(seed)
    changed: list[str] = []
    seen: set[int] = set()
    with torch.no_grad():
        for name, tensor in (named_weights(model) if computed else persistent_weights(model)).items():
            if not tensor.is_floating_point() or not tensor.numel() or (only is not None and name not in only):
                continue
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
                size = tensor.float().square().mean().sqrt().clamp(min=0.01)  # a bias may be all zeros
                tensor += (noise * scale * size).to(tensor.dtype)
            changed.append(name)
    return changed


def greedy_reference(model: Any, prompt: list[int], length: int, eos: set[int]) -> tuple[list[int], float]:
    """Greedy tokens from one unpadded forward pass per token, without a cache and without ``generate``; and the smallest gap
    between the two largest logits on the way, which says how near a tie it came."""
    ids, gap = list(prompt), float("inf")
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < length:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            best = logits.topk(2)
            gap = min(gap, float(best.values[0] - best.values[1]))
            token = int(best.indices[0])
            tokens.append(token)
            ids.append(token)
            if token in eos:
                break
    return tokens, gap


def eos_token_ids(model: Any) -> set[int]:
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return {eos} if isinstance(eos, int) else set(eos)
    return set()
