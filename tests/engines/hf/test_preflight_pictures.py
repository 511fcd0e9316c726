"""Preflight on a model that takes pictures: sound workers pass, and those that are faulty with pictures fail that check alone."""

import copy
import re
import shutil
import time
from pathlib import Path

import msgspec
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rollout_core.cli import app
from rollout_core.multimodal import Conversation
from rollout_core.preflight import models, vision_models
from rollout_core.preflight.checks import CHECKS, CheckFailed, Context, batch_holds, pictures_go_once, worker_starts
from rollout_core.preflight.workers import make_worker
from rollout_core.workers.engine import Progress
from rollout_core.workers.media import decode_picture, decode_tensors, encode_tensors
from support import tiny_vl
from support.preflight import CAPACITY, Local, results, run

PICTURES = "pictures go once"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight-pictures") / "model"
    vision_models.make_small_vision_model(folder)
    return folder


class Sound(Local):
    pass


class Keeps(Local):
    media_form = "pictures"
    engine_class = "support.keeping_hf:KeepingHFEngine"


class KeepsAll(Keeps):
    def spoil_start(self):
        self.engine.room = 1000


class TakesNone(Local):
    media_form = "none"


class HasACheckpointsNames(Local):
    """For tensors that transformers' modules call by others."""

    def tensor_digests(self):
        shorter = {"model.language_model.": "model.", "model.visual.": "visual."}
        found = super().tensor_digests()
        for prefix, short in shorter.items():
            found = {short + name.removeprefix(prefix) if name.startswith(prefix) else name: one for name, one in found.items()}
        return found


# Faulty workers


class SendsEachTime(Keeps):
    def generate(self, prompts, params, **options):
        self._media.forget()
        return super().generate(prompts, params, **options)


class SendsWhatWasShownTwiceTwice(Keeps):
    """It remembers one picture alone."""

    def spoil_start(self):
        self._media._limit = 1


class NamesThemAndSaysThatItDoesNot(Keeps):
    def spoil_start(self):
        self.media_form = "pictures_each_time"


class HasRoomForOne(Keeps):
    def spoil_start(self):
        self.engine.room = 1


class Shows(Keeps):
    """A worker whose engine shows the model something else, and does not compare its ids."""

    def spoil_start(self):
        shown = self.engine.shown
        self.engine.compares = False
        self.engine.shown = lambda request: self.tamper(*shown(request))


class SwapsTwoPictures(Shows):
    def tamper(self, prompt, pictures):
        return prompt, [*pictures[1::-1], *pictures[2:]]


class ShowsTheNewestWhereOneIsAgain(Shows):
    """The picture that stands twice is the last one's in its second place."""

    def tamper(self, prompt, pictures):
        return prompt, [pictures[-1] if one in pictures[:place] else one for place, one in enumerate(pictures)]


class DropsOne(Shows):
    """The last, with its placeholder."""

    def tamper(self, prompt, pictures):
        at = len(prompt) - 1 - prompt[::-1].index(self.engine.model.config.image_token_id)
        return prompt[:at] + prompt[at + 1 :], pictures[:-1]


class TurnsOneOver(Shows):
    def tamper(self, prompt, pictures):
        return prompt, [pictures[0].transpose(Image.Transpose.FLIP_TOP_BOTTOM), *pictures[1:]]


class LosesColour(Shows):
    def tamper(self, prompt, pictures):
        return prompt, [one.convert("L").convert("RGB") for one in pictures]


class ExpandsWrongly(Keeps):
    """Its processor makes more of a picture than the conversation's."""

    compares = False

    def spoil_start(self):
        area = (2 * self.engine.processor.image_processor.patch_size) ** 2
        self.engine.processor.image_processor.size = {"shortest_edge": 16 * area, "longest_edge": 32 * area}
        self.engine.compares = self.compares


class ExpandsWronglyAndCompares(ExpandsWrongly):
    compares = True


class CountsPicturesAsText(Keeps):
    """Positions are those of a text."""

    def spoil_start(self):
        self.engine.positions = lambda ids, types, seen: torch.arange(len(ids)).expand(3, -1)


class ShowsBlackForWhatItMisses(Keeps):
    def spoil_start(self):
        keep, sizes = self.engine.keep, {}

        def quiet(names, given):
            sizes.update({name: decode_picture(data).size for name, data in given.items()})
            for name in keep(names, given):
                self.engine.kept[name] = Image.new("RGB", sizes[name])
            return []

        self.engine.keep = quiet


