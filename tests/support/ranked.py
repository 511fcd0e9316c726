"""An engine on several ranks, each a thread with its own parts of a model: what a real one has, and faults in one of its ranks.

Its tokens come from the whole model, joined of what the ranks have, so that a wrong part is heard in them, too.
"""

from __future__ import annotations

import threading
import time
from contextlib import closing

from rollout_core.errors import WorkerError
from rollout_core.testing.fake_engine import FakeEngine, FakeWorker
from rollout_core.transfer import receive
from rollout_core.workers.carriers import receiver_of
from rollout_core.workers.digests import weight_digest
from rollout_core.workers.link.hosts import Spec
from rollout_core.workers.shards import WHOLE, Shard, joined
from rollout_core.workers.worker import Worker

EMBEDDING, PROJ, BIAS, NORM = "model.embed_tokens.weight", "model.proj.weight", "model.proj.bias", "model.norm.weight"
SPLIT = {EMBEDDING: 0, "lm_head.weight": 0, PROJ: 1, BIAS: 0}


def shard_of(name, shape, rank, ranks):
    """Rows of the embeddings, padded to what ranks divide; columns of the projection; the norm and what is computed are whole."""
    if name not in SPLIT:
        return WHOLE
    dim = SPLIT[name]
    size = -(-shape[dim] // ranks)
    return Shard(dim, ((min(rank * size, shape[dim]), min((rank + 1) * size, shape[dim])),))


class Rank:
    """The target of an update in one rank."""

    def __init__(self, number, ranks, weights):
        self.number, self.version, self.unusable, self.fault = number, 0, None, ""
        self.shards = {name: shard_of(name, tuple(whole.shape), number, ranks) for name, whole in weights.items()}
        self.parts = {name: self.shards[name].of(whole.detach()).clone() for name, whole in weights.items()}

    def begin(self, plan, version):
        if self.fault == "refuses":
            raise WorkerError("this rank has no room")

    def load(self, pairs):
        self.unusable = "an update to them was not completed"
        if self.fault == "fails":
            raise WorkerError("this rank cannot load")
        if self.fault == "hangs":
            time.sleep(30)
        for name, whole in pairs:
            self.parts[name].copy_(self.shards[name].of(whole))

    def prepare(self):
        pass

    def commit(self, version):
        self.version, self.unusable = version, None
        kind, _, name = self.fault.partition(" ")
        if kind == "changes":
            self.parts[name].view(-1)[-1] += 1
        if kind == "miscounts":
            self.version += 1

    def abort(self, version):
        if self.version == version:
            self.version, self.unusable = version - 1, "an update to them was interrupted"


class RankedEngine(FakeEngine):
    """``fault`` (``call_fault``): ``RANK KIND``, until the next."""

    is_read_in_update = False

    def __init__(self, model, ranks):
        super().__init__(model)
        self.ranks = [Rank(number, ranks, self.weights.tensors) for number in range(ranks)]
        self._version = self._before = 0
        self.hides = ""  # a tensor of which the last rank says nothing

    @property
    def version(self):
        return self._version

    def call_fault(self, argument):
        number, _, fault = argument.decode().partition(" ")
        if fault.startswith("hides "):
            self.hides = fault.removeprefix("hides ")
        else:
            self.ranks[int(number)].fault = fault
        return b""

    def call_versions(self, argument):
        return " ".join(str(rank.version) for rank in self.ranks).encode()

    def update(self, update):
        errors = {}

        def take(rank):
            try:
                with closing(receiver_of(update, "cpu", rank.number)) as carrier:
                    if rank.fault == "is gone":
                        return
                    receive(carrier, rank, timeout=update.timeout)
            except Exception as error:
                errors[rank.number] = error

        for rank in self.ranks:
            rank.version = update.version - 1
        threads = [threading.Thread(target=take, args=(rank,)) for rank in self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[min(errors)]
        for rank in self.ranks:
            if rank.version != update.version:
                raise WorkerError(f"rank {rank.number} has version {rank.version}")
        self._before, self._version = self._version, update.version
        self.loads += 1
        return 0.0

    def abandon(self, version):
        if self._version == version:
            self._version = self._before
        for rank in self.ranks:
            rank.abort(version)

    def check_usable(self):
        for rank in self.ranks:
            if rank.unusable is not None:
                raise WorkerError(f"the worker's weights are unusable: {rank.unusable}; call sync_weights again")

    def used(self):
        return {name: self.read_tensor(name) for name in self.weights.tensors}

    def shards(self):
        if len(self.ranks) == 1:
            return []
        found = [dict(rank.shards) for rank in self.ranks]
        found[-1].pop(self.hides, None)
        return found

    def rank_digests(self):
        return [{name: weight_digest(part) for name, part in rank.parts.items()} for rank in self.ranks]

    def digests(self, names):
        return {name: weight_digest(self.read_tensor(name)) for name in self.weights.tensors}

    def read_tensor(self, name):
        whole = self.weights.tensors[name]
        return joined(name, whole.shape, {rank.number: (rank.shards[name], rank.parts[name]) for rank in self.ranks})


class RankedWorker(FakeWorker):
    """The worker."""

    def __init__(self, folder, *, ranks, process=False, timeout=10.0):
        spec = Spec("support.ranked:RankedEngine", {"model": str(folder), "ranks": ranks})
        Worker.__init__(self, spec, process=process, timeout=timeout)
