"""A worker under test: a callable ``make_worker(folder)`` that starts a rollout worker on the model in a folder.

It may be a function whose parameter is named ``folder``, or a class with ``sync_weights``, such as
``rollout_core.workers.HFWorker``. What it gives does what ``rollout_core.workers.worker.Worker`` says of the methods that it has,
and it has

- ``sync_weights(source, capacity=, inject=) -> report`` with a ``version``; ``generate(prompts, params) -> [Completion, ...]``;
  ``version``; ``close()``.

With more methods more is checked (``WORKER_CAPABILITIES``). Its attributes ``takes_computed`` (True unless given), ``reads_values``
and ``steps_exactly`` (False unless given), ``digest_algorithm`` ("xxh3-128" unless given) and ``capabilities`` (all of them unless
given) are those of ``Worker``. A function or class may have ``models``: where the functions of ``rollout_core.preflight.models``
are found for models that are not transformers'.
"""

from __future__ import annotations

import copy
import inspect
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.errors import TransferError
from rollout_core.preflight import models as transformers_models
from rollout_core.preflight.checks import CheckFailed, Context, worker_starts
from rollout_core.testing.carriers import End
from rollout_core.testing.packers import Phase, Raised, name_of
from rollout_core.testing.registry import Violation
from rollout_core.transfer.targets import named_weights, persistent_weights
from rollout_core.workers.contract import SamplingParams

#: What a worker may have beyond what it must. All of it is found by itself.
WORKER_CAPABILITIES: Final[dict[str, str]] = {
    "weights": "methods tensor_digests() and read_tensor(name): what the worker has, read back",
    "requests": "methods submit(prompts, params, request_ids=), abort(request_ids), pause(), resume() and step(steps)",
    "memory": "methods release_memory() and resume_memory(), and 'memory' in its capabilities, if it has any",
    "process": "found: the worker starts processes, which can be killed",
}
_NEEDED: Final = ("sync_weights", "generate", "close")
_METHODS: Final[dict[str, tuple[str, ...]]] = {
    "weights": ("tensor_digests", "read_tensor"),
    "requests": ("submit", "abort", "pause", "resume", "step"),
    "memory": ("release_memory", "resume_memory"),
}
#: The shape of the small model's attention: one that the kernels of every engine take.
_SHAPE: Final = {"heads": 4, "head_dim": 32}
_BUCKETS: Final = 3  # of an update, about
_CLOSING: Final = 5.0  # seconds for a worker that is of no interest any more
#: A whole check of preflight may take so many times as long as one call.
_CALLS: Final = 20
#: How different weights 1 are from weights 0.
_PERTURBATION: Final = 0.05


