"""The identity of a processor: equal for two processors that give equal outputs by their settings, in any process."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch

from rollout_core.errors import UnsupportedProcessorError

#: Parts whose settings decide what an item becomes. A tokenizer decides nothing about pixels; of it the class is enough.
_PARTS: Final = ("image_processor", "video_processor", "feature_extractor", "audio_processor")
#: Defaults of a call that a processor class may set (transformers 5.23, ``ProcessorMixin._merge_kwargs``).
_DEFAULTS: Final = ("images_kwargs", "videos_kwargs", "audio_kwargs")
#: No part of what an item becomes: the template writes text, and the rest says where files came from.
_IGNORED: Final = frozenset({"chat_template", "name_or_path", "_name_or_path", "_commit_hash", "_auto_class", "processor_class"})

_TOKENIZERS: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()


def processor_fingerprint(processor: Any, processor_kwargs: Mapping[str, Any] | None = None) -> str:
    """SHA-256 (hex) over the classes of a processor and its parts, their settings, the version of transformers and the keywords.

    The backend of an image processor shows in its class. Settings are those of ``to_dict`` of the image, video and audio
    processors, and the plain attributes of the processor itself (image_seq_length and its like). The chat template is left out.
    Arrays count by dtype, shape and bytes.

    Raises ``UnsupportedProcessorError`` for a setting or keyword that has no canonical form.
    """
    parts = {name: part for name in _PARTS if (part := getattr(processor, name, None)) is not None}
    # A tokenizer by itself has no settings of its own here: it is identified by what it encodes (`tokenizer_fingerprint`).
    own = vars(processor) if hasattr(processor, "tokenizer") else {}
    described = {
        "classes": {"processor": _class(processor)}
        | {name: _class(part) for name, part in parts.items()}
        | {"tokenizer": _class(getattr(processor, "tokenizer", None))},
        "transformers": _version(processor),
        "settings": {name: _settings(part.to_dict()) for name, part in parts.items()},
        "processor": _settings({key: value for key, value in own.items() if _is_plain(value)}),
        "defaults": {name: getattr(processor, name, None) for name in _DEFAULTS},
        "keywords": dict(processor_kwargs or {}),
    }
    try:
        canonical = json.dumps(described, sort_keys=True, separators=(",", ":"), default=_canonical)
    except TypeError as error:
        raise UnsupportedProcessorError(f"the settings of {type(processor).__name__} have no fingerprint: {error}") from error
    return hashlib.sha256(canonical.encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) over vocabulary, merges and control tokens. Kept for as long as the tokenizer has the same length."""
    known = _TOKENIZERS.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        known = len(tokenizer), hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()
        _TOKENIZERS[tokenizer] = known
    return known[1]


def _class(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _version(processor: Any) -> str | None:
    """The version of the library that the processor's classes come from."""
    roots = {ancestor.__module__.partition(".")[0] for ancestor in type(processor).__mro__}
    return getattr(sys.modules.get("transformers"), "__version__", None) if "transformers" in roots else None


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _IGNORED}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list | tuple | dict)


def _canonical(value: Any) -> Any:
    """JSON has no arrays, sets, enums or mappings of its own kind; anything else is an error, never a ``repr`` with an address."""
    if isinstance(value, np.ndarray):
        # Not to lists: a bank of mel filters has tens of thousands of numbers.
        return ["array", value.dtype.str, list(value.shape), hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]
    if isinstance(value, torch.Tensor):
        return ["tensor", _canonical(value.detach().cpu().numpy())]
    if isinstance(value, np.generic):
        return [value.dtype.str, value.item()]
    if isinstance(value, set | frozenset):
        return ["set", sorted(value)]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "__dataclass_fields__"):
        return [_class(value), {name: getattr(value, name) for name in value.__dataclass_fields__}]
    raise TypeError(f"{value!r} is a {_class(value)}, which has no canonical form")
