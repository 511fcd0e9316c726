"""A BucketPlan for people and for programs: sizes in words, tables for a terminal, and JSON."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Final

import msgspec
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rollout_core.bucketing import BucketPlan, Slot, TensorSpec
from rollout_core.bucketing.dtypes import WIRE_NAMES, label
from rollout_core.errors import CapacityError

_PREFIXES: Final = "KMGTPE"
_UNITS: Final = {
    "B": 1,
    "kB": 1000,
    **{f"{prefix}iB": 1 << 10 * power for power, prefix in enumerate(_PREFIXES, start=1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(_PREFIXES, start=1)},
}
#: Longer numbers are no sizes of anything, and int() refuses very long ones with an error of its own.
_SIZE: Final = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?) *([A-Za-z]*)")
#: Rows of a table before its middle is left out.
_HEAD, _TAIL = 8, 4


def parse_size(text: str) -> int:
    """A number of bytes: ``512MiB``, ``1.5 GiB``, ``2GB``, ``4096``. Units are case-sensitive, as Mb would be megabits.

    Raises ``CapacityError`` for anything that is not a whole number of bytes >= 0 in a known unit.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        if re.match(r"[-\u2212]\s*[.0-9]", text.strip()):
            raise CapacityError(f"size {text!r} is negative; give a number of bytes >= 0, for example 512MiB")
        raise CapacityError(f"size {text!r} is no number with a unit; write it like 512MiB, 1.5GiB or 4096 (bytes)")
    number, unit = match.groups()
    if unit and unit not in _UNITS:
        raise CapacityError(
            f"size {text!r} has the unknown unit {unit!r}{_meant(unit)}; units are B, KiB, MiB, GiB, TiB (powers of 1024) and "
            "KB, MB, GB, TB (powers of 1000)"
        )
    size = Fraction(number) * _UNITS[unit or "B"]
    if size.denominator != 1:
        raise CapacityError(f"size {text!r} is {float(size):.6g} bytes, which is not whole; write a whole number of bytes")
    return int(size)


def _meant(unit: str) -> str:
    """What someone who wrote ``unit`` may have meant, as a question; empty if it is like no unit."""
    prefix = unit[0].upper()
    if prefix not in _PREFIXES or unit[1:].lower() not in ("", "b", "i", "ib"):
        return " (did you mean B, bytes?)" if prefix == "B" else ""
    binary, decimal = (f"{name} ({_UNITS[name]} bytes)" for name in (f"{prefix}iB", f"{prefix}B"))
    return f" (did you mean {binary}?)" if "i" in unit[1:].lower() else f" (did you mean {binary} or {decimal}?)"


def format_size(nbytes: int) -> str:
    """A number of bytes in binary units, to four significant digits: ``512 MiB``, ``1.25 GiB``, ``17 B``."""
    if nbytes < 0:
        raise ValueError(f"{nbytes} is no number of bytes")
    text, unit = str(nbytes), "B"
    for prefix in _PREFIXES:
        if float(text) < 1024:  # of the rounded number: 1048575 bytes are 1 MiB and not 1024 KiB
            break
        unit = f"{prefix}iB"
        text = f"{nbytes / _UNITS[unit]:.4g}"
    return f"{text} {unit}"


def plan_table(plan: BucketPlan, *, source: str = "", show_all: bool = False) -> Group:
    """The plan as rich renderables: a summary, the buckets, and what was split, is over capacity or is tied.

    ``source``: words on where the specs came from. Long tables leave out their middle unless ``show_all``.
    """
    parts: list[Any] = [_summary(plan, source)]
    if plan.buckets:
        parts += ["", _bucket_table(plan, show_all)]
    split = [(name, _pieces_words(slots)) for name, slots in pieces_of(plan).items()]
    over = [layout for layout in plan.buckets if layout.nbytes > plan.capacity]
    own = [(layout.slots[0].name, f"{format_size(layout.nbytes)} in bucket {layout.index}") for layout in over]
    tied = [(name, ", ".join(map(printable, others))) for name, others in plan.tied.items()]
    parts += _listing("split tensors", split, show_all)
    parts += _listing("over capacity, each in a bucket of its own", own, show_all)
    parts += _listing("tied tensors, which travel once", tied, show_all)
    return Group(*parts)


def pieces_of(plan: BucketPlan) -> dict[str, list[tuple[int, Slot]]]:
    """For each split tensor its pieces as (bucket index, slot), in order."""
    pieces: dict[str, list[tuple[int, Slot]]] = {}
    for layout in plan.buckets:
        for slot in layout.slots:
            if slot.is_piece:
                pieces.setdefault(slot.name, []).append((layout.index, slot))
    return pieces


