"""VLLMServerWorker and SGLangServerWorker on servers that are not what they should be: each error says what to do (W7)."""

import json

import pytest
import torch
from safetensors.torch import save_file

from rollout_core.errors import RolloutCoreError, TransferError, WorkerError
from rollout_core.workers import SGLangServerWorker, VLLMServerWorker
from rollout_core.workers.http.server import free_port
from rollout_core.workers.sglang.commands import LOADER
from rollout_core.workers.versions import check_version


def answers(routes):
    """A server that knows these paths; a value is said as JSON, a pair is a status and a value."""

    def behave(line, asked):
        path = asked.line.split()[1].partition("?")[0]
        status, value = routes.get(path, ("404 Not Found", {"detail": "Not Found"}))
        body = json.dumps(value).encode()
        line.say(f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n", body)
        return True

    return behave


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9, "max_position_embeddings": 64}))
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    return tmp_path


def vllm_routes(folder, **more):
    models = {"data": [{"id": "m", "root": str(folder), "max_model_len": 64}]}
    return {"/version": ("200 OK", {"version": "0.32.0"}), "/v1/models": ("200 OK", models), **more}


def sglang_routes(folder, **more):
    info = {"version": "0.5.23", "model_path": str(folder), "custom_weight_loader": [LOADER], "device": "cpu", **more}
    return {"/server_info": ("200 OK", info)}


def refused(make, error, words):
    with pytest.raises(RolloutCoreError, match=words) as raised:
        make()
    assert isinstance(raised.value, error), type(raised.value)


@pytest.mark.parametrize("worker", [VLLMServerWorker, SGLangServerWorker])
def test_w7_nobody_there_is_a_transfer_error(worker):
    refused(lambda: worker(f"http://127.0.0.1:{free_port()}", timeout=5), TransferError, "no connection")


@pytest.mark.parametrize("worker", [VLLMServerWorker, SGLangServerWorker])
def test_w7_a_server_that_never_answers_is_reported_in_time(serve, worker):
    server = serve(lambda line, asked: line.hang())
    refused(lambda: worker(server.url, timeout=0.5), TransferError, r"silent for 0.5 s|not complete within 0.5 s|within 0.5 s")


@pytest.mark.parametrize("worker", [VLLMServerWorker, SGLangServerWorker])
def test_no_address_is_refused(worker):
    refused(lambda: worker("localhost"), WorkerError, "is no address of a server")


def test_what_is_no_vllm_is_refused(serve):
    server = serve(answers({}))
    refused(lambda: VLLMServerWorker(server.url, timeout=5), WorkerError, "GET .*/version: the server answered 404")


def test_an_old_vllm_is_refused(serve, folder):
    server = serve(answers({**vllm_routes(folder), "/version": ("200 OK", {"version": "0.11.2"})}))
    refused(lambda: VLLMServerWorker(server.url, timeout=5), WorkerError, "vLLM 0.11.2 is not served: from 0.26 on")


def test_a_vllm_without_our_extension_is_told_what_it_needs(serve, folder):
    server = serve(answers(vllm_routes(folder)))
    refused(lambda: VLLMServerWorker(server.url, timeout=5), WorkerError, "VLLM_SERVER_DEV_MODE=1, .*RolloutExtension")


@pytest.mark.parametrize("worker", [VLLMServerWorker, SGLangServerWorker])
def test_a_model_that_is_elsewhere_is_asked_for(serve, tmp_path, worker):
    routes = (vllm_routes if worker is VLLMServerWorker else sglang_routes)(tmp_path / "elsewhere")
    server = serve(answers(routes))
    refused(lambda: worker(server.url, timeout=5), WorkerError, "not on this machine: pass model_dir")


def test_an_sglang_without_our_loader_is_told_what_it_needs(serve, folder):
    server = serve(answers(sglang_routes(folder, custom_weight_loader=[])))
    refused(lambda: SGLangServerWorker(server.url, timeout=5), WorkerError, "without --custom-weight-loader rollout_core")


def test_an_old_sglang_is_refused(serve, folder):
    server = serve(answers(sglang_routes(folder, version="0.4.9")))
    refused(lambda: SGLangServerWorker(server.url, timeout=5), WorkerError, "SGLang 0.4.9 is not served: from 0.5.17 on")


def test_an_sglang_whose_loader_never_came_is_told_so(serve, folder):
    """As when the server runs elsewhere, and its answer's file with it. Sessions are opened and closed around each call."""
    done = ("200 OK", {"success": True, "message": "Success"})
    paths = ("/begin_weight_update", "/end_weight_update", "/update_weights_from_tensor")
    server = serve(answers({**sglang_routes(folder), **dict.fromkeys(paths, done)}))
    refused(lambda: SGLangServerWorker(server.url, timeout=5), WorkerError, "did not come to rollout_core.*on this machine")
    assert [asked.line.split()[1] for asked in server.asked] == ["/server_info", paths[0], paths[2], paths[1]]


def test_an_older_sglang_has_no_sessions(serve, folder):
    done = ("200 OK", {"success": True, "message": "Success"})
    server = serve(answers({**sglang_routes(folder, version="0.5.20"), "/update_weights_from_tensor": done}))
    refused(lambda: SGLangServerWorker(server.url, timeout=5), WorkerError, "did not come to")
    assert [asked.line.split()[1] for asked in server.asked] == ["/server_info", "/update_weights_from_tensor"]


@pytest.mark.parametrize(
    ("engine", "version", "served"),
    [
        ("vLLM", "0.26.0", True),
        ("vLLM", "0.32.0+cpu", True),
        ("vLLM", "1.0", True),
        ("vLLM", "0.25.9", False),
        ("SGLang", "0.5.17", True),
        ("SGLang", "0.5.17.post1", True),
        ("SGLang", "0.5.9", False),
        ("SGLang", "0.6", True),
        ("SGLang", "unknown", False),
    ],
)
def test_versions(engine, version, served):
    if served:
        check_version(engine, version)
    else:
        with pytest.raises(WorkerError, match=version):
            check_version(engine, version)
