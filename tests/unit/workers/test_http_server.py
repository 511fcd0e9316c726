"""A server's process: ready or an error that says why, and nothing left of it, however it ends."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rollout_core.errors import WorkerError
from rollout_core.workers.http.server import ServerProcess, free_port

GUARD = 30.0  # seconds after which a test fails rather than hangs
SLEEPS = [sys.executable, "-I", "-S", "-u", "-c", "import time; print('here I am'); time.sleep(1000)"]
#: A server in a few lines: argv is its port, and what it does before it listens. It answers /health with 200, all else with 404.
SERVES = """
import os, signal, socket, subprocess, sys, time
exec(sys.argv[2])
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    line, _ = listener.accept()
    asked = line.recv(10000)
    status = b"200 OK" if asked.startswith(b"GET /health ") else b"404 No"
    line.sendall(b"HTTP/1.1 %s\\r\\nContent-Length: 0\\r\\n\\r\\n" % status)
    line.close()
"""
#: A child in a session of its own, and one more below it whose parent is gone; both pay no heed to SIGTERM. Their ids go to a file.
CHILDREN = """
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        if os.fork() != 0:
            os._exit(0)
        os.setsid()
    with open({path!r}, "a") as file:
        file.write(f"{{os.getpid()}}\\n")
    time.sleep(1000)
while not os.path.exists({path!r}) or len(open({path!r}).read().split()) < 2:
    time.sleep(0.01)
"""


def command(port, first=""):
    return [sys.executable, "-I", "-S", "-u", "-c", SERVES, str(port), first]


def start(first="", **options):
    port = free_port()
    return ServerProcess(command(port, first), f"http://127.0.0.1:{port}", **options)


def exists(process):
    """Whether a process is there, and has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def until(condition):
    deadline = time.monotonic() + GUARD
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def is_free(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) != 0


def test_a_server_is_ready_and_then_gone(temporary):
    with start("print('hello')") as server:
        assert server.alive
        assert len(server.processes) == 1
        assert server.wait(0) is None
        until(lambda: server.tail() == "hello")
        process, port = server.processes[0], int(server.url.rpartition(":")[2])
        assert not is_free(port)
        assert os.getsid(process) != os.getsid(0)  # a terminal's Ctrl-C does not reach it
        assert list(temporary.iterdir())
    assert not server.alive
    assert server.processes == []
    assert server.wait() == -signal.SIGTERM
    assert not exists(process)
    assert is_free(port)
    assert not list(temporary.iterdir())
    server.stop()
    server.stop(0)


def test_it_is_asked_before_it_is_killed(tmp_path):
    said = tmp_path / "said"
    handler = f"signal.signal(signal.SIGTERM, lambda *_: (open({str(said)!r}, 'w').write('bye'), sys.exit(5)))"
    server = start(handler)
    server.stop(GUARD)
    assert said.read_text() == "bye"
    assert server.wait() == 5


