"""A view as words: a table for a terminal, and JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rollout_core.viewing.view import ShownItem, Turn, View


def view_table(view: View) -> Group:
    """The totals, a line per turn, and the warnings, as rich renderables."""
    table = Table(title_justify="left", header_style="", expand=False)
    table.add_column("turn", justify="right", no_wrap=True)
    table.add_column("added", no_wrap=True)
    table.add_column("text", no_wrap=True, overflow="ellipsis", max_width=44)
    for header in ("tokens", "compact", "rendered", "loss"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("items", no_wrap=True)
    table.add_column("", style="red", no_wrap=True)
    segment = 0
    for turn in view.turns:
        if turn.segment != segment:
            segment = turn.segment
            table.add_section()
        table.add_row(
            str(turn.number),
            Text(printable(turn.title)),
            Text(printable(turn.text)),
            f"{turn.tokens:,}",
            f"{turn.compact:,}",
            f"{turn.rendered:,}",
            f"{turn.loss:,}" if turn.loss else "",
            items_words(turn),
            "!" if turn.warnings else "",
        )
    warnings = [Text(printable(f"! turn {turn.number}: {words}"), style="red") for turn in view.turns for words in turn.warnings]
    return Group(*(Text(line) for line in summary_words(view)), table, *warnings)


def summary_words(view: View) -> list[str]:
    """The totals, and what they would be if everything were rendered again at each extension; a line each."""
    last = [turn for turn in view.turns if turn.segment == view.segments - 1]
    where = f" in the last of {view.segments} segments" if view.segments > 1 else ""
    compact = sum(turn.compact for turn in last)
    lines = [
        f"{_count(len(view.turns), 'turn')}, {_count(last[-1].stop, 'token')}{where} ({compact:,} compact), "
        f"{view.loss:,} sampled, {_count(view.processed + view.reused, 'item')}"
    ]
    tokens, items = view.whole()
    lines.append(
        f"Rendered {_count(view.rendered, 'token')} and processed {_count(view.processed, 'item')} once; "
        f"all anew at each extension would be {tokens:,} and {items:,}."
    )
    return lines


def items_words(turn: Turn) -> str:
    """The items of a turn, counted: ``2 images (1 reused)``."""
    kinds = Counter(item.modality for item in turn.items)
    if not kinds:
        return ""
    words = ", ".join(_count(number, {"audio": "sound"}.get(kind, kind)) for kind, number in kinds.items())
    reused = "all reused" if turn.processed == 0 else f"{turn.reused} reused"
    return words if not turn.reused else f"{words} ({reused})"


def view_json(view: View) -> dict[str, Any]:
    """The view as plain JSON values: all that the table and the picture show but pixels."""
    tokens, items = view.whole()
    return {
        "format": 1,
        "totals": {
            "turns": len(view.turns),
            "segments": view.segments,
            "rendered": view.rendered,
            "loss": view.loss,
            "processed": view.processed,
            "reused": view.reused,
            "rendered_if_whole": tokens,
            "processed_if_whole": items,
        },
        "turns": [_turn_json(turn) for turn in view.turns],
    }


def _turn_json(turn: Turn) -> dict[str, Any]:
    return {
        "turn": turn.number,
        "segment": turn.segment,
        "added": turn.title,
        "text": turn.text,
        "start": turn.start,
        "stop": turn.stop,
        "tokens": turn.tokens,
        "compact": turn.compact,
        "rendered": turn.rendered,
        "loss": turn.loss,
        "logprobs": turn.logprobs,
        "processed": turn.processed,
        "reused": turn.reused,
        "runs": [[run.origin, run.start, run.stop] for run in turn.runs],
        "items": [_item_json(item) for item in turn.items],
        "sampled_placeholders": list(turn.marks),
        "warnings": list(turn.warnings),
    }


def _item_json(item: ShownItem) -> dict[str, Any]:
    return {
        "name": item.name,
        "modality": item.modality,
        "start": item.start,
        "stop": item.stop,
        "compact": item.compact,
        "spans": [list(span) for span in item.spans],
        "what": item.what,
        "identity": item.identity,
        "same_as": item.same_as,
    }


def printable(text: str) -> str:
    """Text with what would steer a terminal, or cannot be encoded, as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def drawable(text: str) -> str:
    """Text in ASCII, the rest as escapes: matplotlib warns of every glyph that its font lacks."""
    return printable(text).encode("ascii", "backslashreplace").decode("ascii")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
