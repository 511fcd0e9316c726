"""Clause W7: each request is sent once, held to its timeouts, and answered or failed, never both."""

import asyncio
import json
import socket
import threading
import time
from contextlib import aclosing

import pytest

from rollout_core.errors import RolloutCoreError, TransferError, WorkerError
from rollout_core.workers.http.client import Client, NoAnswerError, RequestError, Timeouts

GUARD = 30.0  # seconds after which a test fails rather than hangs
LONG = 60.0  # a bound that a test is not about, and which must not be the one that ends it


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, GUARD))


def answer(status="200 OK", kind="application/json", body=b"{}", more=()):
    """A whole answer, as bytes."""
    lines = [f"HTTP/1.1 {status}", *([f"Content-Type: {kind}"] if kind else []), f"Content-Length: {len(body)}", *more, "", ""]
    return "\r\n".join(lines).encode() + body


def says(*pieces, keep=True):
    """The answer that says these bytes, and keeps the connection or closes it."""

    def behave(line, asked):
        line.say(*pieces)
        return keep

    return behave


def then_hangs(*pieces):
    def behave(line, asked):
        line.say(*pieces)
        line.hang()

    return behave


def then_resets(*pieces):
    def behave(line, asked):
        line.say(*pieces)
        line.reset()

    return behave


def chunks(*pieces, end=True):
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + (b"0\r\n\r\n" if end else b"")


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n"
JSON_CHUNKED, SSE_CHUNKED = HEAD % b"application/json", HEAD % b"text/event-stream"


async def post(server, value=None, **options):
    async with Client(server.url, **options) as client:
        return await client.post("/run", {"x": 1} if value is None else value)


async def get(server, **options):
    async with Client(server.url, **options) as client:
        return await client.get("/look")


async def stream(server, **options):
    async with Client(server.url, **options) as client:
        return [event async for event in client.stream("/run", {"stream": True})]


def failure(coroutine, kind=RolloutCoreError):
    """The error, and the seconds until it came."""
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        run(coroutine)
    return caught.value, time.monotonic() - began


# What is an answer


def test_w7_json_goes_out_and_json_comes_back(serve):
    server = serve(says(answer(body=b'{"text": ["\xc3\xa4", null, 1.5]}')))
    sent = {"ids": [1, 2], "name": "ä", "nested": {"none": None, "pair": (True, 0.1)}}
    assert run(post(server, sent)) == {"text": ["ä", None, 1.5]}
    (asked,) = server.asked
    assert asked.line == "POST /run HTTP/1.1"
    assert json.loads(asked.body) == {"ids": [1, 2], "name": "ä", "nested": {"none": None, "pair": [True, 0.1]}}
    assert asked.headers["content-type"] == "application/json"
    assert "transfer-encoding" not in asked.headers  # its length says where it ends


def test_w7_a_large_request_arrives_whole(serve):
    server = serve(says(answer()))
    sent = ["x" * 100_000] * 57  # more than five of the pieces that it is handed over in
    run(post(server, sent))
    assert json.loads(server.asked[0].body) == sent


