"""One request and what comes back for it: a value, or an error that says why there is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any, Final, Literal

import aiohttp
import msgspec
from aiohttp import hdrs
from aiohttp.http_exceptions import HttpProcessingError

from rollout_core.workers.http.events import DONE, EventError, EventParser
from rollout_core.workers.http.failures import RequestError, words_of
from rollout_core.workers.http.timeouts import Clock, Timeouts

Method = Literal["GET", "POST"]

_CHUNK: Final = 1 << 20  # bytes of a request that are handed over at once; each that is taken is a sign of life
_ERROR_BODY: Final = 64 << 10  # bytes read of the body of a failure
_AFTER_DONE: Final = 0.25  # seconds for a body to end after the stream's own end, for its connection to be used again
#: What reading a body raises where it is cut, or is no HTTP.
_CUT: Final = (TimeoutError, aiohttp.ClientError, OSError, HttpProcessingError)


class Exchange:
    """One request, and its answer once it has begun. ``asked`` is its method and address."""

    def __init__(self, method: Method, url: str, timeouts: Timeouts) -> None:
        self.asked = f"{method} {url}"
        self.method, self.url, self.timeouts = method, url, timeouts
        self.clock = Clock(timeouts)
        self.sent = False
        self.response: aiohttp.ClientResponse
        self._transport: asyncio.BaseTransport | None = None

    def connected(self, transport: asyncio.BaseTransport | None) -> None:
        self._transport = transport
        self.sent = True  # as far as anybody can tell from here on
        self.clock.silence()

    def finish(self) -> None:
        """Where the answer was read to its end, the connection is with its pool again, or with another request. Where it was not,
        it ends here: closing it would wait for a server that may never take what is left of the request."""
        response = getattr(self, "response", None)
        if (response is None or response.connection is not None) and isinstance(self._transport, asyncio.WriteTransport):
            self._transport.abort()
        if response is not None:
            response.close()

    async def body(self, encoded: bytes) -> AsyncIterator[bytes]:
        """The request's body. An iterator, which nothing can send a second time."""
        for start in range(0, len(encoded), _CHUNK):
            yield encoded[start : start + _CHUNK]
            self.clock.silence()

    async def check_status(self) -> None:
        status, reason = self.response.status, self.response.reason
        if 200 <= status <= 299:
            return
        self._use_no_more()
        happened = f"the server answered {status} {reason or ''}".rstrip()
        location = self.response.headers.get(hdrs.LOCATION)
        if location is not None:
            happened += f" to {words_of(location.encode())}, and redirects are not followed"
        try:
            said = words_of(await self._beginning(_ERROR_BODY))
        except _CUT:
            said = "(its words were cut)"
        raise self._wrong(happened + (f": {said}" if said else ""))

    def _use_no_more(self) -> None:
        """A server whose code failed closes the connection behind its answer (Starlette raises the error on, uvicorn then closes):
        what is sent on it until that is heard would be lost. Nobody waited since the status came, so where the connection is with
        its pool already, no other request has it."""
        connection = self.response.connection
        if connection is not None and connection.protocol is not None:
            connection.protocol.force_close()
        elif isinstance(self._transport, asyncio.WriteTransport):
            self._transport.abort()

    async def value(self, limit: int) -> Any:
        """JSON decoded, plain text as a str, ``""`` where there is no body. What does not say what it is, is text."""
        body = await self._beginning(limit + 1)
        if len(body) > limit:
            raise self._wrong(f"the answer has more than {limit} bytes (body_limit)")
        self._check_end_is_known()
        typed = hdrs.CONTENT_TYPE in self.response.headers
        if typed and self._expect("application/json", "text/plain") == "application/json":
            return self._decoded(body)
        try:
            return body.decode()
        except UnicodeDecodeError as error:
            raise self._wrong(f"the answer is not UTF-8 at its byte {error.start}") from None

    async def events(self, limit: int) -> AsyncGenerator[Any, None]:
        """The data of each server-sent event, decoded from JSON, up to ``[DONE]`` or the body's end."""
        self._expect("text/event-stream")
        parser = EventParser(limit)
        try:
            async for piece in self._pieces():
                for data in parser.feed(piece):
                    if data == DONE:
                        await self._after_done()
                        return
                    yield self._event(data)
            self._check_end_is_known()
            parser.end()
        except EventError as error:
            raise self._wrong(f"the stream {error}") from None

    async def _pieces(self) -> AsyncIterator[bytes]:
        """The answer's body. Ends where the body ends, in one of ``_CUT`` where it is cut."""
        while True:
            async with self.clock.step(None, ""):
                self.clock.silence()
                piece = await self.response.content.readany()
            if not piece:
                return
            yield piece

    async def _beginning(self, limit: int) -> bytes:
        found = bytearray()
        async for piece in self._pieces():
            found += piece
            if len(found) >= limit:
                break
        return bytes(found[:limit])

    async def _after_done(self) -> None:
        """The stream is complete; what its server may still have to say decides over the connection only."""
        with suppress(*_CUT):
            async with asyncio.timeout(_AFTER_DONE):
                await self.response.content.readany()

    def _check_end_is_known(self) -> None:
        """Where neither a length nor chunks say where a body ends, one that was cut looks like a whole one."""
        headers = self.response.headers
        is_chunked = "chunked" in headers.get(hdrs.TRANSFER_ENCODING, "").lower()
        if not is_chunked and hdrs.CONTENT_LENGTH not in headers and self.response.status != 204:
            raise self._wrong("the answer has neither a length nor chunks, so nobody can tell whether it is whole")

    def _expect(self, *kinds: str) -> str:
        """The content type, if it is one of these."""
        given = self.response.headers.get(hdrs.CONTENT_TYPE, "of no content type")
        kind = given.partition(";")[0].strip().lower()
        if kind not in kinds:
            raise self._wrong(f"the answer is {given[:80]}, not {' or '.join(kinds)}")
        return kind

    def _event(self, data: str) -> Any:
        value = self._decoded(data.encode())
        if isinstance(value, dict) and (value.get("error") or value.get("object") == "error"):
            raise self._wrong(f"the stream reports an error: {words_of(data.encode())}")
        return value

    def _decoded(self, data: bytes) -> Any:
        try:
            return msgspec.json.decode(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise self._wrong(f"the answer is not JSON ({error}): {words_of(data[:1000])}") from None

    def _wrong(self, happened: str) -> RequestError:
        return RequestError(self.asked, happened, sent=self.sent, status=self.response.status)
