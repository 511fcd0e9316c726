"""verl's door against verl's registry and base class, unmodified, between processes, in the order of verl's manager."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from doors import verl_process
from rollout_core.errors import TransferError
from rollout_core.testing.oracles import bytes_of
from rollout_core.testing.peers.verl import PACKAGE
from support.tensors import patterned

BUCKET = 1000  # bytes
TIMEOUT = 60.0  # most of which a rollout may need to import verl on a busy machine
STEP = 3


def weights():
    """Made one by one, as an actor gathers them; what is larger than a bucket, tied, of size zero and strided included."""
    tied = patterned(torch.float32, 6, 7)
    yield "embed", tied
    yield "half", patterned(torch.bfloat16, 3)
    yield "wide", patterned(torch.float32, 30, 40)
    yield "empty", torch.empty(0, 4)
    yield "scalar", patterned(torch.int64)
    yield "strided", patterned(torch.float32, 8, 8)[:, ::2]
    for at in range(40):
        yield f"layers.{at}", patterned(torch.bfloat16, 5, 9, seed=at + 2)
    yield "lm_head", tied


def wanted():
    return [[name, str(tensor.dtype), list(tensor.shape), bytes_of(tensor).hex()] for name, tensor in weights()]


@pytest.fixture(scope="session")
def registry():
    return verl_process.registry()


@pytest.fixture
def actors(registry):
    """Two actors: the master, and one that only walks the generator."""
    made = [registry.new("rollout_core", is_master=master, bucket_size=BUCKET, timeout=TIMEOUT) for master in (True, False)]
    yield made
    for actor in made:
        actor.finalize()


class Rollout:
    """A rollout worker's process."""

    def __init__(self, topology, global_steps=STEP, **told):
        told = {"bucket_size": BUCKET, "timeout": TIMEOUT, "topology": topology, "global_steps": global_steps, **told}
        program = Path(verl_process.__file__)
        self.process = subprocess.Popen([sys.executable, program, json.dumps(told)], stdout=subprocess.PIPE, text=True)

    def answer(self):
        out, _ = self.process.communicate(timeout=2 * TIMEOUT)
        return json.loads(out)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.process.kill()
        self.process.communicate()


def topology(engine_class, actors, rollouts):
    """``CheckpointEngineManager.build_process_group`` up to its second step, with rollouts that answer nothing to ``prepare``."""
    metadata = [actor.prepare() for actor in actors] + [{}] * rollouts
    ours, theirs = engine_class.build_topology(len(actors), rollouts, metadata)
    assert {len(values) for values in ours.values()} == {len(actors)}
    assert {len(values) for values in theirs.values()} == {rollouts}
    split = lambda found, place: {key: values[place] for key, values in found.items()}  # noqa: E731
    return [split(ours, place) for place in range(len(actors))], [split(theirs, place) for place in range(rollouts)]


def send_all(actors, generator=weights, global_steps=STEP):
    return [asyncio.run(actor.send_weights(generator(), global_steps=global_steps)) for actor in actors]


@pytest.fixture
def update(registry, actors):
    """verl's order for one update, up to ``init_process_group`` everywhere; gives the rollouts."""
    with ExitStack() as stack:

        def begin(rollouts=1, **told):
            engine_class = registry.get("rollout_core")
            ours, theirs = topology(engine_class, actors, rollouts)
            running = [stack.enter_context(Rollout(one, **told)) for one in theirs]
            for actor, one in zip(actors, ours, strict=True):
                actor.init_process_group(**one)
            return running

        yield begin


def test_the_registry_s_class_is_a_whole_checkpoint_engine(registry):
    base = PACKAGE.load("verl.checkpoint_engine.base")
    engine_class = registry.get("rollout_core")
    assert issubclass(engine_class, base.CheckpointEngine)
    assert not inspect.isabstract(engine_class)
    assert engine_class.wire_format == "named_tensors"
    for name in base.CheckpointEngine.__abstractmethods__ - {"init_process_group"}:
        theirs, ours = inspect.signature(getattr(base.CheckpointEngine, name)), inspect.signature(getattr(engine_class, name))
        assert list(ours.parameters) == list(theirs.parameters), name


def test_verl_s_config_names_the_module_to_import():
    """What ``custom_backend_module`` is given; verl imports it by name in every worker."""
    with PACKAGE:
        module = importlib.import_module("rollout_core.transfer.doors.verl")
    assert module.__name__ == "rollout_core.transfer.doors.verl"


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("rollouts", [1, 2])
def test_every_rollout_gets_every_tensor(update, actors, rollouts, staged):
    running = update(rollouts, more={"staged": staged})
    sent, idle = send_all(actors)
    for rollout in running:
        answer = rollout.answer()
        assert answer.get("message") is None
        assert answer["metadata"] == {}
        assert answer["got"] == wanted()
    assert idle == {}
    assert sent["weight_transfer/bytes"] >= sum(tensor.nbytes for _, tensor in weights())
    assert 0 < sent["weight_transfer/seconds"] < TIMEOUT


