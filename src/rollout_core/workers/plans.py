"""The plan of a worker's updates, kept from one to the next: a trainer sends the same tensors again and again."""

from __future__ import annotations

from rollout_core.bucketing import Options, Packer, plan_buckets, specs_of
from rollout_core.bucketing.placement import Order, Oversize
from rollout_core.bucketing.sources import Source
from rollout_core.bucketing.specs import are_specs_of


class Plans:
    """The last plan, and what packs it. On a GPU that keeps tables of about three thousandths of the weights' size."""

    def __init__(self) -> None:
        self._packer: Packer | None = None

    def packer_for(self, source: Source, capacity: int, *, oversize: Oversize = "split", order: Order = "given") -> Packer:
        """A packer of the plan for this source: the last one, if names, dtypes, shapes, ties and options are the same. Raises what
        ``specs_of`` and ``plan_buckets`` do."""
        options = Options(capacity=capacity, oversize=oversize, order=order)
        last = None if self._packer is None or self._packer.plan.options != options else self._packer.plan
        if last is None or not are_specs_of(last.specs, source):
            specs = tuple(specs_of(source))
            if last is None or specs != last.specs:
                self._packer = Packer(plan_buckets(specs, capacity, oversize=oversize, order=order))
        assert self._packer is not None
        return self._packer

    def clear(self) -> None:
        """Let go of it."""
        self._packer = None
