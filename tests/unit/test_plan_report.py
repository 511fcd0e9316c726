"""``rollout-core plan`` without a model: sizes, the table, the JSON, the plot's content, and the command on a small checkpoint."""

import io
import json
import math
import re
import struct
import subprocess
import sys
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest
import torch
import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from rich.console import Console
from typer.testing import CliRunner

from rollout_core.bucketing import BucketPlan, TensorSpec, plan_buckets
from rollout_core.bucketing.placement import Order, Oversize
from rollout_core.errors import CapacityError
from rollout_core.preflight import plan_command, plan_segments
from rollout_core.preflight.plan_plot import draw_plan, plot_plan
from rollout_core.preflight.plan_report import format_size, parse_size, plan_json, plan_table

MiB = 1 << 20
# Written out, so that a wrong power in the code under test is not repeated here.
UNITS = {
    "": 1,
    "B": 1,
    "KiB": 1024,
    "MiB": 1048576,
    "GiB": 1073741824,
    "TiB": 1099511627776,
    "KB": 1000,
    "MB": 1000000,
    "GB": 1000000000,
    "TB": 1000000000000,
}


def spec(name, nbytes, dtype=torch.uint8, alias_of=None):
    return TensorSpec(name, dtype, (nbytes // dtype.itemsize,), alias_of)


SPLIT = plan_buckets(
    [
        spec("model.embed_tokens.weight", 250),
        spec("model.layers.0.w", 40),
        spec("model.layers.1.w", 60, torch.float32),
        spec("lm_head.weight", 250, alias_of="model.embed_tokens.weight"),
    ],
    100,
)
PADDED = plan_buckets([spec("a.0.x", 33), spec("a.1.x", 64, torch.float32), spec("a.2.x", 3), spec("a.3.x", 80)], 120, align=16)
OWN = plan_buckets([spec("small", 50), spec("big", 300), spec("other", 60)], 100, oversize="own")
#: Names that are no mathematics, though a font engine may think so, in a segment and in the legend of layers.
HOSTILE = plan_buckets([spec(r"$\frac{$", 90), spec("$\\frac{$\u6a21.0.w", 60), spec("main.0.w", 90)], 100)
MANY = plan_buckets([spec(f"layers.{i}.w", 90) for i in range(40)], 100)


# Sizes


@given(st.integers(0, 2**60), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "  "]))
def test_a_whole_number_of_any_unit_is_read(number, unit, gap):
    assert parse_size(f" {number}{gap}{unit} ") == number * UNITS[unit]


@given(st.integers(0, 5000), st.text("0123456789", min_size=1, max_size=12), st.sampled_from(sorted(UNITS)))
@example(1, "5", "GiB")
@example(0, "1", "KiB")
def test_a_fraction_of_a_unit_is_read_if_it_is_whole_bytes(whole, decimals, unit):
    exact = Fraction(f"{whole}.{decimals}") * UNITS[unit]
    if exact.denominator == 1:
        assert parse_size(f"{whole}.{decimals}{unit}") == exact
    else:
        with pytest.raises(CapacityError, match="not whole"):
            parse_size(f"{whole}.{decimals}{unit}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-1", "is negative"),
        ("-5MiB", "is negative"),
        ("\u22125MiB", "is negative"),
        ("nan", "no number"),
        ("inf", "no number"),
        ("", "no number"),
        ("MiB", "no number"),
        ("1e9", "no number"),
        ("1_000", "no number"),
        ("1,000", "no number"),
        ("0x10", "no number"),
        ("\u0663MiB", "no number"),  # a digit to int(), and to nobody's configuration
        ("9" * 5000, "no number"),  # longer than int() reads
        ("512M", r"did you mean MiB \(1048576 bytes\) or MB \(1000000 bytes\)\?"),
        ("512Mb", r"did you mean MiB \(1048576 bytes\) or MB \(1000000 bytes\)\?"),
        ("512mib", r"did you mean MiB \(1048576 bytes\)\?"),
        ("3b", r"did you mean B, bytes\?"),
        ("3 parsecs", "unknown unit 'parsecs'; units are B, KiB, MiB"),
        ("1.5", "not whole"),
        ("0.1KiB", "102.4 bytes"),
    ],
)
def test_what_is_no_size_is_refused_with_advice(text, message):
    with pytest.raises(CapacityError, match=message):
        parse_size(text)


