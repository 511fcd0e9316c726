"""Moving buckets from a trainer to rollout workers: ``send`` on one side, ``receive`` on the other, a carrier between them.

Loads no more than bucketing until a carrier is imported: ``rollout_core.transfer.carriers.memory`` between processes,
``.collective`` over torch.distributed, ``.cuda_ipc`` between processes on one GPU's node, ``.local`` between threads.
"""

from rollout_core.transfer.receiving import receive
from rollout_core.transfer.report import ReceiveReport, SendReport, Step
from rollout_core.transfer.sending import send, send_stream
from rollout_core.transfer.targets import CollectedWeights, DirectWeights, StagedWeights, Target

__all__ = [
    "CollectedWeights",
    "DirectWeights",
    "ReceiveReport",
    "SendReport",
    "StagedWeights",
    "Step",
    "Target",
    "receive",
    "send",
    "send_stream",
]