def plan_json(plan: BucketPlan) -> dict[str, Any]:
    """The plan as plain JSON values; sizes and offsets in bytes. ``specs`` are in source order, slots by offset."""
    return {
        "format": 1,
        "digest": plan.digest.hex(),
        "options": msgspec.to_builtins(plan.options),
        "totals": {
            "tensors": len(plan.specs),
            "travelling": len(plan.specs) - sum(len(names) for names in plan.tied.values()),
            "buckets": len(plan.buckets),
            "nbytes": plan.nbytes,
            "padding": plan.padding,
            "manifest_nbytes": len(plan.to_bytes()),
            "nbytes_by_dtype": nbytes_by_dtype(plan),
        },
        "groups": [list(group) for group in plan.groups],
        "split": {
            name: [{"bucket": index, "start": slot.start, "nbytes": slot.nbytes} for index, slot in slots]
            for name, slots in pieces_of(plan).items()
        },
        "oversized": list(plan.oversized),
        "tied": {name: list(others) for name, others in plan.tied.items()},
        "specs": [_spec_json(spec) for spec in plan.specs],
        "buckets": [
            {
                "index": layout.index,
                "nbytes": layout.nbytes,
                "padding": layout.padding,
                "fill": layout.nbytes / plan.capacity,
                "slots": [_slot_json(slot) for slot in layout.slots],
            }
            for layout in plan.buckets
        ],
    }


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    dtype = WIRE_NAMES[spec.dtype]
    return {"name": spec.name, "dtype": dtype, "shape": list(spec.shape), "nbytes": spec.nbytes, "alias_of": spec.alias_of}


def _slot_json(slot: Slot) -> dict[str, Any]:
    return {"name": slot.name, "offset": slot.offset, "nbytes": slot.nbytes, "start": slot.start}


def nbytes_by_dtype(plan: BucketPlan) -> dict[str, int]:
    """Bytes that travel for each dtype, by its short label, the largest first."""
    totals: Counter[str] = Counter()
    for spec in plan.specs:
        if spec.alias_of is None:
            totals[label(spec.dtype)] += spec.nbytes
    return dict(totals.most_common())


def printable(name: str) -> str:
    """A tensor's name with what would steer a terminal, or cannot be encoded, as escapes."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def _summary(plan: BucketPlan, source: str) -> Table:
    tied = sum(len(names) for names in plan.tied.values())
    manifest, options = len(plan.to_bytes()), plan.options
    sent = plan.nbytes + plan.padding
    fills = [layout.nbytes / plan.capacity for layout in plan.buckets] or [0.0]
    rows = [
        ("source", source),
        ("tensors", f"{len(plan.specs):,}" + (f", of which {tied:,} tied to another" if tied else "")),
        ("data", _exact(plan.nbytes) + _mean(plan.nbytes, len(plan.specs) - tied, " a tensor on average")),
        ("dtypes", ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in nbytes_by_dtype(plan).items())),
        ("buckets", f"{len(plan.buckets):,} of at most {_exact(plan.capacity)}"),
        ("fill", f"least {min(fills):.1%}, median {statistics.median(fills):.1%}, most {max(fills):.1%}"),
        ("padding", f"{format_size(plan.padding)} ({plan.padding / sent:.3%} of what travels)" if plan.padding else "none"),
        ("manifest", _exact(manifest) + _mean(manifest, len(plan.specs), " a tensor")),
        ("options", f"order {options.order}, oversize {options.oversize}, align {options.align}"),
        ("digest", plan.digest.hex()),
    ]
    table = Table.grid(padding=(0, 2))
    for name, words in rows:
        if words:
            table.add_row(Text(name, style="bold"), Text(words))
    return table


def _exact(nbytes: int) -> str:
    return format_size(nbytes) if nbytes < 1024 else f"{format_size(nbytes)} ({nbytes:,} bytes)"


def _mean(nbytes: int, count: int, words: str) -> str:
    return f", {format_size(nbytes // count) if nbytes >= 1024 * count else f'{nbytes / count:.1f} B'}{words}" if count else ""


def _bucket_table(plan: BucketPlan, show_all: bool) -> Table:
    shown = _ends(plan.buckets, show_all)
    count = len(plan.buckets)
    title = "buckets" if len(shown) == count else f"buckets ({len(shown) - 1} of {count:,}; --all shows every one)"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="")
    for header in ("bucket", "fill", "bytes", "padding", "tensors", "pieces"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("first", "last"):
        table.add_column(header, overflow="fold")
    for layout in shown:
        if layout is None:
            table.add_row(*["..."] * 8)
            continue
        table.add_row(
            str(layout.index),
            f"{layout.nbytes / plan.capacity:.1%}",
            f"{layout.nbytes:,}",
            f"{layout.padding:,}",
            f"{len(layout.slots):,}",
            str(sum(slot.is_piece for slot in layout.slots)),
            Text(printable(layout.slots[0].name)),
            Text(printable(layout.slots[-1].name)),
        )
    return table


def _listing(title: str, rows: Sequence[tuple[str, str]], show_all: bool) -> list[Any]:
    if not rows:
        return []
    table = Table.grid(padding=(0, 2))
    for row in _ends(rows, show_all):
        name, words = row if row is not None else ("...", f"{len(rows) - _HEAD - _TAIL:,} more")
        table.add_row("", Text(printable(name), overflow="fold"), Text(words, overflow="fold"))
    return ["", Text(f"{title} ({len(rows):,})", style="bold"), table]


def _ends(rows: Sequence[Any], show_all: bool) -> list[Any]:
    """All rows, or the first and last few around a None."""
    if show_all or len(rows) <= _HEAD + _TAIL + 1:
        return list(rows)
    return [*rows[:_HEAD], None, *rows[-_TAIL:]]


def _pieces_words(slots: Sequence[tuple[int, Slot]]) -> str:
    spec = slots[0][1].spec
    words = [f"bucket {index}: {format_size(slot.nbytes)}" for index, slot in slots]
    if len(words) > 5:
        words[3:-1] = [f"... {len(words) - 4} more"]
    return f"{spec}, {format_size(spec.nbytes)} in {len(slots)} pieces ({', '.join(words)})"
