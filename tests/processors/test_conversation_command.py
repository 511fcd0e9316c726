"""``rollout-core conversation`` with real processors, loaded from folders: what it prints and draws, and what it refuses."""

from __future__ import annotations

import base64
import functools
import json
import subprocess
import sys
import wave

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from rollout_core.cli import app
from rollout_core.multimodal import Conversation, HFRenderer
from rollout_core.viewing import file as files
from rollout_core.viewing.file import load_processor
from support import processors

LOADED = functools.cache(load_processor)
UNSTABLE = processors.QWEN_TEMPLATE.replace(
    "{% for message in messages %}", "{{ messages | length }}{% for message in messages %}", 1
)
#: Calls of tools written after the content, as Qwen's templates write them.
CALLING = processors.QWEN_TEMPLATE.replace(
    "<|im_end|>\n{% endfor %}",
    "{% for call in message.get('tool_calls') or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = processors.qwen2_vl()
    made.save_pretrained(folder / "qwen2-vl")
    templates = {"unstable": UNSTABLE, "calling": CALLING, "poems": "{{ raise_exception('only poems, please') }}", "silent": None}
    for name, made.chat_template in templates.items():
        made.save_pretrained(folder / name)
    made.tokenizer.save_pretrained(folder / "tokenizer")
    for name in ("empty", "broken"):
        (folder / name).mkdir()
    (folder / "broken" / "processor_config.json").write_text("{")
    clip = processors.build(
        "CLIPProcessor", chat_template="x", image_processor=processors.part("CLIPImageProcessor"), tokenizer=made.tokenizer
    )
    clip.save_pretrained(folder / "clip")
    return folder


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """Loading a processor takes a second or two, and every test here runs the command anew."""
    monkeypatch.setattr(files, "load_processor", LOADED)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A terminal's width, which pytest-xdist passes on, would cut the tables."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def work(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name, size in (("a", (60, 80)), ("b", (120, 56)), ("f0", (56, 56)), ("f1", (56, 56))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["conversation", *map(str, arguments)])


def write(folder, *messages, **more):
    file = folder / "c.json"
    file.write_text(json.dumps({"messages": messages, **more}), encoding="utf-8")
    return file


def image(path):
    return {"type": "image", "image": path}


def text(words):
    return {"type": "text", "text": words}


QUESTION = {"role": "user", "content": [image("a.png"), text("What is it?")]}
ANSWER = {"role": "assistant", "content": "A picture."}


def turns(*arguments):
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["turns"]


# What it shows


def test_a_conversation_is_printed_and_drawn(models, work, monkeypatch):
    url = "data:image/png;base64," + base64.b64encode((work / "a.png").read_bytes()).decode()
    video = {"type": "video", "video": ["f0.png", "f1.png"], "metadata": {"fps": 2.0}}
    tools = [{"role": "tool", "content": [image("b.png"), image(url)]}, {"role": "tool", "content": [video]}]
    file = write(work, {"role": "system", "content": "Be brief."}, QUESTION, ANSWER, *tools, processor=str(models / "qwen2-vl"))
    monkeypatch.chdir("/")
    done = run(file, "--plot", work / "c.png")
    assert done.exit_code == 0, done.output
    assert f"plot written to {work / 'c.png'}" in done.stdout
    with Image.open(work / "c.png") as drawn:
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 24)}
    assert {(0xC9, 0xCE, 0xD6), (0xF0, 0x8C, 0x2E), (0x3B, 0x78, 0xB5), (0x22, 0x25, 0x2B)} <= colours, "all origins"
    lines = [line.split("\u2502") for line in done.stdout.splitlines() if line.startswith("\u2502")]
    assert [line[2].strip() for line in lines] == ["system, user", "assistant", "tool x2"]
    assert lines[2][8].strip() == "2 images, 1 video (1 reused)"
    shown = turns(file)
    assert [i["same_as"] for i in shown[2]["items"]] == [None, "image 0", None]
    assert [(turn["processed"], turn["reused"]) for turn in shown] == [(1, 0), (0, 0), (2, 1)]


