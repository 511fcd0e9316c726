"""HFWorker: a rollout worker on transformers, the reference that other engines are held against."""

from __future__ import annotations

from typing import ClassVar

import torch

from rollout_core.errors import WorkerError
from rollout_core.workers.carriers import CarrierChoice
from rollout_core.workers.link.hosts import Spec
from rollout_core.workers.media import Form
from rollout_core.workers.worker import Worker


class HFWorker(Worker):
    """A transformers causal language model that takes weights in buckets and generates.

    ``model_dir`` is a folder as ``save_pretrained`` writes it. ``dtype`` is a torch dtype's name. With ``process`` the model lives
    in a process of its own; without, in a thread of this one. ``device`` and ``carrier``: see ``Worker``. ``timeout`` bounds each
    answer of it in seconds, ``start_timeout`` its start; ``threads`` is its number of torch threads (0: torch's own choice).

    Calls are carried out one after the other, the samples of one in batches of ``max_batch``.
    """

    media_form: Form = "tensors"
    #: What runs in its process, as ``module:class``.
    engine_class: ClassVar[str] = "rollout_core.workers.hf.engine:HFEngine"

    def __init__(
        self,
        model_dir: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        carrier: CarrierChoice = "auto",
        process: bool = True,
        threads: int = 0,
        start_timeout: float = 300.0,
        timeout: float = 300.0,
    ) -> None:
        named = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise WorkerError(f"dtype is {dtype!r}; it is the name of a floating-point torch dtype, for example 'float32'")
        options = {"model": str(model_dir), "dtype": dtype, "device": device, "threads": threads if process else 0}
        spec = Spec(self.engine_class, options)
        super().__init__(spec, process=process, device=device, carrier=carrier, start_timeout=start_timeout, timeout=timeout)
