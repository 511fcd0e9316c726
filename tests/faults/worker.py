"""One process of the harness: an end of a carrier, and a trap at one step of it. Started by ``harness.Worker``, never by hand.

Requests and replies are JSON, one packet each, over a socket pair whose descriptor is the only argument; sockets for carriers come
with them. The process ends when the harness does.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.errors import TransferError
from rollout_core.transfer import DirectWeights, StagedWeights, Step, receive, send
from rollout_core.transfer.carriers.memory import MemoryReceiver, MemorySender

CONNECT = 20.0  # seconds to make a carrier: part of the stage, not of the play
SMALL_SHM = 64 << 20  # a larger /dev/shm is never filled


class Injected(Exception):
    """What ``raise`` raises."""


class Small(torch.nn.Module):
    """Three buckets of 512 bytes: two tied weights, a buffer, three dtypes."""

    capacity = 512

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(9, 12)
        self.middle = torch.nn.Linear(12, 12, dtype=torch.bfloat16)
        self.head = torch.nn.Linear(12, 9, bias=False)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.Linear(10, 10)
        self.register_buffer("steps", torch.zeros(17, dtype=torch.int8))


class Large(torch.nn.Module):
    """Three buckets of 16 MiB: more than a process with no memory left has lying about."""

    capacity = 16 << 20

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(11 << 20))


def filled(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The same bytes for the same seed, other ones for another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            data = tensor.view(torch.uint8) if tensor.dim() else tensor
            data.copy_(torch.randint(0, 120, data.shape, generator=generator, dtype=torch.uint8))
    return model


def fingerprint(model: torch.nn.Module) -> str:
    """Of every byte of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class Trap:
    """The ``observe`` of an end: notes its steps, and does what the case says at one of them."""

    def __init__(self, faults: list[dict[str, Any]], end: End) -> None:
        self.steps: list[str] = []
        self._seen: Counter[str] = Counter()
        self._faults = faults
        self._end = end

    def __call__(self, step: Step) -> None:
        self.at(str(step))

    def at(self, step: str) -> None:
        nth, self._seen[step] = self._seen[step], self._seen[step] + 1
        self.steps.append(f"{step} #{nth}" if nth else step)
        for fault in self._faults:
            if fault["step"] == self.steps[-1]:
                self._end.tell({"event": "fault", "at": time.monotonic(), "fault": fault["fault"]})
                self.spring(fault)

    def spring(self, fault: dict[str, Any]) -> None:
        kind, carrier = fault["fault"], self._end.carrier
        channels = carrier._links._channels
        match kind:
            case "raise":
                raise Injected(f"injected at {fault['step']}")
            case "interrupt":
                signal.raise_signal(signal.SIGINT)
            case "exit":
                os._exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop" | "stop, go on":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "shut":
                channels[-1]._socket.shutdown(socket.SHUT_RDWR)
            case "close":
                os.close(channels[-1].fileno())
            case "delay" | "overdue":
                time.sleep(fault["seconds"])
            case "fill":
                fill_shm()
            case "no memory":
                limit(resource.RLIMIT_AS, address_space())
            case "no shared memory":
                limit(resource.RLIMIT_FSIZE, 4096)
            case "corrupt":
                self._end.corrupt("push" if self._end.is_sender else "pull" if fault["step"].startswith("pull") else "view")
            case _:
                raise AssertionError(kind)