@given(st.text() | st.text("0123456789.-+ eKMGiBb"))
def test_any_text_is_a_size_or_a_capacity_error(text):
    try:
        size = parse_size(text)
    except CapacityError:
        return
    assert type(size) is int
    assert size >= 0


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (MiB - 1, "1 MiB"),
        (512 * MiB, "512 MiB"),
        (1280 * MiB, "1.25 GiB"),
        (2**63 - 1, "8 EiB"),
    ],
)
def test_sizes_are_written_in_binary_units(nbytes, text):
    assert format_size(nbytes) == text


@given(st.integers(0, 2**63 - 1))
def test_a_written_size_is_within_its_digits(nbytes):
    number, unit = format_size(nbytes).split()
    size = Fraction(number) * (1 if unit == "B" else 1024 ** ("KMGTPE".index(unit[0]) + 1))
    assert abs(size - nbytes) * 2000 <= nbytes, f"{nbytes} was written as {number} {unit}"
    assert 0 <= float(number) < 1024


def test_a_negative_size_is_not_written():
    with pytest.raises(ValueError, match="-1 is no number of bytes"):
        format_size(-1)


# The table


def rendered(plan, **options):
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(plan_table(plan, **options))
    return console.file.getvalue()


def bucket_rows(text):
    """The cells of the bucket table."""
    return [
        [cell.strip() for cell in line.strip("\u2502").split("\u2502")] for line in text.splitlines() if line.startswith("\u2502")
    ]


def summary(text):
    return dict(re.match(r"(\w+) +(.*?) *$", line).groups() for line in text.split("\n\n")[0].splitlines())


def test_the_summary_states_the_totals():
    lines = summary(rendered(SPLIT, source="somewhere"))
    manifest = len(SPLIT.to_bytes())
    assert lines == {
        "source": "somewhere",
        "tensors": "4, of which 1 tied to another",
        "data": "350 B, 116.7 B a tensor on average",
        "dtypes": "u8 290 B, f32 60 B",
        "buckets": "4 of at most 100 B",
        "fill": "least 60.0%, median 95.0%, most 100.0%",
        "padding": "none",
        "manifest": f"{manifest} B, {manifest / 4:.1f} B a tensor",
        "options": "order given, oversize split, align 1",
        "digest": SPLIT.digest.hex(),
    }


def test_padding_is_stated_with_its_share():
    # 33 -> 48, 48 + 64 + 3 = 115, then 80 alone: 15 bytes between slots of 180.
    assert summary(rendered(PADDED))["padding"] == "15 B (7.692% of what travels)"
    assert [row[3] for row in bucket_rows(rendered(PADDED))] == ["15", "0"]


def test_each_bucket_is_a_row():
    assert bucket_rows(rendered(SPLIT)) == [
        ["0", "100.0%", "100", "0", "1", "1", "model.embed_tokens.weight", "model.embed_tokens.weight"],
        ["1", "100.0%", "100", "0", "1", "1", "model.embed_tokens.weight", "model.embed_tokens.weight"],
        ["2", "90.0%", "90", "0", "2", "1", "model.embed_tokens.weight", "model.layers.0.w"],
        ["3", "60.0%", "60", "0", "1", "0", "model.layers.1.w", "model.layers.1.w"],
    ]


def test_the_middle_of_many_buckets_is_left_out_unless_all_are_asked_for():
    short, full = rendered(MANY), rendered(MANY, show_all=True)
    assert [row[0] for row in bucket_rows(short)] == [*map(str, range(8)), "...", "36", "37", "38", "39"]
    assert "12 of 40; --all shows every one" in short
    assert [row[0] for row in bucket_rows(full)] == [str(index) for index in range(40)]
    assert "--all" not in full


