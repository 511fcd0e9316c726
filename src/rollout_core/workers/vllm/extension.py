"""What of ours runs in each of vLLM's workers, by ``worker_extension_cls``; importing it registers the door."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
import torch

from rollout_core.errors import WorkerError
from rollout_core.transfer.causes import cause_of
from rollout_core.transfer.doors.vllm import WorkerExtension
from rollout_core.workers.commands import Abandon, Answer, Command, Digests, Expect, Layout, Read, Receive, Settle, answer_with
from rollout_core.workers.digests import algorithm_on, weight_digests
from rollout_core.workers.experts import AbsentWeight, UnknownLayout
from rollout_core.workers.shards import WHOLE, Shard
from rollout_core.workers.vllm.readback import Directory, read_part, read_weight

_MAY_BE_NAN: Final = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class RolloutExtension(WorkerExtension):
    """For ``worker_extension_cls``. Its methods become the worker's, for ``collective_rpc``."""

    def rollout_core_loading(self) -> float:
        """Seconds of the last update that went into digests and loading."""
        return float(self.weight_transfer_engine.loading)  # type: ignore[attr-defined]

    def rollout_core_abandon(self, version: int) -> None:
        """The update to ``version`` was committed here, and has failed for its sender."""
        self._rollout_core_target().abort(version)

    def rollout_core_memory(self) -> int:
        """Bytes of the device that are in use, by whomever; 0 on a CPU, where vLLM's sleep lets go of nothing."""
        device = self.device  # type: ignore[attr-defined]
        if device.type == "cpu":
            return 0
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)

    def rollout_core_mend(self) -> None:
        """Pack the output layer again where it is the embeddings, too.

        vLLM ties them by giving ``ParallelLMHead`` the embeddings' parameter. Its reload (0.32, ``layerwise.py``, also under
        ``reload_weights``) packs a layer again when something was loaded into it; into a tied head nothing is, unless the update
        names it as well. What a CPU has packed of it then stays that of the old weights: ``read_weight`` of it shows that.
        """
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        for module in self._rollout_core_model().modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def _rollout_core_nan(self) -> str | None:
        """Which weight has a NaN, on a GPU.

        vLLM 0.26 feeds what it samples to its next step before anybody looks at it. From NaN logits that is no token, the embedding
        of which ends the process (``index out of bounds``, a device-side assert); on a CPU it is noticed in time.
        """
        if self.device.type != "cuda":  # type: ignore[attr-defined]
            return None
        named = self._rollout_core_model().named_parameters()
        weights = {name: weight for name, weight in named if weight.dtype in _MAY_BE_NAN and weight.numel()}
        if not weights or not torch.nn.utils.get_total_norm(weights.values(), math.inf).isnan():
            return None
        names = [name for name, weight in weights.items() if weight.isnan().any()]
        return f"{names[0]!r} has a NaN ({len(names)} tensors have): check what the trainer sends"

    def rollout_core_carry_out(self, command: str) -> dict[str, Any]:
        """One of ``workers.commands`` as JSON; the answer as what JSON can say, which is all that a server lets through."""
        # An error that left this would be handed on as its text alone; and of several workers vLLM 0.32 would take what they
        # answered for the answers to its next call (see doors.vllm).
        try:
            with torch.no_grad():
                answer = self._rollout_core_answer(msgspec.json.decode(command, type=Command))
        except Exception as error:
            answer = Answer(failed=cause_of(error))
        target = self._rollout_core_target()
        answer = msgspec.structs.replace(
            answer,
            unusable=target.unusable,
            version=target.version,
            loading=self.rollout_core_loading(),
            device=str(self.device),  # type: ignore[attr-defined]
            quantization=str(self.model_config.quantization or ""),  # type: ignore[attr-defined]
            # On a CPU it sleeps, too, and frees nothing.
            sleeps=self.device.type == "cpu" or bool(self.model_config.enable_sleep_mode),  # type: ignore[attr-defined]
        )
        return msgspec.to_builtins(answer)  # type: ignore[no-any-return]

    def _rollout_core_answer(self, command: Command) -> Answer:
        match command:
            case Digests(shapes=shapes):
                # On a CPU they are of values: see ``readback``.
                device: torch.device = self.device  # type: ignore[attr-defined]
                values, algorithm = device.type == "cpu", algorithm_on(str(device))
                parts = self._rollout_core_parts(shapes)
                pairs = ((name, part) for name, part, _ in parts)
                return Answer(digests=weight_digests(pairs, values=values, algorithm=algorithm))
            case Layout(shapes=shapes):
                return Answer(shards={name: shard for name, _, shard in self._rollout_core_parts(shapes)})
            case Read(name=name, shape=shape):
                try:
                    return answer_with(*self._rollout_core_part(name, shape))
                except AbsentWeight:
                    return Answer()
            case Abandon(version=version):
                self.rollout_core_abandon(version)
            case Expect(version=version):
                self._rollout_core_target().version = version - 1
            case Settle(mend=mend, address=address):
                engine = self.weight_transfer_engine  # type: ignore[attr-defined]
                if engine.address != address:
                    return Answer()
                engine.shutdown()  # or the sender's memory stays mapped, and is not freed when it is given back
                failure, engine.failure = engine.failure, None
                if failure is not None:
                    return Answer(failed=cause_of(failure))
                if mend:
                    self.rollout_core_mend()
                    target = self._rollout_core_target()
                    target.unusable = target.unusable or self._rollout_core_nan()  # until the next update, for whoever asks
            case Receive():
                raise WorkerError("vLLM has calls of its own for updates")
        return Answer()

    def _rollout_core_parts(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor, Shard]]:
        """Of the tensors of a checkpoint, what this worker has; those that it has not are left out."""
        directory = Directory(self._rollout_core_model())
        for name, shape in shapes.items():
            try:
                yield name, *self._rollout_core_part(name, shape, directory)
            except UnknownLayout:
                raise  # or it would be told as missing
            except WorkerError:
                continue

    def _rollout_core_part(
        self, name: str, shape: tuple[int, ...], directory: Directory | None = None
    ) -> tuple[torch.Tensor, Shard]:
        model = self._rollout_core_model()
        if self.parallel_config.world_size == 1:  # type: ignore[attr-defined]
            return read_weight(model, name, directory), WHOLE
        return read_part(model, name, shape, directory)

    def _rollout_core_target(self) -> Any:
        return self.weight_transfer_engine.target  # type: ignore[attr-defined]

    def _rollout_core_model(self) -> Any:
        return self.model_runner.get_model()  # type: ignore[attr-defined]
