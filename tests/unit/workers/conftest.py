"""A server that does what a test tells it to, on a bare socket: every byte it says is written out in the test."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest


@dataclass
class Asked:
    """A request as it came: ``line`` is its first, header names are in lower case."""

    line: str
    headers: dict[str, str]
    body: bytes
    connection: int  # counted from 0, in order of arrival


@dataclass
class Line:
    """One connection, in the hands of an answer."""

    socket: socket.socket
    over: threading.Event  # set when the test ends: what a server that hangs waits for
    buffer: bytearray = field(default_factory=bytearray)

    def say(self, *pieces: bytes | str) -> None:
        for piece in pieces:
            self.socket.sendall(piece if isinstance(piece, bytes) else piece.encode())

    def hang(self) -> None:
        self.over.wait()

    def reset(self) -> None:
        """Close so that the other side gets RST, not FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.socket.close()

    def until(self, end: bytes) -> bytes | None:
        while end not in self.buffer:
            got = self.socket.recv(1 << 16)
            if not got:
                return None
            self.buffer += got
        found, _, rest = bytes(self.buffer).partition(end)
        self.buffer = bytearray(rest)
        return found

    def exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            got = self.socket.recv(1 << 16)
            if not got:
                break
            self.buffer += got
        found = bytes(self.buffer[:size])
        del self.buffer[:size]
        return found


Answer = Callable[[Line, Asked], "bool | None"]


class Server:
    """``answers[i]`` is called with the i-th request of all connections, the last also with every later one; the connection is kept
    if it returns True. ``reads_bodies`` False: a request's body stays where it is."""

    def __init__(self, *answers: Answer, reads_bodies: bool = True) -> None:
        self.answers, self.reads_bodies = answers, reads_bodies
        self.asked: list[Asked] = []
        self.connections = 0
        self.ended = threading.Semaphore(0)  # released as often as a client has closed a connection, or an answer has
        self.arrived = threading.Semaphore(0)  # released with each request
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(30)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lines: list[Line] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self.over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(10)
        self._listener.close()
        for line in self._lines:
            with suppress(OSError):
                line.socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _accept(self) -> None:
        with suppress(OSError):
            while not self.over.is_set():
                line = Line(self._listener.accept()[0], self.over)
                line.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._lines.append(line)
                thread = threading.Thread(target=self._serve, args=(line, self.connections))
                self.connections += 1
                self._threads.append(thread)
                thread.start()

    def _serve(self, line: Line, connection: int) -> None:
        with suppress(OSError):
            while (head := line.until(b"\r\n\r\n")) is not None:
                first, *rest = head.decode().split("\r\n")
                headers = {name.lower(): value for name, value in (entry.split(": ", 1) for entry in rest)}
                body = line.exactly(int(headers.get("content-length", 0))) if self.reads_bodies else b""
                with self._lock:
                    number = len(self.asked)
                    asked = Asked(first, headers, body, connection)
                    self.asked.append(asked)
                self.arrived.release()
                if not self.answers[min(number, len(self.answers) - 1)](line, asked):
                    break
        line.socket.close()
        self.ended.release()


@pytest.fixture
def serve():
    """``serve(*answers)``: a ``Server``, closed with the test."""
    servers = []

    def start(*answers: Answer, reads_bodies: bool = True) -> Server:
        servers.append(Server(*answers, reads_bodies=reads_bodies))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
