"""parametrize_packer_checks and the pytest plugin, in pytest runs of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

FILE = """
    import pytest
    from rollout_core.testing import parametrize_packer_checks

    class Plain:
        def pack(self, named, capacity):
            return [[(name, tensor.clone())] for name, tensor in named]

        def unpack(self, buckets):
            return [pair for bucket in buckets for pair in bucket]

    class Halved(Plain):
        def unpack(self, buckets):
            return [(name, tensor.view(-1)[: max(1, tensor.numel() // 2)]) for name, tensor in super().unpack(buckets)]

    @parametrize_packer_checks({packers}, only={only}, expected_failures={expected})
    def test_packer(packer, check):
        check(packer)
"""


@pytest.fixture
def run(tmp_path):
    def run(*options, packers="[Plain]", only=("B1-order",), expected=None):
        text = FILE.format(packers=packers, only=list(only), expected=expected or {})
        (tmp_path / "test_it.py").write_text(textwrap.dedent(text))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rsxX",
            "-p",
            "no:cacheprovider",
            "--strict-markers",
            *options,
            "test_it.py",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout + done.stderr

    return run


def test_one_line_gives_a_test_for_each_check_and_k_selects(run):
    code, shown = run("-vv", "-k", "B1-scalars or B3-alignment", only=["B1", "B3"])
    assert code == 0, shown
    assert "test_it.py::test_packer[Plain-packer/B1-scalars] PASSED" in shown
    assert "test_it.py::test_packer[Plain-packer/B3-alignment] PASSED" in shown
    assert "2 passed, 14 deselected" in shown


def test_a_failure_has_the_counterexample_and_the_script(run):
    code, shown = run(packers="[Halved]")
    assert code == 1
    assert "'a' has another shape (model: [2], actual: [1])" in shown
    assert "case: capacity 8 bytes; 'a' f32[2]" in shown
    assert "named = [" in shown
    assert "runner.py" not in shown  # the reader is shown their own line and the report, not the kit's inside


def test_a_skip_says_why(run):
    code, shown = run(only=["B14-cut"])
    assert code == 0
    assert "needs 'manifest': methods manifest(named_tensors, capacity) -> bytes and read_manifest(data)" in shown


def test_expected_failures_are_strict(run):
    expected = {"packer/B1-order": "known since spring"}
    code, shown = run(packers="[Halved]", expected=expected)
    assert code == 0
    assert "1 xfailed" in shown
    assert "known since spring" in shown
    code, shown = run(packers="[Plain]", expected=expected)
    assert code == 1
    assert "[XPASS(strict)] known since spring" in shown


def test_an_expected_failure_that_is_skipped_is_a_failure(run):
    code, shown = run(only=["B14-cut"], expected={"packer/B14-cut": "no manifest"})
    assert code == 1
    assert "packer/B14-cut is expected to fail, and was skipped: needs 'manifest'" in shown


def test_two_packers_of_one_class_have_ids_of_their_own(run):
    code, shown = run("-vv", "-o", "strict_parametrization_ids=true", packers="[Plain(), Plain(), 'reference']")
    assert code == 0, shown
    for label in ("Plain-0", "Plain-1", "reference"):
        assert f"test_packer[{label}-packer/B1-order] PASSED" in shown


def test_the_option_goes_before_the_argument(run):
    code, shown = run("--rollout-core-max-examples", "1", packers="[Halved]")
    assert code == 0, shown  # one case, which is a single element
    code, shown = run("--rollout-core-max-examples", "0")
    assert code == 4
    assert "--rollout-core-max-examples is 0; it is a number of cases, at least 1" in shown


def test_a_wrong_id_is_an_error_when_the_tests_are_collected(run):
    code, shown = run(expected={"packer/B1-odrer": "?"})
    assert code == 2
    assert "there is no check 'packer/B1-odrer'; did you mean 'packer/B1-order'?" in shown


def loaded_after(program):
    done = subprocess.run(
        [sys.executable, "-c", program + "; import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_entry_points_are_there():
    from importlib.metadata import entry_points

    assert [e.value for e in entry_points(group="pytest11", name="rollout_core")] == ["rollout_core.testing.pytest_plugin"]
    assert [e.value for e in entry_points(group="hypothesis", name="rollout_core")] == [
        "rollout_core.testing.hypothesis_plugin:register"
    ]


def test_loading_the_pytest_plugin_loads_neither_torch_nor_hypothesis():
    loaded = loaded_after("import rollout_core.testing.pytest_plugin")
    assert not loaded & {"torch", "hypothesis", "pytest", "msgspec", "numpy"}


def test_loading_the_hypothesis_entry_point_loads_no_torch_and_hypothesis_only_if_it_is_there():
    assert "torch" not in loaded_after("import hypothesis")
    assert "rollout_core.testing.hypothesis_plugin" in loaded_after("import hypothesis")
    assert not loaded_after("import rollout_core.testing.hypothesis_plugin as p; p.register()") & {"torch", "hypothesis"}


@pytest.mark.parametrize(
    "imports",
    [
        "from hypothesis import strategies as st; from rollout_core.bucketing import BucketPlan, TensorSpec",
        "from rollout_core.bucketing import BucketPlan, TensorSpec; from hypothesis import strategies as st",
    ],
)
def test_from_type_knows_the_types_in_whatever_order_they_are_imported(imports):
    program = f"""
{imports}
from hypothesis import find
import rollout_core.testing
spec = find(st.from_type(TensorSpec), lambda spec: spec.numel == 1)
plan = find(st.from_type(BucketPlan), lambda plan: plan.nbytes)
print(spec, len(plan.buckets))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "f32[1] 1\n"), done.stderr


def test_importing_the_kit_is_cheap_and_loads_what_is_used():
    assert not loaded_after("import rollout_core.testing") & {"torch", "hypothesis", "pytest"}
    assert "hypothesis" in loaded_after("from rollout_core.testing import check_packer")


def test_a_name_that_is_not_there_is_an_attribute_error():
    import rollout_core.testing as kit

    with pytest.raises(AttributeError, match=r"module 'rollout_core.testing' has no attribute 'check_packers'"):
        kit.check_packers  # noqa: B018
    assert set(dir(kit)) == set(kit.__all__)
    for name in kit.__all__:
        assert getattr(kit, name) is not None
