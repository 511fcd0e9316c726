"""ShardedHFWorker: rollouts from a transformers model that is sharded over ranks, by all of them in step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from rollout_core.bucketing.tensors import is_sharded
from rollout_core.errors import TransferError, WorkerError
from rollout_core.transfer.lockstep import FailedElsewhere, Lockstep, bounded
from rollout_core.transfer.sharded import reshard
from rollout_core.workers.contract import Completion, SamplingParams
from rollout_core.workers.hf.generate import device_of, eos_ids_of, generate, pad_id_of, plain
from rollout_core.workers.requests import check_request

_DONE, _FORWARD, _FAILED = 0, 1, 2  # what a rank says before each forward pass


class ShardedHFWorker:
    """The trainer's own model, sharded over the ranks of ``group`` (None: the default group) as FSDP2 does, as a rollout worker.

    Every rank has one, and all call ``generate`` at the same time, each with prompts of its own. Each forward pass is made by all
    ranks, as it gathers every layer's parameters; ranks that have less to do, or nothing, make theirs with one token.

    The weights are the trainer's: there is no update to send. ``version`` counts what the trainer says by ``advance``, once for
    each change of the weights; it is what completions carry as ``weight_version``. ``timeout``: seconds that a rank waits for the
    others at one forward pass. Raises ``WorkerError`` if the model cannot generate.
    """

    def __init__(self, model: torch.nn.Module, *, group: dist.ProcessGroup | None = None, timeout: float = 600.0) -> None:
        if not hasattr(model, "generate") or not hasattr(model, "config"):
            raise WorkerError(
                f"the model is a {type(model).__name__}: pass a transformers model, not what wraps it or is within it"
            )
        self.model: Any = model
        self.version = 0
        self._steps = Lockstep(group, timeout)
        # Before a forward pass leaves whole parameters in their place.
        sharded = [tensor for tensor in model.parameters() if is_sharded(tensor)]
        self._groups = {one for tensor in sharded for one in tensor.device_mesh.get_all_groups()}  # type: ignore[attr-defined]

    def advance(self) -> int:
        """The trainer has changed the weights: the version that the next call's tokens carry. On every rank."""
        self.version += 1
        return self.version

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, max_batch: int = 64) -> list[Completion]:
        """``params.n`` completions of each of this rank's prompts, grouped by prompt; ``to_batch`` pads them (clause W3). Token for
        token what the whole model gives for this call on one rank, samples with a seed included.

        Prompts are lists of token ids; a rank may have none. ``params`` and ``max_batch`` may differ between ranks.

        Raises ``WorkerError`` for a request that is refused on any rank, ranks whose versions differ, or NaN or infinite logits; on
        the other ranks the same, with the rank in a note. ``TransferError`` if a rank ends, or does not come in time. An error of
        one rank within a forward pass leaves the others in FSDP's own collective, which ends after ``timeout``, too.
        """
        versions = [int(one) for one in self._steps.exchange(str(self.version).encode())]
        if len(set(versions)) > 1:
            raise WorkerError(f"the ranks' weight versions are {versions}: call advance() on every rank after each change")
        turns = _Turns(self._steps, self.model)
        ends, pad = eos_ids_of(self.model), pad_id_of(self.model)
        completions: list[Completion] = []

        def work() -> bytes:
            nonlocal completions
            with turns.taken():
                check_request(prompts, params, max_batch)
                completions = generate(
                    self.model,
                    prompts,
                    params,
                    eos_token_ids=ends,
                    pad_token_id=pad,
                    weight_version=self.version,
                    max_batch=max_batch,
                )
            return b""

        with bounded(self._groups, self._steps.timeout), plain(self.model):
            self._steps.together(work)
        return completions


class _Turns:
    """The forward passes of one call: none is begun before every rank has said what it does."""

    def __init__(self, steps: Lockstep, model: Any) -> None:
        self._steps, self._model = steps, model
        self._resting = False  # whether this rank makes passes for the others only
        self._within = False  # a pass
        self._left = False  # whether the ranks have parted

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within, every forward pass of this rank is made by all; after it, those of ranks that have more to do."""
        # First of all hooks: FSDP's, which gather, come after the ranks have agreed.
        hooks = [
            self._model.register_forward_pre_hook(self._before, prepend=True),
            self._model.register_forward_hook(self._after),
        ]
        try:
            yield
            self._rest()
        except BaseException as error:
            self._part(error)
            if self._within and type(error) is RuntimeError:  # what a backend raises; others are this rank's own
                raise TransferError(f"a forward pass ended, in which ranks wait for each other: {error}") from error
            raise
        finally:
            for hook in hooks:
                hook.remove()
            if self._steps.broken is None:
                reshard(self._model)  # or the outermost module would keep these weights over the next optimizer's step

    def _before(self, *_: Any) -> None:
        if not self._resting:
            self._say(_FORWARD)
        self._within = True

    def _after(self, *_: Any) -> None:
        self._within = False

    def _say(self, word: int) -> int:
        found = self._steps.agree(word)
        if found == _FAILED:
            self._left = True
            raise FailedElsewhere("another rank has failed")
        return found

    @torch.no_grad()
    def _rest(self) -> None:
        """Take part until every rank is done."""
        self._resting = True
        token = torch.zeros((1, 1), dtype=torch.int64, device=device_of(self._model))
        while self._say(_DONE) == _FORWARD:
            self._model(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)

    def _part(self, error: BaseException) -> None:
        """Tell the other ranks that this one goes no further, unless they know."""
        if self._within:
            self._steps.abort(f"a forward pass failed: {error}")
            error.add_note(f"within a forward pass: the other ranks wait for this one in it, at most {self._steps.timeout:g} s")
        elif not self._left and self._steps.broken is None:
            self._left = True
            self._steps.agree(_FAILED)
