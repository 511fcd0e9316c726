"""Rollouts from a transformers causal language model held in this process: ``generate``.

The decoding loop is transformers' own; this module makes it sample from the model alone. ``model.generate`` fills every
field left unset from the checkpoint's ``generation_config``, where a repetition penalty or suppressed tokens may stand
that would bend the distribution a trainer believes in, and some of those fields have no value that means "off".
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from rollout_core.errors import WorkerError
from rollout_core.workers.contract import Completion, SamplingParams

#: Called after each step with every row's token and its logprob, those of rows that have ended included; returns whether each row
#: ends here.
Watch: TypeAlias = Callable[[list[int], list[float]], list[bool]]


class _Recorder:
    """A logits processor that keeps each chosen token's log-probability and changes nothing.

    It runs before temperature, top-k and top-p. Asking ``generate`` for its logits instead would keep every step's
    (rows, vocabulary) table to the end; here one is alive at a time.
    """

    def __init__(self, places: Sequence[int]) -> None:
        self.columns: list[torch.Tensor] = []
        self._table: torch.Tensor | None = None
        self._places = places  # the prompt of each row, as errors name it

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.settle(input_ids)
        self._table = torch.log_softmax(scores.float(), dim=-1)
        # A NaN or infinity among a row's logits turns the whole row NaN. Sampling from it would fail on a CPU, end the
        # CUDA context, and greedy decoding would go on as if nothing were wrong.
        bad = torch.isnan(self._table[:, 0])
        if bad.any():
            place = self._places[int(bad.int().argmax())]
            raise WorkerError(
                f"the model gave NaN or infinite logits for prompt {place} at response token {len(self.columns)}: "
                "check the weights it was last given"
            )
        return scores

    def settle(self, input_ids: torch.Tensor) -> None:
        """Look up the token that followed the last call, now that it stands at the end of ``input_ids``."""
        if self._table is not None:
            self.columns.append(self._table.gather(1, input_ids[:, -1:]))
            self._table = None


class _Watched(StoppingCriteria):  # type: ignore[misc]
    """Shows each step's tokens to a watch, which may end rows."""

    def __init__(self, recorder: _Recorder, watch: Watch) -> None:
        self._recorder, self._watch = recorder, watch

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        del scores, kwargs
        self._recorder.settle(input_ids)
        ended = self._watch(input_ids[:, -1].tolist(), self._recorder.columns[-1][:, 0].tolist())
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


@contextmanager
def plain(model: Any) -> Iterator[None]:
    """The model in eval mode without its own generation settings; each module's mode and settings come back after."""
    modes = [(module, module.training) for module in model.modules()]
    # Also below a wrapper such as an adapter, whose own attribute may only look through to the model within.
    held = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    try:
        for module, _ in held:
            module.generation_config = GenerationConfig()
        model.eval()
        yield
    finally:
        for module, settings in held:
            module.generation_config = settings
        for module, mode in modes:
            module.training = mode


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Fixed generators of the CPU and the model's device within, the caller's own again after."""
    if seed is None:
        yield
        return
    if device.type not in ("cpu", "cuda"):
        raise WorkerError(f"no seeded sampling on device type {device.type!r}: pass seed=None, or use cpu or cuda")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed: that reseeds every GPU in the machine, and only this model's is put back.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def check(model: Any, prompts: Sequence[Sequence[int]], response_length: int, special: dict[str, Sequence[int]]) -> None:
    """Raise ``WorkerError`` for what ``generate`` refuses; ``special``: ids that have to be in the vocabulary, by what they are."""
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise WorkerError(f"{type(model).__name__} is an encoder-decoder: pass a causal (decoder-only) language model")
    vocabulary, limit = config.vocab_size, getattr(config, "max_position_embeddings", None)
    for kind, ids in special.items():
        for token in ids:
            if type(token) is not int or not 0 <= token < vocabulary:
                raise WorkerError(f"{kind} {token!r} is outside the model's {vocabulary} ids: pass the tokenizer's own")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise WorkerError(f"prompt {index} is empty: give each prompt at least one token, such as BOS")
        for position, token in enumerate(prompt):
            if type(token) is not int or not 0 <= token < vocabulary:
                raise WorkerError(
                    f"prompt {index} position {position} is {token!r}, not one of the model's {vocabulary} ids: "
                    "check that tokenizer and model belong together"
                )
        if limit is not None and len(prompt) + response_length > limit:
            raise WorkerError(
                f"prompt {index} has {len(prompt)} tokens and with response_length {response_length} passes the "
                f"model's {limit} positions: shorten the prompt or the response"
            )


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    weight_version: int = 0,
    max_batch: int = 64,
) -> list[Completion]:
    """Sample ``params.n`` completions of each prompt with a transformers causal model, on the device it is on.

    Completions are grouped by prompt: prompt 0's n samples first. A response ends with the first of ``eos_token_ids``
    (unless ``ignore_eos``) or ``params.stop_token_ids``, status ``"stop"`` even as the last token allowed; or at
    ``params.response_length`` tokens, status ``"length"``. Each token's logprob is ``log_softmax`` in float32 of the
    raw logits, before temperature, top-k and top-p: what vLLM calls ``raw_logprobs``, its default. The checkpoint's
    ``generation_config`` has no influence. Greedy decoding runs each prompt once and repeats it n times.

    ``pad_token_id`` may equal an EOS id; it must be an id of the model. At most ``max_batch`` rows are decoded at once.
    With a seed the caller's random state is left as it was and the same call gives the same samples again; which ones
    depends on all of its arguments, ``max_batch`` and the other prompts included. Without a seed sampling draws from
    torch's global generator. While it runs the model is in eval mode with its ``generation_config`` set aside, so one
    model must not be used by two threads; both are put back, also after an error.

    Raises:
        WorkerError: an empty prompt, a token id outside the vocabulary, a prompt and response that together pass the
            model's positions, NaN or infinite logits, or an argument out of range. The message names the prompt.
    """
    for name, value, least in (("max_batch", max_batch, 1), ("weight_version", weight_version, 0)):
        if type(value) is not int or value < least:
            raise WorkerError(f"{name} is {value!r}: pass a whole number of at least {least}")
    stops = {"eos_token_ids": eos_token_ids, "stop_token_ids": params.stop_token_ids}
    check(model, prompts, params.response_length, {**stops, "pad_token_id": (pad_token_id,)})
    ends = ends_of(params, eos_token_ids)
    greedy = params.temperature == 0
    settings = settings_of(params, ends, pad_token_id)
    samples = 1 if greedy else params.n
    rows = [(index, sample) for index in range(len(prompts)) for sample in range(samples)]
    completions: list[Completion] = []
    with plain(model), seeded(None if greedy else params.seed, device_of(model)):
        for start in range(0, len(rows), max_batch):
            places = rows[start : start + max_batch]
            recorder = _Recorder([index for index, _ in places])
            responses = decode(model, [prompts[index] for index, _ in places], settings, recorder)
            logprobs = torch.cat(recorder.columns, dim=1).tolist()
            for (index, sample), response, scores in zip(places, responses, logprobs, strict=True):
                # What follows a row's end is padding, and only its place says so: padding may be any id.
                end = next((place for place, token in enumerate(response) if token in ends), None)
                length = len(response) if end is None else end + 1
                completions += [
                    Completion(
                        token_ids=tuple(response[:length]),
                        logprobs=tuple(scores[:length]),
                        status="length" if end is None else "stop",
                        weight_version=weight_version,
                        prompt_index=index,
                        sample_index=copy,
                    )
                    for copy in (range(params.n) if greedy else (sample,))
                ]
    return completions


def device_of(model: Any) -> torch.device:
    """Where a model computes: where it is, and for shards that are kept on the CPU meanwhile, the device of their mesh."""
    mesh = getattr(next(model.parameters(), None), "device_mesh", None)
    if mesh is None or mesh.device_type == model.device.type:
        device: torch.device = model.device
        return device
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


@contextmanager
def _offloaded() -> Iterator[None]:
    """transformers warns of inputs on another device than the model's, which is where the shards are, and not where it computes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are calling .generate", UserWarning)
        yield


