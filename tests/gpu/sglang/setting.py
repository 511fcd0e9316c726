"""SGLang on the GPU, in bfloat16, with the attention and sampling that come with torch and Triton alone."""

from __future__ import annotations

TIMEOUT = 120
OPTIONS = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "mem_fraction_static": 0.3,
    "max_running_requests": 64,
}