@pytest.mark.parametrize(
    ("said", "value"),
    [
        (answer(kind="text/plain; charset=utf-8", body=b"cache flushed"), "cache flushed"),
        (answer(kind=None, body=b"{}"), "{}"),  # SGLang's words are of no type
        (answer(kind=None, body=b""), ""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", ""),
        (answer(status="201 Created", body=b"[1]"), [1]),
        (JSON_CHUNKED + chunks(b'{"a"', b": 1}"), {"a": 1}),
        (answer(kind="application/json; charset=utf-8", body=b"null"), None),
    ],
    ids=["text", "no type", "empty", "204", "201", "chunked", "null"],
)
def test_w7_values(serve, said, value):
    assert run(post(serve(says(said)))) == value
    assert run(get(serve(says(said)))) == value


def test_w7_headers_go_with_each_request(serve):
    server = serve(says(answer()))
    run(post(server, headers={"Authorization": "Bearer abc"}))
    assert server.asked[0].headers["authorization"] == "Bearer abc"


def test_w7_requests_share_connections(serve):
    server = serve(says(answer()))

    async def five():
        async with Client(server.url) as client:
            for _ in range(5):
                await client.post("/run", {})
            assert not client._under_way  # a request that is over is not kept

    run(five())
    assert [asked.connection for asked in server.asked] == [0] * 5


@pytest.mark.parametrize("whole", [True, False], ids=["in one piece", "in two"])
def test_w7_no_request_is_lost_on_the_connection_of_a_failure(serve, whole):
    """As servers do whose code raised: they close behind the answer, which is heard later."""
    failure = answer(status="500 Internal Server Error", body=b"failed")

    def closes_late(line, asked):
        if whole:
            line.say(failure)
        else:
            line.say(failure[:-3])
            time.sleep(0.05)
            line.say(failure[-3:])
        time.sleep(0.1)
        return False

    server = serve(closes_late, says(answer(body=b"2")))

    async def ask():
        async with Client(server.url) as client:
            with pytest.raises(RequestError, match="500 Internal Server Error: failed"):
                await client.post("/run", {})
            return await client.post("/run", {})

    assert run(ask()) == 2


def test_w7_proxies_of_the_environment_are_not_used(serve, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert run(post(serve(says(answer(body=b"1"))))) == 1


# What is none

NOT_ANSWERS = {
    "500 with JSON": (answer("500 Internal Server Error", body=b'{"error": {"message": "out of  memory"}}'), "500.*out of memory"),
    "400 of FastAPI": (answer("400 Bad Request", body=b'{"detail": "no such model"}'), "400 Bad Request: no such model"),
    "500 with HTML": (
        answer("502 Bad Gateway", "text/html", b"<html>\n<h1>Bad gateway</h1>" + b"." * 5000),
        r"502.*<h1>.* \.\.\.;",
    ),
    "503 without words": (answer("503 Service Unavailable", None, b""), "503 Service Unavailable; the request may"),
    "words that are cut": (b"HTTP/1.1 500 Oh\r\nContent-Length: 10\r\n\r\nabc", "500 Oh.*its words were cut"),
    "redirect": (answer("307 Temporary Redirect", more=["Location: /elsewhere"]), "307.*to /elsewhere.*not followed"),
    "wrong JSON": (answer(body=b'{"a": }'), "not JSON"),
    "no JSON at all": (answer(body=b""), "not JSON"),
    "NaN": (answer(body=b'{"a": NaN}'), "not JSON"),
    "HTML": (answer(kind="text/html", body=b"<html>"), "is text/html, not application/json"),
    "text that is not UTF-8": (answer(kind="text/plain", body=b"ab\xff"), "not UTF-8 at its byte 2"),
    "no end": (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n[1]", "neither a length nor chunks"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", "no HTTP"),
    "wrong chunks": (JSON_CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n", "no HTTP"),
    "two lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} ", "no HTTP"),
    "endless header": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, "no HTTP"),
}


@pytest.mark.parametrize("name", NOT_ANSWERS)
def test_w7_a_failure_is_never_a_value(serve, name):
    said, words = NOT_ANSWERS[name]
    server = serve(says(said, keep=False))
    error, _ = failure(post(server), RequestError)
    assert f"POST {server.url}/run: " in str(error)
    assert str(error).endswith("; the request may have been carried out")
    assert error.sent
    assert len(str(error)) < 600
    with pytest.raises(RolloutCoreError, match=words):
        run(post(server))
    assert len(server.asked) == 2


def test_w7_the_status_is_there_for_programs(serve):
    error, _ = failure(post(serve(says(answer("404 Not Found")))), RequestError)
    assert isinstance(error, WorkerError)
    assert error.status == 404


def test_w7_redirects_reach_nobody_else(serve):
    other = serve(says(answer()))
    server = serve(says(answer("302 Found", more=[f"Location: {other.url}/run"])))
    failure(post(server), RequestError)
    failure(get(server), RequestError)
    assert other.connections == 0


CUT = {
    "before the answer": says(keep=False),
    "reset before the answer": then_resets(),
    "within the headers": says(b"HTTP/1.1 200 OK\r\nContent-Le", keep=False),
    "after the headers": says(answer(body=b"[1, 2]")[:-6], keep=False),
    "within the body": says(answer(body=b"[1, 2]")[:-3], keep=False),
    "within a number": says(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 4\r\n\r\n12", keep=False),
    "reset within the body": then_resets(answer(body=b"[1, 2]")[:-3]),
    "between chunks": says(JSON_CHUNKED + chunks(b"[1]", end=False), keep=False),
    "within a chunk": says(JSON_CHUNKED + b"8\r\n[1, 2", keep=False),
    "reset between chunks": then_resets(JSON_CHUNKED + chunks(b"[1]", end=False)),
}


@pytest.mark.parametrize("name", CUT)
def test_w7_an_answer_cut_short_is_an_error_and_its_post_is_not_sent_again(serve, name):
    server = serve(CUT[name], says(answer(body=b'"a second try"')))
    error, _ = failure(post(server), NoAnswerError)
    assert isinstance(error, TransferError)
    assert error.sent
    assert "lost before the answer was complete" in str(error)
    assert [asked.line for asked in server.asked] == ["POST /run HTTP/1.1"]


# Dead servers


def dead_url():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_w7_a_dead_server_is_reported_not_waited_for():
    async def ask():
        async with Client(dead_url(), timeout=Timeouts(connect=LONG, silence=LONG)) as client:
            await client.post("/run", {})

    error, seconds = failure(ask(), NoAnswerError)
    assert not error.sent
    assert "no connection" in str(error)
    assert str(error).endswith("; the request was not sent")
    assert seconds < LONG / 4


def test_w7_no_connection_in_time():
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        held = []
        while True:  # fill the queue of connections that nobody accepts, so that the next one gets no answer
            held.append(socket.socket())
            held[-1].settimeout(0.2)
            try:
                held[-1].connect(listener.getsockname())
            except TimeoutError:
                break

        async def ask():
            async with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=Timeouts(connect=0.3)) as client:
                await client.post("/run", {})

        error, seconds = failure(ask(), NoAnswerError)
        for one in held:
            one.close()
    assert 0.3 <= seconds < 10
    assert "no connection within 0.3 s (Timeouts.connect)" in str(error)
    assert not error.sent


def test_w7_a_server_that_dies_meanwhile_is_reported_at_once(serve):
    server = serve(then_hangs())

    async def ask():
        async with Client(server.url, timeout=Timeouts(silence=LONG)) as client:
            asking = asyncio.create_task(client.post("/run", {}))
            await asyncio.to_thread(server.arrived.acquire)
            await asyncio.to_thread(server.close)
            await asking

    error, seconds = failure(ask(), NoAnswerError)
    assert error.sent
    assert seconds < LONG / 4


# Timeouts


@pytest.mark.parametrize(
    "said",
    [b"", b"HTTP/1.1 200", answer(body=b"[1, 2]")[:-6], answer(body=b"[1, 2]")[:-2], JSON_CHUNKED + chunks(b"[", end=False)],
    ids=["no answer", "half a header", "headers alone", "half a body", "a chunk"],
)
def test_w7_silence_ends_a_request_in_its_time(serve, said):
    server = serve(then_hangs(said), says(answer()))
    error, seconds = failure(post(server, timeout=Timeouts(silence=0.4)), NoAnswerError)
    assert 0.4 <= seconds < 10
    assert "the server was silent for 0.4 s (Timeouts.silence); the request may have been carried out" in str(error)
    assert len(server.asked) == 1


def test_w7_a_get_that_takes_too_long_is_not_sent_again(serve):
    server = serve(then_hangs(), says(answer()))
    failure(get(server, timeout=Timeouts(silence=0.2)), NoAnswerError)
    assert len(server.asked) == 1


def drip(piece, every):
    def behave(line, asked):
        line.say(JSON_CHUNKED if b"data" not in piece else SSE_CHUNKED)
        while not line.over.wait(every):
            line.say(chunks(piece, end=False))

    return behave


def test_w7_a_drip_feed_ends_with_the_total(serve):
    timeout = Timeouts(silence=LONG, total=0.5)
    error, seconds = failure(post(serve(drip(b" ", 0.02)), timeout=timeout), NoAnswerError)
    assert 0.5 <= seconds < 10
    assert "not complete within 0.5 s (Timeouts.total)" in str(error)


def test_w7_the_total_covers_the_wait_for_the_answer(serve):
    error, seconds = failure(post(serve(then_hangs()), timeout=Timeouts(silence=LONG, total=0.3)), NoAnswerError)
    assert 0.3 <= seconds < 10
    assert "Timeouts.total" in str(error)


def slowly(head, body):
    def behave(line, asked):
        line.say(head)
        for byte in body:
            if line.over.wait(0.02):
                return
            line.say(bytes([byte]))

    return behave


def test_w7_a_slow_answer_that_is_never_silent_is_waited_for(serve):
    body = b"[" + b" " * 100 + b"1]"  # over 2 s in all
    head = answer(body=body)[: -len(body)]
    assert run(post(serve(slowly(head, body)), timeout=Timeouts(silence=1.5))) == [1]


def test_w7_headers_have_to_be_there_in_time(serve):
    error, seconds = failure(post(serve(slowly(b"", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000)), timeout=Timeouts(silence=0.3)))
    assert 0.3 <= seconds < 10
    assert "Timeouts.silence" in str(error)


def test_w7_a_timeout_of_one_request_is_for_that_one(serve):
    server = serve(then_hangs(), says(answer(body=b"1")))

    async def ask():
        async with Client(server.url, timeout=Timeouts(silence=LONG)) as client:
            with pytest.raises(NoAnswerError, match="0.2 s"):
                await client.post("/run", {}, timeout=Timeouts(silence=0.2))
            return await client.post("/run", {})

    assert run(ask()) == 1


def test_w7_a_server_that_reads_nothing_is_silent_too(serve):
    server = serve(then_hangs(), reads_bodies=False)
    value = ["x" * (1 << 20)] * 64  # more than the system takes in between
    error, seconds = failure(post(server, value, timeout=Timeouts(silence=0.5)), NoAnswerError)
    assert 0.5 <= seconds < 20
    assert "Timeouts.silence" in str(error)
    assert error.sent


def test_w7_a_request_taken_slowly_is_no_silence(serve):
    def take(line, asked):
        left = int(asked.headers["content-length"])
        while left > 0:
            left -= len(line.exactly(min(left, 8 << 20)))
            line.over.wait(0.05)
        line.say(answer(body=b"1"))

    server = serve(take, reads_bodies=False)
    assert run(post(server, ["x" * (1 << 20)] * 96, timeout=Timeouts(silence=1.0))) == 1


@pytest.mark.parametrize("name", ["connect", "silence", "total", "queue"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "3"])
def test_w7_timeouts_are_checked(name, value):
    with pytest.raises(WorkerError, match=f"Timeouts.{name} is"):
        Timeouts(**{name: value})


# At most once


def test_w7_a_connection_closed_while_idle_is_not_used(serve):
    """The client's loop was busy while the server closed: it looks before it sends."""
    server = serve(says(answer(body=b"1"), keep=False), says(answer(body=b"2")))

    async def ask():
        async with Client(server.url) as client:
            assert await client.post("/run", {}) == 1
            assert server.ended.acquire(timeout=GUARD)  # blocks the loop
            return await client.post("/run", {})

    assert run(ask()) == 2
    assert [asked.connection for asked in server.asked] == [0, 1]


def test_w7_a_post_on_a_connection_that_closes_is_not_sent_again_and_a_get_once(serve):
    """The server closes as the next request comes in, as one does whose idle time is up."""
    for ask, tries in (("post", 1), ("get", 2)):
        server = serve(says(answer()), says(keep=False), says(keep=False), says(answer()))

        async def twice(ask=ask, server=server):
            async with Client(server.url) as client:
                await getattr(client, ask)("/run")
                await getattr(client, ask)("/run")

        error, _ = failure(twice(), NoAnswerError)
        assert error.sent
        assert len(server.asked) == 1 + tries


def test_w7_a_second_answer_is_not_the_answer_to_the_next_request(serve):
    server = serve(says(answer(body=b"1") + answer(body=b'"of the first"')), says(answer(body=b"2")))

    async def ask():
        async with Client(server.url) as client:
            return [await client.post("/run", {}), await client.post("/run", {})]

    assert run(ask()) == [1, 2]


def test_w7_a_second_answer_that_comes_later_is_not_either(serve):
    def late(line, asked):
        line.say(answer(body=b"1"))
        assert go.acquire(timeout=GUARD)
        line.say(answer(body=b'"of the first"'))
        said.release()
        return True

    go, said = threading.Semaphore(0), threading.Semaphore(0)
    server = serve(late, says(answer(body=b"2")))

    async def ask():
        async with Client(server.url) as client:
            first = await client.post("/run", {})
            go.release()
            await asyncio.to_thread(said.acquire)
            return [first, await client.post("/run", {})]

    assert run(ask()) == [1, 2]


def test_w7_an_answer_before_the_request_was_read_leaves_the_next_one_whole(serve):
    def early(line, asked):
        line.say(answer("413 Payload Too Large"))
        line.hang()

    server = serve(early, says(answer(body=b"2")), reads_bodies=False)

    async def ask():
        async with Client(server.url, timeout=Timeouts(silence=LONG)) as client:
            with pytest.raises(RequestError, match="413"):
                await client.post("/run", ["x" * (1 << 20)] * 64)
            return await client.get("/look")

    assert run(ask()) == 2
    assert [asked.line.split()[0] for asked in server.asked] == ["POST", "GET"]
    assert server.connections == 2


def test_w7_cancelling_closes_the_connection_and_gives_the_turn_back(serve):
    server = serve(then_hangs(), says(answer(body=b"2")))

    async def ask():
        async with Client(server.url, connections=1) as client:
            asking = asyncio.create_task(client.post("/run", {}))
            await asyncio.to_thread(server.arrived.acquire)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            return await client.post("/run", {})

    assert run(ask()) == 2


def test_w7_a_callers_own_timeout_is_the_callers(serve):
    server = serve(then_hangs())

    async def ask():
        async with Client(server.url, timeout=Timeouts(silence=LONG)) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await client.post("/run", {})

    run(ask())


@pytest.mark.parametrize("value", [{"x": float("nan")}, [float("inf")], {"x": {1, 2}}, b"bytes", {("a",): 1}])
def test_w7_what_is_no_json_is_not_sent(serve, value):
    server = serve(says(answer()))
    error, _ = failure(post(server, value), RequestError)
    assert not error.sent
    assert server.connections == 0


@pytest.mark.parametrize("path", ["run", "", "//[", "/a b", "/a#b", "/a\r\nX: y", None, 3])
def test_w7_a_path_that_is_none_is_not_sent(serve, path):
    server = serve(says(answer("404 Not Found")))

    async def ask():
        async with Client(server.url) as client:
            await client.post(path, {})

    error, _ = failure(ask(), WorkerError)
    assert len(server.asked) == (path == "//[")  # an odd path, but one
    assert error.sent == (path == "//[")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:80",
        "ftp://localhost",
        "http://",
        "http://a:99999",
        "http://u:p@a",
        "http://a?x=1",
        "http://a b",
        None,
        "http://[",
    ],
)
def test_an_address_that_is_none(url):
    with pytest.raises(WorkerError, match="no address of a server"):
        Client(url)


