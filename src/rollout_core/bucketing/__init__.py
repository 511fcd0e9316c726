"""Tensors into buckets and back: specs, plans, packing, unpacking, streams, manifests and digests.

Pure: nothing here starts a thread or process, reads a clock or the environment, or opens a file, except the safetensors functions
in ``checkpoint``, which open the path that they are given. What is compiled, once a packer of many small tensors packs for the
second time, is beside it in ``rollout_core.compiled``.
"""

from rollout_core.bucketing.bucket import Bucket
from rollout_core.bucketing.checkpoint import SafetensorsSource, save_buckets
from rollout_core.bucketing.grouping import aiter_buckets, iter_buckets
from rollout_core.bucketing.packer import Packer, apack, pack
from rollout_core.bucketing.placement import BucketLayout, Options, Slot
from rollout_core.bucketing.plan import BucketPlan, plan_buckets
from rollout_core.bucketing.specs import TensorSpec, specs_of
from rollout_core.bucketing.stream import apack_stream, pack_stream
from rollout_core.bucketing.stream_header import StreamBucket
from rollout_core.bucketing.stream_unpacker import StreamUnpacker, unpack_stream
from rollout_core.bucketing.unpacker import Unpacker, unpack

__all__ = [
    "Bucket",
    "BucketLayout",
    "BucketPlan",
    "Options",
    "Packer",
    "SafetensorsSource",
    "Slot",
    "StreamBucket",
    "StreamUnpacker",
    "TensorSpec",
    "Unpacker",
    "aiter_buckets",
    "apack",
    "apack_stream",
    "iter_buckets",
    "pack",
    "pack_stream",
    "plan_buckets",
    "save_buckets",
    "specs_of",
    "unpack",
    "unpack_stream",
]