def test_split_tied_and_oversized_tensors_are_listed():
    text = rendered(SPLIT)
    pieces = "u8[250], 250 B in 3 pieces (bucket 0: 100 B, bucket 1: 100 B, bucket 2: 50 B)"
    assert re.search(rf"split tensors \(1\)\n +model.embed_tokens.weight +{re.escape(pieces)}", text)
    assert re.search(r"tied tensors, which travel once \(1\)\n +model.embed_tokens.weight +lm_head.weight", text)
    assert "over capacity" not in text
    assert re.search(r"over capacity, each in a bucket of its own \(1\)\n +big +300 B in bucket 1", rendered(OWN))


def test_many_pieces_are_counted_and_not_listed():
    text = rendered(plan_buckets([spec("big", 1000)], 100))
    assert "1000 B in 10 pieces (bucket 0: 100 B, bucket 1: 100 B, bucket 2: 100 B, ... 6 more, bucket 9: 100 B)" in text


def test_names_cannot_steer_the_terminal():
    text = rendered(plan_buckets([spec("[red]a[/red]\x1b[31m\n\udc80", 5)], 10))
    assert bucket_rows(text)[0][6] == r"[red]a[/red]\x1b[31m\n\udc80"
    assert "\x1b" not in text


def test_a_plan_of_nothing_has_a_summary_only():
    empty = plan_buckets([], 10)
    lines = summary(rendered(empty))
    assert lines["tensors"] == "0"
    assert lines["buckets"] == "0 of at most 10 B"
    assert "first" not in rendered(empty), "no table without rows"


# JSON and random plans

DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.float64]
NAMES = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "visual.blocks.0.w"]


@st.composite
def plans(draw) -> BucketPlan:
    sizes = draw(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 60)), max_size=25))
    names = [NAMES[i] if i < len(NAMES) and draw(st.booleans()) else f"model.layers.{i % 5}.w{i}" for i in range(len(sizes))]
    specs = [TensorSpec(name, dtype, (numel,)) for name, (dtype, numel) in zip(names, sizes, strict=True)]
    if specs and draw(st.booleans()):
        root = draw(st.sampled_from(specs))
        specs.append(TensorSpec("tied", root.dtype, root.shape, root.name))
    oversize = draw(st.sampled_from(["split", "own"]))
    order = draw(st.sampled_from(["given", "packed"]))
    return plan_buckets(specs, draw(st.integers(8, 600)), oversize=oversize, order=order, align=draw(st.sampled_from([1, 16])))


@given(plans())
def test_the_json_holds_the_whole_plan(plan):
    read = json.loads(json.dumps(plan_json(plan), allow_nan=False))
    specs = [TensorSpec(s["name"], getattr(torch, s["dtype"]), tuple(s["shape"]), s["alias_of"]) for s in read["specs"]]
    again = plan_buckets(specs, **read["options"])
    assert again == plan
    assert read["digest"] == plan.digest.hex()
    slots = [(bucket["index"], *slot.values()) for bucket in read["buckets"] for slot in bucket["slots"]]
    assert slots == [(b.index, slot.name, slot.offset, slot.nbytes, slot.start) for b in plan.buckets for slot in b.slots]
    totals = read["totals"]
    assert totals["nbytes"] == sum(slot["nbytes"] for bucket in read["buckets"] for slot in bucket["slots"])
    assert totals["nbytes"] == sum(totals["nbytes_by_dtype"].values())
    assert totals["padding"] == sum(bucket["padding"] for bucket in read["buckets"])
    assert totals["travelling"] == len({s.alias_of or s.name for s in plan.specs})
    for name, pieces in read["split"].items():
        assert sum(piece["nbytes"] for piece in pieces) == next(s.nbytes for s in plan.specs if s.name == name)


# The plot


def artist(figure, gid):
    (found,) = figure.findobj(lambda artist: artist.get_gid() == gid)
    return found


