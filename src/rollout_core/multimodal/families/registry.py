"""Families by the class names of their processors."""

from __future__ import annotations

from typing import Any, Final

from rollout_core.errors import UnsupportedProcessorError
from rollout_core.multimodal.families.family import Family
from rollout_core.multimodal.families.known import KNOWN

_BY_PROCESSOR: Final[dict[str, Family]] = {name: family for family in KNOWN for name in family.processors}


def families() -> tuple[Family, ...]:
    """All families, each once, refused ones included."""
    return tuple({family.name: family for family in _BY_PROCESSOR.values()}.values())


def family_of(processor: Any) -> Family:
    """The family of a processor or tokenizer, by the names of its class and its ancestors.

    A family that refuses is returned too: it says why when it is used. Raises ``UnsupportedProcessorError`` if none is known.
    """
    for ancestor in type(processor).__mro__:
        if ancestor.__name__ in _BY_PROCESSOR:
            return _BY_PROCESSOR[ancestor.__name__]
    raise UnsupportedProcessorError(
        f"no family is known for {type(processor).__name__}; describe one as a families.Family with processors="
        f"({type(processor).__name__!r},) and a rule for each output key, and pass it to families.register_family"
    )


def register_family(family: Family, *, replace: bool = False) -> Family:
    """Make a family known to ``family_of`` under its processors' class names, and return it.

    Raises ``UnsupportedProcessorError`` if another family has one of the names, unless ``replace``.
    """
    if not family.processors:
        raise UnsupportedProcessorError(f"family {family.name!r} names no processor class, so nothing would find it")
    for name in family.processors:
        known = _BY_PROCESSOR.get(name)
        if known is not None and known != family and not replace:
            raise UnsupportedProcessorError(f"{name} belongs to family {known.name!r} already; pass replace=True to take it over")
    _BY_PROCESSOR.update(dict.fromkeys(family.processors, family))
    return family
