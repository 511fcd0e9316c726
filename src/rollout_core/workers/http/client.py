"""An HTTP client for an engine's server: each request is sent once, held to its timeouts, and answered or failed, never both.

Clause W7. aiohttp does the HTTP; this module says what counts as an answer, and what is known of a request without one.
"""

from __future__ import annotations

import asyncio
import json as json_of_python
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import aiohttp
from aiohttp import hdrs
from aiohttp.http_exceptions import HttpProcessingError

from rollout_core.errors import WorkerError
from rollout_core.workers.http.exchange import Exchange, Method
from rollout_core.workers.http.failures import NoAnswerError, RequestError, words_of
from rollout_core.workers.http.timeouts import Timeouts

__all__ = ["Client", "NoAnswerError", "RequestError", "Timeouts"]

#: Seconds after which an idle connection is not used again. Less than the 5 s after which uvicorn closes it: a request that is sent
#: as the server closes is lost, and nobody knows whether it was carried out.
_KEEP_ALIVE: Final = 2.0
_CLOSED: Final = "the client was closed"
#: The request that a task has under way.
_EXCHANGE: Final[ContextVar[Exchange]] = ContextVar("exchange")


class _Connector(aiohttp.TCPConnector):
    """Connections on which nothing waits to be read: what a server says twice would be taken for the next answer."""

    async def connect(self, *arguments: Any, **options: Any) -> Any:
        while True:
            connection = await super().connect(*arguments, **options)
            if connection.protocol is None or not connection.protocol.should_close:
                _EXCHANGE.get().connected(connection.transport)
                return connection
            connection.close()


