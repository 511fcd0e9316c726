"""Prepare a GPU host that reaches no package registry: collect what it lacks, here, as files to be carried to it.

    python tests/gpu/host/bundle.py vllm OUT     # OUT/vllm.part_aa, _ab, ...: each at most 60 MiB
    python tests/gpu/host/bundle.py sglang OUT
    python tests/gpu/host/bundle.py hf OUT       # only what rollout_core itself needs

and there, with one folder for each engine, as the two want different releases of transformers:

    mkdir -p SITE && cat vllm.part_* | tar -xJ -C SITE
    PYTHONPATH=SITE python3 tests/gpu/run.py vllm

The host is x86-64 Linux (glibc 2.35 or newer) with Python 3.12, torch 2.11.0 for CUDA 13, triton, transformers 5, pytest,
hypothesis and what those need. vLLM 0.26.0 and SGLang 0.5.17 are the newest releases for that torch; a .txt beside this file lists
what is installed, dependencies included. What no GPU of compute capability 9.0 (H100, H200) loads with the settings of our tests is
left out, and so is what the host has: a second copy would hide it.

Needs tar, xz and strip here, and pip with its index; no GPU, and any Python from 3.11.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ENGINES = ("hf", "vllm", "sglang")
GLIBC = (17, 24, 27, 28, 31, 34, 35)  # pip matches each by itself
#: Kernels for other GPUs or of backends that are not chosen, compilers' headers, and data of no use here.
UNUSED = (
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
    "vllm/vllm-rs",
    "vllm/third_party/deep_gemm",
    "vllm/third_party/fmha_sm100",
    "vllm/_qutlass_C.abi3.so",
    "sgl_kernel/flash_ops.abi3.so",
    "sgl_kernel/sm100",
    "xgrammar/lib",
    "flashinfer/data/cutlass",
    "flashinfer/data/spdlog",
    "pycountry/locales",
)
LARGE = 1 << 20  # bytes, from which a library is worth stripping


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part-mib", type=int, default=60, help="most MiB of a part")
    given = parser.parse_args()
    for tool in ("tar", "xz", "strip"):
        if shutil.which(tool) is None:
            parser.error(f"there is no {tool} here")
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rollout-core-bundle-") as folder:
        site = Path(folder) / "site"
        install(HERE / f"{given.engine}.txt", site)
        slim(site)
        for old in given.out.glob(f"{given.engine}.part_*"):
            old.unlink()
        write_parts(site, given.out / f"{given.engine}.part_", given.part_mib << 20)
    for part in sorted(given.out.glob(f"{given.engine}.part_*")):
        print(part, f"{part.stat().st_size / 2**20:.1f} MiB")


def install(listed: Path, site: Path) -> None:
    """The wheels of a list, for the host's platform and not for this one's."""
    platforms = [word for minor in GLIBC for word in ("--platform", f"manylinux_2_{minor}_x86_64")]
    platforms += ["--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64", "--platform", "any"]
    python = ["--python-version", "3.12", "--implementation", "cp", "--abi", "cp312", "--abi", "abi3", "--abi", "none"]
    what = ["--no-deps", "--no-compile", "--only-binary=:all:", "--target", str(site), "-r", str(listed)]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *what, *platforms, *python], check=True)


def slim(site: Path) -> None:
    """Leave out what is not used, and the symbols of libraries."""
    for name in UNUSED:
        path = site / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for data in site.glob("mistral_common/data/*"):
        if ".model" in data.name or "tekken" in data.name:
            data.unlink()
    libraries = [path for path in site.rglob("*.so") if path.stat().st_size > LARGE]
    if libraries:  # some cannot be stripped, and stay as they are
        subprocess.run(["strip", "--strip-unneeded", *libraries], check=False, stderr=subprocess.DEVNULL)


def write_parts(site: Path, prefix: Path, nbytes: int) -> None:
    """The folder as one tar.xz, cut into files of at most ``nbytes``."""
    with (
        subprocess.Popen(["tar", "-C", site, "--sort=name", "-cf", "-", "."], stdout=subprocess.PIPE) as tar,
        subprocess.Popen(["xz", "-T0", "-3"], stdin=tar.stdout, stdout=subprocess.PIPE) as xz,
        subprocess.Popen(["split", "-b", str(nbytes), "-", prefix], stdin=xz.stdout) as split,
    ):
        for pipe in (tar.stdout, xz.stdout):
            assert pipe is not None
            pipe.close()  # or an end that dies would not be noticed by who writes to it
    if any(process.returncode for process in (tar, xz, split)):
        raise SystemExit(f"the bundle was not written: tar {tar.returncode}, xz {xz.returncode}, split {split.returncode}")


if __name__ == "__main__":
    main()
