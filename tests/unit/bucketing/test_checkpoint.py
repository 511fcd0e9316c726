"""Safetensors on disk: what is written loads with the plain library, what is read is read lazily."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.bucketing import (
    SafetensorsSource,
    TensorSpec,
    iter_buckets,
    pack,
    pack_stream,
    plan_buckets,
    save_buckets,
    specs_of,
    unpack,
    unpack_stream,
)
from rollout_core.bucketing.checkpoint import _TO_FORMAT
from rollout_core.errors import DuplicateNameError, IncompleteStreamError, IntegrityError, SourceError
from rollout_core.testing.oracles import picture
from support.tensors import DTYPES, named, odd_inputs, patterned

ODD = [(name, tensor) for name, tensor in odd_inputs().items() if tensor.dtype in _TO_FORMAT and name != "tied"]


def save(pairs, path, capacity=1 << 20, **options):
    plan = plan_buckets(specs_of(pairs), capacity, **options)
    save_buckets(plan, pack(plan, pairs), path)
    return plan


@pytest.mark.parametrize("order", ["given", "packed"])
@pytest.mark.parametrize("capacity", [16, 100, 1 << 20])
def test_a_saved_update_loads_with_the_plain_library(tmp_path, capacity, order):
    """Split tensors, padding and all dtypes that the format has."""
    file = tmp_path / "update.safetensors"
    save(ODD, file, capacity, order=order)
    loaded = safetensors.torch.load_file(file)
    assert sorted(map(str, picture(loaded.items()))) == sorted(map(str, picture(ODD)))
    assert os.listdir(tmp_path) == ["update.safetensors"]


@given(pairs=named(), capacity=st.integers(16, 300))
def test_any_update_reads_back(tmp_path_factory, pairs, capacity):
    pairs = [(f"{i}-{name}" if name.isprintable() else f"{i}", t) for i, (name, t) in enumerate(pairs) if t.dtype in _TO_FORMAT]
    file = tmp_path_factory.mktemp("update") / "u.safetensors"
    save(pairs, file, capacity)
    expected = {name: rest for name, *rest in picture(pairs)}
    for source in (SafetensorsSource(file), str(file), file.parent):
        plan = plan_buckets(specs_of(source), 64)
        assert {n: r for n, *r in picture(unpack(plan, pack(plan, source)))} == expected
    assert {n: r for n, *r in picture(unpack_stream(pack_stream(file, 64)))} == expected
    assert {n: r for n, *r in picture(p for b in iter_buckets(file, 64) for p in b)} == expected


def writable(dtype: torch.dtype) -> bool:
    """Whether the plain library writes this dtype, one element of it a byte or more."""
    try:
        safetensors.torch.save({"w": patterned(dtype, 2)})
    except Exception:  # it raises many kinds
        return False
    return dtype not in (torch.float4_e2m1fn_x2,)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if writable(dtype)], ids=str)
def test_every_dtype_that_the_plain_library_writes_is_written_alike(tmp_path, dtype):
    pairs = [("w", patterned(dtype, 2, 3))]
    save(pairs, tmp_path / "ours.safetensors")
    safetensors.torch.save_file(dict(pairs), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert header_of(tmp_path / "ours.safetensors") == header_of(tmp_path / "theirs.safetensors")
    assert picture(SafetensorsSource(tmp_path / "theirs.safetensors").items()) == picture(pairs)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 3)
        self.head = torch.nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_written_once_and_load_model_ties_them(tmp_path):
    model, fresh = Tied(), Tied()
    file = tmp_path / "m.safetensors"
    save(model, file)
    assert list(safetensors.torch.load_file(file)) == ["embed.weight"]
    missing, unexpected = safetensors.torch.load_model(fresh, file)
    assert not missing
    assert not unexpected
    assert torch.equal(fresh.head.weight, model.embed.weight)
    for path in (file, str(file), tmp_path, str(tmp_path)):
        specs = specs_of(path)
        assert [(spec.name, spec.alias_of) for spec in specs] == [("embed.weight", None), ("head.weight", "embed.weight")]
    assert torch.equal(SafetensorsSource(file)["head.weight"], model.embed.weight)


def test_specs_come_from_headers_and_values_when_asked(tmp_path, monkeypatch):
    file = tmp_path / "m.safetensors"
    save([(f"w{i}", patterned(torch.float32, 8, seed=i)) for i in range(4)], file)
    source = SafetensorsSource(file)
    read = []
    original = SafetensorsSource.__getitem__
    monkeypatch.setattr(SafetensorsSource, "__getitem__", lambda self, name: read.append(name) or original(self, name))
    plan = plan_buckets(specs_of(source), 64)
    assert read == []
    assert "w0" in source
    assert "x" not in source
    buckets = pack(plan, source)
    next(buckets)
    assert read == ["w0", "w1"]
    assert len(list(buckets)) == 1
    assert list(source) == ["w0", "w1", "w2", "w3"]


def test_a_folder_with_an_index_is_read_as_it_says(tmp_path):
    first, second = {"a": torch.ones(2)}, {"b": torch.zeros(3)}
    safetensors.torch.save_file(second, tmp_path / "x.safetensors")
    safetensors.torch.save_file(first, tmp_path / "y.safetensors")
    safetensors.torch.save_file({"stale": torch.ones(1)}, tmp_path / "z.safetensors")
    index = {"weight_map": {"a": "y.safetensors", "b": "x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [spec.name for spec in specs_of(tmp_path)] == ["a", "b"]


def test_a_name_in_two_files_says_which(tmp_path):
    for name in ("a", "b"):
        safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(DuplicateNameError, match=r"name 'w' stands in .*a.safetensors and in .*b.safetensors"):
        specs_of(tmp_path)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(SourceError, match="is no safetensors file, and no folder with one in it"):
        specs_of(tmp_path)
    broken = tmp_path / "m.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0{not json")
    with pytest.raises(SourceError, match=r"m.safetensors cannot be read as safetensors"):
        specs_of(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(SourceError, match="index.json is no safetensors index"):
        specs_of(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(SourceError, match="gone.safetensors cannot be read"):
        specs_of(tmp_path)


def test_a_dtype_that_does_not_travel_is_named(tmp_path):
    header = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with pytest.raises(SourceError, match="tensor 'w' in .* has dtype F6_E2M3, which does not travel"):
        specs_of(tmp_path)


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(SourceError, match=r"needs the safetensors package: pip install 'rollout-core\[hf\]'"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec("w", torch.complex128, (2,)), r"tensor 'w' \(c128\[2\]\) has a dtype that safetensors cannot hold"),
        (TensorSpec("w", torch.float4_e2m1fn_x2, (2,)), "has a dtype that safetensors cannot hold"),
        (TensorSpec("__metadata__", torch.float32, (2,)), "tensor '__metadata__' has a name that safetensors cannot hold"),
        (TensorSpec("\ud800", torch.float32, (2,)), "has a name that safetensors cannot hold"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_writing(tmp_path, spec, message):
    plan = plan_buckets([spec], 64)
    with pytest.raises(SourceError, match=message):
        save_buckets(plan, pack(plan, [(spec.name, patterned(spec.dtype, 2))]), tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "m.safetensors"
    pairs = [("a", torch.ones(4)), ("b", torch.ones(4))]
    save(pairs, file)
    before = file.read_bytes()
    plan = plan_buckets(specs_of(pairs), 16)
    buckets = list(pack(plan, pairs))
    with pytest.raises(IncompleteStreamError):
        save_buckets(plan, buckets[:1], file)
    buckets[1].buffer[0] ^= 1
    with pytest.raises(IntegrityError):
        save_buckets(plan, buckets, file)

    def failing():
        yield buckets[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_buckets(plan, failing(), file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_files_of_a_folder_are_read_by_name(tmp_path):
    order = ["m", "c", "x", "a", "q", "b", "z", "k", "f", "t"]
    for name in order:
        safetensors.torch.save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    source = SafetensorsSource(tmp_path)
    assert [spec.name for spec in specs_of(source)] == sorted(order)
    assert len(source) == 10


def test_b10_metadata_that_name_a_tensor_of_the_file_are_no_tie(tmp_path):
    metadata = {"b": "a", "c": "a", "note": "of no tensor", "a": "note"}
    safetensors.torch.save_file({"a": torch.ones(2), "b": torch.zeros(2)}, tmp_path / "m.safetensors", metadata=metadata)
    assert {spec.name: spec.alias_of for spec in specs_of(tmp_path)} == {"a": None, "b": None, "c": "a"}
    assert SafetensorsSource(tmp_path)["b"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": 5}', "not json", '"text"'])
def test_b14_any_json_that_is_no_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SourceError, match=r"index.json is no safetensors index"):
        specs_of(tmp_path)


def test_what_an_index_misses_is_named_in_order(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "m.safetensors")
    missing = {f"w{i:02}": "m.safetensors" for i in reversed(range(20))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": missing}))
    with pytest.raises(SourceError, match="the index says that 'w00' is in .*m.safetensors, and it is not"):
        specs_of(tmp_path)


# ------------------------------------------------------------------------------------------------------------ the file itself


def header_of(file) -> dict:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0, "the data starts aligned"
    return json.loads(raw[8 : 8 + length])


def test_b3_every_tensor_in_the_file_is_aligned_and_there_is_no_gap(tmp_path):
    pairs = [(f"{dtype}", patterned(dtype, 3)) for dtype in (torch.uint8, torch.float64, torch.bfloat16, torch.complex64)]
    pairs.insert(2, ("more bytes", patterned(torch.int8, 5)))
    file = tmp_path / "m.safetensors"
    save(pairs, file)
    header = header_of(file)
    ranges = sorted((*entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__")
    assert len(ranges) == 5
    for (start, end, name), after in zip(ranges, [*ranges[1:], None], strict=True):
        assert start % dict(pairs)[name].dtype.itemsize == 0
        assert after is None or after[0] == end


def test_b10_metadata_are_the_ties_and_the_frameworks_mark(tmp_path):
    weight = patterned(torch.float32, 2)
    file = tmp_path / "m.safetensors"
    save([("a", weight), ("b", weight), ("c", patterned(torch.float32, 3))], file)
    assert header_of(file)["__metadata__"] == {"format": "pt", "b": "a"}, "transformers asks for the mark"


def test_b9_an_untied_tensor_may_be_named_format(tmp_path):
    pairs = [("format", patterned(torch.float32, 2))]
    save(pairs, tmp_path / "m.safetensors")
    assert picture(SafetensorsSource(tmp_path).items()) == picture(pairs)


def test_b13_an_update_without_digests_is_written_where_that_is_asked_for(tmp_path):
    pairs = [("a", patterned(torch.float32, 2))]
    plan = plan_buckets(specs_of(pairs), 64)
    with pytest.raises(IntegrityError, match="bucket 0 carries no digest"):
        save_buckets(plan, pack(plan, pairs, digest=None), tmp_path / "m.safetensors")
    save_buckets(plan, pack(plan, pairs, digest=None), tmp_path / "m.safetensors", verify=False)
    assert picture(SafetensorsSource(tmp_path).items()) == picture(pairs)


def test_a_file_under_way_stands_beside_its_place_and_is_no_checkpoint(tmp_path):
    """Beside it, so that it can be renamed; hidden, so that nobody who looks for ``*.safetensors`` finds half an update."""
    pairs = [("a", patterned(torch.float32, 2)), ("b", patterned(torch.float32, 2))]
    plan = plan_buckets(specs_of(pairs), 8)
    seen = []

    def watched():
        for bucket in pack(plan, pairs):
            seen.append(os.listdir(tmp_path))
            yield bucket

    save_buckets(plan, watched(), tmp_path / "u.safetensors")
    assert len(seen) == 2
    for (part,) in seen:
        assert part.startswith(".u.safetensors.")
        assert part.endswith(".part")
    assert os.listdir(tmp_path) == ["u.safetensors"]


def test_a_file_is_as_readable_as_any_other_of_the_process(tmp_path):
    before = os.umask(0o027)
    try:
        save([("a", torch.ones(1))], tmp_path / "m.safetensors")
        assert os.umask(0o027) == 0o027, "and the process keeps its mask"
    finally:
        os.umask(before)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o640