class End:
    """An end of one carrier, for the length of a case."""

    def __init__(self, request: dict[str, Any], sockets: list[int], tell: Any) -> None:
        self.tell = tell
        self.role, self.place, self.receivers = request["role"], request["place"], request["receivers"]
        self.fds, self.threads = descriptors(), threads()
        for fd in sockets:
            self.fds.pop(str(fd), None)  # the harness's, for this carrier; closed below
        self.group = False
        model = filled(Large() if request["large"] else Small(), 1)
        self.model = model
        self.target = (DirectWeights if request["target"] == "direct" else StagedWeights)(model)
        self.carrier = self.connect(request, sockets)

    @property
    def is_sender(self) -> bool:
        return self.role == "sender"

    def connect(self, request: dict[str, Any], sockets: list[int]) -> Any:
        match request["carrier"]:
            case "memory":
                ends = [socket.socket(fileno=fd) for fd in sockets]
                try:
                    return MemorySender(ends) if self.is_sender else MemoryReceiver(ends[0], timeout=CONNECT)
                finally:
                    for one in ends:
                        one.close()
            case "listen" if self.is_sender:
                return MemorySender.listen(request["name"], self.receivers, timeout=CONNECT)
            case "listen":
                return MemoryReceiver.connect(request["name"], timeout=CONNECT)
            case "collective":
                return self.join(request["name"])
        raise AssertionError(request["carrier"])

    def join(self, path: str) -> Any:
        from datetime import timedelta

        import torch.distributed as dist

        from rollout_core.transfer.carriers.collective import CollectiveReceiver, CollectiveSender

        store = dist.FileStore(path, self.receivers + 1)
        rank = 0 if self.is_sender else self.place + 1
        dist.init_process_group("gloo", store=store, rank=rank, world_size=self.receivers + 1, timeout=timedelta(seconds=CONNECT))
        self.group = True
        return CollectiveSender(host="127.0.0.1", timeout=CONNECT) if self.is_sender else CollectiveReceiver(timeout=CONNECT)

    def update(self, request: dict[str, Any]) -> dict[str, Any]:
        """One update, and everything about how it ended."""
        trap = Trap(request["faults"], self)
        options = {"timeout": request["timeout"], "deadline": request["deadline"], "observe": trap}
        wanted = filled(Large() if isinstance(self.model, Large) else Small(), request["seed"])
        before = fingerprint(self.model)
        error: BaseException | None = None
        report: Any = None
        started = time.monotonic()
        try:
            trap.at("begin")
            if self.is_sender:
                plan = plan_buckets(specs_of(wanted), wanted.capacity)
                report = send(plan, wanted, self.carrier, **options)
            else:
                report = receive(self.carrier, self.target, **options)
            ended = time.monotonic()
            trap.at("returned")
        except BaseException as problem:
            error, ended = problem, time.monotonic()
        unlimit()
        notes = [note for note in getattr(error, "__notes__", ()) if " process:\n" not in note]
        after = fingerprint(self.model)
        result = {
            "ok": report is not None,
            "error": type(error).__name__ if error is not None else None,
            "message": "; ".join([str(error), *notes]) if error is not None else "",
            "trace": "".join(traceback.format_exception(error)) if error is not None else "",
            "started": started,
            "ended": ended,
            "steps": trap.steps,
            "version": self.carrier.version if self.is_sender else self.target.version,
            "weights": {before: "old", fingerprint(wanted): "new"}.get(after, "mixed"),
            "unusable": self.target.unusable,
        }
        del error, report
        return result

    def close(self) -> dict[str, Any]:
        """Let go of the carrier; what is left of it after."""
        problem = ""
        try:
            self.carrier.close()
            self.carrier.close()
        except BaseException as error:
            problem = "".join(traceback.format_exception(error))
        if self.group:
            import torch.distributed as dist

            dist.destroy_process_group()
        for name in ("carrier", "target", "model"):
            delattr(self, name)
        until = time.monotonic() + 2.0
        while True:  # a thread of a group takes a moment to end
            kept = mapped()
            gc.collect()
            left = {fd: to for fd, to in descriptors().items() if self.fds.get(fd) != to}
            lost = {fd: to for fd, to in self.fds.items() if fd not in descriptors()}
            more = threads() - self.threads
            if not (left or lost or more > 0 or mapped()) or time.monotonic() > until:
                break
            time.sleep(0.01)
        return {"problem": problem, "left": left, "lost": lost, "threads": more, "mapped": mapped(), "in cycles": kept}

    def corrupt(self, method: str) -> None:
        """Flip a byte of the next bucket that goes through this method."""
        carrier, original = self.carrier, getattr(self.carrier, method)

        def once(slot: int, nbytes: int) -> Any:
            delattr(carrier, method)
            if self.is_sender:
                slots = carrier._slots if hasattr(carrier, "_slots") else None
                buffer = slots[slot] if slots else carrier._arena.view(slot * (len(carrier._arena._map) // 2), nbytes)
                buffer[nbytes // 2] ^= 0x40
                return original(slot, nbytes)
            carrier_view = original if method == "view" else carrier.view
            carrier_view(slot, nbytes)[nbytes // 2] ^= 0x40
            return original(slot, nbytes)

        setattr(carrier, method, once)


class Rounds:
    """The same again and again, on one carrier or each time on one of its own."""

    def __init__(self, request: dict[str, Any], sockets: list[int]) -> None:
        self._is_sender, self._name, self._count = request["role"] == "sender", request["name"], 0
        self._models = [filled(Small(), seed) for seed in (1, 2)]
        self._plan = plan_buckets(specs_of(self._models[0]), Small.capacity)
        self._target = StagedWeights(filled(Small(), 0))
        ends = [socket.socket(fileno=fd) for fd in sockets]
        self._carrier: Any = None
        if request["what"] != "carriers":
            self._carrier = MemorySender(ends) if self._is_sender else MemoryReceiver(ends[0], timeout=CONNECT)
        for one in ends:
            one.close()

    def run(self, what: str, count: int) -> dict[str, Any]:
        """``count`` rounds, and what this process has open and in memory after."""
        for _ in range(count):
            self._count += 1
            match what:
                case "updates":
                    self._update(self._carrier)
                case "aborted updates":
                    self._aborted(self._carrier)
                case "carriers":
                    self._on_new_carrier()
        gc.collect()
        return {"descriptors": len(descriptors()), "threads": threads(), "rss": rss()}

    def _update(self, carrier: Any, observe: Any = None) -> None:
        if self._is_sender:
            send(self._plan, self._models[self._count % 2], carrier, timeout=CONNECT, observe=observe)
        else:
            receive(carrier, self._target, timeout=CONNECT, observe=observe)

    def _aborted(self, carrier: Any) -> None:
        """Raise at one end or the other, at another step each time."""
        steps = ("examine", "pull 1", "load 1", "prepare")
        if self._is_sender:
            steps = ("hear Welcome", "pack 1", "push 1", "hear Free 0")
        mine = self._count % 2 == self._is_sender

        def observe(step: Step) -> None:
            if mine and str(step) == steps[self._count // 2 % len(steps)]:
                raise Injected(str(step))

        try:
            self._update(carrier, observe)
        except (Injected, TransferError):
            return
        raise AssertionError("an update that was to be aborted was not")

    def _on_new_carrier(self) -> None:
        name = f"{self._name}-{self._count}"
        if self._is_sender:
            carrier: Any = MemorySender.listen(name, timeout=CONNECT)
        else:
            carrier, self._target.version = MemoryReceiver.connect(name, timeout=CONNECT), 0
        with carrier:
            self._update(carrier)


def descriptors() -> dict[str, str]:
    """Open descriptors of this process, and what each is."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the one that the listing took
            continue
    return found


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def mapped() -> int:
    """How many mappings of a carrier's memory there are."""
    return Path("/proc/self/maps").read_text().count("memfd:rollout-core")


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def limit(kind: int, soft: int) -> None:
    resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))


def unlimit() -> None:
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE):
        limit(kind, resource.getrlimit(kind)[1])


def fill_shm() -> None:
    """Write to /dev/shm until there is no room; the harness takes it away again."""
    room = os.statvfs("/dev/shm")
    assert room.f_blocks * room.f_frsize <= SMALL_SHM, "this /dev/shm is the machine's own, and is not filled"
    with open(f"/dev/shm/filling-{os.getpid()}", "wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(b"\1" * size)
            except OSError:
                continue


def rss() -> int:
    """Resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, it would be ignored
    torch.set_num_threads(1)
    control = socket.socket(fileno=int(sys.argv[1]))

    def tell(message: dict[str, Any]) -> None:
        control.send(json.dumps(message).encode())

    filled(Small(), 1)  # torch's lazy parts
    gc.freeze()  # what is there by now is not looked at in every case again
    tell({"event": "ready"})
    end: End | None = None
    rounds: Rounds | None = None
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(control, 1 << 17, 8)
        except ConnectionError:
            data = b""
        if not data:
            return
        request = json.loads(data)
        reply: dict[str, Any] = {}
        try:
            match request["do"]:
                case "open":
                    end = End(request, fds, tell)
                case "update":
                    assert end is not None
                    reply = end.update(request)
                case "leaks open":
                    rounds = Rounds(request, fds)
                case "leaks run":
                    assert rounds is not None
                    reply = rounds.run(request["what"], request["count"])
                case "close":
                    assert end is not None
                    reply = end.close()
                    end = None
        except BaseException as error:
            reply = {"failed": "".join(traceback.format_exception(error))}
        tell({"event": "done", "do": request["do"], **reply})


if __name__ == "__main__":
    main()