@pytest.mark.parametrize("headers", [{"A": "b\r\nC: d"}, {"": "a"}, {"A\n": "b"}, {"A": 3}])
def test_headers_that_are_none(headers):
    with pytest.raises(WorkerError, match="header"):
        Client("http://localhost:1", headers=headers)


@pytest.mark.parametrize("option", ["connections", "body_limit"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, None])
def test_bounds_that_are_none(option, value):
    with pytest.raises(WorkerError, match=option):
        Client("http://localhost:1", **{option: value})


# Bounds


def test_w7_an_endless_body_is_cut_off(serve):
    def endless(line, asked):
        line.say(JSON_CHUNKED)
        while not line.over.is_set():
            line.say(chunks(b" " * 10_000, end=False))

    error, _ = failure(post(serve(endless), body_limit=100_000), RequestError)
    assert "more than 100000 bytes (body_limit)" in str(error)
    server = serve(says(answer(body=b"[" + b"1," * 10 + b"1]")))
    assert run(post(server, body_limit=23)) == [1] * 11
    assert "more than 22 bytes" in str(failure(post(server, body_limit=22))[0])


def test_w7_an_endless_body_of_a_failure_is_cut_off(serve):
    def endless(line, asked):
        line.say(JSON_CHUNKED.replace(b"200 OK", b"500 Oh"))
        while not line.over.is_set():
            line.say(chunks(b"no " * 10_000, end=False))

    error, _ = failure(post(serve(endless)), RequestError)
    assert error.status == 500
    assert len(str(error)) < 600


