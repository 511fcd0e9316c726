"""vLLM's side of ``support.rank_faults``: an extension of its workers."""

from __future__ import annotations

from rollout_core.workers.commands import Expect, Settle
from rollout_core.workers.vllm.extension import RolloutExtension
from support.rank_faults import change, failing, fault_of


class FaultyExtension(RolloutExtension):
    """For ``worker_extension_cls``."""

    def _rollout_core_answer(self, command):
        kind, target = fault_of(self.rank), self._rollout_core_target()
        if isinstance(command, Expect):
            vars(target).pop("load", None)
            if kind == "fails":
                target.load = failing(target.load)
        answer = super()._rollout_core_answer(command)
        if isinstance(command, Settle) and command.mend and kind.startswith("changes "):
            change(self._rollout_core_model(), kind.removeprefix("changes "))
        return answer
