"""Planning and manifests for a mixture-of-experts model of 18,867 tensors, beside pickle of the same metadata."""

from __future__ import annotations

import pickle
from typing import NamedTuple

import torch

from rollout_core.bench.timing import Timing, measure
from rollout_core.bucketing import BucketPlan, TensorSpec, plan_buckets

CAPACITY = 512 << 20


def qwen3_30b_a3b() -> list[TensorSpec]:
    """The tensors of Qwen/Qwen3-30B-A3B's checkpoint, after its config.json: 48 layers of 128 experts, hidden size 2048, expert
    size 768, 32 query and 4 key-value heads of 128, vocabulary 151,936, bf16, embeddings not tied."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151936, 2048)}
    for layer in range(48):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (4096, 2048),
            f"{at}.self_attn.k_proj.weight": (512, 2048),
            f"{at}.self_attn.v_proj.weight": (512, 2048),
            f"{at}.self_attn.o_proj.weight": (2048, 4096),
            f"{at}.self_attn.q_norm.weight": (128,),
            f"{at}.self_attn.k_norm.weight": (128,),
            f"{at}.mlp.gate.weight": (128, 2048),
            f"{at}.input_layernorm.weight": (2048,),
            f"{at}.post_attention_layernorm.weight": (2048,),
        }
        for expert in range(128):
            shapes |= {
                f"{at}.mlp.experts.{expert}.gate_proj.weight": (768, 2048),
                f"{at}.mlp.experts.{expert}.up_proj.weight": (768, 2048),
                f"{at}.mlp.experts.{expert}.down_proj.weight": (2048, 768),
            }
    shapes |= {"model.norm.weight": (2048,), "lm_head.weight": (151936, 2048)}
    return [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()]


class PlanningResult(NamedTuple):
    tensors: int
    manifest_nbytes: int
    pickle_nbytes: int
    timings: dict[str, Timing]


def bench_planning(repeats: int) -> PlanningResult:
    """Plan, encode and decode, each against pickling the list of (name, dtype, shape) and reading it back."""
    specs = qwen3_30b_a3b()
    metadata = [(spec.name, spec.dtype, spec.shape) for spec in specs]
    plan = plan_buckets(specs, CAPACITY)
    manifest, pickled = plan.to_bytes(), pickle.dumps(metadata)
    timings = measure(
        {
            "plan": lambda: plan_buckets(specs, CAPACITY),
            "plan, packed order": lambda: plan_buckets(specs, CAPACITY, order="packed"),
            "encode": plan.to_bytes,
            "decode": lambda: BucketPlan.from_bytes(manifest),
            "pickle dumps": lambda: pickle.dumps(metadata),
            "pickle loads": lambda: pickle.loads(pickled),
        },
        repeats=repeats,
    )
    return PlanningResult(len(specs), len(manifest), len(pickled), timings)
