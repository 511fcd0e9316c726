"""Many random conversations over every family and three real tokenizers, against the oracles of ``support.whole``.

Run by `nox -s processors -- --conversations 1000`; prints a table and fails if one conversation differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from support import processors, real_tokenizers, torchvision_cpu  # noqa: E402 - the tests' folder has to be on the path first

torchvision_cpu.prepare()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    spec = importlib.util.spec_from_file_location("test_conversations", HERE / "test_conversations.py")
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    families = tests.FAMILIES
    share = -(-arguments.conversations // (len(families) * len(real_tokenizers.NAMES)))
    total = bad = 0
    began = time.monotonic()
    real_tokenizers.backend("qwen2")  # before it is replaced
    for tokenizer in real_tokenizers.NAMES:
        backend = real_tokenizers.backend(tokenizer)
        processors.base_tokenizer = lambda backend=backend: backend
        for place, name in enumerate(families):
            processor = tests.built(name)
            first = arguments.seed + place * share
            found = tests.check(name, processor, tests.renderer_of(name, processor), range(first, first + share))
            total, bad = total + share, bad + len(found)
            for line in found:
                print(f"{name} with {tokenizer}: {line}")
            print(f"{tokenizer:8} {name:16} {share} conversations, {len(found)} differences", flush=True)
    print(f"{total} conversations, {len(families)} families, {len(real_tokenizers.NAMES)} tokenizers: {bad} differences, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return 1 if bad or total < arguments.conversations else 0


if __name__ == "__main__":
    raise SystemExit(main())
