"""vLLM's door: a backend for its official calls ``init_weight_transfer_engine``, ``start_weight_update``, ``update_weights`` and
``finish_weight_update``, by which ``send`` reaches every worker of an engine.

Importing this module registers the backend. It has to be imported in each worker before the model is loaded, which naming a class
of it does: ``LLM(worker_extension_cls="rollout_core.transfer.doors.vllm.WorkerExtension",
weight_transfer_config=WeightTransferConfig(backend="rollout_core"))``. docs/doors.md shows a whole update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rollout_core.bucketing import BucketPlan
from rollout_core.bucketing.sources import Pair
from rollout_core.bucketing.tensors import as_bytes
from rollout_core.errors import IncompleteStreamError, TransferError
from rollout_core.transfer import receive
from rollout_core.transfer.carriers.contract import ReceiverEnd
from rollout_core.transfer.carriers.names import NAMES, connect
from rollout_core.transfer.targets import own_copies

NAME: Final = "rollout_core"


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """What ``init_weight_transfer_engine`` is given as ``init_info``; every worker gets the same.

    ``carrier``: a name in ``RECEIVERS``, to which one can add. ``address``: where that finds the sender, in its own words.
    ``timeout``: seconds to wait for the sender, then and in each update. ``staged``: keep an update in memory of its own until it
    is complete, so that one that fails leaves the old weights; else it is loaded as it comes, and one that fails leaves weights
    that are unusable. ``partial``: allow updates without some of the model's parameters, which then stay as they are.

    For who drives several workers: ``by_rank``, each finds a sender of its own, at ``address``, ``/`` and its rank, which then
    knows who is who. ``raises=False``: what goes wrong in ``init_weight_transfer_engine`` and ``update_weights`` is kept as the
    engine's ``failure``, and has to be asked for: vLLM 0.32 takes what several workers answered to a call that failed in one for
    their answers to its next.
    """

    carrier: str = "memory"
    address: str = ""
    timeout: float = 60.0
    staged: bool = False
    partial: bool = False
    by_rank: bool = False
    raises: bool = True

    def address_of(self, rank: int) -> str:
        return f"{self.address}/{rank}" if self.by_rank else self.address


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What ``update_weights`` is given as ``update_info``. ``version``: accept this one only; None takes what is sent."""

    version: int | None = None


def _connect(info: InitInfo, device: torch.device) -> ReceiverEnd:
    return connect(info.carrier, info.address, device=device, timeout=info.timeout)


#: How a worker on this device gets its end of a carrier. A module that adds to it has to be imported in the workers, as this one.
RECEIVERS: Final[dict[str, Callable[[InitInfo, torch.device], ReceiverEnd]]] = dict.fromkeys(NAMES, _connect)


