"""Where an engine runs: a process of its own, or a thread of this one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from rollout_core.workers.link import supervisor

GRACE: Final = 5.0  # seconds that an engine has to end by itself
#: What the process runs. It finds this package, and the engine, where its parent did, also when they are not installed.
#: Ctrl-C reaches every process of a terminal; whether this one ends is for the trainer to say.
_PROGRAM: Final = (
    "import json, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = json.loads(sys.argv.pop(1)); "
    "import os; from rollout_core.transfer.lifetime import end_with_parent; end_with_parent(int(sys.argv.pop(1)) or os.getppid()); "
    "from rollout_core.workers.link.process import main; main()"
)


@dataclass(frozen=True, slots=True)
class Spec:
    """An engine to be made: its class as ``module:class``, what it is given, and what its process has in its environment beside
    what this one has. ``has_children``: whether it starts processes of its own, which have to end with it, however that ends."""

    place: str
    options: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    has_children: bool = False


class Host(Protocol):
    """What an engine runs in."""

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within that time."""
        ...

    def kill(self) -> None:
        """End it at once, where that can be done."""
        ...

    def processes(self) -> list[int]:
        """The ids of its processes that run, if it has some of its own."""
        ...

    @property
    def words(self) -> str:
        """What it is, and how it ended if it did."""
        ...


class ProcessHost:
    """A process. Started with ``subprocess``, not ``multiprocessing``: the caller's main module is not run again, so a script needs
    no ``__main__`` guard."""

    def __init__(self, spec: Spec, theirs: socket.socket) -> None:
        path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        above = [sys.executable, "-I", "-S", supervisor.__file__, str(os.getpid()), "", "0", ""] if spec.has_children else []
        self.process = subprocess.Popen(
            [
                *above,
                *(sys.executable, "-P", "-c", _PROGRAM, path, "0" if above else str(os.getpid())),
                *(f"--channel={theirs.fileno()}", f"--engine={spec.place}", f"--options={json.dumps(dict(spec.options))}"),
            ],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.PIPE if above else subprocess.DEVNULL,
            env={**os.environ, **spec.environment},
        )
        self._was_killed = False

    def wait(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):  # in the hands of a driver even a killed process may take its time
            self.process.wait(seconds)
        has_ended = self.process.poll() is not None
        if has_ended and self.process.stdin is not None:
            self.process.stdin.close()
        return has_ended

    def kill(self) -> None:
        self._was_killed = self._was_killed or self.process.poll() is None
        if self.process.stdin is None:
            self.process.kill()
            return
        with suppress(OSError, ValueError):  # the supervisor's word for the end of all of them
            os.write(self.process.stdin.fileno(), b"k")

    def processes(self) -> list[int]:
        pid = self.process.pid
        return [] if self.process.poll() is not None else [pid, *supervisor.descendants(pid)]

    @property
    def words(self) -> str:
        code = self.process.poll()
        state = "killed for it" if code is None else f"ended with exit code {code}"
        if code is not None and -code in set(signal.Signals):
            state += f" ({signal.Signals(-code).name})"
        return f"the worker process (pid {self.process.pid}, {state})"


class ThreadHost:
    """A thread. It cannot be killed: a call that does not return keeps it."""

    def __init__(self, spec: Spec, theirs: socket.socket) -> None:
        from rollout_core.workers.link.process import serve

        self.engine: Any = None  # once it is made
        arguments = (theirs.detach(), spec.place, spec.options, self._made)
        self._thread = threading.Thread(target=serve, args=arguments, name="rollout-core-engine", daemon=True)
        self._thread.start()

    def _made(self, engine: Any) -> None:
        self.engine = engine

    def wait(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def kill(self) -> None:
        pass

    def processes(self) -> list[int]:
        return []

    @property
    def words(self) -> str:
        return "the worker's thread"