class FailsWhatItMisses(Keeps):
    def spoil_start(self):
        self.engine.missed = lambda request, missing: Progress(request.key, [], [], self.version, "failed")


class TakesOneForAnother(Keeps):
    """Pictures of one size have one name."""

    def spoil_start(self):
        keep, first = self.engine.keep, {}

        def mixed(names, given):
            missing = keep(names, given)
            for name in names:
                self.engine.kept[name] = first.setdefault(self.engine.kept[name].size, self.engine.kept[name])
            return missing

        self.engine.keep = mixed
        self.engine.room = 1000


class SeesWithOldWeights:
    """What was made of a picture once is kept over an update."""

    def spoil_start(self):
        super().spoil_start()
        visual, kept = self.engine.model.model.visual, {}
        see = visual.forward

        def forward(pixels, **options):
            key = pixels.numpy().tobytes()
            if key not in kept:
                kept[key] = see(pixels, **options)
            return copy.copy(kept[key])  # transformers puts something else into it

        visual.forward = forward


class KeepsWhatOldWeightsSaw(SeesWithOldWeights, Local):
    pass


class KeepsPicturesAndWhatOldWeightsSaw(SeesWithOldWeights, Keeps):
    pass


class SwapsTensorsOfTwo(Local):
    def spoil_start(self):
        submit = self.engine.submit

        def swapped(group):
            requests = [msgspec.structs.replace(one, inputs=self.tamper(one.inputs)) for one in group.requests]
            submit(msgspec.structs.replace(group, requests=requests))

        self.engine.submit = swapped

    def tamper(self, inputs):
        if not inputs:
            return inputs
        tensors = decode_tensors(inputs)
        pixels, count = tensors["pixel_values"], int(tensors["image_grid_thw"][0].prod())
        return encode_tensors(
            {**tensors, "pixel_values": torch.cat([pixels[count : 2 * count], pixels[:count], pixels[2 * count :]])}
        )


class LeavesTheTowerThatSees(Local):
    """Updates do not reach it, and it is said that they do."""

    def sync_weights(self, source, **options):
        self.digests = super().tensor_digests()
        old = {name: tensor.clone() for name, tensor in self.engine.weights.tensors.items() if "visual" in name}
        report = super().sync_weights(source, **options)
        self.digests = super().tensor_digests()
        for name, tensor in old.items():
            self.tensor(name).copy_(tensor)
        return report

    digests = None

    def tensor_digests(self):
        return self.digests or super().tensor_digests()


class SaysTheOldVersion(Local):
    def generate(self, prompts, params, **options):
        done = super().generate(prompts, params, **options)
        if not isinstance(prompts[0], Conversation):
            return done
        return [msgspec.structs.replace(one, weight_version=one.weight_version - 1, token_versions=None) for one in done]


class SaysNoneAndAnswers(Local):
    media_form = "none"

    def generate(self, prompts, params, **options):
        flat = [one.with_generation_prompt().input_ids.tolist() if isinstance(one, Conversation) else one for one in prompts]
        return super().generate(flat, params, **options)