class RolloutCoreEngine(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """One worker's end. One call of ``update_weights`` is one whole update, and waits for the sender's ``send``, which has to run
    beside it. ``start_weight_update`` changes nothing yet, and ``finish_weight_update`` only says that all went well."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    #: One carrier brings one model's weights.
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.target = _Model(model, self.model_config)
        self._parallel = vllm_config.parallel_config
        self._info = InitInfo()
        self._carrier: ReceiverEnd | None = None
        self._finished = False
        self.loading = 0.0  # seconds of the last update
        #: What went wrong since ``init_weight_transfer_engine``, where that said not to raise it.
        self.failure: Exception | None = None

    @property
    def address(self) -> str:
        """Of the last ``init_weight_transfer_engine``, by which one that drives vLLM tells its own from another's."""
        return self._info.address

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._info, self.failure = init_info, None
        with self._kept():
            if init_info.carrier not in RECEIVERS:
                raise TransferError(f"carrier is {init_info.carrier!r}; this worker knows {', '.join(sorted(RECEIVERS))}")
            self.shutdown()
            found = replace(init_info, address=init_info.address_of(self._parallel.rank))
            self._carrier = RECEIVERS[init_info.carrier](found, self.device)
            self.target.staged, self.target.partial = init_info.staged, init_info.partial

    def start_weight_update(self) -> None:
        self._finished = False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Not the base class's: it synchronizes torch.accelerator, which a CPU has not.
        if self.failure is None:
            with self._kept():
                self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Raises what ``receive`` raises, with a note if the weights are unusable; vLLM's ``finish_weight_update`` then refuses."""
        if self._carrier is None:
            raise TransferError("call init_weight_transfer_engine before update_weights")
        self.target.expected = update_info.version
        try:
            self.loading = receive(self._carrier, self.target, timeout=self._info.timeout).loading
        except Exception as error:
            # In the text, not in a note: vLLM hands on an error of another process as its text.
            if self.target.unusable is not None:
                raise TransferError(f"{error} ({self.target.unusable}; update again before anything is generated)") from error
            raise
        self._finished = True

    @staticmethod
    def trainer_send_weights(*arguments: Any, **options: Any) -> None:
        """What vLLM 0.26 wants its backends to have for the trainer: here it is ``send`` that does this."""
        del arguments, options
        raise TransferError("the trainer's side of this backend is rollout_core.transfer.send")

    def finish_weight_update(self) -> None:
        if not self._finished and self._info.raises:
            raise TransferError("no update was received since start_weight_update; call update_weights before finish_weight_update")

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """What is raised in it is kept, if ``InitInfo`` says so."""
        try:
            yield
        except Exception as error:
            if self._info.raises:
                raise
            self.failure = error

    def shutdown(self) -> None:
        carrier, self._carrier = self._carrier, None
        if carrier is not None:
            carrier.close()


class _Model:
    """vLLM's model as the target of an update, through its layerwise reload, which gives layers new tensors to be loaded into and
    copies each into the live ones as soon as it is complete.

    Tied embeddings on a CPU: the reload does not pack lm_head again (vLLM 0.32), which goes on with the old weights. That is
    mended where a worker of ours drives vLLM, not here: vLLM's own ``reload_weights`` has it, too.
    """

    def __init__(self, model: torch.nn.Module, model_config: Any) -> None:
        self.version = 0
        self.unusable: str | None = None
        self.expected: int | None = None
        self.staged = self.partial = False
        self._model, self._config = model, model_config
        self._reloading = False
        self._damaged = False  # by an update that was not completed
        self._before = 0
        self._held: list[Pair] = []
        self._loaded: set[str] = set()
        self._tied: list[set[str]] = []  # names that are one parameter

    def begin(self, plan: BucketPlan | None, version: int) -> None:
        if self.expected not in (None, version):
            raise TransferError(f"update_weights was called for version {self.expected}, and the sender sends version {version}")
        self._held, self._loaded = [], set()

    def load(self, pairs: list[Pair]) -> None:
        # Copies: a layer's tensors are kept until its last one has come.
        if self.staged:
            self._held += own_copies(pairs)
        else:
            self._load(own_copies(pairs))

    def prepare(self) -> None:
        if not self.staged:
            self._complete()

    def commit(self, version: int) -> None:
        held, self._held = self._held, []
        if held:
            self._load(held)
            self._complete()
        self._before, self.version = self.version, version
        self._damaged, self.unusable = False, None

    def abort(self, version: int) -> None:
        self._held = []
        if self.version == version:  # after the commit: an interrupt
            self.version, self.unusable = self._before, "interrupted"
        if self.unusable is not None:
            self._damaged = True
            self.unusable = f"the weights are unusable: the update to version {version} was not completed"
        self._end_reload()  # layers that nothing was loaded into get their tensors back, and the next update can begin

    def _load(self, pairs: list[Pair]) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.unusable = "the weights are unusable: an update is under way"
        if not self._reloading:
            self._reloading = True
            self._tied = _shared(self._model)  # the reload takes them apart
            _pack_experts_again(self._model)
            initialize_layerwise_reload(self._model)
        self._loaded |= self._model.load_weights(pairs) or set()  # type: ignore[operator]

    def _complete(self) -> None:
        """Raises ``IncompleteStreamError`` if a parameter has not come: vLLM would leave it as it was, and say nothing."""
        came = self._loaded.union(*(names for names in self._tied if names & self._loaded))
        # Of experts vLLM 0.26 says "experts.w13_weight" and means "experts.routed_experts.w13_weight".
        names = (name for name, _ in self._model.named_parameters())
        missing = {name for name in names if name not in came and name.replace(".routed_experts.", ".") not in came}
        optional = (self.partial and not self._damaged) or self._config.quantization is not None
        if self._loaded and missing and not optional:
            raise IncompleteStreamError(
                f"the update has nothing for {len(missing)} parameters of the model, such as {min(missing)!r}; "
                "send all of them, or set partial in init_info"
            )
        if self._loaded and self._config.quantization is None and (halves := self._half_loaded()):
            raise IncompleteStreamError(
                f"the update has a part only of {len(halves)} layers, such as {halves[0]!r}; send all that belongs to them"
            )
        self._end_reload()

    def _half_loaded(self) -> list[str]:
        """Layers of which a part has come: vLLM would use memory that was never written for the rest."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        infos = ((name, module, get_layerwise_info(module)) for name, module in self._model.named_modules())
        return [name for name, module, info in infos if info.can_load() and info.load_numel > 0 and _lacks_some(module, info)]

    def _end_reload(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self._reloading:
            self._reloading = False
            finalize_layerwise_reload(self._model, self._config)


def _shared(model: torch.nn.Module) -> list[set[str]]:
    """The names of each parameter that has several."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return [found for found in names.values() if len(found) > 1]


def _lacks_some(module: torch.nn.Module, info: Any) -> bool:
    """Whether something of a layer has not come. vLLM counts elements, and does not count what pads a layer as loaded; so what is
    fused of parts without padding is told by the count, experts by their numbers, and parameters by their names."""
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS  # which it leaves as they are

    came = {name for name, _ in info.loaded_weights}
    if any(name not in came and name not in SKIP_TENSORS for name, _ in module.named_parameters(recurse=False)):
        return True
    experts: Any = getattr(module, "w13_weight", None)
    if experts is None:
        return len(getattr(module, "output_partition_sizes", ())) > 1 and info.load_numel < info.load_numel_total
    parts: dict[int, set[str]] = {}
    for name, call in info.loaded_weights:
        if name in ("w13_weight", "w2_weight"):
            parts.setdefault(call.arguments["expert_id"], set()).add(call.arguments["shard_id"])
    every = max(len(found) for found in parts.values()) if parts else 0
    gated = getattr(getattr(module, "moe_config", None), "is_act_and_mul", True)
    return every < (3 if gated else 2) or len(parts) < len(experts) or any(len(found) < every for found in parts.values())


def _pack_experts_again(model: torch.nn.Module) -> None:
    """vLLM 0.32 packs experts for its CPU kernels when it has loaded them first, and not when it has loaded others later, which it
    then reads as if they were packed. From here on it packs those, too."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        is_packed = getattr(getattr(method, "unquantized_backend", None), "name", "") == "CPU" and hasattr(method, "moe_kernel")
        if is_packed and not isinstance(method.process_weights_after_loading, _Packing):  # type: ignore[union-attr]
            method.process_weights_after_loading = _Packing(method)  # type: ignore[union-attr]


class _Packing:
    """``process_weights_after_loading`` of such a method."""

    def __init__(self, method: Any) -> None:
        self._method, self._process = method, method.process_weights_after_loading

    def __call__(self, layer: Any) -> None:
        kernel, plain = self._method.moe_kernel, layer.w13_weight.detach().clone()
        self._process(layer)
        # Another version may have packed it by itself.
        if kernel is not None and torch.equal(as_bytes(layer.w13_weight.detach()), as_bytes(plain)):
            kernel.fused_experts.process_weights_after_loading(layer)


class WorkerExtension:
    """For ``worker_extension_cls``. Its methods become the worker's, for ``collective_rpc``."""

    def rollout_core_version(self) -> int:
        """Version of the weights that this worker has: 0 as loaded at the start. ``TransferError`` if they are unusable."""
        target = self.weight_transfer_engine.target  # type: ignore[attr-defined]
        if target.unusable is not None:
            raise TransferError(target.unusable)
        return int(target.version)


WeightTransferEngineFactory.register_engine(NAME, RolloutCoreEngine)