def test_w7_no_more_requests_at_once_than_connections(serve):
    under_way, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(3)

    def count(line, asked):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        together.wait(GUARD)  # as many as may be are there at once
        with lock:
            under_way -= 1
        line.say(answer(body=asked.body))
        return True

    server = serve(count)

    async def ask():
        async with Client(server.url, connections=3, timeout=Timeouts(total=LONG)) as client:
            return await asyncio.gather(*(client.post("/run", number) for number in range(12)))

    assert run(ask()) == list(range(12))
    assert most == 3
    assert server.connections == 3


def test_w7_the_wait_for_a_turn_counts_for_nothing_but_itself(serve):
    def after_a_while(line, asked):
        line.over.wait(0.5)
        line.say(answer(body=asked.body))
        return True

    server = serve(after_a_while)

    async def ask(**bounds):
        timeout = Timeouts(connect=1.4, silence=1.4, total=1.4, **bounds)
        async with Client(server.url, connections=1, timeout=timeout) as client:
            return await asyncio.gather(*(client.post("/run", number) for number in range(4)), return_exceptions=True)

    assert run(ask()) == [0, 1, 2, 3]  # the last waited for 1.5 s
    first, *others = run(ask(queue=0.2))
    assert first == 0
    for other in others:
        assert isinstance(other, NoAnswerError)
        assert "no connection was free within 0.2 s (Timeouts.queue); the request was not sent" in str(other)
    assert len(server.asked) == 5


