"""REINFORCE on a small random model: rollouts from any worker, and its weights replaced in buckets at every step.

    python examples/policy_gradient.py                              # transformers; half a minute on two CPU cores
    python examples/policy_gradient.py --worker vllm                # or vllm-async, sglang: where that engine is installed
    python examples/policy_gradient.py --worker vllm --url http://127.0.0.1:8000 --model DIR    # a server, which serves DIR

The toy reward is the share of a response's places that hold an even token id: ending early earns nothing more. A step samples with
the newest weights, checks that it did, and trains on it twice, clipped as PPO is. Exits with 1 if the reward did not rise.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rollout_core.workers import (
    HFWorker,
    RolloutBatch,
    SamplingParams,
    SGLangServerWorker,
    SGLangWorker,
    VLLMServerWorker,
    VLLMWorker,
    Worker,
    to_batch,
)

VOCABULARY, POSITIONS, PAD, EOS = 64, 64, 0, 2
PROMPTS, SAMPLES, RESPONSE = 8, 8, 16
PASSES, CLIP = 2, 0.2
#: Steps whose mean rewards are compared, the first ones with the last.
COMPARED = 5
#: A policy that does not learn passes this margin in less than one run of a million. Its rewards are independent and lie in [0, 1]:
#: by Hoeffding's inequality the means of two times N of them differ by more than t with a chance of at most exp(-N * t**2).
MARGIN = math.sqrt(math.log(1e6) / (COMPARED * PROMPTS * SAMPLES))
#: Between the logprobs of the worker and of the trainer, which compute the same in float32 by other kernels.
NEAR = 1e-3


def make_model(folder: str) -> None:
    """A random Qwen2 of 0.3 million parameters, written as a checkpoint. Heads of 32: vLLM has no smaller ones on a CPU."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def start_worker(name: str, url: str | None, folder: str) -> Worker:
    """From here on all of them are the same to the trainer."""
    if url is not None:
        return {"vllm": VLLMServerWorker, "sglang": SGLangServerWorker}[name](url)
    if name == "hf":
        return HFWorker(folder)
    if name == "sglang":
        return SGLangWorker(folder)
    return VLLMWorker(folder, mode="async" if name == "vllm-async" else "stepped")


def check_versions(batch: RolloutBatch, version: int) -> None:
    """Refuse a sample any token of which came from other weights than those that were sent last."""
    found = batch.weight_versions[batch.response_mask.bool()].unique().tolist()
    if found != [version]:
        raise SystemExit(f"tokens of weight versions {found} in the batch of version {version}")


def even_share(batch: RolloutBatch) -> torch.Tensor:
    """The reward of each row, between 0 and 1."""
    return ((batch.responses % 2 == 0) & batch.response_mask.bool()).sum(1) / batch.responses.shape[1]


def response_logprobs(model: torch.nn.Module, batch: RolloutBatch) -> torch.Tensor:
    """(rows, response length), from the padded batch as it is. The logits at a place say what follows it."""
    logits = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits
    start = batch.prompts.shape[1] - 1
    return logits[:, start:-1].log_softmax(-1).gather(-1, batch.responses[..., None])[..., 0]


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: RolloutBatch, rewards: torch.Tensor) -> float:
    """One step on the rollouts. Returns the largest difference between the worker's logprobs and the trainer's, before it."""
    assert batch.logprobs is not None
    groups = rewards.view(PROMPTS, SAMPLES)  # a prompt's samples are next to each other
    advantages = (groups - groups.mean(1, keepdim=True)).view(-1, 1)  # the baseline is what a prompt's samples earned
    advantages = advantages / (advantages.std() + 1e-6)
    mask, difference = batch.response_mask, math.nan
    for number in range(PASSES):
        logprobs = response_logprobs(model, batch)
        if number == 0:
            difference = ((logprobs.detach() - batch.logprobs) * mask).abs().max().item()
        # Of the policy that is trained to the one that sampled, which is the worker: 1 in the first pass, but for rounding.
        ratio = (logprobs - batch.logprobs).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        optimizer.zero_grad()
        (-(gain * mask).sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return difference


def run(worker: Worker, model: torch.nn.Module, steps: int, learning_rate: float) -> int:
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    choose = random.Random(0)
    # The same at every step, so that rewards can be compared, and of many lengths: `to_batch` pads them on the left.
    prompts = [[choose.randrange(3, VOCABULARY) for _ in range(choose.randint(2, 12))] for _ in range(PROMPTS)]
    earned, largest = [], 0.0
    for step in range(steps):
        report = worker.sync_weights(model, capacity=256 << 10)  # raises if what is read back is not what was sent
        params = SamplingParams(response_length=RESPONSE, n=SAMPLES, temperature=1.0)  # a seed would be one for all prompts
        completions = worker.generate(prompts, params)
        batch = to_batch(prompts, completions, response_length=RESPONSE, pad_token_id=PAD, n=SAMPLES)
        check_versions(batch, report.version)
        rewards = even_share(batch)
        difference = train(model, optimizer, batch, rewards)
        earned.append(rewards.mean().item())
        largest = max(largest, difference)
        print(
            f"step {step}  reward {earned[-1]:.3f}  tokens {int(batch.response_mask.sum())}  weights {report.version} in "
            f"{report.buckets} buckets, {report.seconds:.3f} s  logprobs differ by {difference:.1e}",
            flush=True,
        )
    rise = (sum(earned[-COMPARED:]) - sum(earned[:COMPARED])) / COMPARED
    print(f"reward rose by {rise:.3f}, margin of chance {MARGIN:.3f}; logprobs differ by {largest:.1e} at most")
    return 0 if rise > MARGIN and largest < NEAR else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worker", choices=("hf", "vllm", "vllm-async", "sglang"), default="hf")
    parser.add_argument("--url", help="of a server of vllm or sglang, started with rollout_core's start_server; with --model")
    parser.add_argument("--model", help="folder of the model; without, or if there is none, a small random one is made")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    if arguments.url and (arguments.worker not in ("vllm", "sglang") or not arguments.model):
        parser.error("--url needs --worker vllm or sglang, and --model with the folder that the server serves")
    if arguments.steps < 2 * COMPARED:
        parser.error(f"--steps is at least {2 * COMPARED}: the first {COMPARED} are compared with the last")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.model or made
        if not (Path(folder) / "config.json").exists():
            make_model(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # no dropout while it is trained either
        with start_worker(arguments.worker, arguments.url, folder) as worker:
            return run(worker, model, arguments.steps, arguments.learning_rate)


if __name__ == "__main__":  # an engine's own processes import this file again
    sys.exit(main())
