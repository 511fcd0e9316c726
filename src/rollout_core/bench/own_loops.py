"""The engines' own loops over requests, run in the same process and over the same model as a worker's: what its overhead is
measured against. Each gives tokens with their logprobs, as a worker does, and nothing else that a worker gives.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import torch

from rollout_core.workers.hf.engine import HFEngine
from rollout_core.workers.hf.worker import HFWorker
from rollout_core.workers.sglang.engine import SGLangEngine
from rollout_core.workers.sglang.worker import SGLangWorker
from rollout_core.workers.vllm.async_engine import VLLMAsyncEngine
from rollout_core.workers.vllm.engine import VLLMEngine
from rollout_core.workers.vllm.worker import VLLMWorker


class Loop(msgspec.Struct, frozen=True):
    """Prompts to answer with ``response_length`` greedy tokens each, all at once."""

    prompts: list[list[int]]
    response_length: int


class Looped(msgspec.Struct, frozen=True):
    """What came of it: wall seconds, and each prompt's tokens."""

    seconds: float
    tokens: list[list[int]]


class OwnHF(HFEngine):
    """transformers' ``generate`` on a left-padded batch, with its logits kept."""

    def call_own_loop(self, argument: bytes) -> bytes:
        loop = msgspec.msgpack.decode(argument, type=Loop)
        width = max(map(len, loop.prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in loop.prompts]).to(self.model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in loop.prompts])
        mask = mask.to(self.model.device)
        start = time.perf_counter()
        with torch.no_grad():
            found = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=loop.response_length,
                min_new_tokens=loop.response_length,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            tokens = found.sequences[:, width:]
            for step, logits in enumerate(found.logits):
                logits.float().log_softmax(-1).gather(1, tokens[:, step : step + 1]).tolist()
        return msgspec.msgpack.encode(Looped(time.perf_counter() - start, tokens.tolist()))


def _vllm_params(length: int, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, logprobs=0, detokenize=False, **more)


class OwnVLLM(VLLMEngine):
    """``LLM.generate``."""

    def call_own_loop(self, argument: bytes) -> bytes:
        loop = msgspec.msgpack.decode(argument, type=Loop)
        prompts = [{"prompt_token_ids": prompt} for prompt in loop.prompts]
        start = time.perf_counter()
        found = self._llm.generate(prompts, _vllm_params(loop.response_length), use_tqdm=False)
        seconds = time.perf_counter() - start
        return msgspec.msgpack.encode(Looped(seconds, [list(one.outputs[0].token_ids) for one in found]))


class OwnVLLMAsync(VLLMAsyncEngine):
    """``AsyncLLM.generate`` of all, gathered; each output whole, when it is done."""

    def call_own_loop(self, argument: bytes) -> bytes:
        from vllm.sampling_params import RequestOutputKind

        loop = msgspec.msgpack.decode(argument, type=Loop)
        params = _vllm_params(loop.response_length, output_kind=RequestOutputKind.FINAL_ONLY)

        async def one(number: int, prompt: list[int]) -> list[int]:
            tokens: list[int] = []
            async for found in self._llm.generate({"prompt_token_ids": prompt}, params, request_id=f"own-{id(loop)}-{number}"):
                tokens = list(found.outputs[0].token_ids)
            return tokens

        async def all_of_them() -> list[list[int]]:
            return await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(loop.prompts)))

        start = time.perf_counter()
        tokens = self._run(all_of_them())
        return msgspec.msgpack.encode(Looped(time.perf_counter() - start, tokens))


class OwnSGLang(SGLangEngine):
    """``Engine.generate`` of all."""

    def call_own_loop(self, argument: bytes) -> bytes:
        loop = msgspec.msgpack.decode(argument, type=Loop)
        params = {"temperature": 0.0, "max_new_tokens": loop.response_length, "ignore_eos": True}
        start = time.perf_counter()
        found = self._engine.generate(input_ids=loop.prompts, sampling_params=params, return_logprob=True)
        seconds = time.perf_counter() - start
        return msgspec.msgpack.encode(Looped(seconds, [list(one["output_ids"]) for one in found]))


class OwnHFWorker(HFWorker):
    engine_class: ClassVar[str] = f"{__name__}:OwnHF"


class OwnVLLMWorker(VLLMWorker):
    engine_classes: ClassVar[Mapping[str, str]] = {"stepped": f"{__name__}:OwnVLLM", "async": f"{__name__}:OwnVLLMAsync"}


class OwnSGLangWorker(SGLangWorker):
    engine_class: ClassVar[str] = f"{__name__}:OwnSGLang"
