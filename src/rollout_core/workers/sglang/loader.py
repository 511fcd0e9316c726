"""What of ours runs in each of SGLang's ranks: updates come into the live model, and its weights are read back.

SGLang imports it by ``custom_weight_loader``, and calls ``load`` with the model. An error must not leave it: it would end the
scheduler.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, Final

import msgspec
import torch

from rollout_core.bucketing import BucketPlan
from rollout_core.bucketing.sources import Pair
from rollout_core.errors import WorkerError
from rollout_core.transfer import receive
from rollout_core.transfer.causes import cause_of
from rollout_core.workers.carriers import receiver_of
from rollout_core.workers.commands import Abandon, Answer, Digests, Expect, Layout, Read, Receive, Settle, answer_with
from rollout_core.workers.digests import algorithm_on, weight_digests
from rollout_core.workers.experts import AbsentWeight, UnknownLayout
from rollout_core.workers.names import canonical
from rollout_core.workers.sglang.commands import Asked, Named, Where, unpacked, write_answer
from rollout_core.workers.shards import Shard
from rollout_core.workers.vllm.readback import Directory, read_part

_LOG: Final = logging.getLogger(__name__)


def load(model: Any, named: Named) -> None:
    """SGLang's ``custom_weight_loader``: ``named`` is a command, see ``commands``. What goes wrong is in the answer; where none can
    be given, as who asked is gone, in SGLang's log."""
    try:
        order = unpacked(named)
        target = _target_of(model)
        try:
            with torch.no_grad():
                answer = _answer(model, target, order.what)
        except Exception as error:
            answer = Answer(failed=cause_of(error))
        write_answer(order.folder, rank_here(), msgspec.structs.replace(answer, unusable=target.unusable, version=target.version))
    except Exception:
        _LOG.exception("rollout_core's loader could not answer")


def _answer(model: Any, target: _Model, command: Asked) -> Answer:
    match command:
        case Receive(update=update):
            # Who counted before may be gone, and its count with it: what is offered is the next.
            target.version = update.version - 1
            with closing(receiver_of(update, _device_of(model), rank_here())) as carrier:
                return Answer(loading=receive(carrier, target, timeout=update.timeout).loading)
        case Abandon(version=version, why=why):
            if target.version == version:
                target.version, target.unusable = version - 1, why
            return Answer()
        case Digests(shapes=shapes):
            algorithm = algorithm_on(str(_device_of(model)))
            pairs = ((name, part) for name, part, _ in _parts(model, shapes))
            return Answer(digests=weight_digests(pairs, algorithm=algorithm))
        case Layout(shapes=shapes):
            return Answer(shards={name: shard for name, _, shard in _parts(model, shapes)})
        case Read(name=name, shape=shape):
            try:
                return answer_with(*read_part(model, _name_in(model, name), shape))
            except AbsentWeight:
                return Answer()
        case Where():
            return Answer(device=_gpu(_device_of(model)))
        case Settle():
            return Answer()
        case Expect():
            raise WorkerError("SGLang's loader is not asked that")


def _parts(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor, Shard]]:
    """Of the tensors of a checkpoint, what this rank has, without the zeros that SGLang pads it with on a CPU; left out are those
    that it has not, and those that have something else in their padding."""
    directory = Directory(model)
    for name, shape in shapes.items():
        try:
            yield name, *read_part(model, _name_in(model, name), shape, directory)
        except UnknownLayout:
            raise  # or it would be told as missing
        except WorkerError:
            continue


def _name_in(model: Any, name: str) -> str:
    """What SGLang's model calls a weight that a module, or a checkpoint, has under this name. Its models that see have the names of
    older checkpoints, with another in the tower that sees."""
    if not hasattr(model, "visual"):
        return name
    name = canonical(name)
    return name.replace(".attn.qkv.", ".attn.qkv_proj.") if name.startswith("visual.") else name


class _Model:
    """SGLang's model as the target of an update. Its ``load_weights`` copies into the live parameters, fused ones in parts."""

    def __init__(self, model: Any) -> None:
        self.version = 0
        self.unusable: str | None = None
        self._model = model

    def begin(self, plan: BucketPlan | None, version: int) -> None:
        """Refuse weights of 16 bits for those that SGLang made 8 of when it started, which it would load as they are."""
        own = next((name for name, tensor in self._model.named_parameters() if _is_of_8_bits(tensor.dtype)), None)
        if own is not None and plan is not None and not any(_is_of_8_bits(spec.dtype) for spec in plan.specs):
            raise WorkerError(
                f"SGLang has quantized its weights when it started ({own!r} has 8 bits), and cannot take these: start it without "
                "quantization, or from a checkpoint that is quantized and updated as such"
            )

    def load(self, pairs: list[Pair]) -> None:
        self.unusable = "an update to them was not completed"
        # By the names of an older checkpoint, which all of its loaders know: some pass over those that they do not, without a word.
        sees = hasattr(self._model, "visual")
        self._model.load_weights([(canonical(name), tensor) for name, tensor in pairs] if sees else pairs)
        _forget_pictures()

    def prepare(self) -> None:
        pass

    def commit(self, version: int) -> None:
        self.version, self.unusable = version, None

    def abort(self, version: int) -> None:
        if self.version == version:
            self.version, self.unusable = version - 1, "an update to them was interrupted"


def _is_of_8_bits(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 1 and dtype is not torch.bool


def _forget_pictures() -> None:
    """Of SGLang's cache of what its encoder made, which it keeps over an update: what the old weights saw."""
    for name in ("sglang.srt.managers.mm_schedule", "sglang.srt.managers.mm_utils"):  # of newer versions, and of older ones
        cache = getattr(sys.modules.get(name), "embedding_cache", None)
        if cache is not None:
            cache.clear()


def _device_of(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def _gpu(device: torch.device) -> str:
    """The id by which the driver knows a GPU, in whatever process; ``""`` for a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""


def _target_of(model: Any) -> _Model:
    found: _Model | None = getattr(model, "_rollout_core_target", None)
    if found is None:
        found = model._rollout_core_target = _Model(model)
    return found


def rank_here() -> int:
    """Of this process among SGLang's: tensor and pipeline parallel ones counted together."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
