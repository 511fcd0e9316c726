"""Reinforcement learning from pictures that a tool returns, on a small random Qwen2.5-VL: conversations that grow by deltas.

    python examples/pictures.py                   # transformers; half a minute on two CPU cores
    python examples/pictures.py --worker vllm     # or vllm-async, sglang; vLLM gets each picture once, and then by its name

The policy is asked for a colour. Its first turn stands for the call of a tool, whatever it says; the tool returns a drawing; the
second turn is the answer. The toy reward is the share of the answer's places that hold an even token id if the drawing was black,
an odd one if it was white: who does not look earns one half at most. Exits with 1 if the reward did not rise. Needs torchvision,
which transformers wants for the processor.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from rollout_core.multimodal import Conversation, HFRenderer
from rollout_core.workers import Completion, HFWorker, SamplingParams, SGLangWorker, VLLMWorker, Worker

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
ID = {word: number for number, word in enumerate(SPECIAL)}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY, POSITIONS = 264, 256
COLOURS = ("black", "white")
CALL, ANSWER, SAMPLES = 2, 2, 16  # most tokens of each turn; conversations of each colour
#: As in policy_gradient.py: steps that are compared, the rise that a policy that does not learn passes in less than one run of a
#: million (Hoeffding's inequality), and how near the logprobs of worker and trainer are.
COMPARED = 5
MARGIN = math.sqrt(math.log(1e6) / (COMPARED * len(COLOURS) * SAMPLES))
NEAR = 1e-3


def make_processor() -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's, over a tokenizer of bytes: nothing is fetched."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=list(SPECIAL[3:])
    )
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56}),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )


def make_model() -> Qwen2_5_VLForConditionalGeneration:
    """Two layers that see and two that speak, in float32, random."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.1,
            "bos_token_id": None,
            "eos_token_id": ID["<|im_end|>"],
            "pad_token_id": ID["<pad>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": 128,
            "num_heads": 2,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.1,
        },
        image_token_id=ID["<|image_pad|>"],
        video_token_id=ID["<|video_pad|>"],
        vision_start_token_id=ID["<|vision_start|>"],
        vision_end_token_id=ID["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config).float().eval()


def start_worker(name: str, folder: str) -> Worker:
    """From here on all of them are the same to the trainer."""
    if name == "hf":
        return HFWorker(folder)
    if name == "sglang":
        return SGLangWorker(folder)
    return VLLMWorker(folder, mode="async" if name == "vllm-async" else "stepped")


def draw(colour: str, choose: random.Random) -> Image.Image:
    """What the tool returns: a sheet of that colour with a grey disc on it, somewhere."""
    picture = Image.new("RGB", (56, 56), colour)
    x, y = choose.randint(0, 36), choose.randint(0, 36)
    ImageDraw.Draw(picture).ellipse((x, y, x + 20, y + 20), fill="grey")
    return picture


def is_text(ids: Sequence[int]) -> bool:
    """Whether a turn holds no placeholder: beside a real picture, transformers and vLLM take a sampled one for a part of it."""
    return not {ID["<|image_pad|>"], ID["<|video_pad|>"]} & set(ids)


def add(conversation: Conversation, completion: Completion) -> Conversation:
    return conversation.append_sampled(completion.token_ids, logprobs=completion.logprobs, finish=completion.status)


def roll_out(
    worker: Worker, renderer: HFRenderer, step: int, choose: random.Random
) -> tuple[list[Conversation | None], torch.Tensor]:
    """SAMPLES conversations of each colour, and what each earned: (len(COLOURS) * SAMPLES,) in [0, 1]. None for one that said a
    placeholder, which earns nothing and is not trained on."""

    def sample(conversations: list[Conversation], length: int, n: int = 1) -> list[Completion]:
        seed = choose.randrange(1 << 30) if "seeds" in worker.capabilities else None
        params = SamplingParams(response_length=length, n=n, temperature=1.0, seed=seed)
        completions = worker.generate(conversations, params)
        for completion in completions:
            if set(completion.versions) != {worker.version}:
                raise SystemExit(f"step {step}: {completion.place} has weights {completion.versions}, not {worker.version}")
        return completions

    asked = Conversation.start(renderer, [{"role": "user", "content": "Black or white?"}])
    colours = [colour for colour in COLOURS for _ in range(SAMPLES)]
    shown: dict[int, Conversation] = {}
    for place, call in enumerate(sample([asked], CALL, n=len(colours))):
        # Only this message is rendered, and only its picture processed; what was sampled stays as it is.
        result = {"role": "tool", "content": [{"type": "image", "image": draw(colours[place], choose)}]}
        if is_text(call.token_ids):
            shown[place] = add(asked, call).extend([result])
    ended: list[Conversation | None] = [None] * len(colours)
    rewards = torch.zeros(len(colours))
    for place, answer in zip(shown, sample(list(shown.values()), ANSWER), strict=True):
        if is_text(answer.token_ids):
            ended[place] = add(shown[place], answer)
            wanted = COLOURS.index(colours[place])
            rewards[place] = sum(token % 2 == wanted for token in answer.token_ids) / ANSWER
    return ended, rewards


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, conversations: Sequence[Conversation | None], rewards: torch.Tensor
) -> float:
    """One step of REINFORCE. Returns the largest difference between the worker's logprobs and the trainer's."""
    groups = rewards.view(len(COLOURS), SAMPLES)
    advantages = (groups - groups.mean(1, keepdim=True)).flatten()
    # Where nearly all earn the same, what is left is chance: not scaled up, or one unlucky sample would undo what was learned.
    advantages = advantages / advantages.std().clamp(min=0.2)
    largest = 0.0
    optimizer.zero_grad()
    for conversation, advantage in zip(conversations, advantages, strict=True):
        if conversation is None:
            continue
        arrays = conversation.arrays("torch")  # what processing it all at once would give
        logits = model(
            input_ids=arrays.input_ids[None],
            attention_mask=arrays.attention_mask[None],
            position_ids=arrays.position_ids[:, None],  # (3, 1, n): time, height and width
            **conversation.multi_modal_inputs(),
        ).logits[0]
        sampled = arrays.loss_mask[1:].bool()  # the logits at a place say what follows it
        logprobs = logits[:-1].log_softmax(-1).gather(-1, arrays.input_ids[1:, None])[sampled, 0]
        worker_logprobs = arrays.logprobs[1:][sampled]
        largest = max(largest, (logprobs.detach() - worker_logprobs).abs().max().item())
        ratio = (logprobs - worker_logprobs).exp()  # 1, but for rounding, as the sampling weights are these
        (-(ratio * advantage).sum() / (len(conversations) * (CALL + ANSWER))).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if advantages.any():  # or Adam would go on in the direction that it had
        optimizer.step()
    return largest


