"""A mixture of experts (W1, W2, W9): an engine has all experts of a layer in two tensors, a checkpoint three for each of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from rollout_core.errors import PlanMismatchError, WorkerError
from rollout_core.workers import SamplingParams
from rollout_core.workers.digests import combined_digest, weight_digest
from support.engines import DEVICE, ENGINE, VLLM_CPU, changed, running_worker
from support.greedy import argmax_loop
from support.mixture import make_mixture
from support.rank_workers import worker_of

PROMPTS = [[5], [17, 3, 60], list(range(100, 137)), [9, 2, 2, 12, 7, 55]]
GREEDY = SamplingParams(response_length=10, ignore_eos=True)
RANKS = f"{ENGINE}_tp2"
#: Two ranks want two GPUs. SGLang is read in the same way on one rank as on two, and vLLM is not.
KINDS = [ENGINE] if ENGINE == "hf" or DEVICE == "cuda" else [*([ENGINE] if ENGINE == "vllm" else []), RANKS]
EXPERT = "model.layers.1.mlp.experts.5.{}.weight"
#: What the engine's tensors for all experts are called where a fault changes the first value, the one of expert 0's first matrix.
STACKED = {"vllm": "model.layers.1.mlp.experts.routed_experts.w2_weight", "sglang": "model.layers.1.mlp.experts.w2_weight"}


class Place:
    """A running worker, and two models for it: as modules, and by the names of checkpoints."""

    def __init__(self, worker, models, folder, faults):
        self.worker, self.models, self.faults = worker, models, faults
        self.checkpoints = []
        for number, model in enumerate(models):
            model.save_pretrained(folder / str(number))
            self.checkpoints.append(load_file(folder / str(number) / "model.safetensors", device=str(model.device)))


@pytest.fixture(scope="module", params=KINDS)
def place(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "fault").write_text("")
    model = make_mixture()
    model.save_pretrained(folder / "start")
    models = [changed(model, seed).to(DEVICE) for seed in (1, 2)]
    start, faults = folder / "start", folder / "fault"
    running = worker_of(RANKS, start, faults) if request.param == RANKS else running_worker(ENGINE, start)
    with running as worker:
        yield Place(worker, models, folder, faults)


def check_tokens(place, model):
    expected = [argmax_loop(model, prompt, 10) for prompt in PROMPTS]
    assert [list(one.token_ids) for one in place.worker.generate(PROMPTS, GREEDY)] == expected


def test_w1_w2_every_update_is_what_is_generated_with_and_read_back(place):
    """The second and third update, too: engines lay experts out for their kernels when they load them first."""
    worker = place.worker
    for turn in (0, 1, 0):
        model = place.models[turn]
        report = worker.sync_weights(model, capacity=100_000)
        check_tokens(place, model)
        sent = {**dict(model.named_parameters()), **dict(model.named_buffers())} if ENGINE == "hf" else place.checkpoints[turn]
        expected = {
            name: weight_digest(tensor, values=worker.reads_values, algorithm=worker.digest_algorithm)
            for name, tensor in sent.items()
        }
        assert worker.tensor_digests() == expected
        assert report.digest == combined_digest(expected)


if ENGINE != "hf":  # whose module has the stacked names itself

    def test_w2_by_the_names_of_checkpoints_it_is_the_same_update(place):
        model, checkpoint = place.models[1], place.checkpoints[1]
        stacked = place.worker.sync_weights(dict(model.state_dict()))
        one_by_one = place.worker.sync_weights(checkpoint)
        assert one_by_one.digest == stacked.digest
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            name = EXPERT.format(matrix)
            assert torch.equal(place.worker.read_tensor(name), checkpoint[name].cpu()), name

    def test_w2_an_expert_that_is_missing_or_too_much_is_refused(place):
        checkpoint = dict(place.checkpoints[0])
        place.worker.sync_weights(checkpoint)
        name = EXPERT.format("up_proj")
        moved = {**checkpoint, name.replace(".5.", ".8."): checkpoint[name]}
        with pytest.raises(PlanMismatchError, match=r"experts\.8\.up_proj"):
            place.worker.sync_weights(moved)
        del checkpoint[name]
        with pytest.raises(PlanMismatchError, match=r"experts\.5\.up_proj.* is not in the update"):
            place.worker.sync_weights(checkpoint)
        with pytest.raises(PlanMismatchError, match=r"experts\.0\.gate_proj\.weight' is f32.32, 128. in the update"):
            stacked = dict(place.models[0].state_dict())
            stacked["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(8, 64, 128, device=DEVICE)
            place.worker.sync_weights(stacked)
        check_tokens(place, place.models[0])


if RANKS in KINDS:

    @pytest.mark.parametrize("place", [RANKS], indirect=True)
    @pytest.mark.parametrize("rank", [0, 1])
    def test_w9_one_value_of_one_expert_on_one_rank_is_seen(place, rank):
        place.faults.write_text(f"{rank} changes {STACKED[ENGINE]}")
        with pytest.raises(WorkerError, match=rf"on ranks \[{rank}\] of 2, first 'model.layers.1.mlp.experts.0.down_proj.weight'"):
            place.worker.sync_weights(place.models[1])
        place.faults.write_text("")
        place.worker.sync_weights(place.models[1])
        check_tokens(place, place.models[1])


if ENGINE == "vllm" and DEVICE == "cpu":

    @pytest.mark.slow
    def test_preflight_holds(tmp_path):
        """Its trainer has stacked experts, and its worker's engine may not."""
        make_mixture().save_pretrained(tmp_path / "model")
        command = [sys.executable, "-m", "rollout_core.cli", "preflight", "--worker", ENGINE, "--model", str(tmp_path / "model")]
        environment = {**os.environ, **VLLM_CPU, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        report = tmp_path / "report.json"
        run = subprocess.run([*command, "--json", str(report)], env=environment, capture_output=True, text=True, timeout=200)
        checks = json.loads(report.read_text())["checks"]
        assert {check["id"]: check["figure"] for check in checks if check["result"] != "pass"} == {}
        assert run.returncode == 0, run.stdout + run.stderr
