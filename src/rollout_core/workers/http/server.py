"""An engine's server as a process that this one owns: started, watched until it is ready, and ended with all of its children."""

from __future__ import annotations

import http.client
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from rollout_core.errors import WorkerError
from rollout_core.workers.link import supervisor
from rollout_core.workers.link.supervisor import descendants

GRACE: Final = 10.0  # seconds that a server has to end by itself
_EVERY: Final = 0.1  # seconds between looks whether it is ready
_LOOK: Final = 5.0  # seconds that one such look may take
_LAST: Final = 15.0  # seconds in which killed processes have ended: more than the supervisor itself waits
_TAIL: Final = 20  # lines of the log that an error shows
_LISTENING: Final = "0A"


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago. Nothing keeps it: somebody else may take it first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def start_module(
    module: str,
    words: Sequence[str],
    *,
    environment: Mapping[str, str],
    port: int | None = None,
    log: str | None = None,
    start_timeout: float = 300.0,
) -> ServerProcess:
    """A server that is a Python module, run by this interpreter on the loopback interface, with this process's path; ``words`` are
    those of its command line beside ``--host`` and ``--port``. See ``ServerProcess``, whose errors these are."""
    port = port or free_port()
    return ServerProcess(
        [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port), *words],
        f"http://127.0.0.1:{port}",
        environment={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        log=log,
        start_timeout=start_timeout,
    )


class ServerProcess:
    """A server that is ready: ``command`` was started, and one of its processes answers a GET of ``health`` at ``url`` with 200.

    ``environment`` goes beside what this process has. Its output goes to ``log``, a path, of which the last ``log_limit`` bytes are
    kept; None: a file that ends with it. Raises ``WorkerError`` if the port is in use, and if the server ends or is not ready after
    ``start_timeout`` seconds; nothing of it is left then.

    It is in no group of this process, so a terminal's Ctrl-C does not reach it, and it does not outlive this process, however that
    ends. Any thread may call. Linux only.
    """

    def __init__(
        self,
        command: Sequence[str],
        url: str,
        *,
        health: str = "/health",
        environment: Mapping[str, str] | None = None,
        log: str | os.PathLike[str] | None = None,
        log_limit: int = 8 << 20,
        start_timeout: float = 300.0,
    ) -> None:
        command = _checked(command)
        self._name = " ".join(command[:3]) + (" ..." if len(command) > 3 else "")  # the rest may have keys in it
        self._host, self._port = _place(url)
        self.url = url.rstrip("/")
        if type(log_limit) is not int or log_limit < 4096:
            raise WorkerError(f"log_limit is {log_limit!r}: pass a whole number of bytes, at least 4096")
        if not 0 < start_timeout < math.inf:
            raise WorkerError(f"start_timeout is {start_timeout!r}: pass seconds above 0")
        _check_is_free(self._host, self._port)
        self._lock = threading.Lock()  # of the word to the supervisor
        self._folder = tempfile.TemporaryDirectory(prefix="rollout-core-server-") if log is None else None
        self.log = Path(self._folder.name, "log") if self._folder else Path(os.fspath(log or "")).absolute()
        try:
            self.log.write_bytes(b"")
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", supervisor.__file__, str(os.getpid()), str(self.log), str(log_limit)),
                    *(self._folder.name if self._folder else "", *command),
                ],
                stdin=subprocess.PIPE,
                env={"PYTHONUNBUFFERED": "1", **os.environ, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            self._clean()
            raise WorkerError(f"cannot start {self._name} with its log at {self.log}: {error}") from error
        try:
            self._wait_until_ready(health, start_timeout)
        except BaseException:
            self.stop(0)
            raise

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def processes(self) -> list[int]:
        """The ids of the server's processes, the first of them its own, then its children and theirs."""
        return descendants(self._process.pid) if self.alive else []

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code once the server has ended (a signal's number, negative); None if it has not after ``seconds``."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.poll()

    def tail(self, lines: int = _TAIL) -> str:
        """The end of the log; ``""`` once a log of the server's own has gone with it."""
        with suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 400 * lines))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
        return ""

    def stop(self, grace: float = GRACE) -> None:
        """Ask the server to end, and end it and all its children after ``grace`` seconds. Harmless when it has ended."""
        if grace > 0 and self.alive:
            self._say(b"t")
            self.wait(grace)
        self._say(b"k")
        if self.wait(_LAST) is None:
            raise WorkerError(f"{self._name} (processes {self.processes}) does not end when killed: it hangs in the system")
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._clean()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _say(self, word: bytes) -> None:
        """To the supervisor, which may be gone."""
        with self._lock, suppress(OSError):
            if self._process.stdin is not None and not self._process.stdin.closed:
                os.write(self._process.stdin.fileno(), word)

    def _clean(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def _wait_until_ready(self, health: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        last = "no answer"
        while True:
            code = self.wait(min(_EVERY, max(0.0, deadline - time.monotonic())))
            if code is not None:
                raise WorkerError(f"{self._name} ended with {_words(code)} before it was ready{self._last_words()}")
            left = deadline - time.monotonic()
            if left <= 0:
                asked = f"GET {self.url}{health}"
                raise WorkerError(f"{self._name} was not ready after {timeout:g} s ({asked}: {last}){self._last_words()}")
            status = self._look(health, min(left, _LOOK))
            if status == "status 200":
                if self._is_ours():
                    return
                status = "status 200, from a process that is not one of its own"
            last = status or last

    def _look(self, health: str, seconds: float) -> str:
        """What was answered; ``""`` for nothing within that time."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=seconds)
        try:
            connection.request("GET", urlsplit(self.url).path + health)
            return f"status {connection.getresponse().status}"
        except TimeoutError:
            return ""
        except (OSError, http.client.HTTPException) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            connection.close()

    def _is_ours(self) -> bool:
        """Whether the port belongs to one of the server's processes: another server that came first answers too."""
        listening = _listeners(self._port)
        for process in self.processes:
            with suppress(OSError):
                for fd in os.listdir(f"/proc/{process}/fd"):
                    with suppress(OSError):
                        if os.readlink(f"/proc/{process}/fd/{fd}") in listening:
                            return True
        return False

    def _last_words(self) -> str:
        tail = self.tail()
        return f"; the end of its log:\n{tail}" if tail else "; it said nothing"


def _listeners(port: int) -> set[str]:
    """The sockets that listen on a port, as links of ``/proc/PID/fd`` name them."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(f"socket:[{fields[9]}]")
    return found


def _words(code: int) -> str:
    if -code in set(signal.Signals):
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _checked(command: Sequence[str]) -> list[str]:
    if isinstance(command, str) or not command or not all(isinstance(word, str) and "\0" not in word for word in command):
        raise WorkerError(f"a command is {command!r}: pass a list of words, the program first")
    return list(command)


def _place(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except (ValueError, AttributeError, TypeError):
        host, port = None, None
    if not host or not port or parts.scheme != "http":
        raise WorkerError(f"{url!r} is no address of a server's own: pass http://host:port")
    return host, port


def _check_is_free(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: what ended a moment ago is in no way
            listener.bind(address)
            listener.listen()
    except OSError as error:
        raise WorkerError(
            f"no server can listen on {host}:{port} ({error.strerror or error}): choose another, as free_port() does"
        ) from None
