"""Between a program and the process that wants it: what runs it, keeps its log, and sees that nothing of it is left. The program is
an engine of ours, or an engine's server; here it is called the server.

Run as a file, by an interpreter that imports nothing else. It adopts what the server's children leave behind (a subreaper), so all
of the server's processes can be found below it, whatever group or session they made for themselves.

Its standard input is the other's word: ``t`` asks the server to end (SIGTERM), ``k`` ends everything at once. So does the end of
the file, that of the other process, and the server's own: its children do not outlive it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # prctl
_EVERY = 0.5  # seconds between looks at what tells nothing by itself
_PATIENCE = 10.0  # seconds for killed processes to be gone: one within a driver takes its time
_CHUNK = 1 << 16


class Log:
    """A file of at most ``limit`` bytes: when it is full, its newer half stays."""

    def __init__(self, path: str, limit: int) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._limit, self._size = limit, 0

    def write(self, data: bytes) -> None:
        with suppress(OSError):  # a full disk is no reason for the server to wait
            if self._size + len(data) > self._limit:
                data = (os.pread(self._file, self._size, 0) + data)[-self._limit // 2 :]
                os.ftruncate(self._file, 0)
                self._size = 0
            self._size += os.pwrite(self._file, data, self._size)


def parents() -> dict[int, int]:
    """The parent of each process that has not ended."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]  # a name may have anything in it, also brackets
                if state not in b"ZX":
                    found[int(entry)] = int(parent)
    return found


def descendants(of: int) -> list[int]:
    """The processes below one, not itself."""
    by_process, found = parents(), [of]
    for ancestor in found:  # grows meanwhile
        found += [process for process, parent in by_process.items() if parent == ancestor]
    return found[1:]


def _reap(server: int, status: int | None) -> int | None:
    """Take in what has ended; the server's wait status, once there is one."""
    with suppress(ChildProcessError):
        while True:
            process, ended = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                break
            if process == server:
                status = ended
    return status


def _has_children() -> bool:
    """Whether there is anything left to reap, now or later."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _end_all(server: int, status: int | None) -> int | None:
    deadline = time.monotonic() + _PATIENCE
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        for process in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
        status = _reap(server, status)
    # One that looks ended can be waited for only once its last thread is: left behind, it would be another's to bury.
    status = _reap(server, status)
    while _has_children() and time.monotonic() < deadline:
        time.sleep(0.01)
        status = _reap(server, status)
    return status


def _exit_like(status: int | None) -> None:
    """End as the server did, so that who waits for this process learns it."""
    if status is not None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(1 if status is None else os.waitstatus_to_exitcode(status))


def _is_open(fd: int) -> bool:
    with suppress(OSError):
        os.fstat(fd)
        return True
    return False  # that by which the folder was read


def _is_readable(poll: select.poll, wait: float) -> set[int]:
    return {fd for fd, _ in poll.poll(wait * 1000)}


def _drain(log: Log, output: int) -> bool:
    """Whether there is more to come, as far as is known: False at the end, and where nothing is there now."""
    try:
        data = os.read(output, _CHUNK)
    except BlockingIOError:
        return False
    log.write(data)
    return bool(data)


def main(parent: int, log_path: str, limit: int, folder: str, command: list[str]) -> None:
    """``log_path``: where the server's output goes; empty: where this process's own does. ``folder`` is removed if the other
    process ends without a word; empty: none is. What this process was given open is the server's alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _frame: stopped.append(got))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the other process to answer

    def before_it_runs() -> None:
        libc.prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # of this process's only thread
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    given = [int(entry) for entry in os.listdir("/proc/self/fd") if int(entry) > 2 and _is_open(int(entry))]
    log = Log(log_path, limit) if log_path else None
    output, theirs = os.pipe() if log_path else (None, None)
    if output is not None:
        os.set_blocking(output, False)
    try:
        # A session of its own: what it does to its group is not done to this process.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            pass_fds=given,
            start_new_session=True,
            preexec_fn=before_it_runs,
        )
    except OSError as error:
        if log is not None:
            log.write(f"cannot run {command[0]}: {error.strerror}\n".encode())
        os._exit(127)
    for fd in [*given, *([] if theirs is None else [theirs])]:
        os.close(fd)
    server = process.pid  # reaped here, with what else there is to reap; the object stays, or it would do so itself
    ended = os.pidfd_open(server)
    status = None
    watched = select.poll()
    for fd in (0, ended, *([] if output is None else [output])):
        watched.register(fd, select.POLLIN)
    while not stopped and os.getppid() == parent:
        ready = _is_readable(watched, _EVERY)
        status = _reap(server, status)
        if log is not None and output is not None and output in ready and not _drain(log, output):
            watched.unregister(output)  # the server has closed its output, and lives
        if 0 in ready:
            if os.read(0, 1) != b"t":
                break
            with suppress(ProcessLookupError):
                os.kill(server, signal.SIGTERM)
        if status is not None:
            break
    status = _end_all(server, status)
    while log is not None and output is not None and _drain(log, output):
        pass
    if folder and os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)
    _exit_like(status)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5:])
