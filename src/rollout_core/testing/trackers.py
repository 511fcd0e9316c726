"""A tracker under test: what the kit calls, and what it may ask for beyond that.

A tracker grows a multimodal conversation by deltas. Under test is a class or factory that takes a processor (one of
transformers, or anything that behaves like it: called with ``text``, ``images``, ``videos``, ``audio``; ``tokenizer``,
``apply_chat_template``) and gives an object with

- ``start(messages) -> state``, ``extend(state, messages) -> state``;
- ``append_sampled(state, ids, logprobs, finish) -> state``: ids as the policy sampled them, one logprob or None for each or None
  for all, and ``stop``, ``length`` or ``aborted``; the generation prompt comes first where it is not there yet;
- ``input_ids(state)``: the expanded ids, without a generation prompt at the end. What ends a sampled turn and was not sampled may
  stand there at once, or when messages follow.

Messages are as templates take them; media are parts ``{"type": "image", "image": picture}``, ``{"type": "video", "video":
frames, "metadata": {"fps": ...}}``, ``{"type": "audio", "audio": samples, "sampling_rate": ...}``. A method that returns None
has changed the state that it was given. With more methods more is checked (``TRACKER_CAPABILITIES``); what no method shows it
claims in ``capabilities``, a set of these names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from rollout_core.testing.packers import Phase, calling, error_words, name_of, refusal
from rollout_core.testing.registry import Violation

#: (modality, spans of feature tokens, identity) of each item, in token order.
ItemRow: TypeAlias = tuple[str, list[tuple[int, int]], Any]

#: What a tracker may have beyond the four methods. A method is found by itself; a claim has to be declared in ``capabilities``.
TRACKER_CAPABILITIES: Final[dict[str, str]] = {
    "prompt_ids": "method prompt_ids(state): the expanded ids with the generation prompt, as the policy sees them",
    "compact_ids": "method compact_ids(state): ids with one placeholder per item",
    "expand": "methods expand(state, ids) and compact(state, ids): from one track to the other",
    "loss_mask": "method loss_mask(state): per expanded id 1 if it was sampled, else 0",
    "logprobs": "method logprobs(state): per expanded id its logprob, or None",
    "position_ids": "method position_ids(state): (n,) or (axes, n)",
    "items": "method items(state): [(modality, [(start, stop), ...], identity), ...] in token order",
    "multi_modal_inputs": "method multi_modal_inputs(state): the processor's outputs by key",
    "truncate": "method truncate(state, max_length, side, policy): side is right or left, policy drop_item, drop_message or error",
    "to_bytes": "methods to_bytes(state) and from_bytes(data)",
    "delta": "method delta(state, since): (new ids, new compact ids, new items) after an earlier state; items as of items(state)",
    "identity": "method identity(modality, part): what the medium of a part of a message is; equal for equal content",
    "artifact": "method artifact(modality, part): the same together with the processor's settings",
    "forks": "claim: states are values; any of them can be grown any number of times, and none changes",
    "loads": "claim: a picture may also be given as a path, the bytes of a file, or a uint8 array (H, W, 3)",
    "refuses": "claim: where the template changes what it wrote before, extend raises",
    "segments": "claim: where the template changes what it wrote before, the state becomes the whole conversation rendered anew",
    "groups tools": "claim: tool messages that the template puts under one header must be added in one call",
}
_NEEDED: Final = ("start", "extend", "append_sampled", "input_ids")
_CLAIMS: Final = ("forks", "loads", "refuses", "segments", "groups tools")
_METHODS: Final[dict[str, tuple[str, ...]]] = {
    **{name: (name,) for name in TRACKER_CAPABILITIES if name not in _CLAIMS},
    "expand": ("expand", "compact"),
    "to_bytes": ("to_bytes", "from_bytes"),
}


class TrackerUnderTest:
    """A kind of tracker as the checks call it: ``on(processor)`` makes one."""

    def __init__(self, factory: Any, phase: Phase | None = None) -> None:
        if not callable(factory) or (isinstance(factory, type) and not _takes_a_processor(factory)):
            raise TypeError(
                f"{name_of(factory)} cannot be called with a processor; a tracker under test is a class or factory: "
                "MyTracker(processor) gives an object with start, extend, append_sampled and input_ids"
            )
        self.factory = factory
        self.phase = phase or Phase()
        self.capabilities = tracker_capabilities(factory if inspect.isclass(factory) else _made_once(factory))

    def on(self, processor: Any) -> Calls:
        """A new tracker with this processor, or ``Raised``."""
        with calling(self.phase, "making the tracker"):
            return Calls(self.factory(processor), self.phase, self.capabilities)


class Calls:
    """One tracker: every call is noted, every exception becomes ``Raised``, every result is put into one form."""

    def __init__(self, tracker: Any, phase: Phase, capabilities: frozenset[str]) -> None:
        self.tracker = tracker
        self.capabilities = capabilities
        self._phase = phase

    def start(self, messages: Sequence[Mapping[str, Any]]) -> Any:
        state = self._call("start", messages)
        if state is None:
            raise Violation("start gave None; it gives a state")
        return state

    def extend(self, state: Any, messages: Sequence[Mapping[str, Any]]) -> Any:
        return self._changed("extend", state, messages)

    def append_sampled(self, state: Any, ids: Any, logprobs: Any = None, finish: str = "stop") -> Any:
        return self._changed("append_sampled", state, ids, logprobs, finish)

    def truncate(self, state: Any, max_length: int, side: str, policy: str) -> Any:
        return self._changed("truncate", state, max_length, side, policy)

    def input_ids(self, state: Any) -> list[int]:
        return _ids("input_ids", self._call("input_ids", state))

    def prompt_ids(self, state: Any) -> list[int]:
        return _ids("prompt_ids", self._call("prompt_ids", state))

    def compact_ids(self, state: Any) -> list[int]:
        return _ids("compact_ids", self._call("compact_ids", state))

    def expand(self, state: Any, ids: Sequence[int]) -> list[int]:
        return _ids("expand", self._call("expand", state, list(ids)))

    def compact(self, state: Any, ids: Sequence[int]) -> list[int]:
        return _ids("compact", self._call("compact", state, list(ids)))

    def loss_mask(self, state: Any) -> list[int]:
        return _ids("loss_mask", self._call("loss_mask", state))

    def logprobs(self, state: Any) -> list[float | None]:
        return [None if value is None else float(value) for value in self._call("logprobs", state)]

    def position_ids(self, state: Any) -> np.ndarray[Any, Any]:
        """(axes, n)"""
        found = _array(self._call("position_ids", state))
        if found.ndim not in (1, 2):
            raise Violation(f"position_ids gave shape {list(found.shape)}; it is (n,) or (axes, n)")
        return found[None] if found.ndim == 1 else found

    def items(self, state: Any) -> list[ItemRow]:
        return _items("items", self._call("items", state))

    def multi_modal_inputs(self, state: Any) -> dict[str, Any]:
        return dict(self._call("multi_modal_inputs", state))

    def to_bytes(self, state: Any) -> bytes:
        return bytes(self._call("to_bytes", state))

    def from_bytes(self, data: bytes) -> Any:
        return self._call("from_bytes", data)

    def delta(self, state: Any, since: Any) -> tuple[list[int], list[int], list[ItemRow]]:
        ids, compact, items = self._call("delta", state, since)
        return _ids("delta", ids), _ids("delta", compact), _items("delta", items)

    def identity(self, modality: str, part: Any) -> Any:
        return self._call("identity", modality, part)

    def artifact(self, modality: str, part: Any) -> Any:
        return self._call("artifact", modality, part)

    def refusal(self, call: Callable[[], Any]) -> Exception | None:
        """The error with which the tracker refuses a call; None if it does not."""
        return refusal(call)

    def _changed(self, method: str, state: Any, *arguments: Any) -> Any:
        """The state after a call: what it returned, or the one given, changed."""
        found = self._call(method, state, *arguments)
        return state if found is None else found

    def _call(self, method: str, *arguments: Any) -> Any:
        with calling(self._phase, method):
            return getattr(self.tracker, method)(*arguments)


def tracker_capabilities(tracker: Any) -> frozenset[str]:
    """The methods that a tracker, or its class, has and the claims that it makes; ``TypeError`` for a claim that is not known,
    and for what lacks one of the four methods."""
    for method in _NEEDED:
        if not callable(getattr(tracker, method, None)):
            raise TypeError(
                f"{name_of(tracker)} has no method {method}; a tracker under test has start(messages), extend(state, messages), "
                "append_sampled(state, ids, logprobs, finish) and input_ids(state)"
            )
    declared: Any = getattr(tracker, "capabilities", frozenset())
    if isinstance(declared, str) or not isinstance(declared, Iterable):
        raise TypeError(f"capabilities is {declared!r}; it is a set of names, for example {{'forks', 'refuses'}}")
    claims = frozenset(declared)
    unknown = sorted(claims - TRACKER_CAPABILITIES.keys())
    if unknown:
        raise TypeError(f"capabilities has {unknown[0]!r}; it may have {', '.join(TRACKER_CAPABILITIES)}")
    found = {name for name, methods in _METHODS.items() if all(callable(getattr(tracker, method, None)) for method in methods)}
    for name in sorted(claims & _METHODS.keys() - found):
        raise TypeError(f"capabilities has {name!r}, and the tracker has not the {TRACKER_CAPABILITIES[name].partition(':')[0]}")
    return claims | found


def looks_like_a_tracker(target: Any) -> bool:
    """Whether a target is meant for the checks of trackers: it has their methods, or it is a function of one argument."""
    if hasattr(target, "append_sampled"):
        return True
    return inspect.isroutine(target) and not hasattr(target, "pack") and _takes_a_processor(target)


def _takes_a_processor(target: Any) -> bool:
    try:
        signature = inspect.signature(target)
        signature.bind(object())
    except (TypeError, ValueError):
        return False
    return True


def _made_once(factory: Any) -> Any:
    """A tracker of a factory, to see what it has."""
    from rollout_core.testing.worlds import make_world

    return factory(make_world("chatml+rows").processor)


def _array(values: Any) -> np.ndarray[Any, Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def _ids(method: str, values: Any) -> list[int]:
    array = _array(values)
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise Violation(
            f"{method} gave {name_of(values)} of shape {list(array.shape)} and {array.dtype}; it gives whole numbers, (n,)"
        )
    return [int(value) for value in array]


def _items(method: str, rows: Any) -> list[ItemRow]:
    try:
        return [(str(modality), [(int(a), int(b)) for a, b in spans], identity) for modality, spans, identity in rows]
    except (TypeError, ValueError) as error:
        raise Violation(
            f"{method} gave {rows!r:.80}, no list of (modality, [(start, stop), ...], identity): {error_words(error)}"
        ) from error
