"""The values every rollout worker shares: what a call asks for, what it gives back, and the batch a trainer reads.

Clause W3: prompts left-padded, responses padded to ``response_length``, attention 1 through the first EOS inclusive
and 0 after, positions continue from the prompt, n samples grouped by prompt. It is the layout verl's trainer reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import msgspec
import torch

from rollout_core.errors import WorkerError

Status = Literal["stop", "length", "aborted", "failed"]
"""How a completion ended: a stop token, the length limit, an abort from outside, or a fault of the worker."""
STATUSES: Final[tuple[Status, ...]] = get_args(Status)

# Logits divided by less than this can leave float32. vLLM turns to greedy there; a caller should say so instead.
MIN_TEMPERATURE: Final = 1e-5
_INT64_MAX: Final = 2**63 - 1
_FLOAT32_MAX: Final = torch.finfo(torch.float32).max


def _is_whole(value: object, minimum: int) -> bool:
    return type(value) is int and minimum <= value <= _INT64_MAX  # a bool is an int, but no count and no id


def _whole(value: object, minimum: int, where: str, advice: str) -> None:
    if not _is_whole(value, minimum):
        raise WorkerError(f"{where} is {value!r}, not a whole number of at least {minimum}: {advice}")


def _ids(values: object, where: str) -> None:
    if not isinstance(values, tuple):
        raise WorkerError(f"{where} is a {type(values).__name__}, not a tuple: pass tuple(...) of token ids")
    for position, value in enumerate(values):
        if not _is_whole(value, 0):
            raise WorkerError(f"{where}[{position}] is {value!r}, no token id: pass plain ints of at least 0")


def _is_number(value: object) -> bool:
    # Written so that NaN fails it; numpy's float64 is a float and passes.
    return type(value) is not bool and isinstance(value, int | float) and -_FLOAT32_MAX <= value <= _FLOAT32_MAX


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to generate, per call. Raises ``WorkerError`` for a wrong type (a bool too), NaN, or a value out of range."""

    response_length: int  # the most tokens a response may have, and the width it is padded to; at least 1
    n: int = 1  # samples per prompt; greedy ones are identical
    temperature: float = 0.0  # 0 is greedy; else logits are divided by it, and it is at least MIN_TEMPERATURE
    top_p: float = 1.0  # nucleus mass in (0, 1]; 1 is off
    top_k: int = 0  # 0 is off
    seed: int | None = None  # makes a call repeatable; None draws from the worker's own generator
    stop_token_ids: tuple[int, ...] = ()  # these end a response too, and stay in it
    ignore_eos: bool = False  # EOS ids no longer end a response; stop_token_ids still do, as in vLLM

    def __post_init__(self) -> None:
        _whole(self.response_length, 1, "SamplingParams.response_length", "ask for at least one token")
        _whole(self.n, 1, "SamplingParams.n", "ask for at least one sample")
        heat = self.temperature
        if not _is_number(heat) or (heat != 0 and heat < MIN_TEMPERATURE):
            raise WorkerError(f"SamplingParams.temperature is {heat!r}: pass 0 (greedy) or at least {MIN_TEMPERATURE}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise WorkerError(f"SamplingParams.top_p is {self.top_p!r}, not in (0, 1]: pass 1.0 to turn it off")
        _whole(self.top_k, 0, "SamplingParams.top_k", "pass 0 to turn it off")
        _whole(0 if self.seed is None else self.seed, 0, "SamplingParams.seed", "pass None for no seed")
        _ids(self.stop_token_ids, "SamplingParams.stop_token_ids")
        if type(self.ignore_eos) is not bool:
            raise WorkerError(f"SamplingParams.ignore_eos is {self.ignore_eos!r}: pass True or False")


class Completion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sample of one prompt. Raises ``WorkerError`` for a bad value, or logprobs or versions that are not one per token."""

    token_ids: tuple[int, ...]  # the sampled tokens, with the EOS or stop id that ended them; never padding
    logprobs: tuple[float, ...] | None  # one finite float per token; None where the worker has none
    status: Status
    weight_version: int  # of the weights that produced the last token, counted from 0
    prompt_index: int  # which prompt of the call
    sample_index: int  # which of that prompt's n samples
    token_versions: tuple[int, ...] | None = None  # of the weights that produced each token; None: weight_version, all of them
    request_id: str = ""  # of the prompt, as it was submitted
    error: str = ""  # why it failed, if it did

    @property
    def place(self) -> str:
        """``prompt i sample j``, as errors name it."""
        return f"prompt {self.prompt_index} sample {self.sample_index}"

    @property
    def versions(self) -> tuple[int, ...]:
        """The weight version of each token."""
        return (self.weight_version,) * len(self.token_ids) if self.token_versions is None else self.token_versions

    def __post_init__(self) -> None:
        _whole(self.prompt_index, 0, "Completion.prompt_index", "count prompts from 0")
        _whole(self.sample_index, 0, "Completion.sample_index", "count a prompt's samples from 0")
        where = f"completion of {self.place}:"
        _whole(self.weight_version, 0, f"{where} weight_version", "count versions from 0")
        if self.status not in STATUSES:
            raise WorkerError(f"{where} status is {self.status!r}: use one of {', '.join(STATUSES)}")
        _ids(self.token_ids, f"{where} token_ids")
        if self.token_versions is not None:
            self._check_versions(where)
        if self.logprobs is None:
            return
        if not isinstance(self.logprobs, tuple) or len(self.logprobs) != len(self.token_ids):
            raise WorkerError(f"{where} logprobs must be a tuple of one float for each of {len(self.token_ids)} tokens")
        for position, logprob in enumerate(self.logprobs):
            if not _is_number(logprob):
                raise WorkerError(f"{where} logprobs[{position}] is {logprob!r}: pass finite float32 values")

    def _check_versions(self, where: str) -> None:
        versions = self.token_versions
        if not isinstance(versions, tuple) or len(versions) != len(self.token_ids):
            raise WorkerError(f"{where} token_versions must be a tuple of one version for each of {len(self.token_ids)} tokens")
        if any(not _is_whole(version, 0) for version in versions) or list(versions) != sorted(versions):
            raise WorkerError(f"{where} token_versions {versions}: whole numbers that never fall")
        if versions and versions[-1] != self.weight_version:
            raise WorkerError(f"{where} weight_version is {self.weight_version}, and the last token's is {versions[-1]}")


@dataclass(frozen=True, eq=False, slots=True)
class RolloutBatch:
    """Padded CPU tensors of B = len(prompts) * n rows, prompt 0's n samples first; R is ``response_length``.

    P is the longest prompt's length. ``attention_mask`` is what says where tokens are: padding ids may equal real ones.
    """

    prompts: torch.Tensor  # int64 (B, P), left-padded
    responses: torch.Tensor  # int64 (B, R), right-padded
    input_ids: torch.Tensor  # int64 (B, P + R), the two side by side
    attention_mask: torch.Tensor  # int64 (B, P + R): 0 on left padding, 1 through the response's first EOS, 0 after
    position_ids: torch.Tensor  # int64 (B, P + R): 0 on left padding, then 0, 1, ... to the end, padding too (as verl)
    response_mask: torch.Tensor  # int64 (B, R), the last R columns of attention_mask
    logprobs: torch.Tensor | None  # float32 (B, R): 0.0 where response_mask is 0; None if no completion has any
    weight_versions: torch.Tensor  # int64 (B, R): of the weights that produced each token; -1 where response_mask is 0


def _ordered(completions: Sequence[Completion], prompts: int, n: int | None) -> list[Completion]:
    """The completions by prompt, then sample, once each is known to be there exactly once."""
    if n is None:
        n = 1 + max((completion.sample_index for completion in completions), default=0)
    found: dict[tuple[int, int], Completion] = {}
    for completion in completions:
        key = (completion.prompt_index, completion.sample_index)
        if key in found:
            raise WorkerError(f"{completion.place} has two completions: pass each once")
        if key[0] >= prompts or key[1] >= n:
            raise WorkerError(f"{completion.place} is not among {prompts} prompts of {n}: pass one call's completions")
        found[key] = completion
    for key in ((prompt, sample) for prompt in range(prompts) for sample in range(n)):
        if key not in found:
            raise WorkerError(f"prompt {key[0]} sample {key[1]} has no completion: pass an empty one if none came")
    return [found[key] for key in sorted(found)]


def to_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    *,
    response_length: int,
    pad_token_id: int,
    n: int | None = None,
) -> RolloutBatch:
    """Lay prompts and their completions out as the padded batch of clause W3 (see ``RolloutBatch``).

    Completions may come in any order. Every mask comes from the completions' lengths, never from looking for ids: an
    EOS inside a prompt changes nothing, and ``pad_token_id`` may equal an EOS id or a real token. ``n`` is the number
    of samples per prompt; ``None`` takes it from the largest ``sample_index``, which cannot notice a last sample
    missing from every prompt. Without prompts, B and P are 0.

    Raises:
        WorkerError: a prompt is empty or holds something other than token ids, a completion is missing, repeated, of
            no prompt here or longer than ``response_length``, or only some completions with tokens have logprobs.
    """
    _whole(response_length, 1, "response_length", "pass the response_length the completions were made with")
    _whole(pad_token_id, 0, "pad_token_id", "pass the tokenizer's pad id, or its EOS id if it has none")
    _whole(1 if n is None else n, 1, "n", "pass the number of samples per prompt")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise WorkerError(f"prompt {index} is empty: give each prompt at least one token")
        _ids(tuple(prompt), f"prompt {index}")
    rows = _ordered(completions, len(prompts), n)
    with_tokens = [row for row in rows if row.token_ids]
    without_logprobs = [row for row in with_tokens if row.logprobs is None]
    if without_logprobs and len(without_logprobs) < len(with_tokens):
        raise WorkerError(f"{without_logprobs[0].place} has no logprobs but others have: give all or none")

    size, width = len(rows), max(map(len, prompts), default=0)
    prompt_ids = torch.full((size, width), pad_token_id, dtype=torch.int64)
    responses = torch.full((size, response_length), pad_token_id, dtype=torch.int64)
    logprobs = torch.zeros((size, response_length), dtype=torch.float32)
    versions = torch.full((size, response_length), -1, dtype=torch.int64)
    for place, row in enumerate(rows):
        prompt, length = prompts[row.prompt_index], len(row.token_ids)
        if length > response_length:
            raise WorkerError(f"{row.place} has {length} tokens: pass a response_length of that, not {response_length}")
        prompt_ids[place, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.int64)
        responses[place, :length] = torch.tensor(row.token_ids, dtype=torch.int64)
        versions[place, :length] = torch.tensor(row.versions, dtype=torch.int64)
        if row.logprobs is not None:
            logprobs[place, :length] = torch.tensor(row.logprobs, dtype=torch.float32)

    prompt_lengths = torch.tensor([len(prompts[row.prompt_index]) for row in rows], dtype=torch.int64)[:, None]
    lengths = torch.tensor([len(row.token_ids) for row in rows], dtype=torch.int64)[:, None]
    columns = torch.arange(width + response_length, dtype=torch.int64)
    prompt_mask = (columns[:width] >= width - prompt_lengths).long()
    response_mask = (columns[:response_length] < lengths).long()
    return RolloutBatch(
        prompts=prompt_ids,
        responses=responses,
        input_ids=torch.cat([prompt_ids, responses], dim=1),
        attention_mask=torch.cat([prompt_mask, response_mask], dim=1),
        position_ids=(columns - (width - prompt_lengths)).clamp(min=0),  # left padding would fall below 0
        response_mask=response_mask,
        logprobs=None if without_logprobs else logprobs,
        weight_versions=versions,
    )
