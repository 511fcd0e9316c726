import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def a_gpu():
    """These tests need a GPU; without one they fail, so that a broken runner cannot pass for a green one."""
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device: tests/gpu is for a machine that has one")
