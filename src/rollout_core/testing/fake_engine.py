"""A worker without a model: its engine's next token is a hash of the weights and of all tokens so far.

Everything around it is real: the worker, its link and serving, updates in buckets, readback. A token takes microseconds, so that
hundreds of programs are played in seconds, and every rule of requests and weights can be tried on it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
import xxhash

from rollout_core.errors import WorkerError
from rollout_core.transfer import DirectWeights, receive
from rollout_core.transfer.causes import cause_of
from rollout_core.transfer.targets import named_weights, persistent_weights
from rollout_core.workers.carriers import receiver_of
from rollout_core.workers.contract import SamplingParams, Status
from rollout_core.workers.digests import weight_digest
from rollout_core.workers.engine import AWAITED, RELEASED, Emit, Engine, Group, Progress, Request, Update
from rollout_core.workers.link.hosts import Spec
from rollout_core.workers.worker import Worker

VOCABULARY: Final = 61
POSITIONS: Final = 512
EOS: Final = (2, 7, 11)
_FILE: Final = "fake_model.json"
_WIDTH: Final = 6


class FakeModel(torch.nn.Module):
    """Tensors as a small language model has them: tied embeddings, a bias, a buffer that no checkpoint has."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def made(*shape: int) -> torch.nn.Parameter:
            # Exact on every machine, and with more digits than bfloat16 has.
            values = torch.randint(-4096, 4096, shape, generator=generator) / 1024
            return torch.nn.Parameter(values, requires_grad=False)

        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Module()
        self.model.embed_tokens.weight = made(VOCABULARY, _WIDTH)
        self.model.proj = torch.nn.Module()
        self.model.proj.weight, self.model.proj.bias = made(_WIDTH, _WIDTH), made(_WIDTH)
        self.model.norm = torch.nn.Module()
        self.model.norm.weight = made(_WIDTH)
        self.model.register_buffer("inv_freq", torch.arange(3.0) + 1, persistent=False)
        self.lm_head = torch.nn.Module()
        self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def config(self) -> Any:
        return _Config()


class _Config:
    vocab_size = VOCABULARY

    def get_text_config(self) -> _Config:
        return self


