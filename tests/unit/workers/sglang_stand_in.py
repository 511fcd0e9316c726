"""A stand-in for SGLang's ``Engine``: its calls, its answers and its traps, with a model whose next token is known.

``make(version)`` puts it where ``import sglang`` finds it. Each trap is written from SGLang's sources: where its front end and its
scheduler do so, by version.
"""

from __future__ import annotations

import asyncio
import re
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import torch


class Ended(BaseException):
    """What a scheduler's end is: SGLang kills all of its processes."""


class RequestAbortedError(ValueError):
    """By its name: 0.5.17 has it, in its front end."""


class Model(torch.nn.Module):
    """Of SGLang's, what our loader asks for."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.Linear(4, 4, bias=False)

    def load_weights(self, pairs):
        for name, tensor in pairs:
            dict(self.named_parameters())[name].copy_(tensor)


@dataclass
class State:
    """Of a request in the front end."""

    dispatched: bool = False
    abort_sent: bool = False  # from 0.5.20 on
    is_aborted: bool = False


@dataclass
class Script:
    """What happens to requests. ``preparing``: turns of the loop until one is sent on, as with pictures. ``retracts_at``: its
    memory is taken from it after so many tokens, and it waits. ``breaks_with``: raised by its stream. ``lingers``: times that
    SGLang is not idle after a request has ended. ``info``: of the scheduler. ``pace``: seconds for a token."""

    preparing: int = 0
    retracts_at: int | None = None
    breaks_with: Exception | None = None
    lingers: int = 2
    info: dict = field(default_factory=lambda: {"max_req_input_len": 58, "max_total_num_tokens": 10_000})
    silent_ranks: bool = False
    pace: float = 0.001


def next_token(ids):
    return (sum(ids) * 7 + len(ids)) % 50


def make(monkeypatch, version, script=None):
    """SGLang of this version; returns what it was told, in order."""
    script = script or Script()
    heard = []
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])

    class Manager:
        def __init__(self, context):
            self.rid_to_state = {}
            self.model_config = SimpleNamespace(context_len=context)

        def abort_request(self, rid):
            state = self.rid_to_state.get(rid)
            if state is None or state.abort_sent:
                return
            state.abort_sent = numbers >= (0, 5, 20)
            heard.append(f"abort {'sent on' if state.dispatched else 'early'}")
            if state.dispatched or numbers == (0, 5, 17):
                state.is_aborted = True

    class Engine:
        def __init__(self, **options):
            self.options = options
            self.loop = asyncio.new_event_loop()
            names = ("device", "tp_size", "pp_size", "enable_memory_saver", "enable_deterministic_inference", "page_size")
            self.server_args = SimpleNamespace(**{name: options.get(name) for name in names})
            self.tokenizer_manager = Manager(options.get("context_length") or 64)
            self._scheduler_init_result = SimpleNamespace(scheduler_infos=[script.info])
            self.model = Model()
            self.busy = 0
            if numbers >= (0, 5, 21):
                self.begin_weight_update = lambda: self._told("begin", (True, ""))
                self.end_weight_update = lambda: self._told("end", (True, ""))

        def _told(self, what, answer=None):
            heard.append(what)
            return answer

        async def async_generate(self, **request):
            return self._generate(**request)

        async def _generate(self, *, rid, input_ids, sampling_params, **rest):
            state = self.tokenizer_manager.rid_to_state[rid] = State()
            heard.append("generate")
            try:
                for _ in range(script.preparing):
                    await asyncio.sleep(0.01)
                    if state.is_aborted:
                        raise RequestAbortedError(f"Request {rid} was aborted")
                state.dispatched = True
                if script.breaks_with is not None:
                    raise script.breaks_with
                tokens = []
                while True:
                    await asyncio.sleep(script.pace)
                    meta = {"prompt_tokens": len(input_ids), "output_token_logprobs": [(-0.5, 0, None)], "finish_reason": None}
                    if state.is_aborted and (not tokens or len(tokens) == script.retracts_at):
                        rows = [(-0.5, token, None) for token in tokens]
                        meta = {
                            "finish_reason": {"type": "abort", "message": "Abort in waiting queue"},
                            "output_token_logprobs": rows,
                        }
                        yield {"output_ids": tokens[-1:], "meta_info": meta, "text": ""}
                        return
                    if len(tokens) == script.retracts_at:
                        continue
                    tokens.append(next_token([*input_ids, *tokens]))
                    if state.is_aborted:
                        meta["finish_reason"] = {"type": "abort", "message": "Aborted", "status_code": None}
                    elif len(tokens) == sampling_params["max_new_tokens"]:
                        meta["finish_reason"] = {"type": "length"}
                    yield {"output_ids": tokens[-1:], "meta_info": meta}
                    if meta["finish_reason"] is not None:
                        return
            finally:
                del self.tokenizer_manager.rid_to_state[rid]
                self.busy = script.lingers

        def update_weights_from_tensor(self, named, load_format, flush_cache):
            from rollout_core.workers.sglang import loader

            heard.append(f"update, flush {flush_cache}")
            if not script.silent_ranks:
                loader.load(self.model, named)
            if flush_cache and self.busy:
                self.busy -= 1
                if numbers < (0, 5, 22):
                    raise Ended("assert flush_cache_success")
                return False, "the cache was not flushed"
            return True, "Success"

        def flush_cache(self):
            done, self.busy = self.busy == 0, max(0, self.busy - 1)
            heard.append(f"flush {'done' if done else 'refused'}")
            return SimpleNamespace(success=done)

        def release_memory_occupation(self):
            if self.busy:
                raise Ended("release_memory_occupation should be called only when server is idle")
            heard.append("release")

        def resume_memory_occupation(self):
            heard.append("resume")

        def shutdown(self):
            self.loop.close()

    sglang = ModuleType("sglang")
    sglang.__version__, sglang.Engine = version, Engine
    arguments = ModuleType("sglang.srt.server_args")
    arguments.ServerArgs = SimpleNamespace(__dataclass_fields__=("incremental_streaming_output",))
    for name, module in (("sglang", sglang), ("sglang.srt", ModuleType("sglang.srt")), ("sglang.srt.server_args", arguments)):
        monkeypatch.setitem(sys.modules, name, module)
    return heard