def boxes(figure, gid):
    """The drawn boxes as (row, start, end), in bytes."""
    drawn = []
    for path in artist(figure, gid).get_paths():
        (left, low), (right, high) = path.vertices.min(axis=0), path.vertices.max(axis=0)
        drawn.append((round((low + high) / 2), left, right))
    return drawn


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def slot_boxes(plan):
    return [(b.index, slot.offset, slot.end) for b in plan.buckets for slot in b.slots if slot.nbytes]


@settings(deadline=None)
@given(plans(), st.sampled_from(["dtype", "layer"]))
def test_bars_show_every_slot_and_all_padding(plan, colour):
    figure = draw_plan(plan, colour)
    # At this size each byte is wider than a pixel, unless the bucket is a very large one of its own.
    if max((layout.nbytes for layout in plan.buckets), default=0) <= 1400:
        assert boxes(figure, "segments") == slot_boxes(plan)
    assert boxes(figure, "padding") == [(b.index, start, start + n) for b in plan.buckets for start, n in b.gaps()]
    pieces = [(b.index, slot.offset, slot.end) for b in plan.buckets for slot in b.slots if slot.is_piece]
    assert boxes(figure, "pieces") == pieces
    low, high = figure.axes[0].get_ylim()
    assert high < 0
    assert low > len(plan.buckets) - 1, "every bar is inside the axes, the first on top"


@pytest.mark.parametrize("plan", [SPLIT, PADDED, OWN], ids=["split", "padded", "own"])
def test_the_capacity_is_a_line(plan):
    assert set(artist(draw_plan(plan), "capacity").get_xdata()) == {plan.capacity}


def test_a_capacity_far_to_the_right_is_stated_instead():
    figure = draw_plan(plan_buckets([spec("a", 100)], MiB))
    assert not figure.findobj(lambda artist: artist.get_gid() == "capacity")
    assert "capacity (1 MiB, off the scale)" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert figure.axes[0].get_xlim()[1] < 110


def test_a_huge_bucket_does_not_flatten_the_others():
    figure = draw_plan(plan_buckets([spec("a", 100), spec("big", MiB), spec("b", 50)], 100, oversize="own"))
    assert figure.axes[0].get_xlim()[1] < 1000
    assert "\u2192 1 MiB" in texts(figure)


def face_colours(figure, plan):
    colours = artist(figure, "segments").get_facecolor()
    slots = [slot for layout in plan.buckets for slot in layout.slots]
    assert len(colours) == len(slots)
    return {slot.name: tuple(colour[:3]) for slot, colour in zip(slots, colours, strict=True)}


def test_colours_stand_for_dtypes():
    colours = face_colours(draw_plan(SPLIT, "dtype"), SPLIT)
    assert colours["model.embed_tokens.weight"] == colours["model.layers.0.w"]
    assert colours["model.layers.0.w"] != colours["model.layers.1.w"]


def test_colours_stand_for_layers():
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "visual.blocks.0.w", "visual.blocks.1.w"]
    names += [f"model.layers.{layer}.{part}" for layer in range(3) for part in "ab"]
    plan = plan_buckets([spec(name, 50) for name in names], 200)
    colours = face_colours(draw_plan(plan, "layer"), plan)
    assert all(colours[f"model.layers.{layer}.a"] == colours[f"model.layers.{layer}.b"] for layer in range(3))
    assert colours["visual.blocks.0.w"] == colours["visual.blocks.1.w"], "a second stack is one colour"
    assert len(set(colours.values())) == 3 + 4, "three layers, the vision tower, embeddings, head and the norm"
    legend = [text.get_text() for text in draw_plan(plan, "layer").legends[0].get_texts()]
    assert legend[:4] == ["visual.blocks (100 B)", "embeddings (50 B)", "head (50 B)", "no layer (50 B)"]


