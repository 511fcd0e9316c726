"""Preflight's small model that takes pictures, where there is no torchvision: its processor, and the reference over it."""

from importlib.util import find_spec

import pytest
import torch

from rollout_core.errors import WorkerError
from rollout_core.multimodal import Conversation, HFRenderer
from rollout_core.preflight import models, vision_models, vision_reference
from rollout_core.preflight.vision_reference import Reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision") / "model"
    vision_models.make_small_vision_model(folder, heads=4, head_dim=32)
    return folder


def test_the_processor_needs_no_torchvision(folder):
    processor = vision_models.load_processor(folder)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    has_torchvision = find_spec("torchvision") is not None
    assert type(processor.image_processor).__name__.endswith("Pil") != has_torchvision
    assert processor.image_processor.size == {"shortest_edge": 3136, "longest_edge": 12544}


def test_a_folder_without_a_processor_is_named(tmp_path):
    with pytest.raises(WorkerError, match=f"the processor in {tmp_path} could not be loaded: "):
        vision_models.load_processor(tmp_path)


def test_a_tracked_conversation_is_the_whole_of_it(folder):
    """Ids, pictures and positions of three turns, against the one call of the processor that preflight holds a worker to."""
    processor = vision_models.load_processor(folder)
    reference = Reference(None, processor, set())
    first, *later = vision_reference.turns()
    tracked, messages = Conversation.start(HFRenderer(processor), first), list(first)
    for turn in later:
        tracked = tracked.append_sampled(reference.answer(messages), finish="length").extend(turn)
        messages = vision_reference.answered(messages, turn)
    tracked = tracked.with_generation_prompt()
    whole = reference.inputs(messages)
    assert tracked.input_ids.tolist() == whole["input_ids"][0].tolist()
    shown = tracked.multi_modal_inputs()
    assert torch.equal(shown["pixel_values"], whole["pixel_values"])
    assert shown["image_grid_thw"].tolist() == [[1, 6, 8], [1, 6, 8], [1, 6, 10], [1, 6, 8], [1, 6, 8]]
    names = [item.uuid() for item in tracked.items]
    assert len(set(names)) == 4
    assert names[3] == names[0]


def test_exchanged_turns_show_the_first_two_in_the_other_order():
    def shown(turns):
        return [part["image"].tobytes() for turn in turns for part in turn[0]["content"] if part["type"] == "image"]

    right, exchanged = shown(vision_reference.turns()), shown(vision_reference.turns(exchanged=True))
    assert right != exchanged
    assert [exchanged[1], exchanged[0], *exchanged[2:]] == right


def test_the_reference_is_what_transformers_generates(folder):
    """Its tokens, each from a pass over everything, and ``generate`` with a cache; and it ends at an EOS."""
    model, processor = models.load_trainer(folder), vision_models.load_processor(folder)
    inputs = Reference(model, processor, set()).inputs(vision_reference.turns()[0])
    tokens = Reference(model, processor, set()).greedy(inputs, 12)
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert tokens == generated[0, inputs["input_ids"].shape[1] :].tolist()
    ended = Reference(model, processor, {tokens[3]}).greedy(inputs, 12)
    assert ended == tokens[: tokens.index(tokens[3]) + 1]