def test_it_is_killed_after_its_grace():
    server = start("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    began = time.monotonic()
    server.stop(0.3)
    assert 0.3 <= time.monotonic() - began < 10
    assert server.wait() == -signal.SIGKILL


def test_a_server_that_dies_is_seen(temporary):
    with start() as server:
        os.kill(server.processes[0], signal.SIGKILL)
        assert server.wait(GUARD) == -signal.SIGKILL
        assert not server.alive


def test_what_goes_wrong_at_the_start_is_told(temporary):
    with pytest.raises(WorkerError, match=r"exit code 3 before it was ready; the end of its log:\n(.*\n)*no such model$"):
        start("print('x\\n' * 100); print('no such model', file=sys.stderr); sys.exit(3)")
    with pytest.raises(WorkerError, match="signal SIGKILL before it was ready; it said nothing"):
        start("os.kill(os.getpid(), signal.SIGKILL)")
    assert not list(temporary.iterdir())


def test_a_program_that_is_not_there(temporary):
    with pytest.raises(WorkerError, match="exit code 127 before.*\ncannot run /no/such: No such file"):
        ServerProcess(["/no/such"], f"http://127.0.0.1:{free_port()}")
    assert not list(temporary.iterdir())


def test_not_ready_in_time(temporary, tmp_path):
    port, path = free_port(), str(tmp_path / "children")
    began = time.monotonic()
    with pytest.raises(
        WorkerError, match=r"not ready after 1\.5 s \(GET http://.*/health: ConnectionRefusedError.*\n(.*\n)*loading$"
    ):
        ServerProcess(
            command(port, CHILDREN.format(path=path) + "print('loading'); time.sleep(1000)"),
            f"http://127.0.0.1:{port}",
            start_timeout=1.5,
        )
    assert 1.5 <= time.monotonic() - began < 10
    assert not list(temporary.iterdir())
    children = Path(path).read_text().split()
    assert len(children) == 2
    assert not any(map(exists, children))


def test_another_status_is_not_ready():
    port = free_port()
    with pytest.raises(WorkerError, match=r"not ready after 1 s \(GET http://127.0.0.1:\d+/other: status 404\)"):
        ServerProcess(command(port), f"http://127.0.0.1:{port}", health="/other", start_timeout=1)


def test_a_port_in_use_is_told_before_anything_starts(tmp_path, temporary):
    started = tmp_path / "started"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(WorkerError, match=f"127.0.0.1:{port} .Address already in use"):
            ServerProcess(command(port, f"open({str(started)!r}, 'w')"), f"http://127.0.0.1:{port}")
    assert not started.exists()
    assert not list(temporary.iterdir())


def test_somebody_elses_server_is_not_taken_for_it(tmp_path):
    """One that takes the port after this one has started, and answers."""
    port, started = free_port(), tmp_path / "started"
    others = []

    def come_first():
        until(started.exists)
        others.append(subprocess.Popen(command(port)))

    thread = threading.Thread(target=come_first)
    thread.start()
    try:
        with pytest.raises(WorkerError, match="status 200, from a process that is not one of its own"):
            ServerProcess(
                command(port, f"open({str(started)!r}, 'w'); time.sleep(1000)"), f"http://127.0.0.1:{port}", start_timeout=2
            )
    finally:
        thread.join()
        others[0].kill()
        others[0].wait()


def test_a_child_may_be_what_listens():
    with start("if os.fork() != 0: time.sleep(1000)") as server:
        assert len(server.processes) == 2


def test_no_child_is_left(tmp_path):
    path = tmp_path / "children"
    with start(CHILDREN.format(path=str(path))) as server:
        children = path.read_text().split()
        assert all(map(exists, children))
        assert set(children) == set(map(str, server.processes[1:]))  # adopted, so that they can be found
    assert not any(map(exists, children))


def test_no_child_outlives_the_server(tmp_path):
    path = tmp_path / "children"
    with start(CHILDREN.format(path=str(path))) as server:
        os.kill(server.processes[0], signal.SIGKILL)
        server.wait(GUARD)
        assert not any(map(exists, path.read_text().split()))


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)", "1 / 0", "sys.exit()"])
def test_nothing_outlives_this_process(tmp_path, end):
    path, folder = tmp_path / "children", tmp_path / "temporary"
    folder.mkdir()
    program = (
        "import os, sys, tempfile\n"
        f"tempfile.tempdir = {str(folder)!r}\n"
        "from rollout_core.workers.http.server import ServerProcess, free_port\n"
        "port = free_port()\n"
        f"server = ServerProcess([*{command(0)[:-2]!r}, str(port), {CHILDREN.format(path=str(path))!r}], f'http://127.0.0.1:{{port}}')\n"
        f"print(*server.processes, flush=True)\n{end}\n"
    )
    ended = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, env=dict(os.environ))
    processes = ended.stdout.split()
    assert len(processes) == 3, ended.stderr
    until(lambda: not any(map(exists, processes)))
    until(lambda: not list(folder.iterdir()))


