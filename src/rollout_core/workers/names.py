"""Names of weights: transformers' modules and its checkpoints call those of models that see by different names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

#: What a module has before the name that older checkpoints have, which ``save_pretrained`` still writes for them.
_PREFIXES: Final = {"model.language_model.": "model.", "model.visual.": "visual."}
#: The tensors that tied models have as one, and of which an update may name the first alone, as checkpoints do.
EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"


def canonical(name: str) -> str:
    """The shorter of a weight's two names; one that has no other is returned as it is."""
    for prefix, shorter in _PREFIXES.items():
        if name.startswith(prefix):
            return shorter + name.removeprefix(prefix)
    return name


def name_among(name: str, names: Iterable[str]) -> str | None:
    """What these call the weight of this name, which may be its other one; None if they have it under neither."""
    return next((one for one in names if canonical(one) == canonical(name)), None)
