"""What a model can be asked for: its vocabulary, its positions, and the ids that end a response."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rollout_core.errors import WorkerError
from rollout_core.workers.contract import SamplingParams
from rollout_core.workers.engine import Request
from rollout_core.workers.model_dir import config_of, eos_token_ids


def seed_of(params: SamplingParams, request: Request, tokens: int = 0) -> int | None:
    """The seed of one request that has so many tokens already. Engines seed each request by itself: those of one call, and the
    parts of one, would share their chances under one and the same."""
    if params.seed is None:
        return None
    return (params.seed + request.sample + 1_000_003 * request.place + 0x9E3779B1 * tokens) % 2**31


@dataclass(frozen=True, slots=True)
class Limits:
    """``vocabulary``: number of ids. ``positions``: most tokens of a prompt and its response. ``eos``: ids that end a response.
    ``no_seeds``: why a seed does not make sampling repeatable, if it does not."""

    vocabulary: int
    positions: int
    eos: tuple[int, ...]
    no_seeds: str = ""

    @classmethod
    def of(cls, folder: Path, positions: int, *, no_seeds: str = "") -> Limits:
        """Of the model in a folder, which an engine runs with so many positions."""
        return cls(int(config_of(folder)["vocab_size"]), positions, tuple(eos_token_ids(folder)), no_seeds)

    def ends(self, params: SamplingParams) -> list[int]:
        """The ids that end a response under these parameters."""
        return sorted(set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.eos)))

    def check(self, request: Request, params: SamplingParams) -> None:
        """Raise ``WorkerError`` for what an engine would refuse in words of its own, or cut short, or fail on."""
        prompt, place = request.input_ids or request.prompt, request.place
        if self.no_seeds and params.seed is not None and params.temperature != 0:
            raise WorkerError(f"SamplingParams.seed is {params.seed}, and {self.no_seeds}: pass seed=None")
        if not prompt:
            raise WorkerError(f"prompt {place} is empty: give each prompt at least one token, such as BOS")
        for position, token in enumerate(prompt):
            if not 0 <= token < self.vocabulary:
                raise WorkerError(
                    f"prompt {place} position {position} is {token!r}, not one of the model's {self.vocabulary} ids: "
                    "check that tokenizer and model belong together"
                )
        for token in params.stop_token_ids:
            if not 0 <= token < self.vocabulary:
                raise WorkerError(
                    f"stop_token_ids {token!r} is outside the model's {self.vocabulary} ids: pass the tokenizer's own"
                )
        if len(prompt) + params.response_length > self.positions:
            raise WorkerError(
                f"prompt {place} has {len(prompt)} tokens and with response_length {params.response_length} passes the "
                f"model's {self.positions} positions: shorten the prompt or the response"
            )