class WorkerUnderTest:
    """A worker as the checks see it, started once and again where a check has left it broken.

    Calls of it are made in one thread, and each has ``timeout`` seconds; ``model``: a folder, or None for a small random model.
    """

    def __init__(self, make: Any, model: str | Path | None = None, *, timeout: float = 30.0, phase: Phase | None = None) -> None:
        if not callable(make):
            raise TypeError(f"{name_of(make)} cannot be called; a worker under test is make_worker(folder), which starts a worker")
        self.timeout = timeout
        self.models: Any = getattr(make, "models", transformers_models)
        self.phase = phase or Phase()
        self._make = make
        self._scratch = tempfile.TemporaryDirectory(prefix="rollout-core-")
        self._folder = Path(model) if model is not None else Path(self._scratch.name) / "model"
        if self.models is transformers_models:
            from transformers.utils import logging

            logging.disable_progress_bar()
        if model is None:
            self.models.make_small_model(self._folder, **_SHAPE)
        self._context: Context | None = None
        self._end: End[Any] | None = None
        self._children: set[int] = set()  # processes that there were before the worker
        self.programs = 0  # that were played
        self._hangs = False  # in a call that has not returned
        self._holds: int | None = None  # the number of the weights that it has
        #: Of the tensors that the worker started with, or why they could not be read.
        self.first_digests: dict[str, str] | Exception = {}
        self._known: dict[tuple[int, tuple[int, ...]], list[int]] = {}

    @cached_property
    def capabilities(self) -> frozenset[str]:
        """What the running worker has."""
        worker = self.it
        found = {name for name, methods in _METHODS.items() if all(callable(getattr(worker, method, None)) for method in methods)}
        if "memory" not in worker.capabilities:
            found.discard("memory")
        return frozenset(found | ({"process"} if self.processes() else set()))

    # The worker.

    @property
    def it(self) -> Any:
        """The running worker."""
        return self._running().it

    @property
    def steps_exactly(self) -> bool:
        return bool(self.it.steps_exactly)

    def call(self, words: str, call: Callable[[], Any], within: float | None = None) -> Any:
        """What a call of the worker gives. ``Raised`` if it raises, ``Violation`` if it does not return in time."""
        end = self._running()
        try:
            return end.do(words, call, self.timeout if within is None else within)
        except TransferError as error:
            raise Raised(f"the worker: {words}", error) from error
        except Violation as violation:
            self._hangs = not isinstance(violation, Raised)
            raise

    def given(self, check: Callable[[Context], str]) -> str:
        """Run a check of preflight on the worker. ``Violation`` if it fails."""
        context = self.context

        def run() -> Any:
            try:
                return check(context)
            except CheckFailed as failure:
                return failure

        self._holds = None
        found = self.call(check.__name__.replace("_", " "), run, _CALLS * self.timeout)
        if isinstance(found, CheckFailed):
            raise Violation(str(found))
        return str(found)

    @property
    def context(self) -> Context:
        """Preflight's view of the running worker."""
        self._running()
        assert self._context is not None
        return self._context

    def recover(self) -> None:
        """After a program that went wrong: keep the worker if it can be brought to serve, and stop it if not. Engines start slowly,
        and the smallest program is found by many that go wrong."""
        if self._end is None:
            return
        params = SamplingParams(response_length=2, ignore_eos=True)
        is_whole = False
        if not self._hangs:
            with suppress(Violation):
                self.call("abort", self.it.abort)
                self.sync(0)
                self.call("resume", self.it.resume)
                (done,) = self.call("generate", lambda: self.it.generate(self.prompts[:1], params))
                served = list(done.token_ids) == self.greedy(0, self.prompts[0], 2)
                is_whole = served and not self.call("abort", self.it.abort)
        if not is_whole:
            self.stop()

    def stop(self) -> None:
        """Close the worker, wherever it hangs; the next check starts another."""
        end, self._end, self._context, self._holds = self._end, None, None, None
        self._hangs = False
        if end is not None:
            end.abandon()

    def close(self) -> None:
        self.stop()
        self._scratch.cleanup()

    def processes(self) -> list[int]:
        """The ids of the processes that the worker has started, and of those that these have."""
        self._running()
        return [pid for pid in _descendants() if pid not in self._children]

    def kill(self) -> None:
        """End them, as a crash would."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _running(self) -> End[Any]:
        if self._end is None:
            self._start()
        assert self._end is not None
        return self._end

    def _start(self) -> None:
        trainer = self.models.load_trainer(self._folder)
        specs = specs_of(trainer)
        capacity = max(64, plan_buckets(specs, 1 << 40).nbytes // _BUCKETS)
        context = Context(self._folder, lambda folder: _Given(self._make(folder)), capacity, models=self.models)  # type: ignore[arg-type, return-value]
        context.trainer = trainer
        self._children = set(_descendants())
        starter: End[Any] = End(None, "the worker", self.phase)
        try:
            starter.do("start", lambda: worker_starts(context), _CALLS * self.timeout)
        except TransferError as error:
            raise Raised("the worker: start", error) from error
        starter.it = context.worker
        self._context, self._end = context, starter
        self.first_digests = self._read_digests()

    def _read_digests(self) -> dict[str, str] | Exception:
        """Of all tensors; or why there are none."""
        if not callable(getattr(self.it, "tensor_digests", None)):
            return {}
        try:
            found: dict[str, str] = self.call("tensor_digests", self.it.tensor_digests)
            return found
        except Violation as violation:
            return violation

    # Weights and tokens.

    @property
    def prompts(self) -> list[list[int]]:
        return self.context.prompts

    @cached_property
    def trainers(self) -> list[Any]:
        """Trainers with the weights that programs send, by number: those of the folder, and others."""
        first = self.models.load_trainer(self._folder)
        other = copy.deepcopy(first)
        self.models.perturb(other, _PERTURBATION, seed=7, computed=bool(self.it.takes_computed))
        return [first, other]

    @cached_property
    def eos(self) -> frozenset[int]:
        return frozenset(self.models.eos_token_ids(self.trainers[0]))

    def hold(self, weights: int) -> None:
        """Have the worker hold the weights of this number."""
        if self._holds != weights:
            self.sync(weights)

    def sync(self, weights: int) -> Any:
        """Send the weights of this number; the worker's report."""
        self._holds = None
        trainer, capacity = self.trainers[weights], self.context.capacity
        report = self.call("sync_weights", lambda: self.it.sync_weights(trainer, capacity=capacity))
        self._holds = weights
        return report

    def weights(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of the weights of this number, as an update brings them."""
        trainer = self.trainers[number]
        return named_weights(trainer) if self.it.takes_computed else persistent_weights(trainer)

    def loses(self) -> None:
        """Which weights the worker has is not known any more."""
        self._holds = None

    def greedy(self, weights: int, ids: Sequence[int], count: int) -> list[int]:
        """The next ``count`` tokens by the weights of this number, EOS being a token as any other."""
        place = (weights, tuple(ids))
        known = self._known.get(place, [])
        if len(known) < count:
            more = self.models.greedy_reference(self.trainers[weights], [*ids, *known], max(count, 8) - len(known), set())[0]
            known = self._known[place] = [*known, *more]
        return known[:count]


class _Given:
    """A worker with what it leaves out of ``Worker``'s attributes."""

    reads_values = False
    digest_algorithm = "xxh3-128"
    takes_computed = True
    steps_exactly = False
    capabilities = frozenset({"seeds", "memory"})
    timeout = 300.0

    def __init__(self, it: Any) -> None:
        for method in _NEEDED:
            if not callable(getattr(it, method, None)):
                raise TypeError(
                    f"{name_of(it)} has no method {method}; a worker under test has sync_weights(source, capacity=, inject=), "
                    "generate(prompts, params), version and close()"
                )
        vars(self)["_it"] = it
        for name in ("reads_values", "digest_algorithm", "takes_computed", "steps_exactly", "capabilities", "timeout"):
            if hasattr(it, name):
                vars(self)[name] = getattr(it, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_it"], name)


def looks_like_a_worker(target: Any) -> bool:
    """Whether a target is meant for the checks of workers: it is a class of workers, or it takes ``folder``."""
    if inspect.isclass(target) and hasattr(target, "sync_weights"):
        return True
    try:
        return callable(target) and "folder" in inspect.signature(target).parameters
    except (TypeError, ValueError):
        return False


def _descendants() -> list[int]:
    """The processes that this one has started, and those that they have."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended while we looked
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
            if state != "Z":
                parents[int(stat.parent.name)] = int(parent)
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]
