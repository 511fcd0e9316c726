"""What can go wrong where: steps, faults, and every case of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

#: Ends of a carrier are numbered: 0 is the sender, 1 the first receiver.
SENDER: Final = 0

FAULTS: Final = {
    "raise": "an exception at this step",
    "interrupt": "SIGINT, so KeyboardInterrupt",
    "exit": "os._exit",
    "kill": "SIGKILL",
    "stop": "SIGSTOP, and SIGKILL once the other ends have ended",
    "stop, go on": "SIGSTOP, and SIGCONT once the other ends have ended",
    "shut": "the connection to the other end (the last receiver) is shut down",
    "close": "the descriptor of that connection is closed behind the carrier's back",
    "delay": "nothing happens for longer than the timeout",
    "overdue": "nothing happens until the update's deadline has passed, within the timeout",
    "corrupt": "a byte of a bucket is changed in its slot",
    "fill": "/dev/shm is filled to the last byte",
    "no memory": "the process gets no further memory (RLIMIT_AS); buckets of 16 MiB",
    "no shared memory": "no file of more than 4 KiB (RLIMIT_FSIZE), shared memory included",
}
#: The end at fault does not come back.
DEADLY: Final = frozenset({"exit", "kill", "stop"})
#: The way between the ends is lost, or one took the other for lost.
LOSING: Final = DEADLY | {"stop, go on", "shut", "close", "delay"}
#: Nothing happens before the update, or after it, that these could break.
_INSIDE: Final = frozenset({"raise", "interrupt", "overdue"})
_LAID_OUT: Final = "begin"

#: Steps of an end with three buckets and two slots, in the order in which each has to come by itself.
BUCKETS: Final = 3


@dataclass(frozen=True)
class Case:
    """``before``: a fault that comes first, so that the update is being given up when ``fault`` strikes."""

    carrier: str
    targets: tuple[str, ...]  # of each receiver
    who: int
    step: str
    fault: str
    before: tuple[int, str] | None = None
    large: bool = field(default=False)

    @property
    def receivers(self) -> int:
        return len(self.targets)

    def __str__(self) -> str:
        after = f", after raise at {end_name(self.before[0])}'s {self.before[1]}" if self.before else ""
        return f"{self.carrier} to {'+'.join(self.targets)}: {self.fault} at {end_name(self.who)}'s {self.step}{after}"


def end_name(end: int) -> str:
    return "sender" if end == SENDER else f"receiver {end - 1}"


def steps_of(end: int, receivers: int) -> list[str]:
    """Every step of an update that goes well; "#1" is the second of a name. ``run.py`` compares this with what happens."""
    if end != SENDER:
        buckets = [f"{verb} {i}" for i in range(BUCKETS) for verb in ("hear Filled", "pull", "load", "say Free")]
        last = ["hear End", "prepare", "say Ready", "hear Commit", "apply", "say Committed"]
        return ["hear Hello", "examine", "say Welcome", *buckets, *last]
    each = [f" #{i}" if i else "" for i in range(receivers)]
    moved = [f"{verb} {i}" for i in range(BUCKETS) for verb in ("pack", "push")]
    heard = [f"{verb} {i}{nth}" for i in range(BUCKETS) for verb in ("say Filled", "hear Free") for nth in each]
    said = [f"{word}{nth}" for word in ("say End", "hear Ready", "say Commit", "hear Committed") for nth in each]
    greeting = [f"{word}{nth}" for word in ("say Hello", "hear Welcome") for nth in each]
    return [*greeting, *moved, f"pack {BUCKETS}", *heard, *said]


def faults_at(end: int, step: str, carrier: str) -> list[str]:
    """Those that can strike at a step."""
    found = list(FAULTS)
    corruptible = ("push",) if end == SENDER else ("load",) if carrier == "collective" else ("pull", "load")
    if not step.startswith(corruptible):
        found.remove("corrupt")
    if (end, step) != (SENDER, _LAID_OUT) or carrier == "collective":
        found.remove("no shared memory")
    if step in ("begin", "returned"):
        found = [fault for fault in found if fault not in _INSIDE]
    if step == "returned":  # both ends may have let go
        found = [fault for fault in found if fault in DEADLY]
    return found


def cases(carrier: str, targets: tuple[str, ...], faults: frozenset[str]) -> Iterator[Case]:
    """Every step of every end times every fault of these."""
    for who in range(len(targets) + 1):
        for step in ["begin", *steps_of(who, len(targets)), "returned"]:
            for fault in faults_at(who, step, carrier):
                if fault in faults:
                    yield Case(carrier, targets, who, step, fault, large=fault.startswith("no "))


#: Where an update is given up, and the steps that follow at each end: one receiver.
GIVING_UP: Final = {
    (SENDER, "pack 1"): (["say Abort", "hear Aborted"], ["hear Abort", "say Aborted"]),
    (1, "load 1"): (["hear Abort", "say Abort", "hear Aborted"], ["say Abort", "hear Abort", "say Aborted"]),
}


def cases_giving_up(carrier: str, target: str, faults: frozenset[str]) -> Iterator[Case]:
    """Faults on top of a fault: every step of giving up, times every fault of these."""
    for before, steps in GIVING_UP.items():
        for who in (0, 1):
            for step in steps[who]:
                for fault in faults - {"corrupt", "overdue", "no memory", "no shared memory"}:
                    yield Case(carrier, (target,), who, step, fault, before)