# Streams


def test_w7_events(serve):
    body = (
        "\ufeff: a comment\n\n"
        'event: token\nid: 1\nretry: 5\ndata: {"a": 1}\n\n'
        'data: {"text":\r\ndata: "ä€🙂"}\r\n\r\n'
        "data:2\r\r"
        ":\n\n"
        "data: [3]\n\n"
        "data: [DONE]\n\n"
    ).encode()
    wanted = [{"a": 1}, {"text": "ä€🙂"}, 2, [3]]
    byte_by_byte = [body[i : i + 1] for i in range(len(body))]
    for pieces in ([body], byte_by_byte, [body[i : i + 7] for i in range(0, len(body), 7)]):
        assert run(stream(serve(says(SSE_CHUNKED + chunks(*pieces))))) == wanted


def test_w7_events_come_as_they_are_said(serve):
    heard = threading.Semaphore(0)

    def in_turn(line, asked):
        line.say(SSE_CHUNKED)
        for number in range(3):
            line.say(chunks(b"data: %d\n\n" % number, end=False))
            assert heard.acquire(timeout=GUARD)  # the next one only once this one has arrived
        line.say(chunks(b"data: [DONE]\n\n"))
        return True

    server = serve(in_turn)

    async def listen():
        async with Client(server.url) as client:
            events = []
            async for event in client.stream("/run", {}):
                events.append(event)
                heard.release()
            return events

    assert run(listen()) == [0, 1, 2]


