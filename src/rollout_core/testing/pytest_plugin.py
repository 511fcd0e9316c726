"""The pytest plugin: one option. It is loaded in every pytest run where rollout_core is installed, so it imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

#: Set by the option; goes before what ``parametrize_packer_checks`` was given.
max_examples: int | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rollout_core")
    group.addoption(
        "--rollout-core-max-examples",
        type=int,
        default=None,
        metavar="N",
        help="cases tried by each check of rollout_core.testing, whatever parametrize_packer_checks was given",
    )


def pytest_configure(config: pytest.Config) -> None:
    global max_examples
    max_examples = config.getoption("--rollout-core-max-examples")
    if max_examples is not None and max_examples < 1:
        import pytest

        raise pytest.UsageError(f"--rollout-core-max-examples is {max_examples}; it is a number of cases, at least 1")
