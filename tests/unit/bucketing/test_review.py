"""What an adversarial review broke, kept as it broke: each of these once passed for good, or failed with the wrong words."""

from __future__ import annotations

import struct
import threading
from collections.abc import Mapping

import msgspec
import pytest
import safetensors.torch
import torch

from rollout_core.bucketing import (
    BucketPlan,
    SafetensorsSource,
    StreamUnpacker,
    TensorSpec,
    Unpacker,
    pack,
    pack_stream,
    plan_buckets,
    save_buckets,
    specs_of,
    unpack,
    unpack_stream,
)
from rollout_core.errors import (
    CapacityError,
    DuplicateNameError,
    IncompleteStreamError,
    IntegrityError,
    ManifestError,
    SourceError,
)
from rollout_core.testing.oracles import picture
from support.manifests import body_fields, rebuild, u32
from support.tensors import from_bytes, patterned

U8 = torch.uint8


# ------------------------------------------------------------------------------------------------------------ hostile sizes


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((2**63 - 1,) * 60000 + (0,), SourceError, "has 60001 dimensions; at most 64 travel"),
        ((0, 2**62, 2**62), CapacityError, "is larger than"),
        ((1,) * 65, SourceError, "has 65 dimensions; at most 64 travel"),
    ],
    ids=["bignums", "strides overflow", "65 dimensions"],
)
def test_b14_shapes_whose_products_are_the_attack(shape, error, message):
    with pytest.raises(error, match=message):
        TensorSpec("w", U8, shape)


def test_a_torch_size_is_a_shape():
    assert TensorSpec("w", U8, torch.Size([2, 3])) == TensorSpec("w", U8, (2, 3))


# -------------------------------------------------------------------------------------------- layouts that no planner makes


def relaid(specs, *, slots, buckets, pieces=(), capacity=8, **options):
    plan = plan_buckets(specs, capacity, **options)
    steps = [(b - a) % 2**32 for a, b in zip([0, *slots], slots, strict=False)]
    changes = {"slot_tensor": u32(*steps), "bucket_slots": u32(*buckets), "pieces": struct.pack(f"<{len(pieces)}Q", *pieces)}
    return rebuild({**body_fields(plan.to_bytes()), **changes})


A8, A16, B4 = TensorSpec("A", U8, (8,)), TensorSpec("A", U8, (16,)), TensorSpec("B", U8, (4,))
NONE, FOUR = TensorSpec("none", U8, (0,)), [TensorSpec(name, U8, (4,)) for name in "abcd"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (relaid([A8], slots=[0, 0], buckets=[2], pieces=[0, 4, 1, 4]), "a piece of 'A' does not fill bucket 0"),
        (relaid([A8, B4], slots=[0, 1, 0], buckets=[1, 1, 1], pieces=[0, 4, 2, 4]), "a piece of 'A' does not fill bucket 0"),
        (relaid([A16, B4], slots=[0, 1, 0], buckets=[1, 1, 1], pieces=[0, 8, 2, 8]), "the pieces of 'A' do not follow each other"),
        (relaid([A8, B4], slots=[1, 0], buckets=[1, 1]), "its slots are not in the order of its tensors"),
        (relaid([A8, B4], slots=[1, 0], buckets=[1, 1], order="packed"), "its slots are not in the order of its tensors"),
        (
            relaid([A8], slots=[0, 0], buckets=[1, 1], pieces=[0, 4, 1, 4], oversize="error"),
            "a piece of 'A' does not fill bucket 0",
        ),
        (relaid([A8], slots=[0, 0], buckets=[1, 1], pieces=[0, 4, 1, 4], oversize="own"), "a piece of 'A' does not fill bucket 0"),
        (relaid([A16], slots=[0, 0], buckets=[1, 1], pieces=[0, 8, 1, 8], oversize="own"), "a piece of 'A' does not fill bucket 0"),
        (relaid([NONE, A16], slots=[0, 1, 1], buckets=[2, 1], pieces=[1, 8, 2, 8]), "a piece of 'A' does not fill bucket 0"),
        (relaid(FOUR[:2], slots=[1, 0], buckets=[2]), "its slots are not in the order of its tensors"),
        (relaid(FOUR, slots=[0, 2, 1, 3], buckets=[2, 2], order="packed"), "its slots are not in the order of its tensors"),
        (relaid(FOUR[:3], slots=[0, 2, 1], buckets=[1, 1, 1], order="packed"), "its slots are not in the order of its tensors"),
        (
            relaid([B4, TensorSpec("h", torch.float16, (2,))], slots=[0, 1], buckets=[2], order="packed"),
            "its slots are not in packed order",
        ),
        (relaid([A8, B4], slots=[0, 1], buckets=[2], oversize="own"), "bucket 0 exceeds its capacity"),
    ],
    ids=[
        *("two pieces in a bucket", "short piece", "interleaved", "order", "packed order", "error policy", "own policy"),
        *(
            "own policy, full pieces",
            "full piece not alone",
            "order in a bucket",
            "packed, two interleaved",
            "packed, the last two",
        ),
        *("packed, one byte wider", "own policy, two tensors"),
    ],
)
def test_b14_layouts_that_no_planner_makes(data, message):
    with pytest.raises(ManifestError, match=message):
        BucketPlan.from_bytes(data)


