"""What the examples import of this package, and where they are named."""

import ast
import importlib

import pytest

from .conftest import FOLDER


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.py")))
def test_only_public_names_are_used(name):
    tree = ast.parse((FOLDER / name).read_text())
    found = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("rollout_core") for alias in node.names)  # from ... import ..., as users do
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rollout_core"):
            public = importlib.import_module(node.module).__all__
            assert node.module.count(".") == 1
            assert node.module != "rollout_core.testing"
            assert {alias.name for alias in node.names} <= set(public)
            found += 1
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_")
    assert found


def test_the_readme_points_to_each():
    readme = (FOLDER.parent / "README.md").read_text()
    names = [path.name for path in FOLDER.glob("*.py")]
    assert names
    assert all(f"(examples/{name})" in readme for name in names)
