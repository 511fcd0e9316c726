"""What of ours runs in vLLM's workers, without an engine: what one of several workers on a server asks leaves the others' alone."""

from types import SimpleNamespace

import msgspec
import pytest
import torch

from rollout_core.errors import TransferError
from rollout_core.workers.commands import Answer, Layout, Settle
from rollout_core.workers.vllm.extension import RolloutExtension


class Engine:
    """As much of the door's as is asked: an update from ``mine`` is under way, and has failed."""

    def __init__(self):
        self.address, self.closed, self.loading = "mine", 0, 0.0
        self.failure = TransferError("the sender is gone")
        self.target = SimpleNamespace(version=3, unusable=None)

    def shutdown(self):
        self.closed += 1


@pytest.fixture
def extension():
    found = RolloutExtension()
    found.weight_transfer_engine, found.device = Engine(), torch.device("cpu")
    found.model_config = SimpleNamespace(quantization=None, enable_sleep_mode=False)
    found.model_runner = SimpleNamespace(get_model=torch.nn.Module)
    return found


def ask(extension, command):
    found = extension.rollout_core_carry_out(msgspec.json.encode(command).decode())
    return msgspec.convert(found, type=Answer)


@pytest.mark.parametrize("command", [Settle(mend=False), Settle(mend=True, address="another's"), Layout({})])
def test_an_update_is_settled_by_who_sent_it_alone(extension, command):
    answer = ask(extension, command)
    engine = extension.weight_transfer_engine
    assert (answer.failed, answer.version, engine.closed) == (None, 3, 0)
    assert ask(extension, Settle(mend=False, address="mine")).failed.message == "the sender is gone"
    assert engine.closed == 1
    assert ask(extension, Settle(mend=False, address="mine")).failed is None  # it is told once


def test_it_says_what_it_is(extension):
    answer = ask(extension, Layout({}))
    assert (answer.device, answer.quantization, answer.sleeps) == ("cpu", "", True)
    extension.device = torch.device("cuda", 0)
    extension.model_config.quantization = "fp8"
    answer = ask(extension, Layout({}))
    assert (answer.device, answer.quantization, answer.sleeps) == ("cuda:0", "fp8", False)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_t5_nan_weights_are_told_of_where_they_would_end_vllm(extension, device, monkeypatch):
    """On a GPU, and only of an update that came to its end."""
    monkeypatch.setattr(RolloutExtension, "rollout_core_mend", lambda extension: None)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model.register_parameter("none", torch.nn.Parameter(torch.zeros(0, 3)))
    model.register_parameter("eight", torch.nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False))
    extension.model_runner = SimpleNamespace(get_model=lambda: model)
    extension.device = torch.device(device)
    extension.weight_transfer_engine.failure = None
    settled = Settle(mend=True, address="mine")
    assert ask(extension, settled).unusable is None
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf  # an engine gets along with it
        assert ask(extension, settled).unusable is None
        model[1].weight[1, 2] = model[1].bias[0] = torch.nan
    expected = None if device == "cpu" else "'1.weight' has a NaN (2 tensors have): check what the trainer sends"
    assert ask(extension, settled).unusable == expected
    assert ask(extension, Layout({})).unusable == expected, "whoever asks hears of it, another worker of the same server, too"
    extension.weight_transfer_engine.target.unusable = None  # as the next update leaves it
    assert ask(extension, Settle(mend=False, address="mine")).unusable is None
    extension.weight_transfer_engine.target.unusable = "half of it came"
    assert ask(extension, settled).unusable == "half of it came"
