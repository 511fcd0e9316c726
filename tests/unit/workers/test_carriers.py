"""By which carrier a worker's weights go: what is chosen, what is refused, and what an engine is told."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

from rollout_core.errors import TransferError, WorkerError
from rollout_core.testing.fake_engine import FakeModels, FakeWorker
from rollout_core.transfer.carriers import cuda_ipc, names
from rollout_core.transfer.carriers.memory import MemoryReceiver, MemorySender
from rollout_core.workers import HFWorker, VLLMWorker
from rollout_core.workers import carriers as choosing
from rollout_core.workers.carriers import Senders, gpu_of, receiver_of
from rollout_core.workers.engine import Update


class OnGPU:
    """As much of a tensor on a GPU as is looked at."""

    is_cuda = True

    def __init__(self, index=0):
        self.device = torch.device("cuda", index)


HOST, GPU = {"a": torch.ones(2)}, {"a": torch.ones(2), "b": OnGPU(1)}


@pytest.mark.parametrize(
    ("choice", "device", "source", "carrier"),
    [
        ("auto", "cpu", HOST, "memory"),
        ("auto", "cpu", GPU, "memory"),
        ("auto", "cuda", HOST, "memory"),
        ("auto", "cuda", GPU, "cuda_ipc"),
        ("auto", "cuda:1", list(GPU.items()), "cuda_ipc"),
        ("memory", "cuda", GPU, "memory"),
        ("auto", "cuda", "folder/model.safetensors", "memory"),
    ],
)
def test_what_is_chosen(choice, device, source, carrier):
    assert Senders(choice, device).carrier_for(source) == carrier


def test_the_gpu_of_a_source_is_that_of_its_first_tensor_on_one():
    assert gpu_of(GPU) == torch.device("cuda", 1)
    assert gpu_of(HOST) is None
    assert gpu_of(torch.nn.Linear(2, 2)) is None


class Made(Mapping):
    """A mapping that makes its tensors when it is asked for them, which costs, or has its place in an order."""

    def __iter__(self):
        return iter("a")

    def __len__(self):
        return 1

    def __getitem__(self, name):
        pytest.fail("it was asked for a tensor")


def test_no_tensor_is_made_to_see_where_it_is():
    source = Made()
    assert gpu_of(source) is None
    source.device = torch.device("cuda", 1)
    assert gpu_of(source) == torch.device("cuda", 1)
    source.device = "cpu"
    assert gpu_of(source) is None


@pytest.mark.parametrize("worker", [HFWorker, VLLMWorker])
def test_cuda_ipc_to_a_cpu_is_refused_before_anything_is_started(worker):
    with pytest.raises(WorkerError, match="carrier is 'cuda_ipc', and the engine's device 'cpu'"):
        worker("no folder", carrier="cuda_ipc")
    with pytest.raises(WorkerError, match="carrier is 'rdma'; it is one of 'auto', 'memory', 'cuda_ipc'"):
        worker("no folder", carrier="rdma")


def test_cuda_ipc_from_a_process_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WorkerError, match="this process sees no GPU: pass 'auto' or 'memory'"):
        Senders("cuda_ipc", "cuda").carrier_for(HOST)


def test_an_engine_that_is_asked_for_a_carrier_it_cannot_have_says_so():
    with pytest.raises(TransferError, match="carrier is 'rdma'; it is one of 'memory', 'cuda_ipc'"):
        receiver_of(Update("nobody", 1, 0.1, "rdma"), "cpu")
    with pytest.raises(TransferError, match="no sender listens at 'nobody'"):
        receiver_of(Update("nobody", 1, 0.1, "memory"), "cpu")


class Slots:
    """GPU memory that is none."""

    def __init__(self, device="cuda"):
        self.device, self.nbytes, self.freed = torch.device(device), 128, 0

    def free(self):
        self.freed += 1
        self.nbytes = 0


@pytest.fixture
def fake_gpu(monkeypatch):
    """CUDA IPC is shared memory under another name, and every source is on a GPU. What each end was asked for."""
    sent, received = [], []

    def listen(name, address, receivers=1, *, timeout=60.0, check=None, slots=None):
        sent.append((name, slots))
        return MemorySender.listen(address, receivers, timeout=timeout, check=check)

    def connect(name, address, *, device, timeout):
        received.append(name)
        return MemoryReceiver.connect(address, timeout=timeout)

    monkeypatch.setattr(choosing, "listen", listen)
    monkeypatch.setattr(choosing, "connect", connect)
    monkeypatch.setattr(choosing, "gpu_of", lambda source: torch.device("cuda", 0))
    monkeypatch.setattr(cuda_ipc, "CudaSlots", Slots)
    return sent, received


def test_the_engine_hears_of_the_carrier_and_the_sender_keeps_its_memory(fake_gpu, tmp_path):
    FakeModels.make_small_model(tmp_path)
    with FakeWorker(tmp_path) as worker:
        assert worker.sync_weights(FakeModels.load_trainer(tmp_path)).carrier == "memory"
        worker._is_on("cuda", "auto")
        assert worker.sync_weights(FakeModels.load_trainer(tmp_path), readback=False).carrier == "cuda_ipc"
        assert worker.sync_weights(FakeModels.load_trainer(tmp_path), readback=False).carrier == "cuda_ipc"
        sent, received = fake_gpu
        assert received == ["memory", "cuda_ipc", "cuda_ipc"]
        slots = sent[1][1]
        assert sent == [("memory", None), ("cuda_ipc", slots), ("cuda_ipc", slots)]
        assert slots.device == torch.device("cuda", 0)
        assert worker.free_buffers() == 128
        assert worker.free_buffers() == 0
        worker.sync_weights(FakeModels.load_trainer(tmp_path), readback=False)
        freed = slots.freed
        worker.release_memory()
        assert slots.freed == freed + 1
        worker.resume_memory()
    assert slots.freed == freed + 2  # and at its end


def test_w9_receivers_are_ranks_in_whatever_order_they_come():
    """The last connects first; who says what is known all the same."""
    senders, update = Senders("memory", "cpu"), Update("ranks-of-one-engine", 1, 5.0, ranks=3)
    came = []

    def connect(rank):
        time.sleep({2: 0.0, 0: 0.2, 1: 0.4}[rank])
        came.append(rank)
        return receiver_of(update, "cpu", rank)

    with ThreadPoolExecutor(3) as beside:
        connecting = {rank: beside.submit(connect, rank) for rank in range(3)}
        with senders.listen("memory", HOST, update.address, ranks=3, timeout=5, check=lambda: None) as sender:
            assert came == [2, 0, 1]
            ends = {rank: one.result() for rank, one in connecting.items()}
            for rank, end in ends.items():
                end.post(str(rank).encode())
            heard = []
            while len(heard) < 3:
                heard += sender.poll(5)
            assert sorted(heard) == [(rank, str(rank).encode()) for rank in range(3)]
            for end in ends.values():
                end.close()


def test_w9_a_rank_that_does_not_come_is_named():
    update = Update("ranks-that-miss-one", 1, 5.0, ranks=2)
    with ThreadPoolExecutor(1) as beside:
        first = beside.submit(receiver_of, update, "cpu", 0)
        with pytest.raises(TransferError, match="1 of 2 receivers connected to 'ranks-that-miss-one/1' within 0.3 s"):
            Senders("memory", "cpu").listen("memory", HOST, update.address, ranks=2, timeout=0.3, check=lambda: None)
        with suppress(TransferError):  # whether it has got the memory by then
            first.result().close()


def test_another_gpu_is_another_memory(fake_gpu, monkeypatch):
    senders = Senders("auto", "cuda")
    monkeypatch.setattr(choosing, "listen", lambda *arguments, slots=None, **options: slots)
    first = senders.listen("cuda_ipc", HOST, "a", timeout=1, check=lambda: None)
    assert senders.listen("cuda_ipc", HOST, "a", timeout=1, check=lambda: None) is first
    monkeypatch.setattr(choosing, "gpu_of", lambda source: torch.device("cuda", 1))
    second = senders.listen("cuda_ipc", HOST, "a", timeout=1, check=lambda: None)
    assert (second.device, first.freed) == (torch.device("cuda", 1), 1)


def test_slots_are_kept_and_given_back_once(monkeypatch):
    calls = []
    monkeypatch.setattr(cuda_ipc, "_check_device", torch.device)
    monkeypatch.setattr(cuda_ipc, "_call", lambda name, *arguments, device: calls.append((name, arguments[0].value)))
    monkeypatch.setattr(cuda_ipc, "_allocate", lambda nbytes, device: cuda_ipc._Memory(nbytes, nbytes))
    slots = cuda_ipc.CudaSlots("cuda:0")
    slots.free()
    first = slots.take(100)
    assert slots.take(60) is first
    assert slots.take(200) is not first
    assert (calls, slots.nbytes) == ([("cudaFree", 100)], 200)
    slots.free()
    slots.free()
    del slots
    assert calls == [("cudaFree", 100), ("cudaFree", 200)]


def test_names_are_those_that_are_known():
    assert names.NAMES == ("memory", "cuda_ipc")


class TestMemoryThatCannotBeShared:
    WORDS = "the receiver: cudaIpcOpenMemHandle failed with 217: peer access is not supported between these two devices"

    @pytest.fixture
    def worker(self, tmp_path, monkeypatch):
        """One that takes its engine to be on a GPU, which the first update cannot reach."""
        FakeModels.make_small_model(tmp_path)
        monkeypatch.setattr("rollout_core.workers.carriers.gpu_of", lambda source: torch.device("cuda", 0))
        send = FakeWorker._send

        def reach(worker, link, packer, source, carrier, *rest):
            worker.tried.append(carrier)
            if carrier == "cuda_ipc":
                raise TransferError(worker.words)
            return send(worker, link, packer, source, carrier, *rest)

        monkeypatch.setattr(FakeWorker, "_send", reach)
        monkeypatch.setattr(Senders, "_slots_on", lambda senders, gpu: None)
        with FakeWorker(tmp_path) as worker:
            worker.tried, worker.words = [], self.WORDS
            worker._senders = Senders("auto", "cuda")
            yield worker

    def test_auto_takes_shared_memory_then_and_from_then_on(self, worker, tmp_path):
        model = FakeModels.load_trainer(tmp_path)
        with pytest.warns(RuntimeWarning, match="cannot be shared with the engine .*217.*: weights go through shared memory"):
            report = worker.sync_weights(model)
        assert (report.carrier, report.version) == ("memory", 1)
        assert worker.tensor_digests()
        assert worker.sync_weights(model).version == 2
        assert worker.tried == ["cuda_ipc", "memory", "memory"]

    @pytest.mark.parametrize(("choice", "words"), [("cuda_ipc", WORDS), ("auto", "the receiver: it fell silent")])
    def test_nothing_else_is_tried_again(self, worker, tmp_path, monkeypatch, choice, words):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        worker._senders, worker.words = Senders(choice, "cuda"), words
        with pytest.raises(TransferError, match=words[:20]):
            worker.sync_weights(FakeModels.load_trainer(tmp_path))
        assert worker.tried == ["cuda_ipc"]
        assert worker.version == 0
