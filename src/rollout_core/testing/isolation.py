"""Running cases in a process of their own: a packer that hangs or kills its process is a failure and not the end of the run."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import mmap
import os
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, Final, Literal, NoReturn, Protocol, TypeAlias

import msgspec

from rollout_core.errors import RolloutCoreError, TransferError
from rollout_core.testing.packers import error_words
from rollout_core.testing.registry import Check, Skipped, SubjectKind, Violation, get_check
from rollout_core.transfer.channel import Channel, PeerGone
from rollout_core.transfer.lifetime import end_with_parent

_PHASE_BYTES: Final = 64
_MOST_PRINTED: Final = 1 << 20
_FIRST: Final = 3  # times the timeout for the first case of all
#: Seconds for a process to load the packer: torch and an engine's modules may be imported on the way.
_START_TIMEOUT: Final = 120.0
#: Seconds for a fork to come to the subject. A fork copies one thread: a library's lock that another held stays locked in it for
#: ever. One fork in one test run hung before its first word, with the cause unknown; 16,000 tried after it did not.
_FORK_TIMEOUT: Final = 20.0
_LOADING: Final = "loading"  # the phase in which a process comes to the subject


class Hello(msgspec.Struct, tag=True, frozen=True):
    """What a process says once it has the subject, or why it has not."""

    capabilities: list[str]
    error: str = ""


class Request(msgspec.Struct, tag=True, frozen=True):
    number: int
    check: str
    case: bytes


class Outcome(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What came of one case. ``fatal``: the process hung or died. ``value``: what the check returned, for twins."""

    number: int = 0
    result: Literal["pass", "violation", "skip"]
    text: str = ""
    value: str = ""
    fatal: bool = False


class SubjectError(RolloutCoreError, TypeError):
    """What is to be checked cannot be loaded or is no subject of this kind."""


class Subject(Protocol):
    """A subject under test, wrapped for the checks of its kind."""

    @property
    def capabilities(self) -> frozenset[str]: ...


#: Makes the subject, which notes in the given phase, if there is one, what it is doing.
Start: TypeAlias = Callable[[Any], Subject]


def run_case(subject: Any, check: Check, case: bytes, number: int = 0) -> Outcome:
    """Run one case here, in this process."""
    decoded = msgspec.json.decode(case, type=check.case_type)
    try:
        value = check.run(subject, decoded)
    except Skipped as reason:
        return Outcome(number=number, result="skip", text=str(reason))
    except Violation as violation:
        return Outcome(number=number, result="violation", text=str(violation))
    except (Exception, SystemExit) as error:
        return Outcome(number=number, result="violation", text=f"the check met {error_words(error)}")
    return Outcome(number=number, result="pass", value=value if isinstance(value, str) else "")


class Here:
    """Runs cases in this process: for debuggers, and for packers on a device that a fork cannot share."""

    def __init__(self, start: Start) -> None:
        self._start = start
        try:
            self.hello = Hello(sorted(start(None).capabilities))
        except Exception as error:
            raise SubjectError(_loading_words(error)) from error

    def run(self, check: Check, case: bytes, timeout: float) -> Outcome:
        """What came of one case. There is nobody here to end it: ``timeout`` is not kept."""
        return _start_and_run(self._start, None, check, case)

    def close(self) -> None:
        pass