def test_b14_a_group_member_in_two_buckets():
    specs = [TensorSpec("A", U8, (4,)), TensorSpec("B", U8, (16,))]
    fields = body_fields(plan_buckets(specs, 8).to_bytes())
    with pytest.raises(ManifestError, match="the group of 'A' is in two buckets"):
        BucketPlan.from_bytes(rebuild({**fields, "group_sizes": u32(2), "group_members": u32(0, 1)}))


def test_b14_memory_that_is_not_contiguous_is_no_manifest():
    with pytest.raises(ManifestError):
        BucketPlan.from_bytes(memoryview(plan_buckets([A8], 8).to_bytes())[::2])


# ------------------------------------------------------------------------------------------------------------------ sources


class Lazy(Mapping):
    """Every value in the same memory, made when it is asked for."""

    def __init__(self, values):
        self.values_, self.memory = values, torch.empty(2)

    def __getitem__(self, name):
        self.memory.fill_(self.values_[name])
        return self.memory

    def __iter__(self):
        return iter(self.values_)

    def __len__(self):
        return len(self.values_)


def test_b8_a_lazy_mapping_may_reuse_its_memory():
    values = {"a": 1.0, "b": 2.0, "c": 3.0}
    plan = plan_buckets([TensorSpec(name, torch.float32, (2,)) for name in values], 64)
    assert {name: tensor.tolist() for name, tensor in unpack(plan, pack(plan, Lazy(values)))} == {
        n: [v, v] for n, v in values.items()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [list, iter])
def test_b1_like_neg_views_keep_signalling_nans(dtype, make):
    raw = bytes.fromhex("017d") * 2 if dtype is torch.float16 else bytes.fromhex("817f") * 2
    pairs = [(name, torch._neg_view(from_bytes(raw, dtype, (2,)))) for name in "ab"]
    plan = plan_buckets(specs_of(pairs), 64)
    assert picture(unpack(plan, pack(plan, make(pairs)))) == picture(pairs)


def test_b1_negative_views_of_integers_are_negated():
    pairs = [("a", torch._neg_view(torch.tensor([1, 2, 3])))]
    plan = plan_buckets(specs_of(pairs), 64)
    assert dict(unpack(plan, pack(plan, pairs)))["a"].tolist() == [-1, -2, -3]


@pytest.mark.parametrize("wrong", [None, 5, "x", [1.0]], ids=str)
def test_b16_like_slots_with_values_that_are_no_tensors(wrong):
    plan = plan_buckets([TensorSpec("a", U8, (1,)), TensorSpec("b", U8, (1,))], 8)
    with pytest.raises(SourceError, match="tensor 'a' is a .*, not a torch.Tensor"):
        list(pack(plan, {"a": wrong, "b": wrong}))


def test_b16_a_lazy_module_says_what_to_do():
    with pytest.raises(SourceError, match="tensor 'weight' is not initialized yet; run the module once"):
        specs_of(torch.nn.LazyLinear(3))


def test_b16_a_module_may_have_an_attribute_of_any_name():
    model = torch.nn.Linear(2, 2)
    model.tensor_specs = []
    assert len(specs_of(model)) == 2


def test_b10_b11_a_tied_name_whose_tensor_waits_in_a_group():
    w, y = patterned(torch.float32, 2), patterned(torch.float32, 2, seed=5)
    source = {"embed": w, "lm_head": w, "x": y}
    out = dict(unpack_stream(pack_stream(source, 64, groups=[("embed", "x")])))
    assert {n: r for n, *r in picture(out.items())} == {n: r for n, *r in picture(source.items())}


# ---------------------------------------------------------------------------------------------------------------- receivers