def test_it_shows_what_the_conversation_holds(models, work):
    said = {"role": "assistant", "token_ids": [40, 41, 42], "logprobs": [-0.5, None, -1.5], "finish": "length"}
    file = write(work, QUESTION, said, {"role": "user", "content": "Go on."}, ANSWER)
    shown = turns(file, "--processor", models / "qwen2-vl")
    renderer = HFRenderer(LOADED(models / "qwen2-vl"))
    conversation = Conversation.start(renderer, [{"role": "user", "content": [image(str(work / "a.png")), text("What is it?")]}])
    conversation = conversation.append_sampled([40, 41, 42], logprobs=[-0.5, None, -1.5], finish="length")
    conversation = conversation.extend([{"role": "user", "content": "Go on."}])
    conversation = conversation.append_sampled(renderer.tokenizer("A picture.")["input_ids"])
    origin = [name for turn in shown for name, start, stop in turn["runs"] for _ in range(start, stop)]
    assert origin == [("template", "sampled", "environment", "boundary")[code] for code in conversation.origin]
    assert sum(turn["compact"] for turn in shown) == len(conversation.compact_ids)
    assert sum(turn["loss"] for turn in shown) == conversation.loss_mask.sum()
    (item,) = shown[0]["items"]
    assert (item["start"], item["stop"]) == (conversation.items[0].region.start, conversation.items[0].region.stop)
    assert shown[1]["added"] == "assistant (cut by length)"
    assert shown[1]["warnings"] == ["logprobs for 2 of 3 sampled tokens"]
    (work / "c.bin").write_bytes(conversation.to_bytes())
    assert turns("c.bin", "--processor", models / "qwen2-vl") == shown


def test_a_sampled_placeholder_and_a_literal_one_are_warned_of(models, work):
    literal = {"role": "user", "content": "what is <|image_pad|>?"}
    file = write(work, literal, {"role": "assistant", "content": "It is <|image_pad|>."})
    shown = turns(file, "--processor", models / "qwen2-vl")
    assert shown[0]["warnings"] == ["a message holds the text <|image_pad|>: encoded as ordinary text"]
    assert shown[1]["warnings"] == ["1 sampled <|image_pad|>: kept as sampled, and no item stands there"]
    assert len(shown[1]["sampled_placeholders"]) == 1
    assert run(file, "--processor", models / "qwen2-vl").stdout.count("! turn") == 2


def test_calls_of_tools_are_the_ids_that_the_template_writes(models, work):
    call = {"type": "function", "function": {"name": "look", "arguments": {"where": "up"}}}
    said = {"role": "assistant", "content": "Wait.", "tool_calls": [call]}
    file = write(work, {"role": "user", "content": "?"}, said, {"role": "tool", "content": "sky"}, ANSWER)
    shown = turns(file, "--processor", models / "calling")
    written = 'Wait.<tool_call>{"name": "look", "arguments": {"where": "up"}}</tool_call>'
    assert shown[1]["loss"] == len(LOADED(models / "calling").tokenizer(written)["input_ids"])
    assert "look" in shown[1]["text"]
    silent = run(write(work, {"role": "user", "content": "?"}, {**said, "tool_calls": 3}), "--processor", models / "calling")
    assert (silent.exit_code, silent.stderr.count("\n")) == (2, 1)


def test_a_template_that_changes_earlier_messages_begins_a_segment_if_asked(models, work):
    messages = ({"role": "user", "content": "one"}, ANSWER, {"role": "user", "content": "two"}, ANSWER)
    shown = turns(write(work, *messages, on_unstable="segment"), "--processor", models / "unstable")
    assert [turn["segment"] for turn in shown] == [0, 0, 1, 1]
    assert "a new segment begins" in shown[2]["warnings"][0]