def test_layers_are_one_scale_from_dark_to_light():
    plan = plan_buckets([spec(f"h.{layer}.w", 100) for layer in range(30)], 100)
    colours = face_colours(draw_plan(plan, "layer"), plan)
    light = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (colours[f"h.{layer}.w"] for layer in range(30))]
    assert light == sorted(light)
    assert len(set(light)) == 30


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.7.mlp.experts.3.up_proj.weight", ("model.layers", 7)),
        ("transformer.h.0.attn.weight", ("transformer.h", 0)),
        ("visual.blocks.11.norm1.bias", ("visual.blocks", 11)),
        ("0.weight", ("layers", 0)),
        ("layers.4", ("layers", 4)),
        ("model.norm.weight", None),
        ("layer12.weight", None),
        ("a.\u0663.b", None),
    ],
)
def test_the_layer_is_the_first_number_of_a_name(name, found):
    assert plan_segments.stack_and_layer(name) == found


def test_many_side_stacks_share_a_colour():
    plan = plan_buckets([spec("main.0.w", 90), *(spec(f"side{i}.0.w", 40 - i) for i in range(12))], 600)
    kind = plan_segments.kinds(plan, "layer")
    assert [kind(s) for s in plan.specs] == [0, *(f"side{i}" for i in range(6)), *["other stacks"] * 6]


def test_neighbours_too_thin_to_see_are_one_segment():
    """19,000 slots: drawn whole, in far fewer segments, and none crosses a change of colour or a gap."""
    thin = [spec(f"model.layers.{i // 200}.e{i}", 100 + i % 3) for i in range(19_000)]
    plan = plan_buckets(thin, 512 << 10)
    figure = draw_plan(plan, "layer")
    drawn = boxes(figure, "segments")
    assert len(drawn) == sum(len({s.name.split(".")[2] for s in layout.slots}) for layout in plan.buckets)
    by_row = defaultdict(float)
    for row, start, end in drawn:
        assert start == by_row[row], f"row {row} has a hole at {by_row[row]}"
        by_row[row] = end
    assert list(by_row.values()) == [layout.nbytes for layout in plan.buckets]


def test_thin_neighbours_are_parted_by_padding_and_by_what_is_wide():
    # A pixel shows about 65 bytes here.
    sizes = [10, 10, 5000, 10, 10, 64, 10]
    plan = plan_buckets([spec(f"layers.0.w{i}", size) for i, size in enumerate([*sizes, 95_000 - sum(sizes)])], 100_000)
    ends = [20, 5020, 5114, 95_000]
    assert boxes(draw_plan(plan), "segments") == [(0, start, end) for start, end in zip([0, *ends], ends, strict=False)]
    padded = plan_buckets(plan.specs, 100_000, align=16)
    assert boxes(draw_plan(padded), "segments") == [*slot_boxes(padded)[:5], (0, 5072, 5146), *slot_boxes(padded)[-1:]]


def test_over_400_buckets_share_rows_that_show_their_mean():
    specs = [spec(f"w{i}", 64 + i % 2 * 32, DTYPES[i % 2]) for i in range(1001)]
    plan = plan_buckets(specs, 100, align=64)
    assert len(plan.buckets) == 1001
    figure = draw_plan(plan)
    drawn = boxes(figure, "segments")
    rows = [sum(end - start for row, start, end in drawn if row == number) for number in range(334)]
    means = [plan.buckets[i : i + 3] for i in range(0, 1001, 3)]
    assert rows == pytest.approx([sum(layout.nbytes for layout in group) / len(group) for group in means])
    assert {row for row, _, _ in drawn} == set(range(334))
    assert "mean bytes of 3 buckets" in figure.axes[0].get_xlabel()
    assert figure.get_size_inches()[1] < 30


def test_padding_of_rows_that_are_shared_is_their_mean():
    plan = plan_buckets([spec(f"w{i}", 33) for i in range(1500)], 100, align=64)
    assert len(plan.buckets) == 750
    assert plan.padding == 750 * 31
    assert boxes(draw_plan(plan), "padding") == [(row, 66, 66 + 31) for row in range(375)]


