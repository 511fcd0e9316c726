"""The house: imports go down only, the pure packages are pure, and importing costs what it may."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rollout_core

PACKAGE = Path(rollout_core.__file__).parent
#: Each layer may import itself and what stands in its set; errors is everybody's.
MAY_IMPORT = {
    "compiled": set(),
    "bucketing": {"compiled"},
    "multimodal": set(),
    "transfer": {"bucketing", "multimodal"},
    "workers": {"transfer", "bucketing", "multimodal"},
    # The kit's checks of workers are those that preflight runs, and more: nothing that an operator runs may say otherwise.
    "testing": {"preflight", "workers", "transfer", "bucketing", "multimodal"},
    "bench": {"workers", "transfer", "bucketing", "multimodal"},
    "preflight": {"workers", "transfer", "bucketing", "multimodal"},
    "viewing": {"multimodal"},
    "cli": {"viewing", "preflight", "bench", "testing", "workers", "transfer", "bucketing", "multimodal"},
}
PURE = ("bucketing", "multimodal")
#: What a pure module has no business with: files, processes, threads, clocks, the environment, chance, engines.
EFFECTS = {
    *("time", "datetime", "random", "secrets", "threading", "multiprocessing", "subprocess", "socket", "pathlib", "io", "tempfile"),
    *("shutil", "signal", "ctypes", "pickle", "vllm", "sglang", "transformers", "logging"),
}
#: The modules of the pure packages that open files: each is given a path, and reads (or writes safetensors) there.
FILE_MODULES = {"bucketing/checkpoint.py", "multimodal/loading.py"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """All modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    here = layer(path)
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("rollout_core.")} - {"errors", "__version__", here}
    if here == "errors":
        assert not ours
    elif here == "__init__":
        assert ours <= {"errors"} | set(dir(rollout_core))
    else:
        assert ours <= MAY_IMPORT[here], f"{here} imports {ours - MAY_IMPORT[here]}"


@pytest.mark.parametrize("path", [p for p in modules() if layer(p) in PURE], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_pure_packages_have_no_effects(path):
    if str(path.relative_to(PACKAGE)) in FILE_MODULES:
        return
    used = {name.split(".")[0] for name in imports(path)}
    assert not used & EFFECTS
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    attributes = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert not names & {"open", "print", "input", "eval", "exec"}
    assert {a for a in attributes if a.startswith("os.")} <= {"os.PathLike"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_unpickles(path):
    if str(path.relative_to(PACKAGE)) in ("bench/planning.py", "testing/mutants/protocol.py"):
        return  # a baseline, on bytes that it made itself; and a mutant, whose bug it is
    assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def loaded_by(statement: str) -> tuple[set[str], float]:
    """The modules in a new process after a statement, and its seconds (best of five: the machine may be busy)."""
    program = f"import time; t = time.perf_counter(); {statement}; t = time.perf_counter() - t; import sys; print(t, *sys.modules)"
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout.split() for _ in range(5)
    ]
    return set(runs[0][1:]), min(float(run[0]) for run in runs)


def test_importing_rollout_core_is_cheap():
    loaded, seconds = loaded_by("import rollout_core")
    assert not loaded & {"torch", "numpy", "hypothesis", "pytest", "transformers", "msgspec"}
    assert seconds < 0.050, "the budget of the design: 50 ms"


def test_importing_bucketing_loads_torch_and_no_engine():
    program = "import sys, rollout_core.bucketing; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout.split())
    assert "torch" in loaded
    assert not loaded & {"vllm", "sglang", "transformers", "safetensors", "hypothesis", "pytest", "typer", "rich", "matplotlib"}


def test_help_loads_no_torch():
    program = (
        "import sys\nfrom rollout_core.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\nprint('MODULES', *sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout
    assert "preflight" in shown
    assert "plan" in shown
    assert not set(shown.split("MODULES")[1].split()) & {"torch", "transformers", "matplotlib"}