def run(worker: Worker, model: torch.nn.Module, renderer: HFRenderer, steps: int, learning_rate: float) -> int:
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    choose = random.Random(0)
    earned, largest = [], 0.0
    for step in range(steps):
        report = worker.sync_weights(model, capacity=256 << 10)  # raises if what is read back is not what was sent
        conversations, rewards = roll_out(worker, renderer, step, choose)
        difference = train(model, optimizer, conversations, rewards)
        earned.append(rewards.mean().item())
        largest = max(largest, difference)
        print(
            f"step {step}  reward {earned[-1]:.3f}  left out {conversations.count(None)}  weights {report.version} in "
            f"{report.buckets} buckets, {report.seconds:.3f} s  logprobs differ by {difference:.1e}",
            flush=True,
        )
    media = worker.media_report()
    print(f"pictures: {media.sent} with data, {media.named} by name")
    rise = (sum(earned[-COMPARED:]) - sum(earned[:COMPARED])) / COMPARED
    print(f"reward rose by {rise:.3f}, margin of chance {MARGIN:.3f}; logprobs differ by {largest:.1e} at most")
    return 0 if rise > MARGIN and largest < NEAR else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worker", choices=("hf", "vllm", "vllm-async", "sglang"), default="hf")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    if arguments.steps < 2 * COMPARED:
        parser.error(f"--steps is at least {2 * COMPARED}: the first {COMPARED} are compared with the last")
    torch.manual_seed(0)
    model, processor = make_model(), make_processor()
    renderer = HFRenderer(processor, vocab_size=VOCABULARY)  # the model has an id more than the tokenizer
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        with start_worker(arguments.worker, folder) as worker:
            return run(worker, model, renderer, arguments.steps, arguments.learning_rate)


if __name__ == "__main__":  # an engine's own processes import this file again
    sys.exit(main())