def test_sounds_are_read_from_wav_files_beside_the_file(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("omni")
    processors.qwen2_5_omni().save_pretrained(folder)
    with wave.open(str(work / "s.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((np.sin(np.arange(8000) / 20) * 9000).astype("<i2").tobytes())
    parts = [{"type": "audio", "audio": "s.wav"}, text("What do you hear?")]
    file = write(
        work,
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "A tone."},
        processor=str(folder),
        positions="plain@1",
    )
    (item,) = turns(file)[0]["items"]
    assert (item["name"], item["what"]) == ("audio 0", "0.50 s at 16000 Hz")
    assert run(file, "--plot", "s.svg").exit_code == 0


def test_a_folder_without_a_processor_gives_its_tokenizer(models):
    loaded = load_processor(models / "tokenizer")
    assert loaded("<|im_end|>")["input_ids"] == LOADED(models / "qwen2-vl").tokenizer("<|im_end|>")["input_ids"]
    assert not hasattr(loaded, "tokenizer")


# What it refuses


def refused(done, message):
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ("nowhere", "is no folder; give one that save_pretrained wrote"),
        ("empty", "has neither processor_config.json nor tokenizer_config.json"),
        ("broken", "cannot be loaded: "),
        ("clip", "no family is known for CLIPProcessor"),
        ("silent", "chat template"),
        ("poems", "only poems, please"),
        ("unstable", "message 2 (user) makes the chat template change message 0"),
    ],
)
def test_a_processor_that_cannot_be_used_is_one_line_and_exit_code_2(models, work, processor, message):
    file = write(work, {"role": "user", "content": "one"}, ANSWER, {"role": "user", "content": "two"})
    refused(run(file, "--processor", models / processor, "--plot", "c.png"), message)
    assert not (work / "c.png").exists()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the file has no messages"),
        ([ANSWER], "message 0 is the assistant's, and there is nothing that it answers"),
        ([QUESTION, ANSWER, ANSWER], "message 2: the assistant's turn has ended"),
        ([{"content": "x"}], "message 0 has role None"),
        ([QUESTION, ANSWER, {"role": "user", "content": [image("gone.png")]}], "message 2, part 0 (image): "),
        ([{"role": "user", "content": [image("https://example.org/a.png")]}], "nothing is fetched here"),
        ([{"role": "user", "content": [image("c.json")]}], "message 0, part 0 (image): "),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "videos are taken as frames"),
        ([{"role": "user", "content": [{"type": "audio", "audio": [0.5], "sampling_rate": 8000}]}], "message 0"),
        ([QUESTION, {"role": "assistant"}], "message 1: an assistant's message has its text under 'content', or 'token_ids'"),
        (
            [QUESTION, {"role": "assistant", "token_ids": [10**9]}],
            "message 1: sampled id 1000000000 at 0 is outside the vocabulary",
        ),
        ([QUESTION, {**ANSWER, "logprobs": [-1.0]}], "message 1: there are 1 logprobs for "),
        ([QUESTION, {**ANSWER, "finish": "bored"}], "message 1: finish is 'bored'"),
        ([QUESTION, {"role": "assistant", "token_ids": ["a"]}], "message 1: sampled ids must be"),
    ],
)
def test_messages_that_cannot_be_used_are_one_line_and_exit_code_2(models, work, messages, message):
    refused(run(write(work, *messages), "--processor", models / "qwen2-vl"), message)


def test_files_that_cannot_be_used_are_one_line_and_exit_code_2(models, work):
    processor = ("--processor", models / "qwen2-vl")
    file = write(work, QUESTION, ANSWER)
    refused(run(file), "names no processor; give --processor DIR")
    refused(run("gone.json", *processor), "gone.json is no file")
    refused(run(work, *processor), "is no file")
    refused(run("a.png", *processor), "a.png is neither JSON nor a stored conversation")
    refused(run(file, *processor, "--plot", "c.gif"), "must end in .png, .svg, .pdf")
    done = run(file, *processor, "--plot", "no/such/c.png")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "No such file" in done.stderr
    renderer = HFRenderer(LOADED(models / "calling"))
    stored = Conversation.start(renderer, [{"role": "user", "content": "x"}]).to_bytes()
    (work / "c.bin").write_bytes(stored)
    refused(run("c.bin", *processor), "this conversation was made by renderer")
    (work / "c.bin").write_bytes(stored[:-3])
    refused(run("c.bin", "--processor", models / "calling"), "these bytes are no stored conversation")
    (work / "c.bin").write_bytes(b"\x94")
    refused(run("c.bin", "--processor", models / "calling"), "these bytes are no stored conversation")


def test_the_help_names_the_options():
    done = subprocess.run(
        [sys.executable, "-m", "rollout_core.cli", "conversation", "--help"], capture_output=True, text=True, check=True
    )
    for words in ("--processor", "--plot", "--json", "Exits with 0, or 2"):
        assert words in done.stdout