def test_steps_may_be_missing_start_at_zero_and_repeat(update, actors):
    for global_steps in (None, 0, 0, 5):
        (rollout,) = update(global_steps=global_steps)
        send_all(actors, global_steps=global_steps)
        assert rollout.answer()["got"] == wanted()
        for actor in actors:
            actor.finalize()


def test_nothing_at_all_is_an_update_too(update, actors):
    (rollout,) = update()
    send_all(actors, lambda: iter(()))
    assert rollout.answer()["got"] == []


def test_an_idle_actor_walks_its_generator(actors):
    walked = []
    actors[1].init_process_group(receivers=0, address="nobody")
    asyncio.run(actors[1].send_weights(walked.append(name) or (name, tensor) for name, tensor in weights()))
    assert walked == [name for name, _ in weights()]


def test_another_step_is_refused_at_both_ends(update, actors):
    (rollout,) = update(global_steps=STEP + 1)
    words = f"asked for at step {STEP + 1}, and the sender sends step {STEP}"
    with pytest.raises(TransferError, match=words):
        send_all(actors[:1])
    answer = rollout.answer()
    assert answer["error"] == "TransferError"
    assert words in answer["message"]


def failing():
    for name, tensor in weights():
        if name == "layers.30":
            raise ZeroDivisionError("the gather failed")
        yield name, tensor


@pytest.mark.parametrize("staged", [False, True])
def test_an_error_of_the_actor_reaches_the_rollout_and_is_its_own_here(update, actors, staged):
    (rollout,) = update(more={"staged": staged})
    with pytest.raises(ZeroDivisionError, match="the gather failed"):
        send_all(actors[:1], failing)
    answer = rollout.answer()
    assert "the gather failed" in answer["message"]
    assert (len(answer["got"]) == 0) if staged else (0 < len(answer["got"]) < len(wanted()))
    assert answer["seconds"] < TIMEOUT + 20  # of which most is the start of the process


def test_a_rollout_that_stops_in_the_middle_is_no_success(update, actors):
    (rollout,) = update(taking={"at_most": 10})
    with pytest.raises(TransferError, match="whoever takes the weights stopped before their end"):
        send_all(actors[:1])
    assert len(rollout.answer()["got"]) == 10


def test_a_rollout_that_stops_while_it_waits_is_no_success(update, actors):
    (rollout,) = update(taking={"patience": 1.0})

    def slow():
        for name, tensor in weights():
            if name == "layers.30":
                time.sleep(2.0)
            yield name, tensor

    with pytest.raises(TransferError, match="whoever takes the weights stopped before their end"):
        send_all(actors[:1], slow)
    answer = rollout.answer()
    assert answer["error"] == "TimeoutError"
    assert 0 < len(answer["got"]) < len(wanted())


def test_a_rollout_that_is_too_slow_over_a_bucket_is_no_success(update, actors):
    (rollout,) = update(timeout=0.5, taking={"hold": 0.4})
    with pytest.raises(TransferError, match="took more than 0.5 s over one bucket"):
        send_all(actors[:1])
    answer = rollout.answer()
    assert answer["error"] == "TransferError"
    assert "took more than 0.5 s over one bucket" in answer["message"]


def test_a_rollout_that_is_killed(update, actors):
    rollout, other = update(2, taking={"hold": 0.02})

    def kill():
        time.sleep(0.3)
        rollout.process.send_signal(signal.SIGKILL)

    killing = threading.Thread(target=kill)

    def starting():
        for number, pair in enumerate(weights()):
            if number == 1:
                killing.start()
            yield pair

    start = time.monotonic()
    with pytest.raises(TransferError, match="receiver [01]"):
        send_all(actors[:1], starting)
    assert time.monotonic() - start < TIMEOUT / 2
    killing.join()
    answer = other.answer()
    assert answer["error"] == "TransferError"
    assert "the sender gave the update up" in answer["message"]


def test_finalize_leaves_nothing(update, actors):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    (rollout,) = update()
    assert descriptors() > before
    send_all(actors)
    assert rollout.answer()["got"] == wanted()
    rollout.process.stdout.close()
    for actor in actors:
        actor.finalize()
        actor.finalize()
    assert descriptors() == before


def test_without_a_master_there_is_no_address(registry):
    with pytest.raises(TransferError, match="actor rank 0 was not made with is_master"):
        registry.get("rollout_core").build_topology(1, 1, [{}, {}])


def test_carriers_by_name(registry):
    with pytest.raises(TransferError, match="carrier is 'pigeon'; it is 'memory' or 'cuda_ipc'"):
        registry.new("rollout_core", bucket_size=BUCKET, carrier="pigeon")
    # Wired, as far as a machine without a GPU can tell; tests/gpu tests the carrier itself.
    engine = registry.new("rollout_core", bucket_size=BUCKET, carrier="cuda_ipc")
    assert (engine._sender.__name__, engine._receiver.__name__) == ("CudaIpcSender", "CudaIpcReceiver")


def test_receiving_before_the_processes_have_met(actors):
    with pytest.raises(TransferError, match="before init_process_group"):
        asyncio.run(verl_process.take(actors[0], STEP, []))