def pad_id_of(model: Any) -> int:
    """An id for padding: any serves, as masks say what it is; some configs have none, or -1."""
    config = model.config.get_text_config()
    return config.pad_token_id if config.pad_token_id in range(config.vocab_size) else 0


def eos_ids_of(model: Any) -> list[int]:
    """From the model's generation config, or its config if that has none."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return [eos] if isinstance(eos, int) else list(eos)
    return []


def ends_of(params: SamplingParams, eos_token_ids: Sequence[int]) -> set[int]:
    """The ids that end a response."""
    return set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))


def settings_of(params: SamplingParams, ends: set[int], pad_token_id: int, length: int | None = None) -> Any:
    """transformers' words for these parameters, and at most ``length`` tokens if that is not their response length."""
    # All three set even when off: transformers' own default for an unset top_k is 50.
    warpers = {"temperature": float(params.temperature), "top_k": params.top_k, "top_p": float(params.top_p)}
    return GenerationConfig(
        max_new_tokens=params.response_length if length is None else length,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad_token_id,
        do_sample=params.temperature != 0,
        **({} if params.temperature == 0 else warpers),
    )


def decode_watched(
    model: Any,
    prompts: list[Sequence[int]],
    settings: Any,
    places: Sequence[int],
    watch: Watch,
    more: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """One batch of responses, all of which go through ``watch``; ``places``: each row's prompt, as errors name it; ``more``: what
    the model is given beside ids."""
    recorder = _Recorder(places)
    decode(model, prompts, settings, recorder, StoppingCriteriaList([_Watched(recorder, watch)]), more)


def decode(
    model: Any,
    prompts: list[Sequence[int]],
    settings: Any,
    recorder: _Recorder,
    criteria: StoppingCriteriaList | None = None,
    more: Mapping[str, torch.Tensor] | None = None,
) -> list[list[int]]:
    """One batch of responses, as many tokens for each row as the longest took; the recorder holds their logprobs."""
    width = max(map(len, prompts))
    ids = [[settings.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    device = device_of(model)
    with _offloaded() if device.type != model.device.type else nullcontext():
        output = model.generate(
            input_ids=torch.tensor(ids, device=device),
            # Given, not guessed: transformers would take it from the pad id, which may stand inside a prompt. It makes
            # the position ids from this mask, so that each prompt's first token is at position 0.
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([recorder]),
            stopping_criteria=criteria,
            synced_gpus=False,  # ranks of a sharded model keep in step by themselves: hf/sharded.py
            **(more or {}),
        )
    recorder.settle(output)
    responses: list[list[int]] = output[:, width:].tolist()
    return responses