SENT = r"10 pictures sent \(\d+ kB\) and 0 named in 3 turns; \d+ tokens equal"
NAMED = r"4 pictures sent \(\d+ kB\) and 6 named in 3 turns; \d+ tokens equal"
SOUND = {
    Sound: rf"{SENT}; seen anew by version \d",
    Keeps: rf"{NAMED}; 4 that the engine dropped sent again; seen anew by version \d",
    KeepsAll: rf"{NAMED}; none dropped for 16 others; seen anew by version \d",
    HasACheckpointsNames: rf"{SENT}; seen anew by version \d",
    TakesNone: "this worker takes no pictures, says so, and refuses them",
}
#: The words of the check that fails. Those in which tokens differ say where, and which.
FIRST = r"turn 1: the response to 2 pictures differ at \d+: \d+, and \d+ by transformers over all of it at once \(\d+ and \d+ ids\)"
THIRD = FIRST.replace("turn 1", "turn 3").replace("2 pictures", "5 pictures")
SHOWN = r"turn 2 shows 3 pictures, 1 of them new: {} were sent and {} named, expected {} and {} of a worker whose form is '{}'"
FAULTS = {
    SendsEachTime: SHOWN.format(3, 0, 1, 2, "pictures"),
    SendsWhatWasShownTwiceTwice: SHOWN.format(3, 0, 1, 2, "pictures"),
    NamesThemAndSaysThatItDoesNot: SHOWN.format(1, 2, 3, 0, "pictures_each_time"),
    HasRoomForOne: "turn 1: the engine says that it misses 1 pictures .* which it was just given: its cache may be too small",
    SwapsTwoPictures: FIRST,
    ShowsTheNewestWhereOneIsAgain: THIRD,
    DropsOne: FIRST,
    TurnsOneOver: FIRST,
    LosesColour: FIRST,
    ExpandsWrongly: FIRST,
    ExpandsWronglyAndCompares: r"turn 1: \d+ ids were made of a conversation of \d+",
    CountsPicturesAsText: FIRST,
    ShowsBlackForWhatItMisses: THIRD.replace("turn 3", "turn 3 again, after 16 other pictures"),
    FailsWhatItMisses: "turn 3 again, after 16 other pictures: a request failed",
    TakesOneForAnother: FIRST,
    KeepsWhatOldWeightsSaw: THIRD.replace("turn 3", r"turn 3 by version \d"),
    KeepsPicturesAndWhatOldWeightsSaw: THIRD.replace("turn 3", r"turn 3 by version \d"),
    SwapsTensorsOfTwo: FIRST,
    LeavesTheTowerThatSees: FIRST,
    SaysTheOldVersion: r"turn 1: versions \((0, )+0\), the worker's is 1",
    SaysNoneAndAnswers: "says that it takes no pictures, and answered a conversation that shows some",
}


@pytest.mark.parametrize("worker", SOUND, ids=lambda worker: worker.__name__)
def test_a_sound_worker_passes_all_checks(folder, worker):
    outcomes = run(folder, worker)
    assert results(outcomes, "pass") == {check.id for check in CHECKS}, [o for o in outcomes.values() if o.result != "pass"]
    assert re.fullmatch(SOUND[worker], outcomes[PICTURES].figure), outcomes[PICTURES].figure


#: Each takes two seconds: every fourth, and all of them nightly.
SOME = [
    worker if place % 4 == 0 else pytest.param(worker, marks=pytest.mark.slow, id=worker.__name__)
    for place, worker in enumerate(FAULTS)
]


@pytest.mark.parametrize("worker", SOME, ids=lambda worker: worker.__name__)
def test_a_fault_fails_the_check_of_pictures_and_no_other(folder, worker):
    outcomes = run(folder, worker)
    assert results(outcomes, "fail") == {PICTURES}, [(o.id, o.figure) for o in outcomes.values() if o.result == "fail"]
    assert results(outcomes, "skip") == set()
    assert re.search(FAULTS[worker], outcomes[PICTURES].figure), outcomes[PICTURES].figure
    assert not outcomes[PICTURES].trace.startswith("Traceback"), outcomes[PICTURES].trace


@pytest.mark.parametrize("family", tiny_vl.FAMILIES)
def test_a_folder_whose_model_takes_pictures_is_checked_with_them(tmp_path, family):
    tiny_vl.make(tmp_path, family, tied=family == "qwen3_vl")
    outcomes = run(tmp_path, Sound)
    assert results(outcomes, "pass") == {check.id for check in CHECKS}, [o for o in outcomes.values() if o.result != "pass"]
    assert re.fullmatch(SOUND[Sound], outcomes[PICTURES].figure)


def test_a_model_of_text_has_no_pictures_and_says_so(tmp_path):
    models.make_small_model(tmp_path)
    context = Context(tmp_path, Sound, CAPACITY)
    context.trainer = models.load_trainer(tmp_path)
    assert pictures_go_once(context) == "no pictures: the model takes none"


def test_a_folder_without_a_processor_fails_the_check_of_pictures_alone(folder, tmp_path):
    for file in folder.iterdir():
        if "processor" not in file.name:
            shutil.copy(file, tmp_path)
    outcomes = run(tmp_path, Sound)
    assert results(outcomes, "fail") == {PICTURES}
    assert outcomes[PICTURES].figure.startswith(f"the processor in {tmp_path} could not be loaded: ")


# What the check needs of the weights, so that a fault can be seen in tokens


def begun(folder, **options):
    """Up to where pictures are checked, with the worker as it started."""
    context = Context(folder, Sound, CAPACITY, **options)
    context.trainer = models.load_trainer(folder)
    worker_starts(context)
    return context


