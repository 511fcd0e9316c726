"""verl's ``AsyncRolloutRequest`` (verl/workers/rollout/schemas.py): a conversation with pictures that is grown in place.

verl 0.9.1 ships the class and calls it nowhere. The calls below are those of its last caller, ``_async_rollout_a_request`` of
verl/workers/rollout/sglang_rollout/sglang_rollout.py (earlier versions), with an engine that gives token ids
(``skip_tokenizer_init``):

- the constructor with the prompt's messages and pictures;
- before each sampled turn ``get_generation_prompt_ids``, after it ``add_assistant_message`` with its text and its ids;
- then ``add_tool_response_messages`` for the results of tools, or ``add_user_message`` for what a user says;
- at the end ``finalize``, which takes a generation prompt off. Its results are what the trainer gets, and what is shown here, of a
  copy. The check of tokenization in it, which processes everything once more, is off.

That caller has no call for a picture of a user after the first turn, for messages between the prompt and the first sampled turn,
for a tool's content in another order than pictures, then one text, and it ends a rollout whose turn was cut. Such cases are not
judged.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from rollout_core.testing.peers.loading import PeerPackage
from rollout_core.testing.registry import Skipped

PACKAGE = PeerPackage(
    "verl",
    "0.9.1",
    "verl",
    run_init=["verl.plugin.platform", "verl.utils.tokenizer"],
    stubs={
        "tensordict": "names a type of functions for critics, which are not used",
        "tensordict.tensorclass": "the same",
    },
)


class RolloutRequest:
    """``AsyncRolloutRequest`` as a tracker."""

    capabilities = frozenset({"groups tools"})
    #: verl's setting of the same name: whether the engine is shown the whole conversation rendered anew, and not the ids so far.
    use_inference_chat_template: ClassVar[bool] = False

    def __init__(self, processor: Any) -> None:
        with _older_names():
            self._schemas = PACKAGE.load("verl.workers.rollout.schemas")
            PACKAGE.load("verl.models.transformers.qwen2_vl")
            self._response = PACKAGE.load("verl.tools.schemas").ToolResponse
        self._processor = processor
        #: Ids of requests in which a turn was sampled, and of those whose last turn was cut.
        self._sampled: set[str] = set()
        self._ended: set[str] = set()
        self._numbers = itertools.count()

    def start(self, messages: Sequence[Any]) -> Any:
        pictures = [part["image"] for message in messages for part in _parts(message) if part.get("type") == "image"]
        with PACKAGE:
            return self._schemas.AsyncRolloutRequest(
                request_id=str(next(self._numbers)),
                state=self._schemas.AsyncRolloutRequestStateEnum.PENDING,
                messages=[_marked(message) for message in messages],
                multi_modal_data={"image": pictures} if pictures else {},
                reward_scores={},
                max_prompt_len=32768,
                use_inference_chat_template=self.use_inference_chat_template,
                tokenization_sanity_check_mode=self._schemas.TokenizationSanityCheckModeEnum.DISABLE,
                processing_class=self._processor,
            )

    def extend(self, state: Any, messages: Sequence[Any]) -> None:
        if state.request_id not in self._sampled:
            raise Skipped("verl samples a turn before it adds messages")
        if not all(isinstance(message, dict) and message.get("role") in ("user", "tool") for message in messages):
            raise Skipped("verl's caller picks the call by what the message is, and has calls for users and tools only")
        self._refuse_after_a_cut(state)
        at = 0
        with PACKAGE:
            while at < len(messages):
                run = at
                while run < len(messages) and messages[run]["role"] == "tool":
                    run += 1
                if run > at:
                    state.add_tool_response_messages(self._processor, [self._result(message) for message in messages[at:run]])
                    at = run
                    continue
                if not isinstance(messages[at].get("content"), str):
                    raise Skipped("verl's add_user_message takes a text")
                state.add_user_message(self._processor, messages[at]["content"])
                at += 1

    def append_sampled(self, state: Any, ids: Any, logprobs: Any, finish: str) -> None:
        self._refuse_after_a_cut(state)
        text = self._processor.decode(ids, skip_special_tokens=True)
        with PACKAGE:
            state.get_generation_prompt_ids(self._processor)
            given = torch.tensor(ids, dtype=state.input_ids.dtype).unsqueeze(0)
            state.add_assistant_message(self._processor, text, content_ids=given)
        self._sampled.add(state.request_id)
        if finish != "stop":
            self._ended.add(state.request_id)

    def input_ids(self, state: Any) -> Any:
        return self._finalized(state).input_ids[0]

    def prompt_ids(self, state: Any) -> list[int]:
        with PACKAGE:
            return list(state.model_copy().get_generation_prompt_ids(self._processor))

    def loss_mask(self, state: Any) -> Any:
        return self._finalized(state).loss_mask[0]

    def position_ids(self, state: Any) -> Any:
        return self._finalized(state).position_ids

    def multi_modal_inputs(self, state: Any) -> dict[str, Any]:
        return dict(self._finalized(state).multi_modal_inputs)

    def _finalized(self, state: Any) -> Any:
        """What the trainer gets: ``finalize`` puts new tensors into the copy and leaves those of the request."""
        copied = state.model_copy()
        with PACKAGE:
            copied.finalize(self._processor, {}, self._schemas.FinishReasonTypeEnum.STOP)
        return copied

    def _result(self, message: Any) -> Any:
        kinds = [part["type"] for part in _parts(message)]
        if kinds != sorted(kinds) or kinds.count("text") > 1:
            raise Skipped("verl's ToolResponse has pictures, then videos, then one text")
        texts = [part["text"] for part in _parts(message) if part["type"] == "text"]
        pictures = [part["image"] for part in _parts(message) if part["type"] == "image"]
        return self._response(text=texts[0] if texts else None, **({"image": pictures} if pictures else {}))

    def _refuse_after_a_cut(self, state: Any) -> None:
        if state.request_id in self._ended:
            raise Skipped("verl ends a rollout whose turn was cut")


def _parts(message: Any) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _marked(message: Any) -> Any:
    """A message of verl's data sets: media are bare markers, and the media themselves lie beside the messages."""
    if not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [part if part["type"] == "text" else {"type": part["type"]} for part in message["content"]]}


@contextlib.contextmanager
def _older_names() -> Iterator[None]:
    """verl 0.9.1 asks for transformers before 5.11 and imports a type by the name that it had then; nothing here uses it."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    name = "Qwen2VLCausalLMOutputWithPast"
    missing = not hasattr(modeling_qwen2_vl, name)
    if missing:
        setattr(modeling_qwen2_vl, name, object)
    try:
        yield
    finally:
        if missing:
            delattr(modeling_qwen2_vl, name)
