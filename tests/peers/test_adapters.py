"""Each adapter calls its peer's real code and gets back what went in. A peer that is not installed fails here: it does not skip."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import rollout_core.testing.peers
from rollout_core.testing.peers import PEERS, Peer
from rollout_core.testing.peers.common import WouldHangError
from rollout_core.testing.peers.loading import PeerMissingError, PeerPackage, PeerVersionWarning, StubUsedError

#: Ascending names, because checkpoint-engine sorts; 1 KiB each, because it pads to 256 bytes.
NAMED = [(name, torch.arange(256, dtype=torch.float32).reshape(16, 16) + at) for at, name in enumerate("abc")]
CAPACITY = 1024


def assert_same(got, want):
    assert [name for name, _ in got] == [name for name, _ in want]
    for (name, a), (_, b) in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8)), name


@pytest.fixture(params=PEERS.values(), ids=lambda peer: peer.name)
def peer(request):
    return request.param


def test_round_trip_in_several_buckets(peer):
    adapter = peer.load()
    buckets = adapter.pack(NAMED, CAPACITY)
    # vLLM cuts after the tensor that went over the capacity, so two of three share a bucket.
    assert len(buckets) == (2 if peer.name.startswith("vllm") else 3)
    assert_same(adapter.unpack(buckets), NAMED)
    assert sum(adapter.bucket_nbytes(bucket) for bucket in buckets) == 3 * 1024


def test_declared_parts_work(peer):
    adapter = peer.load()
    assert sum(item.startswith("oversize=") for item in adapter.capabilities) == 1
    buckets = adapter.pack(NAMED, CAPACITY)
    if hasattr(adapter, "slots"):
        found = [slot for bucket in buckets for slot in adapter.slots(bucket)]
        assert [(name, nbytes) for name, _, nbytes in found] == [(name, tensor.nbytes) for name, tensor in NAMED]
    if hasattr(adapter, "buffer"):
        buffer = adapter.buffer(buckets[0])
        assert (buffer.dtype, buffer.ndim) == (torch.uint8, 1)
        buffer[5] ^= 1  # the live buffer: what is unpacked changes with it
        assert not adapter.unpack(buckets)[0][1].equal(NAMED[0][1])
    if hasattr(adapter, "receive"):
        specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in NAMED]
        assert_same(adapter.receive(specs, CAPACITY, adapter.pack(NAMED, CAPACITY)), NAMED)


@pytest.mark.parametrize("name", ["vllm", "verl-grouping"])
def test_iterators_are_read_as_buckets_are_asked_for(name):
    adapter = PEERS[name].load()
    assert "iterators" in adapter.capabilities
    read = []
    buckets = adapter.pack((read.append(name) or (name, tensor) for name, tensor in NAMED), CAPACITY)
    assert read == []
    first = next(buckets)
    assert len(read) == 2
    assert_same(adapter.unpack([first, *buckets]), NAMED)


def test_verl_grouping_async_and_groups():
    adapter = PEERS["verl-grouping"].load()

    async def source():
        for pair in NAMED:
            yield pair

    async def collect():
        return [bucket async for bucket in adapter.apack(source(), CAPACITY)]

    assert_same(adapter.unpack(asyncio.run(collect())), NAMED)
    assert [[name for name, _ in bucket] for bucket in adapter.pack(NAMED, CAPACITY, groups=[["a", "c"]])] == [["b"], ["a", "c"]]


def test_verl_chunks_splits_a_tensor_over_buckets():
    adapter = PEERS["verl-chunks"].load()
    buckets = adapter.pack(NAMED, 600)
    assert [slot for bucket in buckets for slot in adapter.slots(bucket)] == [
        (name, 0, nbytes) for name in "abc" for nbytes in (600, 424)
    ]
    assert_same(adapter.unpack(buckets), NAMED)
    with pytest.raises(WouldHangError, match="never sends"):
        adapter.unpack(buckets[:-1])


def test_the_nccl_consumer_with_another_capacity_does_not_hang_the_kit():
    adapter = PEERS["vllm-nccl"].load()
    specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in NAMED]
    with pytest.raises(WouldHangError, match="2048 bytes and the consumer expects 3072"):
        adapter.receive(specs, 4096, adapter.pack(NAMED, CAPACITY))


def test_a_failing_side_of_the_shared_memory_transfer_ends_the_other(monkeypatch):
    adapter = PEERS["verl-shm"].load()
    before = set(threading.enumerate())
    with pytest.raises(AssertionError, match="too large to fit in the bucket"):
        adapter.pack(NAMED, 1000)

    def callback_fails(tensor):  # with views of the shared memory in its caller's hands
        raise KeyError("callback")

    monkeypatch.setattr("rollout_core.testing.peers.verl.copied", callback_fails)
    with pytest.raises(KeyError, match="callback"):
        adapter.pack(NAMED, CAPACITY)
    monkeypatch.undo()
    assert set(threading.enumerate()) == before
    assert_same(adapter.unpack(adapter.pack(NAMED, CAPACITY)), NAMED)


def test_a_peer_leaves_no_trace_in_the_import_system(peer):
    hooks = list(sys.meta_path)
    adapter = peer.load()
    adapter.unpack(adapter.pack(NAMED, CAPACITY))
    assert sys.meta_path == hooks
    assert not {"sglang", "vllm", "verl", "checkpoint_engine", "ray", "cupy", "fastapi", "uvicorn"} & set(sys.modules)
    assert torch.cuda.synchronize.__module__ == "torch.cuda"


def test_a_package_that_was_imported_normally_is_used_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "realpeer").mkdir()
    (tmp_path / "realpeer" / "__init__.py").write_text("ran = True")
    (tmp_path / "realpeer" / "part.py").write_text("import realpeer; seen = getattr(realpeer, 'ran', False)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("rollout_core.testing.peers.loading.installed_version", lambda *_: "1")
    shelled = PeerPackage("realpeer", "1", "realpeer").load("realpeer.part")
    assert (shelled.seen, "realpeer" in sys.modules) == (False, False)
    import realpeer  # type: ignore[import-not-found]

    assert PeerPackage("realpeer", "1", "realpeer").load("realpeer.part").seen
    assert sys.modules.pop("realpeer") is realpeer
    del sys.modules["realpeer.part"]


def test_a_stub_hands_out_names_at_import_and_refuses_use(tmp_path, monkeypatch):
    (tmp_path / "stubbed.py").write_text(
        "import heavy, heavy.sub\n"
        "from heavy.sub import Base, register, Kind\n"
        "class Mine(Base):\n"
        "    @register(kind=Kind.ONE)\n"
        "    def method(self, of: Base | None = None): return 1\n"
        "def use(): return heavy.start()\n"
        "def use_name(): return Kind.TWO\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("rollout_core.testing.peers.loading.installed_version", lambda *_: "1")
    module = PeerPackage("stubbed", "1", "stubbed", stubs={"heavy": "test", "heavy.sub": "test"}).load("stubbed")
    assert module.Mine().method() == 1
    with pytest.raises(StubUsedError, match="heavy.start"):
        module.use()
    with pytest.raises(StubUsedError, match="Kind"):
        module.use_name()


def test_a_missing_or_other_version_says_so():
    with pytest.raises(PeerMissingError, match=r"pip install --no-deps no-such-peer==1\.0"):
        PeerPackage("no-such-peer", "1.0", "no_such_peer").load("no_such_peer.module")
    with pytest.warns(PeerVersionWarning, match="tested with 0.0.1"):
        PeerPackage("sglang", "0.0.1", "sglang").load("sglang.srt.weight_sync.tensor_bucket")


def test_importing_the_table_imports_no_torch_and_no_peer():
    code = (
        "import sys, rollout_core.testing.peers as p; "
        "print(sorted({'torch', 'sglang', 'vllm', 'verl', 'checkpoint_engine'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", PEERS)
def test_each_adapter_works_first_and_alone(name):
    """In a process where no other adapter has loaded a module for it."""
    code = (
        "import torch; from rollout_core.testing.peers import PEERS; "
        f"adapter = PEERS[{name!r}].load(); print(adapter.unpack(adapter.pack([('a', torch.ones(3))], 1024)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (out.stdout.strip(), out.returncode) == ("[('a', tensor([1., 1., 1.]))]", 0), out.stderr


@pytest.mark.parametrize("entry", PEERS.values(), ids=lambda peer: peer.name)
def test_requirements_pin_what_the_table_says(entry: Peer):
    lines = Path(rollout_core.testing.peers.__file__).with_name("requirements.txt").read_text().splitlines()
    assert entry.distribution == "torch" or f"{entry.distribution}=={entry.version}" in lines