def blind(model):
    """All pictures look the same."""
    with torch.no_grad():
        for parameter in model.model.visual.merger.mlp[-1].parameters():
            parameter.zero_()


def test_weights_to_which_all_pictures_are_the_same_are_changed_until_they_are_not(folder):
    context = begun(folder)
    with context.worker as worker:
        blind(context.trainer)
        worker.sync_weights(context.trainer)
        assert pictures_go_once(context).endswith("seen anew by version 3")


def test_weights_to_which_all_pictures_are_the_same_prove_nothing(folder):
    context = begun(folder, perturbation=0.0)
    with context.worker as worker:
        blind(context.trainer)
        worker.sync_weights(context.trainer)
        with pytest.raises(CheckFailed, match="the order of pictures changes no token"):
            pictures_go_once(context)


def test_an_update_that_changes_no_token_proves_nothing(folder):
    context = begun(folder, perturbation=0.0)
    with context.worker, pytest.raises(CheckFailed, match="other weights that see change no token"):
        pictures_go_once(context)


# The model that is made, and what is known of it


def test_the_small_model_is_the_same_each_time(folder, tmp_path):
    state = torch.random.get_rng_state()
    vision_models.make_small_vision_model(tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


def test_the_small_model_is_tied_and_ends_responses(folder):
    trainer = models.load_trainer(folder)
    assert trainer.lm_head.weight is trainer.model.language_model.embed_tokens.weight
    assert models.eos_token_ids(trainer) == {2, 57, 100, 200}
    assert vision_models.placeholders(trainer.config) == {3, 4, 5, 6}
    context = begun(folder)
    with context.worker:
        figure = batch_holds(context)
    ended = int(re.fullmatch(r"48 rows hold, (\d+) ended by an EOS, and one by a stop id", figure).group(1))
    assert ended > 0, "no row met an EOS, so a worker that ignores them would pass"


def test_no_prompt_of_text_has_a_placeholder(folder, monkeypatch):
    context = begun(folder)
    context.worker.close()
    before = context.prompts
    monkeypatch.setattr(vision_models, "placeholders", lambda config: set(before[3]))
    after = begun(folder)
    after.worker.close()
    assert list(map(len, after.prompts)) == list(map(len, before))
    assert set(before[3]) - models.eos_token_ids(after.trainer)
    assert not set(before[3]) & {token for prompt in after.prompts for token in prompt}


def test_what_sees_is_told_from_what_speaks(folder):
    trainer = models.load_trainer(folder)
    seeing = vision_models.seeing_weights(trainer)
    names = dict(trainer.named_parameters(remove_duplicate=False)) | dict(trainer.named_buffers(remove_duplicate=False))
    assert seeing == {name for name in names if name.startswith("model.visual.")}
    before = {name: tensor.clone() for name, tensor in names.items()}
    changed = models.perturb(trainer, 0.05, only=seeing)
    assert set(changed) == seeing
    assert {name for name, tensor in names.items() if not torch.equal(tensor, before[name])} == seeing


# The command


def test_a_real_run_with_pictures_passes_within_a_minute():
    start = time.monotonic()
    done = CliRunner().invoke(app, ["preflight", "--pictures"], env={"COLUMNS": "160"})
    assert time.monotonic() - start < 60
    assert done.exit_code == 0, done.output
    assert "worker hf, small random Qwen2.5-VL" in done.output
    assert re.search(rf"│ {PICTURES} +│ W8 +│ pass +│ +\d+\.\d\d s │ 10 pictures sent ", done.output)
    assert re.search(r"all 14 checks hold in \d+\.\d s", done.output)


@pytest.mark.parametrize("kind", ["vllm", "vllm-async"])
@pytest.mark.parametrize("pictures", [False, True])
def test_vllm_gets_room_for_few_pictures_where_a_model_is_made_for_them(monkeypatch, kind, pictures):
    made = []
    monkeypatch.setattr("rollout_core.workers.vllm.worker.VLLMWorker", lambda *given, **options: made.append(options))
    make_worker(kind, Path("model"), threads=1, keeps_few=pictures)
    assert made[0]["mode"] == ("stepped" if kind == "vllm" else "async")
    assert made[0]["engine_options"] == ({"mm_processor_cache_gb": 0.001} if pictures else None)
