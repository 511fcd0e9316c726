"""What a person sees of a conversation: turns, table, JSON and picture. A small renderer stands for transformers."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rollout_core.errors import ConversationError, UnstableTemplateError
from rollout_core.multimodal import Conversation, Item, Payload, Picture, Sound, Video, rule
from rollout_core.multimodal.deltas import BOUNDARY, ENVIRONMENT, ORIGINS, TEMPLATE
from rollout_core.multimodal.layout import Laid
from rollout_core.multimodal.tracks import Region
from rollout_core.viewing import plot as plotting
from rollout_core.viewing.file import read_file
from rollout_core.viewing.plot import COLOURS, draw_view, plot_view
from rollout_core.viewing.reading import view_of
from rollout_core.viewing.report import view_json, view_table
from rollout_core.viewing.rows import LEFT, page_of, pieces
from rollout_core.viewing.thumbs import thumbnail, waveform

WORD, ROLE, END, PAD = 7, 1, 2, 9
LENGTHS = {"image": 5, "video": 12, "audio": 8}


class Small:
    """One id per word, role and end; an item is as many pads as LENGTHS says, or the message asks; two ids end a sampled turn."""

    fingerprint, vocab_size = "small", 100
    rule = rule("plain@1")

    def __init__(self, unstable=False):
        self.unstable = unstable
        self.payloads = {}

    def payload(self, media):
        return self.payloads.setdefault(media.identity, Payload(media.identity, media.identity, media, {}, "", None, ()))

    def begin(self, messages, tools):
        return self.lay_out(messages, 0, sampled=False)

    def add(self, past, messages, tools):
        if self.unstable and messages.items[-1]["role"] == "user":
            raise UnstableTemplateError("the template changes")
        return self.lay_out(messages, past.message_count, sampled=past.sampled)

    def lay_out(self, messages, first, *, sampled):
        wide, compact, origin, owner, items = [], [], [], [], []

        def put(token, source, number, count=1):
            wide.extend([token] * count)
            compact.append(token)
            origin.extend([source] * count)
            owner.extend([number] * count)

        for _ in range(2 if sampled else 0):
            put(END, BOUNDARY, first - 1)
        media = iter(messages.media)
        for number, message in enumerate(messages.items, start=first):
            put(ROLE, TEMPLATE, number)
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    for _ in part["text"].split():
                        put(WORD, ENVIRONMENT, number)
                    continue
                kind, count = part["type"], part.get("tokens", LENGTHS[part["type"]])
                given = next(media).source
                region = Region(len(wide), len(wide) + count, len(compact), len(compact) + 1)
                put(PAD, ENVIRONMENT, number, count)
                spans = ((region.start, region.stop),)
                index = sum(item.modality == kind for item in items)
                payload = given if isinstance(given, Payload) else self.payload(given)
                items.append(Item(kind, len(items), index, number, region, spans, spans[0], payload))
            put(END, TEMPLATE, number)
        ids = (np.array(wide, np.int64), np.array(compact, np.int64))
        return Laid(*ids, np.array(origin, np.uint8), np.array(owner, np.int64), tuple(items))

    def generation_prompt(self, past, tools):
        one = np.array([ROLE], np.int64)
        return Laid(one, one.copy(), np.zeros(1, np.uint8), one * 0 + past.message_count, ())

    def said(self, ids):
        return {"role": "assistant", "content": " ".join(f"w{i}" for i in ids)}

    def merged(self, items, input_ids):
        return {}


def picture(seed=0, size=(30, 20)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Picture("RGB", size, pixels.tobytes())


def video(seed=0):
    return Video(np.random.default_rng(seed).integers(0, 255, (4, 16, 24, 3), dtype=np.uint8), fps=2.0)


def sound():
    return Sound(np.sin(np.linspace(0, 60, 4000)).astype(np.float32) * np.linspace(0, 1, 4000, dtype=np.float32), 8000)


def part(media, **more):
    return {"type": media.modality, media.modality: media, **more}


def user(*parts, role="user"):
    content = [{"type": "text", "text": p} if isinstance(p, str) else p if isinstance(p, dict) else part(p) for p in parts]
    return {"role": role, "content": content}


def tour(renderer=None):
    """Every origin, every modality, an item twice, a cut turn and a sampled placeholder."""
    conversation = Conversation.start(renderer or Small(), [user("be brief", role="system"), user(picture(1), "what is it")])
    conversation = conversation.append_sampled([3, 4, 5], logprobs=[-1, -2, -3])
    conversation = conversation.extend([user("one", picture(2), picture(1), role="tool"), user(video(), sound(), role="tool")])
    return conversation.append_sampled([6, PAD], logprobs=[-1, None], finish="length").append_sampled([8], finish="aborted")


def many(count):
    conversation = Conversation.start(Small(), [user("word " * 20)])
    for index in range(count // 2):
        conversation = conversation.append_sampled([3] * (5 + index % 9))
        parts = [picture(index % 7, (20 + index % 5 * 9, 20))] if index % 3 == 0 else []
        conversation = conversation.extend([user(f"result {index} " * (1 + index % 6), *parts, role="tool")])
    return conversation


PLACEHOLDERS = {PAD: "<pad>"}


# The turns


def test_a_prompt_and_what_was_sampled_after_it_are_one_turn():
    view = view_of(tour(), PLACEHOLDERS)
    assert [turn.title for turn in view.turns] == ["system, user", "assistant", "tool x2", "assistant (aborted)"]
    assert [turn.text for turn in view.turns] == ["what is it", "w3 w4 w5", "one", "w6 w9 w8"]
    assert [(turn.start, turn.stop) for turn in view.turns] == [(0, 14), (14, 18), (18, 55), (55, 59)]
    # Template, words, one id per item; the prompt; the end of the sampled turn, template, a word, four items; the prompt.
    assert [turn.rendered for turn in view.turns] == [4 + 2 + 3 + 1, 1, 2 + 4 + 1 + 4, 1]
    assert [turn.loss for turn in view.turns] == [0, 3, 0, 3]
    assert [turn.compact for turn in view.turns] == [10, 4, 11, 4]


def test_runs_cover_every_token_with_its_origin():
    conversation = tour()
    runs = [run for turn in view_of(conversation).turns for run in turn.runs]
    assert [ORIGINS.index(run.origin) for run in runs for _ in range(run.start, run.stop)] == conversation.origin.tolist()
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert {run.origin for run in runs} == set(ORIGINS)


def test_an_item_is_processed_once_and_named_where_it_is_shown_again():
    first, _, third, _ = view_of(tour()).turns
    assert [(i.name, i.same_as, i.tokens, i.compact) for i in first.items] == [("image 0", None, 5, 1)]
    names = [("image 1", None), ("image 2", "image 0"), ("video 0", None), ("audio 0", None)]
    assert [(i.name, i.same_as) for i in third.items] == names
    assert [i.what for i in third.items] == ["30 x 20", "30 x 20", "4 frames, 24 x 16", "0.50 s at 8000 Hz"]
    assert (third.processed, third.reused) == (3, 1)


def test_the_same_item_twice_in_one_turn_is_processed_once():
    (turn,) = view_of(Conversation.start(Small(), [user(picture(), picture())])).turns
    assert [item.same_as for item in turn.items] == [None, "image 0"]


def test_the_cost_of_doing_all_again_is_told():
    view = view_of(tour())
    # Two extensions: 10 compact ids and one item, then 25 and five; and two prompts of one id.
    assert view.whole() == (10 + 25 + 2, 1 + 5)
    assert (view.rendered, view.processed, view.reused) == (23, 4, 1)


def test_what_deserves_a_look_is_a_warning():
    conversation = tour().extend([user("literal <pad> text")]).append_sampled([])
    view = view_of(conversation, PLACEHOLDERS)
    assert [turn.warnings for turn in view.turns] == [
        (),
        (),
        (),
        ("1 sampled <pad>: kept as sampled, and no item stands there", "logprobs for 1 of 3 sampled tokens"),
        ("a message holds the text <pad>: encoded as ordinary text",),
        ("nothing was sampled",),
    ]
    assert [turn.marks for turn in view.turns] == [(), (), (), (57,), (), ()]
    assert all(not turn.marks for turn in view_of(conversation).turns), "without placeholders nobody knows"


def test_missing_logprobs_are_no_warning_where_there_are_none_at_all():
    conversation = Conversation.start(Small(), [user("x")]).append_sampled([3])
    assert [turn.warnings for turn in view_of(conversation).turns] == [(), ()]


def test_an_open_prompt_is_a_turn():
    turn = view_of(Conversation.start(Small(), [user("x")]).with_generation_prompt()).turns[-1]
    assert (turn.title, turn.warnings, turn.tokens) == ("assistant (to be sampled)", (), 1)


def test_a_truncated_conversation_says_so():
    turns = view_of(tour().truncate(16)).turns
    assert turns[-1].stop == 16
    assert "truncated here: nothing can follow" in turns[-1].warnings
    left = view_of(tour().truncate(50, "left")).turns
    assert (left[0].start, left[-1].stop) == (0, len(tour().truncate(50, "left")))


def test_a_new_segment_shows_what_was_before_and_reuses_its_items():
    conversation = Conversation.start(Small(unstable=True), [user(picture(1))], on_unstable="segment").append_sampled([3])
    conversation = conversation.extend([user("again", picture(2))])
    view = view_of(conversation)
    assert [(turn.segment, turn.start) for turn in view.turns] == [(0, 0), (0, 7), (1, 0)]
    assert view.turns[2].title == "user, assistant, user"
    assert [item.same_as for item in view.turns[2].items] == ["image 0 of segment 0", None]
    assert "a new segment begins" in view.turns[2].warnings[0]
    assert view.whole() == (view.rendered, 1 + 2), "a segment begins with everything anyway"
    assert "segment 1" in words(draw_view(view))


# The table and the JSON


def table(view):
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(view_table(view))
    return console.file.getvalue()


def test_the_table_has_a_line_per_turn_and_the_warnings_below():
    shown = table(view_of(tour(), PLACEHOLDERS))
    lines = [[c.strip() for c in line.strip("\u2502").split("\u2502")] for line in shown.splitlines() if line.startswith("\u2502")]
    assert lines == [
        ["0", "system, user", "what is it", "14", "10", "10", "", "1 image", ""],
        ["1", "assistant", "w3 w4 w5", "4", "4", "1", "3", "", ""],
        ["2", "tool x2", "one", "37", "11", "11", "", "2 images, 1 video, 1 sound (1 reused)", ""],
        ["3", "assistant (aborted)", "w6 w9 w8", "4", "4", "1", "3", "", "!"],
    ]
    assert "! turn 3: 1 sampled <pad>: kept as sampled, and no item stands there" in shown
    assert "4 turns, 59 tokens (29 compact), 6 sampled, 5 items" in shown
    assert "Rendered 23 tokens and processed 4 items once; all anew at each extension would be 37 and 6." in shown


def test_text_cannot_steer_the_terminal_or_the_plot():
    view = view_of(Conversation.start(Small(), [user("[red]a[/red] \x1b[31m $\\frac{$ \u6771")]))
    assert "\x1b" not in table(view)
    assert r"[red]a[/red] \x1b[31m $\frac{$" in table(view)
    assert any(r"\x1b[31m $\frac{$" in word for word in words(draw_view(view)))
    draw_view(view).savefig(io.BytesIO(), format="png")


def test_the_json_holds_all_that_is_shown():
    view = view_of(tour(), PLACEHOLDERS)
    read = json.loads(json.dumps(view_json(view), allow_nan=False))
    assert [turn["added"] for turn in read["turns"]] == [turn.title for turn in view.turns]
    assert [run for turn in read["turns"] for run in turn["runs"]] == [[*vars_of(run)] for t in view.turns for run in t.runs]
    assert [i["same_as"] for i in read["turns"][2]["items"]] == [None, "image 0", None, None]
    assert read["turns"][3]["sampled_placeholders"] == [57]
    assert read["totals"]["rendered_if_whole"] == 37


def vars_of(run):
    return run.origin, run.start, run.stop


# The picture


def artist(figure, gid):
    (found,) = figure.findobj(lambda a: a.get_gid() == gid)
    return found


def words(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def drawn(figure, page, gid):
    """Boxes of a collection as tokens of their turns: (turn, start, stop)."""
    found = []
    for path in artist(figure, gid).get_paths():
        (left, top), (right, _) = path.vertices.min(axis=0), path.vertices.max(axis=0)
        row = next(r for r in page.rows if abs(r.y - top) < 1e-6)
        start, stop = (row.start + round((x - LEFT) / page.cell) for x in (left, right))
        found.append((row.turn.number, start, stop))
    return found


def tokens(extents):
    return {(turn, token) for turn, start, stop in extents for token in range(start, stop)}


@pytest.mark.parametrize("make", [tour, lambda: many(12), lambda: many(60)], ids=["tour", "twelve", "sixty"])
def test_every_token_is_drawn_in_the_colour_of_its_origin(make):
    view = view_of(make())
    figure, page = draw_view(view), page_of(view, plotting._TOP)
    for origin in COLOURS:
        wanted = {(t.number, i) for t in view.turns for r in t.runs if r.origin == origin for i in range(r.start, r.stop)}
        assert tokens(drawn(figure, page, f"origin:{origin}")) == wanted
    wanted = {(t.number, i) for t in view.turns for item in t.items for i in range(item.start, item.stop)}
    assert tokens(drawn(figure, page, "items")) == wanted


def test_every_item_has_its_thumbnail_and_every_warning_its_words():
    view = view_of(tour(), PLACEHOLDERS)
    figure = draw_view(view, title="tour.json")
    shown = figure.findobj(lambda a: a.get_gid() == "thumbnail")
    wanted = [thumbnail(item.media, shown[0].get_array().shape[0]) for turn in view.turns for item in turn.items]
    assert len(shown) == len(wanted) == 5
    for image, pixels in zip(shown, wanted, strict=True):
        assert np.array_equal(image.get_array(), pixels)
    written = words(figure)
    assert {"image 0", "image 1", "image 2", "video 0", "audio 0", "reused: image 0", "processed"} <= set(written)
    assert {"! logprobs for 1 of 3 sampled tokens"} <= set(written)
    assert len(artist(figure, "marks").get_paths()) == 1
    assert written[0].startswith("tour.json: 4 turns")


@pytest.mark.parametrize(
    "make",
    [
        tour,
        lambda: many(100),
        lambda: Conversation.start(Small(), [user(*(picture(i) for i in range(40)))]),
        lambda: Conversation.start(Small(), [user(part(video(), tokens=5000), picture(1), "x " * 900)]).append_sampled([3] * 700),
        lambda: Conversation.start(Small(), [user("\u6771" * 90)]).append_sampled([PAD]),
        lambda: many(460),
    ],
    ids=["tour", "hundred", "crowd", "long", "wide", "left-out"],
)
def test_no_two_texts_overlap_and_nothing_leaves_the_page(make):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw_view(view_of(make(), PLACEHOLDERS), title="file.json")
    canvas = FigureCanvasAgg(figure)
    boxes = [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in figure.axes[0].texts if t.get_text()]
    boxes += [("legend", figure.axes[0].get_legend().get_window_extent(canvas.get_renderer()))]
    boxes += [("thumbnail", a.get_window_extent()) for a in figure.findobj(lambda a: a.get_gid() == "thumbnail")]
    width, height = figure.get_size_inches() * figure.dpi
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.x1 <= width, text
        assert box.y0 >= 0, text
        assert box.y1 <= height, text
    boxes.sort(key=lambda entry: entry[1].y0)
    for index, (text, box) in enumerate(boxes):
        for other, beside in itertools.takewhile(lambda entry, top=box.y1: entry[1].y0 < top, boxes[index + 1 :]):
            apart = min(box.x1, beside.x1) - max(box.x0, beside.x0) < 1 or min(box.y1, beside.y1) - max(box.y0, beside.y0) < 1
            assert apart, f"{text!r} and {other!r}"


@given(st.lists(st.integers(0, 300), min_size=1, max_size=4), st.sampled_from([32, 64, 128]))
def test_the_rows_of_a_turn_cover_its_tokens_once(lengths, scale):
    parts = [part(picture(i), tokens=n) if i % 2 and n else "x " * n for i, n in enumerate(lengths)]
    turn = view_of(Conversation.start(Small(), [user(*parts)])).turns[-1]
    shown = pieces(turn, scale)
    assert [start for start, _, _ in shown] == [turn.start, *(stop for _, stop, _ in shown[:-1])]
    assert shown[-1][1] == turn.stop
    for start, stop, folded in shown:
        assert -(-(stop - start) // scale) == max(1, folded)
        edges = {e for r in turn.runs for e in (r.start, r.stop)} | {e for i in turn.items for e in (i.start, i.stop)}
        assert not folded or not {e for e in edges if start < e < stop}, "what is folded is all of one kind"


def test_a_long_item_is_folded_and_told():
    view = view_of(Conversation.start(Small(), [user(part(video(), tokens=60_000), "x")]))
    figure = draw_view(view)
    assert figure.get_size_inches()[1] < 5
    assert any("rows like these" in word for word in words(figure))


def test_a_sampled_placeholder_is_never_folded_away():
    conversation = Conversation.start(Small(), [user("x")]).append_sampled([3] * 20_000 + [PAD] + [3] * 20_000)
    figure = draw_view(view_of(conversation, PLACEHOLDERS))
    assert any("rows like these" in word for word in words(figure))
    assert len(artist(figure, "marks").get_paths()) == 1


def test_the_legend_names_every_origin_in_a_colour_of_its_own():
    legend = draw_view(view_of(tour())).axes[0].get_legend()
    named = {
        text.get_text().split(":")[0]: patch.get_facecolor() for text, patch in zip(legend.texts, legend.get_patches(), strict=True)
    }
    assert set(named) >= set(ORIGINS)
    assert len({named[origin] for origin in ORIGINS}) == len(ORIGINS)


def test_of_very_many_turns_the_middle_is_left_out():
    figure = draw_view(view_of(many(900)))
    assert "... 551 turns are not drawn ..." in words(figure)
    assert figure.get_size_inches()[1] * figure.dpi < 65536, "what Agg can draw"


def test_the_same_view_is_the_same_file(tmp_path):
    for name in ("a.png", "b.PNG"):
        plot_view(view_of(tour(), PLACEHOLDERS), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.PNG").read_bytes()
    for name in ("a.svg", "a.pdf"):
        plot_view(view_of(tour()), tmp_path / name)
    with pytest.raises(ConversationError, match=r"must end in \.png, \.svg, \.pdf"):
        plot_view(view_of(tour()), tmp_path / "a.gif")


# Thumbnails


@pytest.mark.parametrize("size", [(30, 20), (1, 1), (2000, 3), (3, 2000), (64, 64)])
def test_a_thumbnail_has_the_height_asked_for_and_a_bounded_width(size):
    pixels = thumbnail(picture(size=size), 40)
    assert pixels.shape[0] == 40
    assert 20 <= pixels.shape[1] <= 80
    assert pixels.dtype == np.uint8


def test_a_picture_of_one_colour_keeps_it():
    assert (thumbnail(Picture("RGB", (8, 8), bytes([9, 200, 30] * 64)), 40) == [9, 200, 30]).all()


def test_a_video_shows_its_first_frame_between_perforated_edges():
    frames = np.zeros((2, 20, 20, 3), np.uint8)
    frames[0] = (250, 10, 10)
    pixels = thumbnail(Video(frames), 40)
    assert (pixels[:, 5:-5] == [250, 10, 10]).all()
    assert (pixels[0, 0] == pixels[0, -1]).all()
    assert (pixels[0, 0] != [250, 10, 10]).any()


def test_a_waveform_is_as_tall_as_the_sound_is_loud():
    half = np.concatenate([np.zeros(500, np.float32), np.tile(np.float32([0.5, -0.5]), 250)])
    inked = (waveform(Sound(half, 8000), 41, 80) == (52, 101, 164)).all(axis=2).sum(axis=0)
    assert inked[:39].tolist() == [1] * 39
    assert inked[41:].tolist() == [41] * 39
    assert thumbnail(Sound(np.zeros(3, np.float32), 8000), 40).shape == (40, 80, 3), "silence, and fewer samples than pixels"


def test_what_was_not_stored_is_a_blank():
    assert len(np.unique(thumbnail(None, 40).reshape(-1, 3), axis=0)) == 1


# The file; what only a processor can tell is tested with one


def write(tmp_path, value):
    file = tmp_path / "c.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "neither JSON nor a stored conversation"),
        ("", "neither JSON nor a stored conversation"),
        ([], "has no list of messages; its form is"),
        ({"messages": {}}, "has no list of messages"),
        ({"messages": [], "procesor": "x"}, "unknown key 'procesor'; the keys are processor, tools"),
        ({"messages": [], "processor": 3}, "'processor' is a int; it is a str"),
        ({"messages": [], "tools": {}}, "'tools' is a dict; it is a list"),
        ({"messages": ["hello"]}, "message 0 is a str"),
        ({"messages": [{"role": "user", "content": "x"}, {"content": "x"}]}, "message 1 has role None"),
        ({"messages": [{"role": "user", "content": "x", "token_ids": [1]}]}, "message 0 has 'token_ids' and role 'user'"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, value, message):
    with pytest.raises(ConversationError, match=message):
        read_file(write(tmp_path, value))


def test_paths_count_from_the_file(tmp_path):
    url = "data:image/png;base64,AAAA"
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": "b/c.png"}},
        {"type": "video", "video": ["f0.png", "/abs/f1.png"], "metadata": {"fps": 2}},
        {"type": "audio", "audio": [0.5, 0.25], "sampling_rate": 8000},
        {"type": "image", "image": "https://example.org/a.png"},
        {"type": "text", "text": "a.png"},
    ]
    given = read_file(write(tmp_path, {"processor": "proc", "messages": [{"role": "user", "content": parts}]}))
    assert given.processor == tmp_path / "proc"
    assert given.messages[0]["content"] == [
        {"type": "image", "image": str(tmp_path / "a.png")},
        {"type": "image", "url": url},
        {"type": "image", "url": str(tmp_path / "b/c.png")},
        {"type": "video", "video": [str(tmp_path / "f0.png"), "/abs/f1.png"], "metadata": {"fps": 2}},
        {"type": "audio", "audio": [0.5, 0.25], "sampling_rate": 8000},
        {"type": "image", "image": "https://example.org/a.png"},
        {"type": "text", "text": "a.png"},
    ]


def test_the_help_costs_no_heavy_import():
    heavy = "{'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)"
    code = f"import sys, rollout_core.viewing.command; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