def test_w7_a_whole_body_ends_a_stream_too(serve):
    body = b"data: 1\n\ndata: 2\n\n"
    assert run(stream(serve(says(SSE_CHUNKED + chunks(body))))) == [1, 2]
    assert run(stream(serve(says(answer(kind="text/event-stream", body=body))))) == [1, 2]
    until_closed = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    assert run(stream(serve(says(until_closed + body + b"data: [DONE]\n\n", keep=False)))) == [1, 2]


STREAMS_CUT = {
    "between events": (SSE_CHUNKED + chunks(b"data: 1\n\n", end=False), NoAnswerError, "lost"),
    "within an event": (SSE_CHUNKED + chunks(b"data: 1\n\ndata: 2", end=False), NoAnswerError, "lost"),
    "within a character": (SSE_CHUNKED + chunks(b'data: 1\n\ndata: "\xc3', end=False), NoAnswerError, "lost"),
    "an event without its end": (SSE_CHUNKED + chunks(b"data: 1\n\ndata: 2\n"), RequestError, "middle of an event"),
    "a line without its end": (SSE_CHUNKED + chunks(b"data: 1\n\ndata: 2"), RequestError, "middle of an event"),
    "no end that can be told": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\ndata: 1\n\n",
        RequestError,
        "neither a length nor chunks",
    ),
    "not UTF-8": (SSE_CHUNKED + chunks(b'data: 1\n\ndata: "\xff"\n\n'), RequestError, "not UTF-8"),
    "not JSON": (SSE_CHUNKED + chunks(b"data: 1\n\ndata: {]\n\n"), RequestError, "not JSON"),
    "an error as an event": (
        SSE_CHUNKED + chunks(b'data: 1\n\ndata: {"error": {"message": "the model died"}}\n\ndata: [DONE]\n\n'),
        RequestError,
        "reports an error: the model died",
    ),
    "an error of older servers": (
        SSE_CHUNKED + chunks(b'data: 1\n\ndata: {"object": "error", "message": "died"}\n\ndata: [DONE]\n\n'),
        RequestError,
        "reports an error: died",
    ),
}