def test_b12_an_error_while_handing_out_leaves_the_bucket_to_be_fed_again(monkeypatch):
    pairs = [("big", patterned(U8, 20)), ("small", patterned(U8, 3))]
    plan = plan_buckets(specs_of(pairs), 8)
    for unpacker, buckets in ((Unpacker(plan), list(pack(plan, pairs))), (StreamUnpacker(), list(pack_stream(pairs, 8)))):
        out = [pair for bucket in buckets[:-1] for pair in unpacker.feed(bucket)]
        with monkeypatch.context() as patch:
            patch.setattr("rollout_core.bucketing.recipes.Views._of", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                unpacker.feed(buckets[-1])
        with pytest.raises(IncompleteStreamError):
            unpacker.close()
        out += unpacker.feed(buckets[-1])
        unpacker.close()
        assert picture(out) == picture(pairs)


def test_b12_pieces_fed_inside_and_outside_of_inference_mode():
    pairs = [("big", patterned(U8, 20))]
    plan = plan_buckets(specs_of(pairs), 8)
    first, *rest = pack(plan, pairs)
    unpacker = Unpacker(plan)
    with torch.inference_mode():
        unpacker.feed(first)
    out = [pair for bucket in rest for pair in unpacker.feed(bucket)]
    assert picture(out) == picture(pairs)


@pytest.mark.parametrize("field", ["version", "index"])
@pytest.mark.parametrize("value", [-1, 2**70, 1.0, None, True])
def test_b13_envelope_numbers_that_are_none(field, value):
    import dataclasses

    pairs = [("a", torch.ones(2))]
    plan = plan_buckets(specs_of(pairs), 8)
    for unpacker, buckets in ((Unpacker(plan), pack(plan, pairs)), (StreamUnpacker(), pack_stream(pairs, 8))):
        (bucket,) = buckets
        with pytest.raises(IntegrityError, match=f"a bucket has {field} "):
            unpacker.feed(dataclasses.replace(bucket, **{field: value}))
    with pytest.raises(ValueError, match="version is -1"):
        StreamUnpacker(version=-1)


# --------------------------------------------------------------------------------------------------------------------- disk


def test_two_writers_of_one_path_do_not_mix(tmp_path):
    """Whoever is last wins, whole."""
    target = tmp_path / "u.safetensors"
    plan = plan_buckets([TensorSpec("w", torch.float32, (8,))], 4)
    barrier = threading.Barrier(2)

    def write(value):
        def buckets():
            for bucket in pack(plan, {"w": torch.full((8,), value)}):
                barrier.wait(5)
                yield bucket

        save_buckets(plan, buckets(), target)

    threads = [threading.Thread(target=write, args=(float(i),)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(safetensors.torch.load_file(target)["w"].tolist())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["u.safetensors"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_metadata_that_is_no_tie(tmp_path):
    safetensors.torch.save_file({"pt": torch.ones(2)}, tmp_path / "m.safetensors", metadata={"format": "pt"})
    assert [spec.name for spec in specs_of(tmp_path)] == ["pt"]
    plan = plan_buckets([TensorSpec("a", U8, (1,)), TensorSpec("format", U8, (1,), "a")], 8)
    with pytest.raises(SourceError, match="tensor 'format' has a name that safetensors cannot hold"):
        save_buckets(plan, [], tmp_path / "x.safetensors")
    plan = plan_buckets([TensorSpec("a", U8, (1,)), TensorSpec("\ud800", U8, (1,), "a")], 8)
    with pytest.raises(SourceError, match="has a name that safetensors cannot hold"):
        save_buckets(plan, [], tmp_path / "x.safetensors")


def test_a_tied_name_of_one_file_that_is_a_tensor_of_another(tmp_path):
    safetensors.torch.save_file({"b": torch.full((2,), 9.0)}, tmp_path / "1.safetensors")
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "2.safetensors", metadata={"b": "a"})
    with pytest.raises(DuplicateNameError, match="name 'b' stands in"):
        SafetensorsSource(tmp_path)


def test_ties_of_a_file_can_be_left_out(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors", metadata={"b": "a"})
    assert [spec.alias_of for spec in specs_of(tmp_path)] == [None, "a"]
    assert [spec.alias_of for spec in specs_of(tmp_path, aliases=False)] == [None, None]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "m.safetensors", "gone": "m.safetensors"}, "the index says that 'gone' is in .*m.safetensors, and it is not"),
        ({"a": 5}, "is no safetensors index"),
        ({"a": ["m.safetensors"]}, "is no safetensors index"),
        ({"a": "../m.safetensors"}, "is not the name of a file beside it"),
    ],
    ids=["missing", "number", "list", "elsewhere"],
)
def test_an_index_is_held_to_its_word(tmp_path, weight_map, message):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(msgspec.json.encode({"weight_map": weight_map}))
    with pytest.raises(SourceError, match=message):
        specs_of(tmp_path)


def test_an_index_says_which_of_two_files_has_the_tensor(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(2), "b": torch.ones(1)}, tmp_path / "2.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_bytes(msgspec.json.encode(index))
    source = SafetensorsSource(tmp_path)
    assert list(source) == ["a", "b"]
    assert source["a"].tolist() == [1.0, 1.0]
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(SourceError, match="tensor 'a' cannot be read"):
        source["a"]
