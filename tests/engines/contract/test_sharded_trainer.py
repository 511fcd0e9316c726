"""A trainer with FSDP2 on two ranks that updates an engine on two ranks (B15, W1, W2, W9): a mixture of experts, which
transformers and FSDP2 have as two tensors a layer, and a checkpoint expert by expert. Each is gathered once."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from rollout_core.preflight.models import load_trainer
from rollout_core.workers.digests import combined_digest, weight_digest
from support.greedy import argmax_loop
from support.mixture import make_mixture
from support.ranks import run_ranks, values_of
from support.sharded import trainer
from support.sharded_engine import LENGTH, updates

PROMPTS = [[5], [17, 3, 60], list(range(100, 137)), [9, 2, 2, 12, 7, 55]]
SEEDS = [1, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_mixture().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def found(folder):
    place = f"{updates.__module__}:{updates.__name__}"
    ended = run_ranks(2, place, str(folder), "support.rank_workers:two_ranks", PROMPTS, SEEDS, None, timeout=200.0)
    found, nothing = values_of(ended)
    assert nothing == []
    return found


@pytest.mark.parametrize("turn", range(len(SEEDS)))
def test_every_rank_of_the_engine_has_its_part_of_the_whole_model(folder, found, turn, tmp_path):
    one = found[turn]
    trainer(str(folder), seed=SEEDS[turn]).save_pretrained(tmp_path)
    whole = load_trainer(tmp_path)  # without what the trainer changed of buffers that engines compute for themselves
    checkpoint = load_file(tmp_path / "model.safetensors")
    expected = {
        name: weight_digest(tensor, values=one["values"], algorithm=one["algorithm"]) for name, tensor in checkpoint.items()
    }
    assert one["ranks"] == 2
    assert one["digests"] == expected
    assert one["report"].digest == combined_digest(expected)
    assert one["report"].version == turn + 1
    assert one["tokens"] == [argmax_loop(whole, prompt, LENGTH) for prompt in PROMPTS]