@pytest.mark.parametrize("name", STREAMS_CUT)
def test_w7_a_stream_cut_short_is_an_error_never_an_end(serve, name):
    said, kind, words = STREAMS_CUT[name]
    server = serve(says(said, keep=False), says(answer()))
    events = []

    async def listen():
        async with Client(server.url) as client:
            async for event in client.stream("/run", {}):
                events.append(event)

    error, _ = failure(listen(), kind)
    assert words in str(error)
    assert error.sent
    assert events == [1]
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (answer("400 Bad Request", body=b'{"message": "too long"}'), "400 Bad Request: too long"),
        (answer(body=b"{}"), "is application/json, not text/event-stream"),
    ],
    ids=["400", "JSON"],
)
def test_w7_an_answer_that_is_no_stream(serve, said, words):
    assert words in str(failure(stream(serve(says(said))), RequestError)[0])


def test_w7_a_null_error_is_none(serve):
    assert run(stream(serve(says(SSE_CHUNKED + chunks(b'data: {"error": null}\n\n'))))) == [{"error": None}]


def test_w7_silence_within_a_stream(serve):
    server = serve(then_hangs(SSE_CHUNKED + chunks(b"data: 1\n\n", end=False)))
    error, seconds = failure(stream(server, timeout=Timeouts(silence=0.4)), NoAnswerError)
    assert 0.4 <= seconds < 10
    assert "Timeouts.silence" in str(error)


def test_w7_a_stream_has_no_total_unless_it_is_given_one(serve):
    def for_a_while(line, asked):
        line.say(SSE_CHUNKED)
        for number in range(20):
            line.over.wait(0.03)
            line.say(chunks(b"data: %d\n\n" % number, end=False))
        line.say(chunks(b"data: [DONE]\n\n"))
        return True

    server = serve(for_a_while)
    assert run(stream(server, timeout=Timeouts(total=0.3))) == list(range(20))

    async def with_its_own():
        async with Client(server.url) as client:
            return [event async for event in client.stream("/run", {}, timeout=Timeouts(total=0.3))]

    assert "Timeouts.total" in str(failure(with_its_own(), NoAnswerError)[0])


