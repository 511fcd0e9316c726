"""Real servers (W7): shared by workers, stopped in the middle of answers, killed; and what is left in them of requests that were
ended."""

import os
import re
import signal
import time
import urllib.request
from concurrent.futures import wait

import pytest
import torch

from rollout_core.errors import PlanMismatchError, TransferError, WorkerError
from rollout_core.workers import SamplingParams, SGLangServerWorker, VLLMServerWorker
from support.engines import ENGINE, VLLM_CACHE, changed, make_model, running_server

WORKER = {"vllm": VLLMServerWorker, "sglang": SGLangServerWorker}[ENGINE]
SHORT = SamplingParams(response_length=8, ignore_eos=True)
PROMPTS = [[5], [17, 3, 60], [9, 2, 2, 12]]
POSITIONS = 10_000
ENDLESS = SamplingParams(response_length=9_900, ignore_eos=True)
LONGER = {
    "vllm": [f"--max-model-len={POSITIONS}", f"--kv-cache-memory-bytes={4 * VLLM_CACHE}"],
    "sglang": [f"--context-length={POSITIONS}", "--max-total-tokens=32768", "--enable-metrics"],
}[ENGINE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = make_model(tied=True)
    model.config.max_position_embeddings = POSITIONS
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with running_server(ENGINE, folder, LONGER) as server:
        yield server


def said(server, path):
    return urllib.request.urlopen(server.url + path, timeout=10).read().decode()


def running_in(server):
    """Requests that the server says it works on or has queued."""
    if ENGINE == "vllm":
        text = said(server, "/metrics")
        counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)", text, re.MULTILINE)
        assert len(counts) == 2, text[:2000]
        return sum(map(float, counts))
    text = said(server, "/v1/loads")
    counts = re.findall(r'"num_(?:running|waiting)_reqs": ?(\d+)', text)
    assert counts, text[:2000]
    return sum(map(int, counts))


def generated(server):
    """Tokens that it has sampled since it was started; SGLang counts those of a request when it ends."""
    found = re.findall(rf"^{ENGINE}:generation_tokens_total\{{[^}}]*\}} (\S+)", said(server, "/metrics"), re.MULTILINE)
    return sum(map(float, found))


def eventually(holds, seconds=60):
    """A server's figures are of its last report."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


def settled(server, seconds=60):
    return eventually(lambda: running_in(server) == 0, seconds)


@pytest.mark.parametrize("way", ["aborted", "closed"])
def test_w4_no_request_is_left_in_the_server(server, way):
    """Neither of those that are aborted nor of those whose sockets close with their worker. By themselves they would end after tens
    of seconds; and tokens tell if they were let, as far as the server's front end hears of them."""
    with WORKER(server.url, timeout=30) as worker:
        before = generated(server)
        worker.generate(PROMPTS, SHORT)
        assert eventually(lambda: generated(server) - before >= SHORT.response_length * len(PROMPTS)), "tokens are not counted"
        futures = worker.submit(PROMPTS, ENDLESS)
        assert eventually(lambda: running_in(server) == len(PROMPTS))
        if way == "aborted":
            worker.abort()
            assert {future.result(0).status for future in futures} == {"aborted"}
            assert settled(server, 10)
    assert {future.result(0).status for future in futures} <= {"aborted", "failed"}
    assert settled(server, 10)
    assert eventually(lambda: generated(server) - before > SHORT.response_length * len(PROMPTS)), "nor are these"
    assert generated(server) - before < ENDLESS.response_length * len(PROMPTS) / 2


def test_workers_share_a_server_and_each_may_update_it(server):
    """Each counts its own updates; a worker that comes later begins at 0, with whatever the server has."""
    model = make_model(tied=True)
    with WORKER(server.url, timeout=30) as one, WORKER(server.url, timeout=30) as other:
        first, second = changed(model, 1), changed(model, 2)
        assert [one.sync_weights(first).version for _ in range(3)] == [1, 2, 3]
        tokens = [done.token_ids for done in one.generate(PROMPTS, SHORT)]
        assert [done.token_ids for done in other.generate(PROMPTS, SHORT)] == tokens
        assert other.sync_weights(second).version == 1
        assert one.weights_digest() == other.weights_digest()
        assert [done.token_ids for done in one.generate(PROMPTS, SHORT)] != tokens
        assert one.sync_weights(first).version == 4


def test_a_model_of_another_shape_is_refused_and_the_server_serves_on(server):
    with WORKER(server.url, timeout=30) as worker:
        with pytest.raises(PlanMismatchError, match="lm_head"):
            worker.sync_weights({**make_model(tied=True).state_dict(), "lm_head.weight": torch.zeros(3, 3)})
        assert len(worker.generate(PROMPTS, SHORT)) == 3


def test_w7_a_server_that_stops_is_reported_and_not_waited_for(server):
    with WORKER(server.url, timeout=2) as worker:
        worker.generate(PROMPTS, SHORT)
        futures = worker.submit(PROMPTS, ENDLESS)
        processes = server.processes
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            assert not wait(futures, timeout=15).not_done
            assert time.monotonic() - start < 10
            for future in futures:
                assert future.result().status == "failed"
                assert re.search(f"{server.url}.*silent for 2 s", future.result().error)
            with pytest.raises((TransferError, WorkerError), match=server.url):
                worker.generate(PROMPTS, SHORT)
            with pytest.raises(TransferError):
                worker.sync_weights(make_model(tied=True))
        finally:
            for pid in processes:
                os.kill(pid, signal.SIGCONT)
    with WORKER(server.url, timeout=30) as worker:
        worker.sync_weights(make_model(tied=True))
        assert len(worker.generate(PROMPTS, SHORT)) == 3
        assert settled(server)


def test_w7_a_server_that_is_killed_is_reported_at_once(server):
    with WORKER(server.url, timeout=30) as worker:
        worker.generate(PROMPTS, SHORT)
        futures = worker.submit(PROMPTS, ENDLESS)
        os.kill(server.processes[0], signal.SIGKILL)
        start = time.monotonic()
        done = [future.result(20) for future in futures]
        assert time.monotonic() - start < 15
        assert {one.status for one in done} == {"failed"}
        assert all(server.url in one.error for one in done)
        with pytest.raises((TransferError, WorkerError), match=server.url):
            worker.generate(PROMPTS, SHORT)
        with pytest.raises(TransferError):
            worker.sync_weights(make_model(tied=True))
        assert worker.version == 0
    assert server.wait(20) is not None
    with pytest.raises(TransferError, match="no connection"):
        WORKER(server.url, timeout=5)
