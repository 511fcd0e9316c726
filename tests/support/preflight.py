"""Preflight on workers that a test has spoilt. Their own readback is off, so that preflight has to find what is wrong."""

from __future__ import annotations

from rollout_core.preflight.checks import Context
from rollout_core.preflight.runner import Outcome, run_checks
from rollout_core.workers import HFWorker

CAPACITY = 1 << 20


def run(folder, make_worker, **options) -> dict[str, Outcome]:
    """Every check's outcome, by its id."""
    report = run_checks(Context(folder, make_worker, CAPACITY, **options), worker="faulty", model="small")
    assert report.ok == all(outcome.result == "pass" for outcome in report.checks)
    return {outcome.id: outcome for outcome in report.checks}


def results(outcomes, result) -> set[str]:
    return {id_ for id_, outcome in outcomes.items() if outcome.result == result}


class Local(HFWorker):
    """An HFWorker in a thread of this process, where a test can reach its engine."""

    readback = False

    def __init__(self, path, **options):
        super().__init__(str(path), process=False, **options)
        self.options = {} if self.readback else {"readback": False}
        self.spoil_start()

    def sync_weights(self, source, **options):
        report = super().sync_weights(source, **{**options, **self.options})
        self.spoil()
        return report

    def spoil_start(self):
        """Once, before anything is asked of it."""

    def spoil(self):
        """After each update."""

    def tensor(self, name):
        return self.engine.weights.tensors[name]

    @property
    def engine(self):
        return self._link.host.engine