class Client:
    """A client of one server, for one event loop.

    ``url`` is the server's address, ``http://host:port``. At most ``connections`` requests are under way, others wait their turn
    in order of arrival. ``headers`` go with each request. ``body_limit`` bounds a body, and one event of a stream, in bytes.

    A call returns what the server answered with a status of 200 to 299, and raises in every other case: ``NoAnswerError`` (a
    ``TransferError``) where the server is gone or took too long, ``RequestError`` (a ``WorkerError``) where it answered something
    else. Both say whether the request may have been carried out. A POST is sent at most once, a GET at most twice, where the first
    met a connection that the server had just closed. Redirects are not followed; proxies in the environment are not used.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: Timeouts | None = None,
        connections: int = 256,
        headers: Mapping[str, str] | None = None,
        body_limit: int = 256 << 20,
    ) -> None:
        self.url = _address(url)
        self.timeout = timeout or Timeouts()
        self._headers = _checked_headers(headers or {})
        for name, value in (("connections", connections), ("body_limit", body_limit)):
            if type(value) is not int or value < 1:
                raise WorkerError(f"{name} is {value!r}: pass a whole number of at least 1")
        self._body_limit = body_limit
        self._turns = asyncio.Semaphore(connections)
        self._under_way: set[Exchange] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def get(self, path: str, *, timeout: Timeouts | None = None) -> Any:
        """The answer: JSON decoded, plain text as a str, ``""`` where there is no body."""
        async with self._exchange("GET", path, None, timeout or self.timeout) as exchange:
            return await exchange.value(self._body_limit)

    async def post(self, path: str, json: Any = None, *, timeout: Timeouts | None = None) -> Any:
        """Send ``json`` (None: no body) and return the answer as ``get`` does."""
        async with self._exchange("POST", path, json, timeout or self.timeout) as exchange:
            return await exchange.value(self._body_limit)

    async def stream(self, path: str, json: Any = None, *, timeout: Timeouts | None = None) -> AsyncGenerator[Any, None]:
        """Send ``json`` and yield the data of each server-sent event, decoded from JSON, up to ``[DONE]`` or the body's end.

        The client's ``Timeouts.total`` does not hold here, one that is given does. Close it (``contextlib.aclosing``) where it is
        not read to its end: its connection is closed then, by which the server knows. An event that reports an error raises
        ``RequestError``.
        """
        async with (
            self._exchange("POST", path, json, timeout or replace(self.timeout, total=None)) as exchange,
            aclosing(exchange.events(self._body_limit)) as events,
        ):
            async for value in events:
                yield value

    async def close(self) -> None:
        """End the requests under way, with a ``NoAnswerError`` each, and close all connections. Harmless twice."""
        self._closed = True
        for exchange in self._under_way:
            exchange.clock.end(_CLOSED)
        if self._session is not None:
            await self._session.close()
            await asyncio.sleep(0)  # for what was ended to have ended

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    @asynccontextmanager
    async def _exchange(self, method: Method, path: str, json: Any, timeouts: Timeouts) -> AsyncIterator[Exchange]:
        """A request that has been answered with success, as far as its status says. Failures on the way are errors of ours."""
        asked = f"{method} {self.url}{path}"
        encoded = b"" if json is None else _encoded(asked, json)
        if not isinstance(path, str) or not path.startswith("/") or not path.isprintable() or set(path) & {" ", "#", "\\"}:
            raise RequestError(asked, "the path is none: pass one that begins with / and has no space and no #", sent=False)
        async with self._turn(asked, timeouts):
            exchange = Exchange(method, self.url + path, timeouts)
            self._under_way.add(exchange)
            try:
                exchange.response = await self._send(exchange, encoded)
                await exchange.check_status()
                yield exchange
            except TimeoutError:
                raise NoAnswerError(asked, exchange.clock.why or "timed out", sent=exchange.sent) from None
            except (aiohttp.ClientResponseError, HttpProcessingError) as error:
                happened = f"the answer is no HTTP ({words_of(error.message.encode())})"
                raise RequestError(asked, happened, sent=exchange.sent) from error
            except aiohttp.InvalidURL as error:
                raise RequestError(asked, f"the address is none ({error})", sent=False) from error
            except (aiohttp.ClientError, OSError) as error:
                raise NoAnswerError(asked, _loss(error, exchange.sent), sent=exchange.sent) from error
            finally:
                exchange.finish()
                self._under_way.discard(exchange)

    @asynccontextmanager
    async def _turn(self, asked: str, timeouts: Timeouts) -> AsyncIterator[None]:
        self._check_open(asked)
        try:
            async with asyncio.timeout(timeouts.queue):
                await self._turns.acquire()
        except TimeoutError:
            waited = f"no connection was free within {timeouts.queue:g} s (Timeouts.queue)"
            raise NoAnswerError(asked, waited, sent=False) from None
        try:
            self._check_open(asked)
            yield
        finally:
            self._turns.release()

    async def _send(self, exchange: Exchange, encoded: bytes) -> aiohttp.ClientResponse:
        # Two turns of the loop: one to hear that the server has closed idle connections, one for them to leave the pool.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self._check_open(exchange.asked)
        headers = {hdrs.CONTENT_TYPE: "application/json", hdrs.CONTENT_LENGTH: str(len(encoded))} if encoded else {}
        connect = exchange.timeouts.connect
        why = "" if connect is None else f"no connection within {connect:g} s (Timeouts.connect)"
        token = _EXCHANGE.set(exchange)
        try:
            async with exchange.clock.step(connect, why):
                return await self._opened().request(
                    exchange.method,
                    exchange.url,
                    data=exchange.body(encoded) if encoded else None,
                    headers=headers,
                    allow_redirects=False,
                )
        finally:
            _EXCHANGE.reset(token)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=_Connector(limit=0, keepalive_timeout=_KEEP_ALIVE, timeout_ceil_threshold=math.inf),
                timeout=aiohttp.ClientTimeout(),  # none: the exchange's clock holds them all
                headers={hdrs.ACCEPT_ENCODING: "identity", **self._headers},
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return self._session

    def _check_open(self, asked: str) -> None:
        if self._closed:
            raise NoAnswerError(asked, _CLOSED, sent=False)
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise RequestError(asked, "the client belongs to another event loop: make one client for each", sent=False)


def _encoded(asked: str, value: Any) -> bytes:
    try:
        return json_of_python.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(asked, f"the value cannot be written as JSON ({error})", sent=False) from None


def _loss(error: Exception, sent: bool) -> str:
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"the connection was lost before the answer was complete ({words})" if sent else f"no connection ({words})"


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except (ValueError, TypeError, AttributeError):
        usable = False
    if not usable or parts.username is not None or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise WorkerError(f"{url!r} is no address of a server: pass http://host:port")
    return url.rstrip("/")


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not (isinstance(name, str) and isinstance(value, str) and name and name.isprintable() and value.isprintable()):
            raise WorkerError(f"the header {name!r} is none: pass names and values as plain text of one line")
    return dict(headers)