class Isolated:
    """Runs cases in a child process, started again after each that it does not survive.

    A fork of this process, so that the subject need not be importable; or with ``hash_seed`` a new interpreter, which loads the
    subject by its ``target`` name.
    """

    def __init__(self, start: Start, *, kind: SubjectKind = "packer", target: str = "", hash_seed: int | None = None) -> None:
        self._start = start
        self._kind = kind
        self._target = target
        self._hash_seed = hash_seed
        self._pid = 0
        self._channel: Channel[Hello | Outcome] | None = None
        self._phase = mmap.mmap(-1, _PHASE_BYTES)
        self._number = 0
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        self._hello: Hello | None = None
        try:
            self._launch()
        except BaseException:
            self.close()
            raise

    @property
    def hello(self) -> Hello:
        """What the process said once it had the subject; waits for it. ``SubjectError`` if it could not."""
        if self._hello is None:
            try:
                self._hello = self._greet()
            except BaseException:
                self.close()
                raise
        return self._hello

    def run(self, check: Check, case: bytes, timeout: float) -> Outcome:
        """What came of one case; a hang of ``timeout`` seconds and the end of the process are violations."""
        if self._channel is None:
            self._launch()
        assert self.hello
        assert self._channel is not None
        self._number += 1
        if self._number == 1:
            timeout *= _FIRST  # libraries may load, and kernels compile
        if os.fstat(self._printed.fileno()).st_size > _MOST_PRINTED:
            self._printed.truncate(0)  # what earlier cases printed
        try:
            self._channel.send(Request(self._number, check.id, case), timeout)
            answer = self._channel.receive(timeout)
        except PeerGone:
            return self._died(self._doing() + " ")
        except TransferError:
            doing = self._doing()
            self._kill()
            return Outcome(result="violation", text=f"{doing} did not end within {timeout:g} s", fatal=True)
        except BaseException:  # Ctrl-C: what the child sends later answers no question any more
            self._kill()
            raise
        assert isinstance(answer, Outcome)
        assert answer.number == self._number
        return answer

    def close(self) -> None:
        self._kill()
        self._printed.close()

    def _launch(self) -> None:
        """Start the process; ``hello`` waits until it has the subject."""
        self._hello = None
        ours, theirs = socket.socketpair()
        self._printed.seek(0)
        self._printed.truncate()
        self._phase[:] = bytes(_PHASE_BYTES)
        parent = os.getpid()
        if self._hash_seed is None:
            with warnings.catch_warnings():
                # Python warns of forks in processes with threads. The child runs no code that waits for one of them:
                # torch is told to use one thread, as in its own DataLoader workers.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                ours.close()
                _child(theirs, self._start, self._printed.fileno(), self._phase, parent)
        else:
            program = "import sys; from rollout_core.testing.isolation import twin; twin(*sys.argv[1:])"
            command = [
                sys.executable,
                "-c",
                program,
                str(theirs.fileno()),
                self._kind,
                self._target,
                str(parent),
                os.pathsep.join(sys.path),
            ]
            environment = {**os.environ, "PYTHONHASHSEED": str(self._hash_seed)}
            output = self._printed.fileno()
            theirs.set_inheritable(True)
            actions = [(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]
            pid = os.posix_spawn(sys.executable, command, environment, file_actions=actions, setpgroup=0)
        theirs.close()
        self._pid = pid
        self._channel = Channel(ours.detach(), Hello | Outcome)

    def _greet(self) -> Hello:
        assert self._channel is not None
        try:
            hello = self._first_message()
        except PeerGone:
            raise SubjectError(f"loading it {self._died('').text}") from None
        except TransferError:
            raise SubjectError(f"loading it took more than {_START_TIMEOUT:g} s") from None
        assert isinstance(hello, Hello)
        if hello.error:
            raise SubjectError(hello.error)
        return hello

    def _first_message(self) -> Hello | Outcome:
        """What the process says first. A fork that does not come to the subject is made once more."""
        assert self._channel is not None
        left = _START_TIMEOUT
        if self._hash_seed is None:
            try:
                return self._channel.receive(min(_FORK_TIMEOUT, _START_TIMEOUT))
            except PeerGone:
                raise
            except TransferError:
                left = max(0.0, _START_TIMEOUT - _FORK_TIMEOUT)
                if not self._phase[:].rstrip(b"\0"):
                    self._kill()
                    self._launch()
        return self._channel.receive(left)

    def _doing(self) -> str:
        return self._phase[:].rstrip(b"\0").decode() or "the check"

    def _died(self, doing: str) -> Outcome:
        """The violation of a process that ended by itself while it was doing this."""
        status = self._reap()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
        self._printed.seek(0)
        last = self._printed.read()[-2000:].decode(errors="replace").strip().splitlines()[-3:]
        words = f"; it printed last: {' | '.join(line.strip() for line in last)}" if last else ""
        return Outcome(result="violation", text=f"{doing}ended its process with {how}{words}", fatal=True)

    def _kill(self) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._reap()

    def _reap(self) -> int:
        """Close the channel and wait for the child; its exit code, negative for a signal."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        pid, self._pid = self._pid, 0
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # and the processes that the packer has started
        try:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except ChildProcessError:  # somebody else has waited for it
            return 0


class _SharedPhase:
    """What the child is doing, in memory that its parent reads when it no longer answers."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def set(self, method: str) -> None:
        self._memory[:] = method.encode()[:_PHASE_BYTES].ljust(_PHASE_BYTES, b"\0")


def _child(connection: socket.socket, start: Start, output: int, phase: mmap.mmap, parent: int) -> NoReturn:
    """The forked child: serve until the parent closes the channel, and leave without running anything of the parent's."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        faulthandler.disable()  # of the parent, to whose output it would write
        end_with_parent(parent)
        _serve(connection, start, _SharedPhase(phase))
        code = 0
    except BaseException:
        import traceback

        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def twin(fd: str, kind: SubjectKind, target: str, parent: str, path: str) -> None:
    """The new interpreter of a twin."""
    sys.path[:] = path.split(os.pathsep)
    end_with_parent(int(parent))
    import rollout_core.testing.checks  # noqa: F401 - registers the checks
    from rollout_core.testing.targets import load_target, wrap

    _serve(socket.socket(fileno=int(fd)), lambda phase: wrap(kind, load_target(target), phase), None)


def _start_and_run(start: Start, phase: Any, check: Check, case: bytes, number: int = 0) -> Outcome:
    """Run a case on a subject of its own."""
    try:
        subject = start(phase)
    except (Exception, SystemExit) as error:
        return Outcome(number=number, result="violation", text=f"making the {check.subject} anew raised {error_words(error)}")
    return run_case(subject, check, case, number)


def _loading_words(error: BaseException) -> str:
    if isinstance(error, RolloutCoreError | TypeError):
        return str(error)
    return f"loading it raised {error_words(error)}"


def _serve(connection: socket.socket, start: Start, phase: Any) -> None:
    import torch

    gc.freeze()  # what is here already is nothing that the subject makes: looking for live tensors need not look at it
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the kit judges results; a packer may warn
    channel: Channel[Request] = Channel(connection.detach(), Request)
    if phase is not None:
        phase.set(_LOADING)
    try:
        capabilities = sorted(start(phase).capabilities)
    except (Exception, SystemExit) as error:
        channel.send(Hello([], _loading_words(error)))
        return
    if phase is not None:
        phase.set("")
    channel.send(Hello(capabilities))
    while True:
        try:
            request = channel.receive(None)
        except PeerGone:
            return
        # A class or factory gives a new subject for every case, as a reproduction script will.
        channel.send(_start_and_run(start, phase, get_check(request.check), request.case, request.number))
