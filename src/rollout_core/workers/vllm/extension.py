"""What of ours runs in each of vLLM's workers, by ``worker_extension_cls``; importing it registers the door."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from rollout_core.errors import WorkerError
from rollout_core.transfer.causes import cause_of
from rollout_core.transfer.doors.vllm import WorkerExtension
from rollout_core.workers.commands import Abandon, Answer, Command, Digests, Expect, Read, Receive, Settle, answer_with
from rollout_core.workers.digests import algorithm_on, weight_digest
from rollout_core.workers.vllm.readback import read_weight


class RolloutExtension(WorkerExtension):
    """For ``worker_extension_cls``. Its methods become the worker's, for ``collective_rpc``."""

    def rollout_core_digests(self, names: Sequence[str]) -> dict[str, str]:
        """Digests of tensors, by the names of a checkpoint; of those that this worker has. On a CPU they are of their values: see
        ``readback``."""
        found: dict[str, str] = {}
        device: torch.device = self.device  # type: ignore[attr-defined]
        values, algorithm = device.type == "cpu", algorithm_on(str(device))
        with torch.no_grad():
            for name in names:
                try:
                    weight = read_weight(self._rollout_core_model(), name)
                    found[name] = weight_digest(weight, values=values, algorithm=algorithm)
                except WorkerError:
                    continue
        return found

    def rollout_core_read(self, name: str) -> torch.Tensor:
        with torch.no_grad():
            return read_weight(self._rollout_core_model(), name).cpu().clone()

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

    def rollout_core_carry_out(self, command: str) -> dict[str, Any]:
        """One of ``workers.commands`` as JSON; the answer as what JSON can say, which is all that a server lets through."""
        try:
            answer = self._rollout_core_answer(msgspec.json.decode(command, type=Command))
        except Exception as error:  # vLLM would hand it on as its text alone
            answer = Answer(failed=cause_of(error))
        target = self._rollout_core_target()
        answer = msgspec.structs.replace(
            answer,
            unusable=target.unusable,
            version=target.version,
            loading=self.rollout_core_loading(),
            device=str(self.device),  # type: ignore[attr-defined]
        )
        return msgspec.to_builtins(answer)  # type: ignore[no-any-return]

    def _rollout_core_answer(self, command: Command) -> Answer:
        match command:
            case Digests(shapes=shapes):
                return Answer(digests=self.rollout_core_digests(list(shapes)))
            case Read(name=name):
                return answer_with(self.rollout_core_read(name))
            case Abandon(version=version):
                self.rollout_core_abandon(version)
            case Expect(version=version):
                self._rollout_core_target().version = version - 1
            case Settle(mend=mend):
                # Or the sender's memory stays mapped, and is not freed when it is given back.
                self.weight_transfer_engine.shutdown()  # type: ignore[attr-defined]
                if mend:
                    self.rollout_core_mend()
            case Receive():
                raise WorkerError("vLLM has calls of its own for updates")
        return Answer()

    def _rollout_core_target(self) -> Any:
        return self.weight_transfer_engine.target  # type: ignore[attr-defined]

    def _rollout_core_model(self) -> Any:
        return self.model_runner.get_model()  # type: ignore[attr-defined]
