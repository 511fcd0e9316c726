"""Every error this package raises on purpose. Each message says what is wrong, where, and what to do about it."""


class RolloutCoreError(Exception):
    """Base of all errors raised by rollout_core."""


class SourceError(RolloutCoreError, ValueError):
    """A source of tensors cannot be packed: an empty name, a tensor without data, a layout that is no plain bytes."""


class DuplicateNameError(SourceError):
    """One name stands at two places."""


class CapacityError(RolloutCoreError, ValueError):
    """A capacity is no positive whole number of bytes, or a tensor or group cannot be placed within it."""


class ManifestError(RolloutCoreError, ValueError):
    """Bytes that are not a valid manifest, or exceed the stated bounds."""


class PlanMismatchError(RolloutCoreError):
    """Two sides, or a plan and a source, do not describe the same tensors; the message names the first difference."""


class IntegrityError(RolloutCoreError):
    """Received bytes are not the bytes that were sent."""


class IncompleteStreamError(RolloutCoreError):
    """A stream of buckets ended early, repeated a bucket, skipped one, or went on after its end."""


class TransferError(RolloutCoreError):
    """Moving bytes between two processes failed, or the other side did."""


class WorkerError(RolloutCoreError):
    """A rollout worker could not do what was asked of it."""


class ConversationError(RolloutCoreError, ValueError):
    """A turn cannot be added to a conversation, or a call asks what the conversation cannot give; it is unchanged."""


class MediaError(ConversationError):
    """A picture, video or sound cannot be read, is empty, or is larger than the stated bounds."""


class UnstableTemplateError(ConversationError):
    """The chat template changes what it rendered earlier once more messages follow; the message says which one."""


class UnsupportedProcessorError(ConversationError):
    """Outputs of this processor cannot be put together from those of single items, or nobody has said how."""


class TruncationError(ConversationError):
    """A conversation cannot be cut as asked."""