def test_w7_a_reader_that_takes_its_time_is_no_silence(serve):
    server = serve(says(SSE_CHUNKED + chunks(b"data: 1\n\ndata: 2\n\n", b"data: 3\n\n")))

    async def listen():
        events = []
        async with Client(server.url) as client:
            async for event in client.stream("/run", {}, timeout=Timeouts(silence=1.0)):
                events.append(event)
                await asyncio.sleep(1.2)
        return events

    assert run(listen()) == [1, 2, 3]


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["one line", "many lines"])
def test_w7_an_endless_event_is_cut_off(serve, end):
    def endless(line, asked):
        line.say(SSE_CHUNKED)
        while not line.over.is_set():
            line.say(chunks(b"data: " + b"x" * 10_000 + end, end=False))

    error, _ = failure(stream(serve(endless), body_limit=100_000), RequestError)
    assert "an event of more than 100000 bytes" in str(error)


def test_w7_a_stream_that_is_left_ends_at_the_server_and_gives_its_turn_back(serve):
    server = serve(drip(b"data: 1\n\n", 0.01), says(answer(body=b"2")))

    async def leave():
        async with Client(server.url, connections=1) as client:
            async with aclosing(client.stream("/run", {})) as events:
                async for _ in events:
                    break
            assert await asyncio.to_thread(server.ended.acquire, timeout=GUARD)
            return await client.post("/run", {})

    assert run(leave()) == 2


def test_w7_the_connection_of_a_whole_stream_is_used_again(serve):
    done = says(SSE_CHUNKED, chunks(b"data: 1\n\n", b"data: [DONE]\n\n", end=False), b"0\r\n\r\n")
    server = serve(done)

    async def twice():
        async with Client(server.url) as client:
            return [[event async for event in client.stream("/run", {})] for _ in range(2)]

    assert run(twice()) == [[1], [1]]
    assert server.connections == 1


def test_w7_a_stream_is_over_with_done_whatever_its_body_does(serve):
    server = serve(then_hangs(SSE_CHUNKED + chunks(b"data: 1\n\ndata: [DONE]\n\ndata: 2\n\n", end=False)), says(answer(body=b"2")))

    async def ask():
        async with Client(server.url, timeout=Timeouts(silence=LONG)) as client:
            return [event async for event in client.stream("/run", {})], await client.post("/run", {})

    assert run(ask()) == ([1], 2)
    assert server.connections == 2


# The client's own end


def test_w7_closing_ends_what_is_under_way(serve):
    """A request without an answer, a body without its end, a stream, and one that waits for its turn."""
    server = serve(then_hangs(), then_hangs(answer(body=b"[1]")[:-1]), then_hangs(SSE_CHUNKED + chunks(b"data: 1\n\n", end=False)))

    async def close_all():
        client = Client(server.url, connections=3, timeout=Timeouts(connect=LONG, silence=LONG))
        asking = []
        for number in range(2):
            asking.append(asyncio.create_task(client.post("/run", number)))
            await asyncio.to_thread(server.arrived.acquire)
        streamed = client.stream("/run", {})
        assert await anext(streamed) == 1
        asking += [asyncio.create_task(anext(streamed)), asyncio.create_task(client.post("/run", {}))]
        await asyncio.sleep(0.05)  # the last two are waiting
        await client.close()
        await client.close()
        ends = await asyncio.gather(*asking, return_exceptions=True)
        with pytest.raises(NoAnswerError, match="was closed; the request was not sent"):
            await client.post("/run", {})
        return ends

    began = time.monotonic()
    ends = run(close_all())
    assert time.monotonic() - began < LONG / 4
    for end in ends:
        assert isinstance(end, NoAnswerError)
        assert "the client was closed" in str(end)
    assert [end.sent for end in ends] == [True, True, True, False]
    assert len(server.asked) == 3


def test_w7_a_stream_not_being_read_is_closed_too(serve):
    server = serve(drip(b"data: 1\n\n", 0.01))

    async def close_between():
        client = Client(server.url)
        events = client.stream("/run", {})
        await anext(events)
        await client.close()
        with pytest.raises(NoAnswerError, match="the client was closed"):
            while True:
                await anext(events)

    run(close_between())


def test_w7_a_client_stays_in_its_loop(serve):
    server = serve(says(answer()))
    client = Client(server.url)
    with asyncio.Runner() as runner:
        runner.run(client.post("/run", {}))
        error, _ = failure(client.post("/run", {}), RequestError)
        assert "another event loop" in str(error)
        assert not error.sent
        runner.run(client.close())
