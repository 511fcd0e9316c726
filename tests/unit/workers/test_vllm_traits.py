"""What a vLLM says of itself decides what its worker says, whatever it was asked for: device, quantization, memory."""

import json

import pytest
import torch
from safetensors.torch import save_file

from rollout_core.errors import WorkerError
from rollout_core.testing.fake_engine import FakeModels
from rollout_core.workers import SamplingParams, SGLangWorker, VLLMServerWorker, VLLMWorker
from unit.workers.vllm_stand_in import StandInWorker


@pytest.fixture
def folder(tmp_path):
    FakeModels.make_small_model(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("device", "found"), [("cpu", "cuda:0"), ("cuda", "cpu")])
def test_a_vllm_on_another_device_than_was_said_is_refused(folder, device, found):
    words = f"device is '{device}', and this vLLM has its weights on '{found}': pass device='{found.partition(':')[0]}'"
    with pytest.raises(WorkerError, match=words):
        StandInWorker(folder, device=device, traits={"device": found})


def test_what_it_quantizes_and_releases_is_what_it_says(folder):
    with StandInWorker(folder) as plain:
        assert (plain.is_quantized, plain.capabilities) == (False, {"seeds", "memory"})
    with StandInWorker(folder, traits={"quantization": "fp8", "sleeps": False}) as other:
        assert (other.is_quantized, other.capabilities) == (True, {"seeds"})
        with pytest.raises(WorkerError, match="quantizes its weights.*readback=False"):
            other.sync_weights(FakeModels.load_trainer(folder))


def test_what_is_no_device_or_not_the_workers_to_choose_is_refused_before_a_start():
    for worker in (VLLMWorker, SGLangWorker):
        with pytest.raises(WorkerError, match="device is 'gpu'; it is 'cpu', 'cuda'"):
            worker("no folder", device="gpu")
    for make in (VLLMWorker, VLLMServerWorker.start):
        with pytest.raises(WorkerError, match="device is 'cuda:1', .*'CUDA_VISIBLE_DEVICES': '1'"):
            make("no folder", device="cuda:1")
    with pytest.raises(WorkerError, match="engine_options has device='cuda', and device is 'cpu'"):
        SGLangWorker("no folder", engine_options={"device": "cuda"})


# Servers


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9, "max_position_embeddings": 64}))
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    return tmp_path


def vllm_server(serve, folder, answers, pieces=()):
    """A vLLM server whose ranks answer so, and whose streams have these pieces."""
    models = {"data": [{"id": "m", "root": str(folder), "max_model_len": 64}]}
    routes = {"/version": {"version": "0.32.0"}, "/v1/models": models, "/collective_rpc": {"results": answers}}

    def behave(line, asked):
        path = asked.line.split()[1].partition("?")[0]
        if path == "/inference/v1/generate":
            body, kind = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces).encode(), "text/event-stream"
        else:
            body, kind = json.dumps(routes.get(path, {})).encode(), "application/json"
        line.say(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n", body)
        return True

    return serve(behave)


def test_a_server_is_what_its_ranks_say(serve, checkpoint):
    rank = {"device": "cuda:0", "quantization": "fp8", "sleeps": False, "version": 0}
    server = vllm_server(serve, checkpoint, [rank, rank])
    with VLLMServerWorker(server.url, timeout=5) as worker:
        assert (worker.is_quantized, worker.capabilities, worker.ranks) == (True, {"seeds"}, 2)
    asked = [json.loads(one.body)["args"][0] for one in server.asked if "/collective_rpc" in one.line]
    assert asked
    assert not any("Settle" in one for one in asked), "a worker that only looks ends nothing of another's update"


def piece(tokens, reason=None):
    rows = [{"token": str(token), "logprob": -0.5} for token in tokens]
    return {"choices": [{"token_ids": tokens, "logprobs": {"content": rows}, "finish_reason": reason}]}


@pytest.mark.parametrize(("pieces", "status"), [([piece([3, 1])], "failed"), ([piece([3, 1]), piece([4], "length")], "length")])
def test_w7_a_stream_that_ends_without_a_word_is_no_abort(serve, checkpoint, pieces, status):
    server = vllm_server(serve, checkpoint, [{"device": "cpu", "version": 0}], pieces)
    with VLLMServerWorker(server.url, timeout=5) as worker:
        (future,) = worker.submit([[5]], SamplingParams(response_length=3))
        done = future.result(10)
    assert done.status == status
    assert status == "length" or "without a word" in done.error
