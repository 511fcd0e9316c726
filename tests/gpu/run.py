"""The GPU tests of one engine, by this Python and what its path has: no installation, no other tool.

    python3 tests/gpu/run.py hf|vllm|sglang|two-hf|two-vllm|two-sglang [WORDS OF PYTEST]

It fails where there is no GPU (``two``: where there are fewer than two), or no such engine. On a host without a package registry,
PYTHONPATH has what ``host/bundle.py`` made; the sessions ``gpu_hf``, ``gpu_vllm``, ``gpu_sglang`` and ``gpu_multi`` of noxfile.py
install it, and call this.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = "tests/engines/contract"
#: What of the tests is for which engine. SGLang's kernels take no float32, in which the contract is written.
PLACES = {
    "hf": [*(f"tests/gpu/{path.name}" for path in sorted((ROOT / "tests/gpu").glob("test_*.py"))), CONTRACT],
    "vllm": ["tests/gpu/vllm", CONTRACT],
    "sglang": ["tests/gpu/sglang"],
    "two-hf": ["tests/gpu/two/test_fsdp_two_gpus.py", "tests/gpu/two/test_collective_nccl.py"],
    "two-vllm": ["tests/gpu/two/test_tensor_parallel.py", "tests/gpu/two/test_fsdp_engine.py", f"{CONTRACT}/test_ranks.py"],
    "two-sglang": ["tests/gpu/two/test_tensor_parallel.py", "tests/gpu/two/test_fsdp_engine.py"],
}


def main(words: list[str]) -> int:
    if not words or words[0] not in PLACES:
        print(__doc__, file=sys.stderr)
        return 2
    place, rest = words[0], words[1:]
    engine = place.removeprefix("two-")
    chosen = [word for word in rest if (ROOT / word.partition("::")[0]).exists()]
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "4"}
    ours = {"PYTHONPATH": path, "ROLLOUT_CORE_ENGINE": engine, "ROLLOUT_CORE_DEVICE": "cuda"}
    # The times of tests are part of what a run on a GPU tells.
    command = [sys.executable, "-m", "pytest", "--durations=15", *([] if chosen else PLACES[place]), *rest]
    return subprocess.run(command, cwd=ROOT, env={**quiet, **os.environ, **ours}).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