def test_the_server_ends_with_its_supervisor():
    with start() as server:
        process = server.processes[0]
        os.kill(server._process.pid, signal.SIGKILL)
        until(lambda: not exists(process))
        assert server.wait(GUARD) == -signal.SIGKILL


def test_a_process_that_holds_our_end_of_the_pipe_is_in_no_way():
    server = start()
    holds = subprocess.Popen(SLEEPS, pass_fds=(server._process.stdin.fileno(),), stdout=subprocess.DEVNULL)
    try:
        began = time.monotonic()
        server.stop(0)
        assert time.monotonic() - began < 10
    finally:
        holds.kill()
        holds.wait()


def test_many_may_stop_it():
    server = start()
    process = server.processes[0]
    threads = [threading.Thread(target=server.stop, args=(grace,)) for grace in (0, 1, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD)
        assert not thread.is_alive()
    assert not exists(process)


def test_the_log_is_bounded_and_ends_with_the_last_words(tmp_path):
    log = tmp_path / "log"
    with start("for i in range(20000): print(f'line {i}', flush=i % 100 == 0)", log=log, log_limit=10_000) as server:
        until(lambda: "line 19999" in server.tail())
        assert log.stat().st_size <= 10_000
        assert server.tail(3).split("\n") == ["line 19997", "line 19998", "line 19999"]
        lines = log.read_text().splitlines()
        first = int(lines[1].split()[1])
        assert lines[1:] == [f"line {i}" for i in range(first, 20000)]  # the end, without a gap
        assert len(lines) > 300
    assert log.exists()  # a log of the caller's own stays


def test_a_server_may_close_its_output():
    with start("os.close(1); os.close(2)") as server:
        assert server.wait(0.7) is None  # longer than the supervisor's own round


def test_the_environment_of_a_server(monkeypatch):
    monkeypatch.setenv("ROLLOUT_CORE_A", "a")
    monkeypatch.setenv("ROLLOUT_CORE_B", "b")
    with start(
        "print({k: v for k, v in os.environ.items() if k[:13] == 'ROLLOUT_CORE_'})", environment={"ROLLOUT_CORE_B": "c"}
    ) as server:
        assert "{'ROLLOUT_CORE_A': 'a', 'ROLLOUT_CORE_B': 'c'}" in server.tail()


def test_errors_do_not_repeat_a_commands_secrets():
    with pytest.raises(WorkerError) as caught:
        ServerProcess([*SLEEPS, "--api-key", "secret"], f"http://127.0.0.1:{free_port()}", start_timeout=0.2)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"command": []}, "a list of words"),
        ({"command": "sleep 1"}, "a list of words"),
        ({"command": ["a", 3]}, "a list of words"),
        ({"command": ["a\0"]}, "a list of words"),
        ({"url": "http://127.0.0.1"}, "no address"),
        ({"url": "https://127.0.0.1:1"}, "no address"),
        ({"url": "127.0.0.1:80"}, "no address"),
        ({"url": None}, "no address"),
        ({"url": "http://203.0.113.7:4000"}, "no server can listen on 203.0.113.7:4000"),
        ({"log_limit": 0}, "log_limit"),
        ({"start_timeout": 0}, "start_timeout"),
        ({"start_timeout": float("nan")}, "start_timeout"),
        ({"log": "/no/such/folder/log"}, "its log at /no/such/folder/log"),
    ],
)
def test_what_cannot_be_started(given, words, temporary):
    with pytest.raises(WorkerError, match=words):
        ServerProcess(**{"command": SLEEPS, "url": f"http://127.0.0.1:{free_port()}", **given})
    assert not list(temporary.iterdir())


def test_free_ports_are_free():
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 1
    for port in ports:
        with socket.create_server(("127.0.0.1", port)):
            pass
