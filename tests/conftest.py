import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

pytest.register_assert_rewrite("support")  # so that what fails there is said as in a test

settings.register_profile("unit", deadline=None, max_examples=60, print_blob=True)
settings.register_profile("nightly", deadline=None, max_examples=2000, print_blob=True)
# Mutation testing: the same few examples for every mutant, no time lost on shrinking, and no mutant killed by slow input alone.
settings.register_profile(
    "mutation",
    deadline=None,
    max_examples=30,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile(os.environ.get("ROLLOUT_CORE_HYPOTHESIS", "unit"))

# The suites share a small machine with each other, and tiny tensors gain nothing from threads.
torch.set_num_threads(1)

# A shell starts what runs in the background with interrupts ignored, and Python leaves that so: tests that interrupt would fail.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