class FakeModels:
    """What the kit and preflight need of such models, as ``rollout_core.preflight.models`` has it of transformers'."""

    @staticmethod
    def make_small_model(folder: Path, **shape: int) -> None:
        """Write one; ``shape``, that of another model's attention, changes nothing."""
        del shape
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FILE).write_text(json.dumps({"seed": 1}))

    @staticmethod
    def load_trainer(folder: Path) -> FakeModel:
        try:
            return FakeModel(int(json.loads((folder / _FILE).read_text())["seed"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WorkerError(f"{folder} holds no fake model: {error}") from error

    @staticmethod
    def perturb(model: torch.nn.Module, scale: float, seed: int = 0, *, computed: bool = True) -> list[str]:
        """Change every value, if ``scale`` is not 0, by an amount of its own that is exact on every machine."""
        generator = torch.Generator().manual_seed(seed)
        changed = named_weights(model) if computed else persistent_weights(model)
        for tensor in {id(tensor): tensor for tensor in changed.values()}.values():
            noise = torch.randint(1, 64, tensor.shape, generator=generator) / 1024
            tensor += noise if scale else 0
        return list(changed)

    @staticmethod
    def eos_token_ids(model: Any) -> set[int]:
        del model
        return set(EOS)

    @staticmethod
    def greedy_reference(model: torch.nn.Module, prompt: list[int], length: int, eos: set[int]) -> tuple[list[int], float]:
        """The tokens, each hashed anew from all before it, and no engine's code; and the nearest tie, which hashes have not."""
        parts = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        raw = b"".join(tensor.detach().numpy().tobytes() for _, tensor in parts)
        key, tokens = xxhash.xxh64_intdigest(raw), list[int]()
        while len(tokens) < length and not (tokens and tokens[-1] in eos):
            ids = b"".join(token.to_bytes(8, "little") for token in [*prompt, *tokens])
            tokens.append(xxhash.xxh64_intdigest(ids, seed=key) % VOCABULARY)
        return tokens, float("inf")


@dataclass(eq=False, slots=True)
class Row:
    """A request and what it has so far. ``cache``, as a KV cache, is the hash of the ids so far under the weights of
    number ``cached_under``."""

    request: Request
    params: SamplingParams
    draws: random.Random
    tokens: list[int] = field(default_factory=list)
    cache: Any = None
    cached_under: int = -1


class FakeEngine:
    """The engine: a token a step for each request that is under way, ``max_batch`` of a group at a time."""

    is_read_in_update: bool = True

    def __init__(self, model: str) -> None:
        self.model: Any = FakeModels.load_trainer(Path(model))
        self.weights = DirectWeights(self.model)
        self.groups: list[tuple[int, dict[int, Row]]] = []  # max_batch, and the rows that have not ended
        self.loads = 0  # updates that changed the weights
        self.is_released = False
        self.awaits = False  # weights, since its memory was released

    @property
    def version(self) -> int:
        return self.weights.version

    @property
    def is_busy(self) -> bool:
        return bool(self.groups) and not self.awaits

    def submit(self, group: Group) -> None:
        self.check_usable()
        for request in group.requests:
            self._check(request, group.params)
        rows = {request.key: Row(request, group.params, _draws(group.params, request)) for request in group.requests}
        if rows:
            self.groups.append((group.max_batch, rows))

    def abort(self, keys: Sequence[int] | None, emit: Emit) -> None:
        for _, rows in self.groups:
            found = list(rows) if keys is None else [key for key in keys if key in rows]
            for key in found:
                self.end(rows.pop(key), emit)
        self._forget_empty()

    def end(self, row: Row, emit: Emit) -> None:
        """A request that is aborted says so."""
        emit([Progress(row.request.key, [], [], self.version, "aborted")])

    def step(self, emit: Emit, between: Callable[[], None]) -> None:
        for most, rows in self.groups:
            for row in list(rows.values())[:most]:
                try:
                    self.check_usable()
                    progress = self.sample(row)
                except WorkerError as error:
                    progress = Progress(row.request.key, [], [], self.version, "failed", cause_of(error))
                emit([progress])
                if progress.status is not None:
                    del rows[row.request.key]
        self._forget_empty()
        between()

    def sample(self, row: Row) -> Progress:
        """One token for a request."""
        cache = self.cache_of(row)
        if row.params.temperature:
            cache = cache.copy()
            cache.update(row.draws.randbytes(8))
        value = cache.intdigest()
        token = value % VOCABULARY
        row.tokens.append(token)
        row.cache.update(token.to_bytes(8, "little"))
        return Progress(row.request.key, [token], [-1.0 - value % 97 / 97], self.version, self.status(row, token))

    def status(self, row: Row, token: int) -> Status | None:
        """How a request has ended with this token, if it has."""
        if token in row.params.stop_token_ids or (token in EOS and not row.params.ignore_eos):
            return "stop"
        return "length" if len(row.tokens) >= row.params.response_length else None

    def cache_of(self, row: Row) -> Any:
        """The request's cache, computed anew where it is of other weights."""
        if row.cached_under != self.loads:
            row.cache = xxhash.xxh64(seed=self.key())
            for item in row.request.media:
                row.cache.update(bytes.fromhex(item.identity))
            for token in [*row.request.prompt, *row.tokens]:
                row.cache.update(token.to_bytes(8, "little"))
            row.cached_under = self.loads
        return row.cache

    def key(self) -> int:
        """The weights, as one number."""
        state = xxhash.xxh64()
        for tensor in self.used().values():
            state.update(tensor.detach().numpy().data)
        return state.intdigest()

    def used(self) -> dict[str, torch.Tensor]:
        """The tensors that tokens come from."""
        return self.weights.tensors

    def update(self, update: Update) -> float:
        if self.is_released:
            raise WorkerError(RELEASED)
        with closing(receiver_of(update, "cpu")) as carrier:
            report = receive(carrier, self.weights, timeout=update.timeout)
        self.loads += 1
        self.awaits = False
        return report.loading

    def abandon(self, version: int) -> None:
        """As ``HFEngine``'s."""
        if self.version == version:
            self.weights.abort(version)

    def specs(self) -> None:
        """The target compares an update's plan with the model."""

    def release_memory(self) -> int:
        """The weights are gone; their tensors stay, as there is no memory to speak of."""
        if self.is_released:
            return 0
        self.is_released = self.awaits = True
        freed = 0
        for tensor in self.weights.tensors.values():
            freed += tensor.nbytes
            tensor.zero_()
        return freed

    def resume_memory(self) -> None:
        self.is_released = False

    def digests(self, names: Sequence[str] | None) -> dict[str, str]:
        self.check_memory()
        found = {name: weight_digest(tensor) for name, tensor in self.weights.tensors.items()}
        return found if names is None else {name: found[name] for name in names if name in found}

    def read_tensor(self, name: str) -> torch.Tensor:
        self.check_memory()
        if name not in self.weights.tensors:
            raise WorkerError(f"the worker has no tensor {name!r}")
        return self.weights.tensors[name].detach().clone()

    def close(self) -> None:
        self.groups.clear()

    def check_memory(self) -> None:
        if self.is_released:
            raise WorkerError(RELEASED)

    def check_usable(self) -> None:
        self.check_memory()
        if self.awaits:
            raise WorkerError(f"the worker's weights are unusable: {AWAITED}; call sync_weights")
        if self.weights.unusable is not None:
            raise WorkerError(f"the worker's weights are unusable: {self.weights.unusable}; call sync_weights again")

    def _check(self, request: Request, params: SamplingParams) -> None:
        if not request.prompt:
            raise WorkerError(f"prompt {request.place} is empty: give each prompt at least one token")
        for position, token in enumerate(request.prompt):
            if token >= VOCABULARY:
                raise WorkerError(f"prompt {request.place} position {position} is {token}, not one of the {VOCABULARY} ids")
        if len(request.prompt) + params.response_length > POSITIONS:
            raise WorkerError(f"prompt {request.place} and its response pass the {POSITIONS} positions")

    def _forget_empty(self) -> None:
        self.groups = [group for group in self.groups if group[1]]


def _draws(params: SamplingParams, request: Request) -> random.Random:
    """What a sample is drawn with: the same for the same seed and place in a call."""
    return random.Random(None if params.seed is None else f"{params.seed} {request.place} {request.sample}")


class FakeWorker(Worker):
    """The worker: ``folder`` is one that ``FakeModels`` has written."""

    #: Where the kit finds what it needs of this worker's models.
    models: ClassVar[Any] = FakeModels
    engine: ClassVar[type[Engine]] = FakeEngine

    def __init__(self, folder: str | Path, *, process: bool = False, timeout: float = 10.0) -> None:
        place = f"{self.engine.__module__}:{self.engine.__qualname__}"
        super().__init__(Spec(place, {"model": str(folder)}), process=process, timeout=timeout)
