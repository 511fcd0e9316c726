"""The core between an RL trainer and its rollout engine: tensor buckets, workers, and the checks that prove them.

Importing this package loads neither torch nor an engine; import the part you need, e.g. ``rollout_core.bucketing``.
"""

from rollout_core.errors import (
    CapacityError,
    ConversationError,
    DuplicateNameError,
    IncompleteStreamError,
    IntegrityError,
    ManifestError,
    MediaError,
    PlanMismatchError,
    RolloutCoreError,
    SourceError,
    TransferError,
    TruncationError,
    UnstableTemplateError,
    UnsupportedProcessorError,
    WorkerError,
)

__version__ = "0.1.0.dev0"

__all__ = [
    "CapacityError",
    "ConversationError",
    "DuplicateNameError",
    "IncompleteStreamError",
    "IntegrityError",
    "ManifestError",
    "MediaError",
    "PlanMismatchError",
    "RolloutCoreError",
    "SourceError",
    "TransferError",
    "TruncationError",
    "UnstableTemplateError",
    "UnsupportedProcessorError",
    "WorkerError",
    "__version__",
]
