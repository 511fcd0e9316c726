"""SGLang's side of ``support.rank_faults``: a loader around ours, and an engine that names it."""

from __future__ import annotations

from rollout_core.workers import SGLangWorker
from rollout_core.workers.commands import Receive
from rollout_core.workers.sglang import loader
from rollout_core.workers.sglang.commands import unpacked
from rollout_core.workers.sglang.engine import SGLangEngine
from support.rank_faults import change, failing, fault_of

LOADER = "support.rank_faults_sglang.load"


def load(model, named):
    """For ``custom_weight_loader``."""
    kind, target = fault_of(loader.rank_here()), loader._target_of(model)
    is_update = isinstance(unpacked(named).what, Receive)
    vars(target).pop("load", None)
    if is_update and kind == "fails":
        target.load = failing(target.load)
    loader.load(model, named)
    if is_update and kind.startswith("changes "):
        change(model, kind.removeprefix("changes "))


class FaultyEngine(SGLangEngine):
    """SGLang's engine with that loader."""

    def _load(self, named, flush):
        worked, said = self._engine.update_weights_from_tensor(named, load_format=LOADER, flush_cache=flush)
        return bool(worked), str(said)


class FaultyWorker(SGLangWorker):
    """A worker on it."""

    engine_class = "support.rank_faults_sglang:FaultyEngine"
