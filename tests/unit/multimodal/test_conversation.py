"""Conversations over the kit's fake processors: growing, refusing, reading, storing. The clauses have their checks in the kit."""

from __future__ import annotations

import copy
import gc
import pickle

import msgspec
import numpy as np
import pytest
import torch
import xxhash

from rollout_core.errors import ConversationError, MediaError, TruncationError, UnstableTemplateError, UnsupportedProcessorError
from rollout_core.multimodal import ORIGINS, Conversation, HFRenderer, Picture
from rollout_core.testing.worlds import make_world

END = "<|im_end|>"


def picture(size=(8, 8), value=7) -> Picture:
    return Picture("RGB", size, bytes([value]) * (size[0] * size[1] * 3))


def shown(*parts) -> list:
    return [{"type": "text", "text": p} if isinstance(p, str) else {"type": p.modality, p.modality: p} for p in parts]


def user(*parts) -> dict:
    return {"role": "user", "content": shown(*parts)}


@pytest.fixture
def world():
    return make_world("chatml+rows")


@pytest.fixture
def renderer(world):
    return HFRenderer(world.processor)


@pytest.fixture
def start(renderer):
    return Conversation.start(renderer, [user(picture(), "what?")])


def parts(*given) -> list:
    return [{"role": "user", "content": list(given)}]


def ids_of(renderer, text) -> list[int]:
    return renderer.encode(text).ids.tolist()


def snapshot(conversation):
    return conversation.to_bytes()


