"""SGLangServerEngine on a stand-in for SGLang's server, whose loader is ours."""

from __future__ import annotations

import base64
import json
import pickle
import threading
import time
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

from rollout_core.errors import WorkerError
from rollout_core.workers import SamplingParams, SGLangServerWorker
from rollout_core.workers.engine import Group, MediaItem, Request
from rollout_core.workers.sglang import loader, server
from rollout_core.workers.sglang.commands import LOADER
from rollout_core.workers.sglang.server import SGLangServerEngine
from unit.workers.sglang_stand_in import Model

PROMPT = [3, 9, 4]  # 9 is where a picture stands
IDENTITY = "ab" * 32


@pytest.fixture
def folder(tmp_path):
    config = {"vocab_size": 50, "max_position_embeddings": 64, "image_token_id": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"norm.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    return tmp_path


class Stand:
    """The server: ``generate`` says what a stream says; ``heard`` are the paths of what was asked."""

    def __init__(self, folder, version, generate, **info):
        self.model, self.generate, self.heard = Model(), generate, []
        self.aborted = threading.Event()
        self.info = {
            "version": version,
            "model_path": str(folder),
            "custom_weight_loader": [LOADER],
            "device": "cpu",
            "context_length": 64,
            "incremental_streaming_output": True,
            **info,
        }

    def __call__(self, line, asked):
        path = asked.line.split()[1]
        if path == "/generate":
            line.say("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            for event in self.generate(self, json.loads(asked.body)):
                text = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"
                line.say(f"{len(text):x}\r\n{text}\r\n")
            line.say("0\r\n\r\n")
            return True
        self.heard.append(path)
        value = {"success": True}
        if path == "/server_info":
            value = self.info
        elif path == "/update_weights_from_tensor":
            (text,) = json.loads(asked.body)["serialized_named_tensors"]
            loader.load(self.model, pickle.loads(base64.b64decode(text)))
        elif path == "/abort_request":
            self.aborted.set()
        body = json.dumps(value)
        line.say(f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}")
        return True


def made(serve, stand, timeout=5.0):
    return SGLangServerEngine(serve(stand).url, model=None, timeout=timeout, connections=8)


def answer(token, reason=None):
    meta = {"prompt_tokens": 3, "output_token_logprobs": [[-0.5, token, None]], "finish_reason": reason}
    return {"output_ids": [token], "meta_info": meta}


def submit(engine, pictures):
    media = [MediaItem("image", IDENTITY, b"png")] if pictures else []
    request = Request(key=1, prompt=PROMPT, place=0, sample=0, media=media)
    engine.submit(Group(SamplingParams(response_length=8, ignore_eos=True), [request], 8))


def until(engine, found, seconds=5.0):
    end = time.monotonic() + seconds
    while not any(one.status for one in found):
        assert time.monotonic() < end
        engine.wait([])
        engine.step(found.extend, lambda: None)
    return next(one for one in found if one.status)


@pytest.mark.parametrize(("version", "begins"), [("0.5.17", False), ("0.5.20", False), ("0.5.21", True), ("0.5.23", True)])
def test_updates_are_begun_where_there_is_such_a_thing(serve, folder, version, begins):
    stand = Stand(folder, version, None)
    engine = made(serve, stand)
    assert ("/begin_weight_update" in stand.heard, "/end_weight_update" in stand.heard) == (begins, begins)
    assert engine.call_device(b"") == b"cpu"
    engine.close()


@pytest.mark.parametrize(
    ("started", "capabilities"),
    [
        ({}, {"memory"}),
        ({"device": "cuda"}, set()),
        ({"device": "cuda", "enable_memory_saver": True, "enable_deterministic_inference": True}, {"memory", "seeds"}),
    ],
)
def test_a_worker_can_what_its_server_can(serve, folder, started, capabilities):
    with SGLangServerWorker(serve(Stand(folder, "0.5.17", None, **started)).url, timeout=5) as worker:
        assert worker.capabilities == capabilities


def test_an_older_server_is_refused(serve, folder):
    with pytest.raises(WorkerError, match=r"SGLang 0.5.16 is not served: from 0.5.17 on"):
        made(serve, Stand(folder, "0.5.16", None))


def test_w4_the_word_for_a_request_that_was_ended_before_it_was_sent_on(serve, folder):
    def generate(stand, request):
        words = {"message": f"Request {request['rid']} was aborted", "type": "invalid_request_error", "code": 400}
        return [{"error": words}, "[DONE]"]

    engine = made(serve, Stand(folder, "0.5.17", generate))
    submit(engine, pictures=False)
    assert until(engine, []).status == "aborted"
    engine.close()


def test_another_error_of_a_stream_fails_its_request(serve, folder):
    engine = made(serve, Stand(folder, "0.5.17", lambda stand, request: [{"error": {"message": "too long"}}, "[DONE]"]))
    submit(engine, pictures=False)
    ended = until(engine, [])
    assert (ended.status, "too long" in ended.cause.message) == ("failed", True)
    engine.close()


@pytest.mark.parametrize("pictures", [True, False])
def test_w4_a_server_that_looks_at_pictures_is_told_of_an_end_when_it_listens(serve, folder, monkeypatch, pictures):
    """Or after a while, as it may never come to it. Without pictures it is told at once."""
    monkeypatch.setattr(server, "_SENT_ON", 0.5)
    asked, told = threading.Event(), []

    def generate(stand, request):
        start = time.monotonic()
        asked.set()
        stand.aborted.wait(5)
        told.append(time.monotonic() - start)
        return [answer(5, {"type": "abort", "status_code": None}), "[DONE]"]

    engine = made(serve, Stand(folder, "0.5.23", generate))
    submit(engine, pictures)
    while not asked.is_set():
        engine._run(server.asyncio.sleep(0.01))
    found = []
    engine.abort([1], found.extend)
    assert found[-1].status == "aborted"
    assert (told[0] > 0.4) == pictures
    engine.close()


def test_w4_once_something_was_heard_of_pictures_an_end_is_told_at_once(serve, folder):
    told = []

    def generate(stand, request):
        yield answer(5)
        start = time.monotonic()
        stand.aborted.wait(5)
        told.append(time.monotonic() - start)
        yield answer(6, {"type": "abort", "status_code": None})
        yield "[DONE]"

    engine = made(serve, Stand(folder, "0.5.23", generate))
    submit(engine, pictures=True)
    found = []
    while not found:
        engine.wait([])
        engine.step(found.extend, lambda: None)
    engine.abort([1], found.extend)
    assert [token for one in found for token in one.token_ids] == [5, 6]
    assert told[0] < 1.0
    engine.close()


def until_told(asked):
    """Streams that say nothing before the server is told of an end; ``asked`` gets their names."""

    def generate(stand, request):
        asked.append(request["rid"])
        stand.aborted.wait(20)
        return [answer(5, {"type": "abort", "status_code": None}), "[DONE]"]

    return generate


def under_way(engine, count, asked, sent):
    """Submit requests, and wait until so many have been sent."""
    requests = [Request(key=key, prompt=PROMPT, place=0, sample=0) for key in range(count)]
    engine.submit(Group(SamplingParams(response_length=8, ignore_eos=True), requests, 8))
    end = time.monotonic() + 20
    while len(asked) < sent:
        assert time.monotonic() < end
        engine._run(server.asyncio.sleep(0.01))


def test_w4_ends_are_told_side_by_side(serve, folder):
    """A server answers neither of the first two calls before it has both."""

    class Slow(Stand):
        both = threading.Barrier(2, timeout=20)
        told: ClassVar = set()

        def __call__(self, line, asked):
            if "/abort_request" in asked.line and (name := json.loads(asked.body)["rid"]) not in self.told:
                self.told.add(name)
                self.both.wait()
            return super().__call__(line, asked)

    asked, found = [], []
    engine = made(serve, Slow(folder, "0.5.23", until_told(asked)), timeout=20.0)
    under_way(engine, 2, asked, 2)
    engine.abort(None, found.extend)
    assert {one.key: one.status for one in found if one.status} == {0: "aborted", 1: "aborted"}
    engine.close()


def test_w4_what_waits_for_a_connection_when_it_is_ended_is_never_sent(serve, folder):
    asked, found = [], []
    stand = Stand(folder, "0.5.23", until_told(asked))
    engine = made(serve, stand, timeout=20.0)
    under_way(engine, 60, asked, 8)
    engine.abort(None, found.extend)
    assert [one.status for one in found if one.status] == ["aborted"] * 60
    assert len(asked) == 8
    assert stand.heard.count("/abort_request") < 60  # nor is the server told of it
    engine.close()
