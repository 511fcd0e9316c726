"""What mutants of workers share: a worker that does not find its own faults, and completions that are tampered with."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import msgspec

from rollout_core.testing.fake_engine import FakeWorker
from rollout_core.workers.contract import Completion
from rollout_core.workers.worker import SyncReport


class Trusting(FakeWorker):
    """Does not read back what it has sent: what is wrong is for the kit to find."""

    def sync_weights(self, source: Any, **options: Any) -> SyncReport:
        return super().sync_weights(source, **{**options, "readback": False})


class Tampers(Trusting):
    """A worker whose completions, of ``submit`` and ``generate``, end otherwise than the engine says."""

    def tamper(self, done: Completion) -> Completion:
        raise NotImplementedError

    def submit(self, *arguments: Any, **options: Any) -> list[Future[Completion]]:
        return [self._other(future) for future in super().submit(*arguments, **options)]

    def generate(self, *arguments: Any, **options: Any) -> list[Completion]:
        return [self.tamper(done) for done in super().generate(*arguments, **options)]

    def _other(self, future: Future[Completion]) -> Future[Completion]:
        made: Future[Completion] = Future()
        future.add_done_callback(lambda done: made.set_result(self.tamper(done.result())))
        return made


def replaced(done: Completion, **changes: Any) -> Completion:
    """A completion with other fields; without tokens if ``token_ids`` is empty."""
    if changes.get("token_ids") == ():
        changes |= {"logprobs": (), "token_versions": ()}
    return msgspec.structs.replace(done, **changes)