def test_segments_carry_names_where_they_fit():
    plan = plan_buckets(
        [spec("model.layers.0.mlp.up_proj.weight", 900), spec("model.layers.0.q_proj.weight", 60), spec("model.layers.0.b", 6)],
        1000,
    )
    written = texts(draw_plan(plan))
    assert "model.layers.0.mlp.up_proj.weight" in written
    assert "q_proj" in written
    assert "96.6%" in written
    assert r"\u6a21 $x$" in texts(draw_plan(plan_buckets([spec("\u6a21 $x$", 9)], 10))), "no font need have the glyphs"
    pieces = texts(draw_plan(SPLIT))
    assert [text for text in pieces if "embed" in text] == [
        "model.embed_tokens.weight",
        "model.embed_tokens.weight from 100 B",
        "model.embed_tokens.weight from 200 B",
    ]


def test_narrow_neighbours_carry_the_number_of_their_layer():
    plan = plan_buckets([spec(f"model.layers.{i // 100}.some_projection{i}", 10) for i in range(300)], 3000)
    assert [text for text in texts(draw_plan(plan)) if "%" not in text] == ["layer 0", "layer 1", "layer 2"]


def test_a_label_has_a_colour_behind_it_only_if_its_run_has_one():
    dtypes = [torch.uint8, torch.float32]
    mixed = plan_buckets([spec(f"layers.{i // 50}.w{i}", 8, dtypes[i % 2 if i < 50 else 0]) for i in range(100)], 1000)
    labels = plan_segments.labels_of(plan_segments.rows_of(mixed, "dtype", 1).segments, lambda text: 100)
    assert [(label.text, label.start, label.nbytes, label.kind) for label in labels] == [
        ("layer 0", 0, 400, None),
        ("layer 1", 400, 400, "u8"),
    ]


@pytest.mark.parametrize("colour", ["dtype", "layer"])
@pytest.mark.parametrize(
    "plan",
    [SPLIT, PADDED, OWN, MANY, HOSTILE, plan_buckets([], 10)],
    ids=["split", "padded", "own", "many", "hostile", "empty"],
)
def test_a_png_has_the_size_and_the_colours_of_its_figure(plan, colour, tmp_path):
    file = tmp_path / "plan.PNG"
    plot_plan(plan, file, colour, title="a $\\frac{$ model\u6a21")
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    figure = draw_plan(plan, colour, title="a $\\frac{$ model\u6a21")
    assert struct.unpack(">II", data[16:24]) == tuple(int(inches * figure.dpi) for inches in figure.get_size_inches())
    assert figure.texts[0].get_text().startswith(r"a $\frac{$ model\u6a21: ")
    seen = pixels(file)
    for red, green, blue, _ in artist(figure, "segments").get_facecolor():
        assert (round(red * 255), round(green * 255), round(blue * 255)) in seen


def pixels(file):
    from PIL import Image

    with Image.open(file) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}


def test_an_svg_has_a_shape_per_segment(tmp_path):
    plot_plan(SPLIT, tmp_path / "plan.svg")
    root = ElementTree.parse(tmp_path / "plan.svg").getroot()
    groups = {group.get("id"): group for group in root.iter("{http://www.w3.org/2000/svg}g")}
    count = {gid: sum(1 for e in groups[gid].iter() if e.tag.endswith(("}path", "}use"))) for gid in ("segments", "pieces")}
    assert count["segments"] == 5
    assert count["pieces"] >= 3


def test_a_pdf_has_one_page_of_the_figures_size(tmp_path):
    plot_plan(OWN, tmp_path / "plan.pdf")
    data = (tmp_path / "plan.pdf").read_bytes()
    assert data.startswith(b"%PDF-")
    (box,) = re.findall(rb"/MediaBox \[ ?([0-9. ]+) ?\]", data)
    width, height = (float(number) / 72 for number in box.split()[2:])
    assert (width, height) == pytest.approx(draw_plan(OWN).get_size_inches(), abs=0.01)


