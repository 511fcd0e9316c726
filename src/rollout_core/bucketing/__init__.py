"""Tensors into buckets and back: specs, plans, packing, unpacking, streams, manifests and digests.

Pure: nothing here starts a thread or process, reads a clock or the environment, or opens a file, except the safetensors functions
in ``checkpoint``, which open the path that they are given.
"""

from rollout_core.bucketing.bucket import Bucket
from rollout_core.bucketing.packer import Packer, apack, pack
from rollout_core.bucketing.placement import BucketLayout, Options, Slot
from rollout_core.bucketing.plan import BucketPlan, plan_buckets
from rollout_core.bucketing.specs import TensorSpec, specs_of
from rollout_core.bucketing.unpacker import Unpacker, unpack

__all__ = [
    "Bucket",
    "BucketLayout",
    "BucketPlan",
    "Options",
    "Packer",
    "Slot",
    "TensorSpec",
    "Unpacker",
    "apack",
    "pack",
    "plan_buckets",
    "specs_of",
    "unpack",
]