class TestGrowing:
    def test_origins_and_messages(self, renderer, start):
        grown = start.append_sampled(ids_of(renderer, f"it is{END}"), logprobs=[-1.0] * 5).extend([user("and?")])
        text = {origin: [] for origin in ORIGINS}
        for token, origin in zip(grown.input_ids, grown.origin, strict=True):
            text[ORIGINS[origin]].append(int(token))
        decoded = {origin: renderer.tokenizer.decode(ids) for origin, ids in text.items()}
        assert decoded["sampled"] == f"it is{END}"
        assert decoded["boundary"] == "\n"
        assert decoded["environment"].replace("<|image_pad|>", "") == "what?and?"
        assert decoded["template"].count("<|im_start|>") == 3
        assert sorted(set(grown.message_ids.tolist())) == [0, 1, 2]
        assert (np.diff(grown.message_ids) >= 0).all()
        assert grown.loss_mask.tolist() == [int(ORIGINS[o] == "sampled") for o in grown.origin]

    def test_generation_prompt_is_there_once(self, renderer, start):
        prompt = start.with_generation_prompt()
        assert prompt.with_generation_prompt() is prompt
        assert renderer.tokenizer.decode(prompt.delta(start).input_ids.tolist()) == "<|im_start|>assistant\n"
        ids = ids_of(renderer, f"x{END}")
        assert prompt.append_sampled(ids).input_ids.tolist() == start.append_sampled(ids).input_ids.tolist()

    @pytest.mark.parametrize("finish", ["length", "aborted"])
    def test_an_open_turn_goes_on_or_is_closed(self, renderer, start, finish):
        one = start.append_sampled(ids_of(renderer, "it "), logprobs=[-0.5] * 3, finish=finish)
        assert one.finish == finish
        more = one.append_sampled(ids_of(renderer, f"is{END}"))
        at_once = start.append_sampled([*ids_of(renderer, "it "), *ids_of(renderer, f"is{END}")])
        assert more.extend([user("?")]).input_ids.tolist() == at_once.extend([user("?")]).input_ids.tolist()
        assert more.messages == at_once.messages
        assert more.message_ids.tolist() == at_once.message_ids.tolist()
        closed = one.extend([user("?")])
        assert renderer.tokenizer.decode(closed.delta(one).input_ids.tolist()).startswith(f"{END}\n<|im_start|>user")

    def test_a_stop_token_is_not_said_twice(self, renderer, start):
        with_stop = start.append_sampled(ids_of(renderer, f"yes{END}"))
        without = start.append_sampled(ids_of(renderer, "yes"))
        assert with_stop.extend([user("?")]).input_ids.tolist() == without.extend([user("?")]).input_ids.tolist()

    def test_stop_tokens_in_front_of_the_next_role(self):
        renderer = HFRenderer(make_world("glm+bare").processor)
        start = Conversation.start(renderer, [{"role": "user", "content": "hi"}])
        grown = start.append_sampled([*ids_of(renderer, "yes"), *ids_of(renderer, "<|user|>")]).extend(
            [{"role": "user", "content": "so"}]
        )
        assert renderer.tokenizer.decode(grown.input_ids.tolist()).count("<|user|>") == 2

    def test_messages_may_come_from_an_iterator(self):
        renderer = HFRenderer(make_world("strips-thinking+rows").processor)
        said = ids_of(renderer, f"<think>hm</think>yes{END}")
        before = Conversation.start(renderer, iter([user("x")]), on_unstable="segment").append_sampled(said)
        after = before.extend(iter([user("new")]))
        assert "new" in renderer.tokenizer.decode(after.input_ids.tolist())

    def test_verify(self, renderer, start):
        grown = start.append_sampled(ids_of(renderer, "a"), finish="aborted").append_sampled(ids_of(renderer, f"b{END}"))
        grown = grown.extend([user(picture(value=4), "c")]).with_generation_prompt()
        grown.verify()
        start.verify()

    def test_verify_sees_a_template_that_counts(self, world):
        """One that says how many messages there were, but only after six: no probing goes there."""
        real = world.processor.apply_chat_template

        def counting(messages, **options):
            text = real(messages, **options)
            return text + f"({len(messages)})" if len(messages) > 12 and not options.get("add_generation_prompt") else text

        world.processor.apply_chat_template = counting
        world.processor.chat_template = "counting"
        renderer = HFRenderer(world.processor)
        grown = Conversation.start(renderer, [{"role": "user", "content": "x"}])
        for _ in range(7):
            grown = grown.append_sampled(ids_of(renderer, f"a{END}")).extend([{"role": "user", "content": "b"}])
        with pytest.raises(UnstableTemplateError):
            grown.verify()
        careful = HFRenderer(world.processor, check_history=True)
        again = Conversation.start(careful, [{"role": "user", "content": "x"}])
        with pytest.raises(UnstableTemplateError):
            for _ in range(7):
                again = again.append_sampled(ids_of(careful, f"a{END}")).extend([{"role": "user", "content": "b"}])

    def test_a_parsed_message_goes_to_the_template(self, renderer, start):
        message = {"role": "assistant", "content": "parsed", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
        grown = start.append_sampled(ids_of(renderer, f"raw{END}"), message=message)
        assert grown.messages[1] == message
        assert start.append_sampled(ids_of(renderer, f"raw{END}")).messages[1] == {"role": "assistant", "content": "raw"}

    def test_the_same_picture_is_processed_once_and_stands_twice(self, world, start):
        before = world.counts.items
        grown = start.extend([user(picture(), picture(value=9), picture())])
        assert world.counts.items == before + 1
        assert [item.index for item in grown.items] == [0, 1, 2, 3]
        assert grown.items[0].payload is grown.items[1].payload is grown.items[3].payload
        assert len({item.region for item in grown.items}) == 4

    def test_forks_do_not_meet(self, renderer, start):
        base = snapshot(start)
        left, right = start.extend([user("a")]), start.extend([user(picture(value=1), "b")])
        assert snapshot(start) == base
        assert len(left.items) == 1
        assert len(right.items) == 2
        with pytest.raises(ConversationError, match="does not go on from"):
            left.delta(right)

    def test_a_long_chain_is_freed(self, start):
        for _ in range(20_000):
            start = start.append_sampled([5], finish="length")
        assert len(start.input_ids) > 20_000
        del start
        gc.collect()


class TestRefusals:
    """Everything refused leaves the conversation as it was."""

    @pytest.mark.parametrize(
        ("messages", "error", "words"),
        [
            ([], ConversationError, "no messages"),
            ("hello", ConversationError, "must be a list of mappings"),
            ({"role": "user"}, ConversationError, "must be a list of mappings"),
            (["hello"], ConversationError, "message 1 is a str"),
            ([{"content": "x"}], ConversationError, "message 1 has role None"),
            ([{"role": "", "content": "x"}], ConversationError, "message 1 has role ''"),
            ([{"role": "user", "content": 5}], ConversationError, "content of type int"),
            (parts(5), ConversationError, "message 1, part 0 must be a mapping"),
            (parts({"type": "text"}), ConversationError, "no string under 'text'"),
            (parts({"type": "document", "text": "x"}), ConversationError, "part 0 is of type 'document'"),
            (parts({"type": "image"}), ConversationError, "must hold one of image, url, path, base64; it has none"),
            (parts({"type": "image", "image": picture(), "path": "x"}), ConversationError, "it has 2 of them"),
            ([{"role": "user", "content": "a\ud800b"}], ConversationError, "lone surrogate '\\\\ud800' at character 1"),
            ([{"role": "user", "content": "x", "extra": object()}], ConversationError, "only JSON values reach a template"),
            (parts({"type": "audio", "audio": [0.5], "sampling_rate": 16000}), UnsupportedProcessorError, "audio"),
            (parts({"type": "image", "image": b"no picture"}), MediaError, r"message 1, part 0 \(image\)"),
            (parts({"type": "image", "image": np.zeros((0, 4, 3), np.uint8)}), MediaError, "part 0"),
            (parts({"type": "video", "video": []}), MediaError, "video"),
            (parts({"type": "image", "image": picture()}, {"type": "video", "image": 1}), ConversationError, "part 1"),
        ],
    )  # fmt: skip
    def test_messages(self, start, messages, error, words):
        before = snapshot(start)
        with pytest.raises(error, match=words):
            start.extend(messages)
        assert snapshot(start) == before

    @pytest.mark.parametrize(
        ("ids", "options", "words"),
        [
            ([10**6], {}, "outside the vocabulary of 401"),
            ([-1], {}, "sampled id -1 at 0"),
            ([True], {}, "whole numbers, not bool"),
            ([1.0], {}, "whole numbers, not float"),
            ([[1]], {}, "one-dimensional"),
            ("ab", {}, "one-dimensional"),
            ([1, 2], {"logprobs": [-1.0]}, "1 logprobs for 2 sampled ids"),
            ([1], {"logprobs": [float("nan")]}, "logprob 0 is nan"),
            ([1], {"logprobs": [float("-inf")]}, "logprob 0 is -inf"),
            ([1], {"logprobs": ["x"]}, "logprob 0 is 'x'"),
            ([1], {"logprobs": [True]}, "logprob 0 is True"),
            ([1], {"finish": "eos"}, "'stop', 'length', 'aborted'"),
            ([1], {"message": {"role": "user", "content": "x"}}, "has role 'assistant' and no media"),
        ],
    )
    def test_sampled(self, start, ids, options, words):
        before = snapshot(start)
        with pytest.raises(ConversationError, match=words):
            start.append_sampled(ids, **options)
        assert snapshot(start) == before

    def test_what_a_state_does_not_allow(self, renderer, start):
        with pytest.raises(ConversationError, match="turn is open"):
            start.with_generation_prompt().extend([user("x")])
        stopped = start.append_sampled(ids_of(renderer, END))
        for call in (stopped.with_generation_prompt, lambda: stopped.append_sampled([1])):
            with pytest.raises(ConversationError, match="turn has ended"):
                call()
        for side in ("right", "left"):
            cut = start.truncate(len(start) - 1, side)
            for call in (
                cut.with_generation_prompt,
                lambda cut=cut: cut.extend([user("x")]),
                lambda cut=cut: cut.append_sampled([1]),
            ):
                with pytest.raises(ConversationError, match="was truncated; grow the one it was cut from"):
                    call()
            for read in (lambda cut=cut: cut.messages, cut.verify):
                with pytest.raises(ConversationError, match="truncated conversation"):
                    read()
        with pytest.raises(ConversationError, match="on_unstable is 'ignore'"):
            Conversation.start(renderer, [user("x")], on_unstable="ignore")

    def test_a_processor_that_changes(self, world, start):
        world.changed() if callable(getattr(world, "changed", None)) else None
        world.processor.chat_template = "another"
        with pytest.raises(ConversationError, match="chat template was changed"):
            start.extend([user("x")])

    def test_a_template_that_drops_pictures(self, world):
        real = world.processor.apply_chat_template

        def silent(messages, **options):
            kept = [
                {**m, "content": [p for p in m["content"] if p["type"] == "text"]}
                if m["role"] == "tool" and isinstance(m["content"], list)
                else m
                for m in messages
            ]
            return real(kept, **options)

        world.processor.apply_chat_template = silent
        world.processor.chat_template = "silent"
        renderer = HFRenderer(world.processor)
        start = Conversation.start(renderer, [user("look")]).append_sampled(ids_of(renderer, f"ok{END}"))
        with pytest.raises(ConversationError, match="no placeholder .* for the image in message 2"):
            start.extend([{"role": "tool", "content": shown(picture(), "here")}])

    def test_a_template_that_refuses(self):
        renderer = HFRenderer(make_world("text-tools+rows").processor)
        start = Conversation.start(renderer, [user("look")]).append_sampled(ids_of(renderer, f"ok{END}"))
        with pytest.raises(ConversationError, match="refuses these messages .*Tool messages hold text only"):
            start.extend([{"role": "tool", "content": shown(picture(), "here")}])

    def test_an_unstable_template(self):
        renderer = HFRenderer(make_world("strips-thinking+rows").processor)
        assert renderer.verdict.breaks
        thought = ids_of(renderer, f"<think>hm</think>yes{END}")
        with pytest.raises(
            UnstableTemplateError, match=r"message 2 \(user\) makes the chat template change message 1 \(assistant\).*on_unstable"
        ):
            Conversation.start(renderer, [user("x")]).append_sampled(thought).extend([user("y")])
        before = Conversation.start(renderer, [user(picture(), "x")], on_unstable="segment").append_sampled(thought)
        after = before.extend([user("y")])
        assert after.segments[0] is before
        assert after.items[0].payload is before.items[0].payload
        assert "hm" not in renderer.tokenizer.decode(after.input_ids.tolist())
        with pytest.raises(ConversationError, match="new segment began"):
            after.delta(before)

    def test_grouped_tool_messages(self):
        renderer = HFRenderer(make_world("groups-tools+rows").processor)
        assert renderer.verdict.groups_tools
        start = Conversation.start(renderer, [user("x")]).append_sampled(ids_of(renderer, f"ok{END}"))
        results = [{"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}]
        together = start.extend(results)
        assert together.tip.message_count == 4
        with pytest.raises(UnstableTemplateError, match="must be added in one extend"):
            start.extend(results[:1]).extend(results[1:])

    def test_what_is_no_processor(self, world):
        for bad in (None, "qwen", world.processor.tokenizer.__call__):
            with pytest.raises(UnsupportedProcessorError, match="is no tokenizer, and no processor with one"):
                HFRenderer(bad)
        world.processor.chat_template = None
        with pytest.raises(UnsupportedProcessorError, match="has no chat template; give chat_template="):
            HFRenderer(world.processor)

    def test_no_offsets(self, world):
        class Slow:
            def __init__(self, real):
                self._real = real

            def __getattr__(self, name):
                return getattr(self._real, name)

            def __len__(self):
                return len(self._real)

            def __call__(self, *args, **kwargs):
                raise NotImplementedError("return_offsets_mapping")

        world.processor.tokenizer = Slow(world.processor.tokenizer)
        with pytest.raises(UnsupportedProcessorError, match="no character offsets; use a fast tokenizer"):
            HFRenderer(world.processor)

    def test_tools(self, renderer):
        schema = {"type": "function", "function": {"name": "f", "description": "shows <|image_pad|>"}}
        conversation = Conversation.start(renderer, [user(picture(), "x")], tools=[schema])
        stored = conversation.to_bytes()
        schema["function"]["name"] = "g"
        assert conversation.to_bytes() == stored
        with pytest.raises(ConversationError, match="give its JSON schema"):
            Conversation.start(renderer, [user("x")], tools=[print])
        with pytest.raises(ConversationError, match="list of JSON schemas"):
            Conversation.start(renderer, [user("x")], tools={"f": 1})

    def test_payloads_of_others(self, start):
        world = make_world("chatml+rows").changed()
        other = Conversation.start(HFRenderer(world.processor), [user(picture(), "x")])
        with pytest.raises(ConversationError, match="this one with other settings"):
            start.extend([{"role": "user", "content": [{"type": "image", "image": other.items[0].payload}]}])
        payloads = {start.items[0].artifact: other.items[0].payload}
        with pytest.raises(ConversationError, match="payload given for artifact"):
            Conversation.from_bytes(start.renderer, start.to_bytes(payloads=False), payloads)

    def test_it_is_not_pickled(self, start):
        with pytest.raises(TypeError, match="send to_bytes"):
            pickle.dumps(start)
        assert copy.deepcopy(start) is copy.copy(start) is start

    def test_values_that_are_no_json(self, start):
        nested: list = []
        nested.append(nested)
        for bad, words in ((10**30, "beyond 64 bits"), (nested, "nested more than")):
            with pytest.raises(ConversationError, match=words):
                start.extend([{"role": "user", "content": "x", "more": bad}])
        start.extend([{"role": "user", "content": "x", "more": np.float64(1.5)}]).to_bytes()

    @pytest.mark.parametrize("bad", [3, {0: -1.0}, (x for x in [0.5]), "x", [1e39]])
    def test_logprobs_of_other_kinds(self, start, bad):
        with pytest.raises(ConversationError, match="logprob"):
            start.append_sampled([1], logprobs=bad)


class TestText:
    def test_literals_in_tool_calls(self, renderer):
        call = {"type": "<|image_pad|>", "function": {"name": "f", "arguments": {"<|image_pad|>": "<|video_pad|>"}}}
        message = {"role": "assistant", "content": "x", "tool_calls": [call]}
        conversation = Conversation.start(renderer, [user(picture(), "x"), message, user("y")])
        assert len(conversation.items) == 1

    def test_literal_placeholders_make_no_item(self, renderer):
        text = "see <|image_pad|> and <|video_pad|>\x00"
        conversation = Conversation.start(renderer, [user(text, picture(), text)])
        assert len(conversation.items) == 1
        assert renderer.tokenizer.decode(conversation.input_ids.tolist()).count(text) == 2
        pad = renderer.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        (item,) = conversation.items
        outside = np.delete(conversation.input_ids, np.arange(item.region.start, item.region.stop))
        assert pad not in outside

    def test_private_use_characters_are_text(self, renderer):
        text = "".join(chr(c) for c in range(0xE0F0, 0xE110)) + "<|image_pad|>"
        conversation = Conversation.start(renderer, [user(text)])
        assert text in renderer.tokenizer.decode(conversation.input_ids.tolist())

    def test_a_sampled_placeholder_makes_no_item(self, renderer, start):
        pad = renderer.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        grown = start.append_sampled([pad, pad], finish="length").extend([user(picture(value=3), "x")])
        assert len(grown.items) == 2
        assert grown.input_ids.tolist().count(pad) == sum(b - a for item in grown.items for a, b in item.spans) + 2
        types = grown.multi_modal_inputs()["mm_token_type_ids"][0]
        assert int(types.sum()) == sum(b - a for item in grown.items for a, b in item.spans)
        assert grown.span_map.expand(grown.compact_ids).tolist() == grown.input_ids.tolist()


class TestReading:
    def test_arrays(self, renderer, start):
        grown = start.append_sampled([65, 66], logprobs=[0.0, None])
        assert grown.logprobs[-2:] == [0.0, None]
        assert grown.logprobs[:-2] == [None] * (len(grown) - 2)
        for backend, kind in (("numpy", np.ndarray), ("torch", torch.Tensor)):
            arrays = grown.arrays(backend)
            fields = [getattr(arrays, name) for name in arrays.__dataclass_fields__]
            assert all(isinstance(value, kind) for value in fields)
            assert {value.shape[-1] for value in fields} == {len(grown)}
            assert np.isnan(np.asarray(arrays.logprobs)).sum() == len(grown) - 1
        with pytest.raises(ConversationError, match="'numpy' or 'torch'"):
            grown.arrays("jax")

    def test_nobody_writes_into_a_conversation(self, start):
        before = snapshot(start)
        for array in (start.input_ids, start.compact_ids, start.loss_mask, start.origin, start.message_ids, start.position_ids):
            array[...] = 0
        with pytest.raises(ValueError, match="read-only"):
            start.tip.tokens.input_ids[0] = 1
        arrays = start.arrays()
        arrays.input_ids[:] = 0
        assert snapshot(start) == before

    def test_delta(self, renderer, start):
        later = start.append_sampled([65], logprobs=[-2.0], finish="length").extend([user(picture(value=5), "b")])
        delta = later.delta(start)
        assert delta.start == len(start)
        assert delta.compact_start == len(start.compact_ids)
        assert [*start.input_ids, *delta.input_ids] == later.input_ids.tolist()
        assert [*start.compact_ids, *delta.compact_ids] == later.compact_ids.tolist()
        assert np.concatenate([start.position_ids, delta.position_ids], axis=1).tolist() == later.position_ids.tolist()
        assert delta.logprobs.count(-2.0) == 1
        assert [item.index for item in delta.items] == [1]
        nothing = later.delta(later)
        assert len(nothing.input_ids) == len(nothing.items) == nothing.position_ids.shape[1] == 0
        assert later.delta().input_ids.tolist() == later.input_ids.tolist()

    def test_uuid(self, start):
        (item,) = start.items
        assert item.uuid() != item.uuid("run 1") != item.uuid("run 2")
        assert item.artifact != item.identity

    def test_repr(self, renderer, start):
        assert repr(renderer) == "<HFRenderer of FakeRowsProcessor, family 'fake-rows', positions 'qwen2-vl@2'>"
        assert "1 items, 1 messages" in repr(start)


class TestCutting:
    @pytest.fixture
    def long(self, renderer, start):
        return start.append_sampled(ids_of(renderer, f"it{END}")).extend([user(picture(value=2), "b", picture((4, 4)), "c")])

    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("policy", ["drop_item", "drop_message"])
    def test_every_length(self, long, side, policy):
        opener = long.renderer.tokenizer.convert_tokens_to_ids("<|vision_start|>")
        for length in range(1, len(long) + 1):
            try:
                cut = long.truncate(length, side, policy)
            except TruncationError:
                continue
            assert len(cut) <= length
            kept = cut.input_ids.tolist()
            assert kept == (long.input_ids.tolist()[: len(cut)] if side == "right" else long.input_ids.tolist()[-len(cut) :])
            assert kept.count(opener) == len(cut.items)
            assert cut.span_map.expand(cut.compact_ids).tolist() == kept
            positions, _ = long.renderer.rule.advance(0, [s for delta in cut.tip.path() for s in delta.segments])
            assert cut.position_ids.tolist() == positions.tolist()
            assert [item.index for item in cut.items] == list(range(len(cut.items)))
            assert len(cut.multi_modal_inputs().get("image_grid_thw", ())) == len(cut.items)
            assert Conversation.from_bytes(long.renderer, cut.to_bytes()).to_bytes() == cut.to_bytes()

    def test_what_fits_is_returned(self, long):
        assert long.truncate(len(long)) is long

    def test_errors(self, long):
        inside = long.items[0].region.start + 1
        with pytest.raises(TruncationError, match=r"token \d+, where the cut would be, is inside image 0"):
            long.truncate(inside, policy="error")
        for bad in (0, -1, True, 1.5, None):
            with pytest.raises(TruncationError, match="max_length is"):
                long.truncate(bad)
        with pytest.raises(TruncationError, match="side is one of"):
            long.truncate(5, "middle")
        with pytest.raises(TruncationError, match="no whole message fits"):
            long.truncate(2, policy="drop_message")


class TestStoring:
    def test_payloads_once_or_elsewhere(self, renderer, start):
        twice = start.extend([user(picture(), "x")])
        assert len(twice.to_bytes()) < 2 * len(start.to_bytes())
        small = twice.to_bytes(payloads=False)
        assert len(small) < len(twice.to_bytes())
        with pytest.raises(ConversationError, match="payload of image 0 .* is not stored here"):
            Conversation.from_bytes(renderer, small)
        payloads = {item.artifact: item.payload for item in twice.items}
        assert Conversation.from_bytes(renderer, small, payloads).to_bytes() == twice.to_bytes()

    def test_goes_on_as_before(self, renderer, start):
        open_turn = start.append_sampled([65], logprobs=[-0.25], finish="aborted")
        for state in (start, open_turn, start.with_generation_prompt()):
            again = Conversation.from_bytes(renderer, state.to_bytes())
            assert again.append_sampled([66]).to_bytes() == state.append_sampled([66]).to_bytes()
            assert again.logprobs == state.logprobs

    def test_another_renderer(self, start):
        other = HFRenderer(make_world("glm+rows").processor)
        with pytest.raises(ConversationError, match="another template, tokenizer, processor or setting"):
            Conversation.from_bytes(other, start.to_bytes())

    def test_damage(self, renderer, start):
        data = start.to_bytes()
        noise = np.random.default_rng(0)
        for place in noise.integers(0, len(data), 300):
            bad = bytearray(data)
            bad[place] ^= 1 << int(noise.integers(8))
            with pytest.raises(ConversationError):
                Conversation.from_bytes(renderer, bytes(bad))
        for bad in (b"", b"\x00", data[:-1], data + b"\x00", b"\xc1" * 50, msgspec.msgpack.encode(("x", 1, b"", b""))):
            with pytest.raises(ConversationError):
                Conversation.from_bytes(renderer, bad)

    def test_bytes_that_no_conversation_wrote(self, renderer, start):
        """With a right digest: other versions, arrays of different lengths, items outside, tensors that do not fit their shape."""
        magic, version, _, packed = msgspec.msgpack.decode(start.to_bytes())
        body = msgspec.msgpack.decode(packed)

        def sealed(changed, version=version):
            inner = msgspec.msgpack.encode(changed)
            return msgspec.msgpack.encode((magic, version, xxhash.xxh3_128_digest(inner), inner))

        with pytest.raises(ConversationError, match="version 2"):
            Conversation.from_bytes(renderer, sealed(body, version=2))
        assert Conversation.from_bytes(renderer, sealed(body)).to_bytes() == start.to_bytes()

        def change(where, value):
            changed = msgspec.msgpack.decode(packed)
            at = changed
            for key in where[:-1]:
                at = at[key]
            at[where[-1]] = value
            return sealed(changed)

        step = [4, 0, 0, 0]
        outputs = next(iter(body[5][0][3]))
        for where, value in [
            ([*step, 3], b"\0" * 8),
            ([*step, 1], b"\0" * 7),
            ([*step, 6, 0, 2], [5, 2, 0, 1]),
            ([*step, 6, 0, 2], [0, 10**9, 0, 1]),
            ([*step, 6, 0, 3], [[0, 10**9]]),
            ([*step, 6, 0, 5], "nothing"),
            ([4, 0, 0], []),
            ([4], []),
            ([5, 0, 3, outputs], {"tensor": ["float32", [2, 2], b"\0"]}),
            ([5, 0, 3, outputs], {"tensor": ["save", [1], b"\0"]}),
            ([5, 0, 6], [["image", 0, 0, 0, None]]),
        ]:
            with pytest.raises(ConversationError):
                Conversation.from_bytes(renderer, change(where, value))