def test_another_ending_or_colour_is_refused_before_anything_is_written(tmp_path):
    for name in ("plan.jpg", "plan", ".png"):
        with pytest.raises(ValueError, match=r"must end in \.png, \.svg, \.pdf"):
            plot_plan(SPLIT, tmp_path / name)
    with pytest.raises(ValueError, match="one of dtype, layer"):
        plot_plan(SPLIT, tmp_path / "plan.png", "rainbow")
    assert list(tmp_path.iterdir()) == []


def test_no_two_fixed_colours_are_alike():
    for fixed in (plan_segments._DTYPES, plan_segments._PARTS):
        together = [*fixed.values(), *plan_segments._SPARE]
        for i, one in enumerate(together):
            for other in together[:i]:
                assert math.dist(to_rgb(one), to_rgb(other)) > 0.08, f"{one} and {other}"


# The command


@pytest.fixture
def model_dir(tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {"embed.weight": torch.zeros(300, dtype=torch.uint8), "layers.0.w": torch.zeros(20, dtype=torch.float32)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def run(*arguments):
    app = typer.Typer()
    app.command("plan")(plan_command.plan_command)
    # As into a file or pipe, whatever the width of whoever runs this.
    return CliRunner(env={"COLUMNS": None}).invoke(app, [str(argument) for argument in arguments])


def test_the_command_prints_writes_and_leaves_the_model_alone(model_dir, tmp_path):
    before = {file: file.read_bytes() for file in model_dir.rglob("*")}
    options = ["--capacity", "256B", "--oversize", "split", "--order", "packed", "--align", "4", "--colour", "layer"]
    result = run(model_dir, *options, "--plot", tmp_path / "plan.svg", "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    assert summary(result.stdout)["source"] == "safetensors headers"
    assert summary(result.stdout)["options"] == "order packed, oversize split, align 4"
    read = json.loads((tmp_path / "plan.json").read_text())
    assert read["options"] == {"capacity": 256, "oversize": "split", "order": "packed", "align": 4}
    assert {s["name"]: s["nbytes"] for s in read["specs"]} == {"embed.weight": 300, "layers.0.w": 80}
    assert "model: 2 tensors, 380 B in 3 buckets of 256 B" in (tmp_path / "plan.svg").read_text()
    assert {file: file.read_bytes() for file in model_dir.rglob("*")} == before


def test_all_buckets_are_shown_on_request(model_dir):
    assert len(bucket_rows(run(model_dir, "--capacity", "10").stdout)) == 13
    assert len(bucket_rows(run(model_dir, "--capacity", "10", "--all").stdout)) == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--capacity", "512mb"], "unknown unit 'mb'"),
        (["--capacity", "-1"], "is negative"),
        (["--capacity", "0"], "capacity is 0"),
        (["--align", "3"], "align is 3"),
        (["--plot", "plan.gif"], "must end in .png, .svg, .pdf"),
        (["--plot", "no/such/folder/plan.png"], "No such file"),
        (["--json", "no/such/folder/plan.json"], "No such file"),
        (["--capacity", "100", "--oversize", "error"], "larger than the capacity"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(model_dir, options, message, monkeypatch):
    monkeypatch.chdir(model_dir)
    result = run(model_dir, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert [file.name for file in model_dir.iterdir()] == ["model.safetensors"]


def test_a_folder_that_is_not_there_is_one_line_and_exit_code_2(tmp_path):
    result = run(tmp_path / "nowhere")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "nowhere does not exist; pass the directory of a model" in result.stderr


def test_the_commands_choices_are_those_of_the_library():
    assert [choice.value for choice in plan_command.Order] == list(get_args(Order))
    assert [choice.value for choice in plan_command.Oversize] == list(get_args(Oversize))
    assert [choice.value for choice in plan_command.PlotColour] == list(get_args(plan_segments.Colour))


def test_the_help_costs_no_heavy_import():
    heavy = "{'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)"
    code = f"import sys, rollout_core.preflight.plan_command; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
