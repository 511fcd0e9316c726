"""A trainer with FSDP2 on two GPUs that updates an engine on the same two, tensor parallel (B15, W2, W9), in bfloat16: a mixture of
experts, and a model whose output layer is its embeddings."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from gpu.small import POSITIONS, make_model
from rollout_core.workers.digests import combined_digest, weight_digest
from support.mixture import make_mixture
from support.ranks import run_ranks, values_of
from support.sharded import trainer
from support.sharded_engine import LENGTH, updates

PROMPTS = [[5], [17, 3, 60], list(range(100, 137)), [9, 2, 2, 12, 7, 55]]
SEEDS = [1, 2]
HEAD = "lm_head.weight"


# SGLang rotates heads of 64 (128, 256, 512) by a kernel that writes its cache, too, and its graphs want that.
@pytest.fixture(scope="module", params=[make_model, partial(make_mixture, POSITIONS, 64)], ids=["tied", "mixture"])
def place(request, tmp_path_factory):
    """The folder of a model, and what the rank with the engine found after each update."""
    if torch.cuda.device_count() < 2:
        pytest.fail("these tests need two GPUs")
    folder = tmp_path_factory.mktemp("model")
    request.param().save_pretrained(folder)
    ended = run_ranks(
        2,
        f"{updates.__module__}:{updates.__name__}",
        str(folder),
        "gpu.two.starting:start",
        PROMPTS,
        SEEDS,
        torch.bfloat16,
        timeout=400.0,
        ROLLOUT_CORE_BACKEND="cpu:gloo,cuda:nccl",
        ROLLOUT_CORE_TRAINER="cuda",
    )
    return folder, values_of(ended)[0]


@pytest.mark.parametrize("turn", range(len(SEEDS)))
def test_every_gpu_has_its_part_of_the_whole_model(place, turn, tmp_path):
    folder, found = place
    one = found[turn]
    trainer(str(folder), seed=SEEDS[turn]).to(torch.bfloat16).save_pretrained(tmp_path)
    sent = load_file(tmp_path / "model.safetensors", device="cuda")
    sent.setdefault(HEAD, sent["model.embed_tokens.weight"])
    expected = {name: weight_digest(tensor, algorithm=one["algorithm"]) for name, tensor in sent.items()}
    assert one["ranks"] == 2
    assert one["report"].carrier == "cuda_ipc"
    assert one["digests"] == expected
    assert one["report"].digest == combined_digest(expected)
    assert [len(tokens) for tokens in one["tokens"]] == [LENGTH] * len(PROMPTS)
    assert one["tokens"] != found[1 - turn]["tokens"]
