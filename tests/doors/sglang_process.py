"""Another process, started by nobody's fork, that takes SGLang payloads as a tensor-parallel rank does: one text a line on stdin,
for each a JSON line of names and the SHA-256 of dtype, shape and bytes on stdout."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path


def digest(tensor) -> str:
    import torch

    head = f"{tensor.dtype}{list(tensor.shape)}".encode()
    flat = tensor.detach().contiguous().flatten()
    return hashlib.sha256(head + bytes(flat.view(torch.uint8).tolist())).hexdigest()


def main() -> None:
    spec = importlib.util.spec_from_file_location("doors_conftest", Path(__file__).with_name("conftest.py"))
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    bucket_class = conftest.SGLANG.load("sglang.srt.weight_sync.tensor_bucket").FlattenedTensorBucket
    serializer = conftest.SGLANG.load("sglang.srt.utils").MultiprocessingSerializer
    with conftest.SGLANG:
        for line in sys.stdin:
            data = serializer.deserialize(line.strip())
            bucket = bucket_class(flattened_tensor=data["flattened_tensor"], metadata=data["metadata"])
            print(json.dumps([(name, digest(tensor)) for name, tensor in bucket.reconstruct_tensors()]), flush=True)


if __name__ == "__main__":
    main()
