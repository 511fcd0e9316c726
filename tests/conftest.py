import os

import torch
from hypothesis import settings

settings.register_profile("unit", deadline=None, max_examples=60, print_blob=True)
settings.register_profile("nightly", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("ROLLOUT_CORE_HYPOTHESIS", "unit"))

# The suites share a small machine with each other, and tiny tensors gain nothing from threads.
torch.set_num_threads(1)
