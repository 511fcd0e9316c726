"""HFWorker on small real transformers models: what arrives, what it generates then, and every way in which an update can fail."""

import copy
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import xxhash

from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.errors import (
    CapacityError,
    DuplicateNameError,
    IntegrityError,
    PlanMismatchError,
    TransferError,
    WorkerError,
)
from rollout_core.testing.oracles import bytes_of
from rollout_core.workers import HFWorker, SamplingParams
from rollout_core.workers.link import hosts
from support.greedy import argmax_loop

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "max_position_embeddings": 64}
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
#: Lengths 1 to 9, so that every row but one is padded.
PROMPTS = [[5], [17, 3, 60], [9, 0, 0, 12, 55, 2, 7, 31, 44]]
STEPS = 6
GREEDY = SamplingParams(response_length=STEPS)
#: A qwen2 update of this capacity has buckets 0 to LAST.
CAPACITY, LAST = 4000, 5
EMBEDDING, HEAD, INV_FREQ = "model.embed_tokens.weight", "lm_head.weight", "model.rotary_emb.inv_freq"


def build(kind):
    if kind == "qwen2 tied":
        config = transformers.Qwen2Config(
            **SIZES, **TOKENS, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, dtype="float32"
        )
        return transformers.Qwen2ForCausalLM(config)
    if kind == "llama bf16":
        config = transformers.LlamaConfig(**SIZES, **TOKENS, num_attention_heads=2, tie_word_embeddings=False, dtype="bfloat16")
        return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    assert kind == "deepseek buffer"  # its router has a persistent buffer, e_score_correction_bias
    config = transformers.DeepseekV3Config(
        **SIZES,
        **TOKENS,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=12,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


KINDS = ("qwen2 tied", "llama bf16", "deepseek buffer")


def tensors_of(model) -> dict[str, torch.Tensor]:
    """Every name that a trainer may ask for: the state dict, which has tied names, and the buffers that are not in it."""
    return {**{name: tensor.detach() for name, tensor in model.state_dict().items()}, **dict(model.named_buffers())}


def change(model, seed: int, *, buffers: bool = True):
    """Other weights, wide enough that greedy tokens depend on context and position. Buffers that transformers computes from the
    config are changed if asked for."""
    generator = torch.Generator().manual_seed(seed)
    computed = set(tensors_of(model)) - set(model.state_dict())
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            if name not in computed:
                tensor.copy_(1 + 0.3 * noise if "norm" in name else 0.4 * noise)
            elif buffers:
                tensor.mul_(1 + 0.1 * noise.abs())
    return model


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Each kind of model as save_pretrained writes it."""
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp("models") / kind.replace(" ", "-")
        change(build(kind), 1).save_pretrained(made[kind])
    return made


@pytest.fixture(scope="session")
def originals(folders):
    return {
        kind: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
        for kind, folder in folders.items()
    }


def start(folders, kind, process, **options):
    dtype = "bfloat16" if "bf16" in kind else "float32"
    return HFWorker(str(folders[kind]), dtype=dtype, process=process, threads=1, **{"timeout": 20, **options})


@pytest.fixture(scope="module")
def workers(folders):
    """One worker of each kind and place, started when first asked for; every test leaves it with weights that it can use."""
    # A shell's background job ignores Ctrl-C, and so would all that it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    running: dict[tuple[str, bool], HFWorker] = {}

    def get(kind, process):
        if (kind, process) not in running:
            running[kind, process] = start(folders, kind, process)
        return running[kind, process]

    yield get
    for worker in running.values():
        worker.close()
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=["process", "here"])
def process(request):
    return request.param == "process"


class Place:
    """A worker, and a trainer whose weights it has. The worker is left as it was found: in step, and usable."""

    def __init__(self, worker, trainer, kind):
        self.worker, self.trainer, self.kind = worker, trainer, kind
        self.before = worker.version

    def changed(self, seed, **options):
        """A trainer with other weights."""
        return change(copy.deepcopy(self.trainer), seed, **options)


@pytest.fixture
def place(workers, originals, process, request):
    kind = getattr(request, "param", "qwen2 tied")
    worker = workers(kind, process)
    trainer = change(copy.deepcopy(originals[kind]), 2)
    worker.sync_weights(trainer)
    place = Place(worker, trainer, kind)
    yield place
    worker.sync_weights(place.trainer)
    worker.generate([[1]], GREEDY)


on_every_kind = pytest.mark.parametrize("place", KINDS, indirect=True)


def assert_has(worker, trainer, names=None):
    """The worker's tensors are the trainer's, byte for byte, and its digests are those of its bytes."""
    wanted = tensors_of(trainer)
    digests = worker.tensor_digests()
    assert set(digests) == set(wanted)
    for name in wanted if names is None else names:
        found, expected = worker.read_tensor(name), wanted[name]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        data = bytes_of(found)
        assert data == bytes_of(expected), f"{name} differs"
        assert digests[name] == xxhash.xxh3_128_hexdigest(data), name


def greedy(worker) -> list[list[int]]:
    return [list(completion.token_ids) for completion in worker.generate(PROMPTS, GREEDY)]


def expected_greedy(model) -> list[list[int]]:
    return [argmax_loop(model, prompt, STEPS) for prompt in PROMPTS]


def assert_in_step(worker, trainer):
    """Every kind of request gets its own answer, several times over."""
    for _ in range(2):
        assert_has(worker, trainer, [EMBEDDING, "model.norm.weight"])
        completions = worker.generate(PROMPTS, GREEDY)
        assert [list(completion.token_ids) for completion in completions] == expected_greedy(trainer)
        assert {completion.weight_version for completion in completions} == {worker.version}


def assert_unusable(worker, version):
    """Half an update is loaded: no version, no tokens, and words; requests that do not need good weights are answered."""
    assert worker.version == version
    for _ in range(2):
        with pytest.raises(
            WorkerError, match=f"weights are unusable: the update to version {version + 1} was not completed; call sync"
        ):
            worker.generate(PROMPTS, GREEDY)
        assert worker.read_tensor(EMBEDDING).shape == (61, 16)
        assert len(worker.weights_digest()) == 32


def is_unusable(worker):
    try:
        worker.generate([[1]], GREEDY)
    except WorkerError:
        return True
    return False


def assert_as_before(place):
    """Nothing of an update was loaded: the old weights are there and in use."""
    assert place.worker.version == place.before
    assert_has(place.worker, place.trainer)
    assert_in_step(place.worker, place.trainer)


@contextmanager
def within(seconds: float):
    begin = time.monotonic()
    yield
    took = time.monotonic() - begin
    assert took < seconds, f"took {took:.1f} s"


def pid_of(worker) -> int:
    return worker._link.host.process.pid


def is_there(pid: int) -> bool:
    """Whether a process exists, one that nobody waited for included."""
    return Path(f"/proc/{pid}").exists()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    while state_of(pid) not in "Tt":
        time.sleep(0.01)


def handles() -> list[str]:
    """Open memfds and sockets of this process."""
    gc.collect()  # an error that was caught holds the frames it came through
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:  # the listing's own
            continue
    return sorted(entry for entry in found if "memfd:" in entry or "socket:" in entry)


@pytest.fixture
def nothing_left():
    """No process, shared memory or socket remains after the test (clause T3)."""

    def children() -> set[str]:
        found = set()
        for task in Path("/proc/self/task").iterdir():
            found |= set((task / "children").read_text().split())
        return found

    before = handles(), children(), set(os.listdir("/dev/shm"))
    yield
    assert (handles(), children()) == before[:2]
    # Other programs of this machine may use /dev/shm meanwhile: what is named after this process is ours.
    ours = re.compile(rf"(?<!\d){os.getpid()}(?!\d)")
    assert not [name for name in set(os.listdir("/dev/shm")) - before[2] if ours.search(name)]


# What arrives

CAPACITIES = (16, 100, 1000, 4096, 1 << 20)


@on_every_kind
def test_a_module_arrives_whole(place):
    trainer = place.changed(3)
    place.worker.sync_weights(trainer)
    assert_has(place.worker, trainer)


@on_every_kind
@pytest.mark.parametrize("form", ["state dict", "pairs", "parameters and buffers"])
def test_every_form_of_source_arrives(place, form):
    trainer = place.changed(3, buffers=False)
    sources = {
        "state dict": trainer.state_dict(),
        "pairs": list(trainer.state_dict().items()),
        "parameters and buffers": dict([*trainer.named_parameters(), *trainer.named_buffers()]),  # a tied name comes once
    }
    place.worker.sync_weights(sources[form])
    assert_has(place.worker, trainer)  # buffers that were left out are what they were


@pytest.mark.parametrize("order", ["given", "packed"])
@pytest.mark.parametrize("oversize", ["split", "own"])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_neither_capacity_nor_policy_nor_order_changes_what_arrives(place, capacity, oversize, order):
    trainer = place.changed(capacity)
    sizes, plans = [], set()

    def note(bucket):
        sizes.append(bucket.nbytes)
        plans.add(bucket.plan_digest)
        return bucket

    report = place.worker.sync_weights(trainer, capacity=capacity, oversize=oversize, order=order, inject=note)
    assert_has(place.worker, trainer)
    largest = 61 * 16 * 4
    assert max(sizes) == largest if oversize == "own" and capacity < largest else max(sizes) <= capacity
    assert (len(sizes) > 1) == (capacity < 4 * CAPACITY), "small buckets are many"
    assert report.buckets == len(sizes)
    assert plans == {plan_buckets(specs_of(trainer), capacity, oversize=oversize, order=order).digest}


@on_every_kind
def test_the_report_says_what_was_done(place):
    trainer = place.changed(3)
    for round_ in (1, 2):
        report = place.worker.sync_weights(trainer, capacity=1000)
        unique = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors_of(trainer).values()}
        assert report.nbytes == sum(unique.values())
        assert report.version == place.worker.version == place.before + round_
        assert report.buckets >= report.nbytes / 1000
        assert report.seconds > 0
        state = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(tensors_of(trainer).items()):
            state.update(len(name).to_bytes(8, "little") + name.encode() + xxhash.xxh3_128_digest(bytes_of(tensor)))
        assert report.digest == place.worker.weights_digest() == state.hexdigest()


def test_without_readback_there_is_no_digest_to_mistake_for_one(place):
    trainer = place.changed(3)
    assert place.worker.sync_weights(trainer, readback=False).digest is None
    assert_has(place.worker, trainer)


def test_bits_are_not_values(place):
    """NaN payloads, -0.0 and denormals arrive as they are, and weights that cannot generate say so."""
    trainer = place.changed(3)
    odd = torch.tensor([0x7F800001, 0x7FC00001, -1, -(2**31), 1], dtype=torch.int32).view(torch.float32)
    with torch.no_grad():
        trainer.model.embed_tokens.weight.view(torch.int32).view(-1)[:5] = odd.view(torch.int32)
    place.worker.sync_weights(trainer, capacity=64)
    assert_has(place.worker, trainer)
    with pytest.raises(WorkerError, match="NaN or infinite logits"):
        place.worker.generate([[1]], GREEDY)


def test_tied_weights_stay_tied(place):
    trainer = place.changed(3)
    pairs = {name: tensor for name, tensor in trainer.state_dict().items() if name != HEAD}
    place.worker.sync_weights(pairs)
    assert bytes_of(place.worker.read_tensor(HEAD)) == bytes_of(trainer.model.embed_tokens.weight)
    place.worker.sync_weights({**{n: t for n, t in trainer.state_dict().items() if n != EMBEDDING}})  # under its other name alone
    assert_in_step(place.worker, place.changed(3, buffers=False))


def test_a_lazy_mapping_and_a_file_are_sources(place, folders, tmp_path):
    trainer = place.changed(3, buffers=False)
    trainer.save_pretrained(tmp_path)
    place.worker.sync_weights(tmp_path)
    assert_has(place.worker, trainer)


def test_the_memory_of_an_update_goes_back(place):
    place.worker.sync_weights(place.changed(3))
    assert not [one for one in handles() if "memfd" in one]


# What it generates then


@pytest.mark.parametrize("place", ["qwen2 tied", "deepseek buffer"], indirect=True)
def test_greedy_tokens_are_the_trainers(place):
    """Clause W1, against a loop without padding, cache or generate()."""
    old = greedy(place.worker)
    assert old == expected_greedy(place.trainer)
    trainer = place.changed(3)
    place.worker.sync_weights(trainer, capacity=3000)
    new = greedy(place.worker)
    assert new == expected_greedy(trainer)
    assert all(a != b for a, b in zip(old, new, strict=True)), "weights that change no token prove nothing"
    assert len({tuple(tokens) for tokens in new}) == len(PROMPTS)


@on_every_kind
def test_every_completion_carries_the_version_of_its_weights(place):
    sampled = SamplingParams(response_length=3, n=2, temperature=1.0)
    for seed in (3, 4):
        version = place.worker.sync_weights(place.changed(seed)).version
        for params in (GREEDY, sampled):
            assert {completion.weight_version for completion in place.worker.generate(PROMPTS, params)} == {version}


def test_samples_are_grouped_by_prompt_and_repeatable(place):
    params = SamplingParams(response_length=4, n=3, temperature=1.0, seed=5)
    completions = place.worker.generate(PROMPTS, params, max_batch=2)
    assert [(c.prompt_index, c.sample_index) for c in completions] == [(p, s) for p in range(3) for s in range(3)]
    assert completions == place.worker.generate(PROMPTS, params, max_batch=2)
    assert len({c.token_ids for c in completions}) > 3
    assert {c.status for c in completions} == {"length"}
    assert place.worker.generate([], params) == []


@pytest.mark.parametrize("length", [1, 4, 55])
def test_the_response_length_is_of_the_call(place, length):
    completions = place.worker.generate(PROMPTS, SamplingParams(response_length=length))
    assert [list(c.token_ids) for c in completions] == [argmax_loop(place.trainer, prompt, length) for prompt in PROMPTS]
    with pytest.raises(WorkerError, match="prompt 2 has 9 tokens and with response_length 56 passes the model's 64 positions"):
        place.worker.generate(PROMPTS, SamplingParams(response_length=56))
    assert_in_step(place.worker, place.trainer)


@pytest.mark.parametrize("where", ["generation_config.json", "config.json", "config.json, and the other has none"])
def test_every_eos_of_the_folder_ends_a_response(folders, originals, tmp_path, where):
    trainer = originals["qwen2 tied"]
    free = expected_greedy(trainer)
    eos = [free[0][2], free[1][3], free[2][4]]
    folder = tmp_path / "model"
    shutil.copytree(folders["qwen2 tied"], folder)
    settings, generation = folder / "config.json", folder / "generation_config.json"
    generation.unlink()
    if where == "generation_config.json":
        generation.write_text(json.dumps({"eos_token_id": eos}))
    else:
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": eos}))
    if "other" in where:
        generation.write_text("{}")
    with HFWorker(folder, process=False) as worker:
        completions = worker.generate(PROMPTS, GREEDY)
        assert [list(c.token_ids) for c in completions] == [argmax_loop(trainer, prompt, STEPS, eos) for prompt in PROMPTS]
        assert {c.status for c in completions} == {"stop"}
        ignoring = worker.generate(PROMPTS, SamplingParams(response_length=STEPS, ignore_eos=True))
        assert [list(c.token_ids) for c in ignoring] == free


@pytest.mark.parametrize("pad", [None, -1, 61, 3])
def test_any_pad_id_of_a_config_will_do(folders, originals, tmp_path, pad):
    """Masks say what is padding; there are configs with -1, or an id beyond the vocabulary."""
    folder = tmp_path / "model"
    shutil.copytree(folders["llama bf16"], folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "pad_token_id": None}))
    with HFWorker(folder, process=False) as worker:
        worker._link.host.engine.model.config.pad_token_id = pad
        assert [len(c.token_ids) for c in worker.generate(PROMPTS, GREEDY)] == [STEPS] * 3


BAD_REQUESTS = {
    "str": (([[1, "x"]], GREEDY), "prompt 0 position 1 is 'x', no token id"),
    "bool": (([[True]], GREEDY), "prompt 0 position 0 is True, no token id"),
    "float": (([[1], [2.0]], GREEDY), "prompt 1 position 0 is 2.0, no token id"),
    "negative": (([[-1]], GREEDY), "prompt 0 position 0 is -1, no token id"),
    "wide": (([[1 << 70]], GREEDY), "prompt 0 position 0 is .*, no token id"),
    "tensor": (([torch.tensor([1])], GREEDY), "prompt 0 position 0 is tensor.*, no token id: pass plain ints"),
    "vocabulary": (([[61]], GREEDY), "prompt 0 position 0 is 61, not one of the model's 61 ids"),
    "empty": (([[]], GREEDY), "prompt 0 is empty"),
    "params": (([[1]], {"response_length": 3}), "params is a dict: pass SamplingParams"),
    "stop id": (([[1]], SamplingParams(response_length=3, stop_token_ids=(61,))), "stop_token_ids 61 is outside"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused_in_words_and_harms_nothing(place, case):
    arguments, message = BAD_REQUESTS[case]
    with pytest.raises(WorkerError, match=message):
        place.worker.generate(*arguments)
    assert_in_step(place.worker, place.trainer)


@pytest.mark.parametrize("max_batch", [0, -1, 1.5, "many", True, 1 << 70])
def test_a_bad_max_batch_is_refused(place, max_batch):
    with pytest.raises(WorkerError, match="max_batch is"):
        place.worker.generate(PROMPTS, GREEDY, max_batch=max_batch)
    assert_in_step(place.worker, place.trainer)


@pytest.mark.parametrize("name", ["no.such", "", "\ud800", 7])
def test_a_name_that_the_worker_lacks_is_refused(place, name):
    with pytest.raises(WorkerError, match="no tensor|no name|cannot be sent"):
        place.worker.read_tensor(name)
    assert_in_step(place.worker, place.trainer)


# Refusals before anything moves


def with_tensor(weights, name, tensor):
    return {**weights, name: tensor}


REFUSED = {
    "unknown name": (
        lambda w: with_tensor(w, "model.extra", torch.zeros(3)),
        PlanMismatchError,
        "'model.extra' .*has none of that name",
    ),
    "odd name": (lambda w: with_tensor(w, "\ud800", torch.zeros(3)), PlanMismatchError, "has none of that name"),
    "missing": (
        lambda w: {n: t for n, t in w.items() if n != "model.norm.weight"},
        PlanMismatchError,
        "'model.norm.weight' is not in the update; send every parameter",
    ),
    "both tied names missing": (
        lambda w: {n: t for n, t in w.items() if n not in (EMBEDDING, HEAD)},
        PlanMismatchError,
        f"'{EMBEDDING}' is not in the update",
    ),
    "nothing": (lambda w: {}, PlanMismatchError, "is not in the update"),
    "dtype": (
        lambda w: with_tensor(w, "model.norm.weight", w["model.norm.weight"].double()),
        PlanMismatchError,
        r"'model.norm.weight' is f64\[16\] in the update and f32\[16\] in the model",
    ),
    "dtype of the same width": (
        lambda w: with_tensor(w, "model.norm.weight", w["model.norm.weight"].view(torch.int32)),
        PlanMismatchError,
        r"is i32\[16\] in the update and f32\[16\] in the model",
    ),
    "shape": (
        lambda w: with_tensor(w, "model.norm.weight", w["model.norm.weight"].view(4, 4)),
        PlanMismatchError,
        r"is f32\[4, 4\] in the update and f32\[16\] in the model",
    ),
    "duplicate": (lambda w: [*w.items(), (HEAD, w[HEAD])], DuplicateNameError, f"'{HEAD}' stands at places"),
    "iterator": (lambda w: iter(w.items()), WorkerError, "an iterator, which can be read once only"),
    "generator": (lambda w: ((n, t) for n, t in w.items()), WorkerError, "an iterator"),
    "no tensors": (lambda w: dict.fromkeys(w, "x"), ValueError, "is a str, not a torch.Tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_update_that_is_not_the_workers_is_refused_before_anything_moves(place, case):
    make, kind, message = REFUSED[case]
    moved = []
    with pytest.raises(kind, match=message):
        place.worker.sync_weights(make(place.changed(3, buffers=False).state_dict()), inject=moved.append)
    assert not moved
    assert_as_before(place)


@pytest.mark.parametrize("options", [{"capacity": 0}, {"capacity": 3}, {"capacity": 64, "oversize": "error"}])
def test_a_capacity_that_cannot_be_is_refused_before_anything_moves(place, options):
    with pytest.raises(CapacityError):
        place.worker.sync_weights(place.changed(3), **options)
    assert_as_before(place)


# Faults on the way


def flipped(bucket):
    bucket.buffer[bucket.nbytes // 2] ^= 1
    return bucket


def shortened(bucket):
    return replace(bucket, buffer=bucket.buffer[:-1])


def lengthened(bucket):
    return replace(bucket, buffer=torch.cat([bucket.buffer, torch.zeros(1, dtype=torch.uint8)]))


def much_too_long(bucket):
    return replace(bucket, buffer=torch.zeros(1 << 20, dtype=torch.uint8))


def elsewhere_and_flipped(bucket):
    return flipped(replace(bucket, buffer=bucket.buffer.clone()))


def without_digest(bucket):
    return replace(bucket, digest=None)


def renumbered(bucket):
    return replace(bucket, index=bucket.index + 1)


def of_another_plan(bucket):
    return replace(bucket, plan_digest=bytes(16))


DAMAGE = {
    flipped: (IntegrityError, "is damaged"),
    shortened: (IntegrityError, "its layout is"),
    lengthened: ((IntegrityError, TransferError), "its layout is|is larger than a slot"),
    much_too_long: ((IntegrityError, TransferError), "its layout is|is larger than a slot"),
    elsewhere_and_flipped: (IntegrityError, "is damaged"),
    without_digest: (IntegrityError, "carries no digest"),
    renumbered: (TransferError, "was given in the place of bucket"),
    of_another_plan: (PlanMismatchError, "is of plan 0{32}"),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda function: function.__name__)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_damaged_bucket_is_refused(place, damage, where):
    kind, message = DAMAGE[damage]
    trainer = place.changed(3)
    at = {"first": 0, "middle": 2, "last": LAST}[where]
    seen = []

    def inject(bucket):
        seen.append(bucket.index)
        return damage(bucket) if bucket.index == at else bucket

    with within(15), pytest.raises(kind, match=message):
        place.worker.sync_weights(trainer, capacity=CAPACITY, inject=inject)
    assert at in seen
    if where == "first":
        assert_as_before(place)
    else:
        assert_unusable(place.worker, place.before)
    report = place.worker.sync_weights(trainer, capacity=CAPACITY, inject=lambda bucket: seen.append(bucket.index) or bucket)
    assert report.version == place.before + 1
    assert seen[-1] == LAST, "the number of buckets that this test counts on"
    assert_has(place.worker, trainer)
    assert_in_step(place.worker, trainer)


@pytest.mark.parametrize("at", [0, 2])
def test_a_bucket_of_an_older_update_is_a_replay(place, at):
    recorded = []

    def record(bucket):
        recorded.append(replace(bucket, buffer=bucket.buffer.clone()))
        return bucket

    trainer = place.changed(3)
    version = place.worker.sync_weights(place.changed(4), capacity=CAPACITY, inject=record).version
    place.worker.sync_weights(trainer, capacity=CAPACITY)
    with within(15), pytest.raises(IntegrityError, match=f"bucket {at} of version {version + 2} is damaged"):
        place.worker.sync_weights(trainer, capacity=CAPACITY, inject=lambda b: recorded[at] if b.index == at else b)
    if at:
        assert_unusable(place.worker, version + 1)
    else:
        assert_in_step(place.worker, trainer)


def test_a_bucket_fed_twice_is_refused(place):
    held = []

    def twice(bucket):
        held.append(replace(bucket, buffer=bucket.buffer.clone()))
        return held[1] if bucket.index == 2 else bucket

    with within(15), pytest.raises(TransferError, match="bucket 1 was given in the place of bucket 2"):
        place.worker.sync_weights(place.changed(3), capacity=CAPACITY, inject=twice)
    assert_unusable(place.worker, place.before)


def test_a_bucket_may_lie_in_other_memory(place):
    """Every bucket moved elsewhere, in an update of more buckets than there are slots."""
    trainer = place.changed(3)

    def move(bucket):
        moved = replace(bucket, buffer=bucket.buffer.clone())
        bucket.buffer.zero_()
        return moved

    with within(15):
        place.worker.sync_weights(trainer, capacity=1000, inject=move)
    assert_has(place.worker, trainer)


class Failing(Mapping):
    """Weights of which one fails when it is read for the second time: after the plan, on its way."""

    def __init__(self, weights, name, error):
        self.weights, self.name, self.error, self.reads = weights, name, error, 0

    def __getitem__(self, name):
        self.reads += name == self.name
        if self.reads > 1 and name == self.name:
            raise self.error
        return self.weights[name]

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


ERRORS = [OSError("the disk is gone"), TransferError("not ours"), KeyboardInterrupt(), SystemExit(3)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_a_source_raises_comes_out_unchanged(place, error):
    source = Failing(place.changed(3).state_dict(), "model.norm.weight", error)
    with within(15), pytest.raises(type(error)) as raised:
        place.worker.sync_weights(source, capacity=2000)
    assert raised.value is error
    assert source.reads == 2
    assert_unusable(place.worker, place.before)
    trainer = place.changed(4)
    assert place.worker.sync_weights(trainer).version == place.before + 1
    assert_has(place.worker, trainer)
    assert_in_step(place.worker, trainer)


def test_a_source_that_fails_at_once_leaves_the_old_weights(place):
    with pytest.raises(OSError, match="at once"):
        place.worker.sync_weights(Failing(place.changed(3).state_dict(), EMBEDDING, OSError("at once")))
    assert_as_before(place)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), TransferError("planted")], ids=lambda error: type(error).__name__)
def test_interrupted_at_the_very_end_an_update_has_failed_on_both_sides(place, monkeypatch, when, error):
    """Whether or not the worker has counted on already, it takes the next update under the number that the trainer gives it."""
    send = place.worker._send

    def interrupted(*arguments):
        if when == "after":
            send(*arguments)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(place.worker, "_send", interrupted)
        with pytest.raises(type(error)):
            place.worker.sync_weights(place.changed(3))
    if when == "before":
        assert_as_before(place)
    else:
        assert_unusable(place.worker, place.before)
    trainer = place.changed(4)
    assert place.worker.sync_weights(trainer).version == place.before + 1
    assert_in_step(place.worker, trainer)


def test_interrupted_after_the_very_end_too(folders, originals):
    """Once both sides have counted on, and before the caller hears of it."""

    class Interrupted(HFWorker):
        armed = False

        @property
        def _version(self):
            return self.counted

        @_version.setter
        def _version(self, value):
            self.counted = value
            if self.armed:
                self.armed = False
                raise KeyboardInterrupt

    with Interrupted(str(folders["qwen2 tied"]), process=False) as worker:
        worker.armed = True
        with pytest.raises(KeyboardInterrupt):
            worker.sync_weights(originals["qwen2 tied"])
        assert_unusable(worker, 0)
        assert worker.sync_weights(originals["qwen2 tied"]).version == 2  # 1 was committed, and may have been sampled from
        assert_in_step(worker, originals["qwen2 tied"])


def test_what_half_an_update_changed_has_to_be_sent_again(place):
    """A state dict leaves out the buffers that are not persistent: it does not repair them."""
    trainer = place.changed(3)
    inv_freq_first = {INV_FREQ: trainer.model.rotary_emb.inv_freq, **tensors_of(trainer)}

    def fail(bucket):
        if bucket.index == 3:  # with two slots, two buckets have been loaded by then
            raise ArithmeticError
        return bucket

    with pytest.raises(ArithmeticError):
        place.worker.sync_weights(inv_freq_first, capacity=1000, inject=fail)
    for _ in range(2):
        with pytest.raises(PlanMismatchError, match=f"not completed changed the model's tensor '{INV_FREQ}', and .*send it too"):
            place.worker.sync_weights(trainer.state_dict())
        assert_unusable(place.worker, place.before)
    place.worker.sync_weights(trainer)
    assert_in_step(place.worker, trainer)
    place.worker.sync_weights(trainer.state_dict())


def test_untied_bytes_for_a_tied_worker_are_found_by_name(place):
    weights = place.changed(3).state_dict()
    weights[HEAD] = weights[HEAD].clone()
    place.worker.sync_weights(weights)  # untied and equal is as good as tied
    weights[HEAD][5, 7] += 1
    with pytest.raises(PlanMismatchError, match=f"'{EMBEDDING}' and '{HEAD}' are one tensor in the model, .*different values"):
        place.worker.sync_weights(weights)
    assert_unusable(place.worker, place.before + 1)


def test_many_faults_in_a_row(place):
    """Nothing adds up: not slots, not answers, not numbers."""
    trainer = place.changed(3)

    def boom(bucket):
        if bucket.index == 3:
            raise ArithmeticError
        return bucket

    def late_flip(bucket):
        return flipped(bucket) if bucket.index == 2 else bucket

    for _ in range(4):
        for inject, kind in ((boom, ArithmeticError), (late_flip, IntegrityError)):
            with within(15), pytest.raises(kind):
                place.worker.sync_weights(trainer, capacity=2000, inject=inject)
    assert_unusable(place.worker, place.before)
    place.worker.sync_weights(trainer, capacity=2000)
    assert_in_step(place.worker, trainer)


# Interrupts, threads and signals, with a process of its own


@pytest.fixture
def alarm():
    """Raise KeyboardInterrupt in this thread, as Ctrl-C does, after some seconds; ``also`` is called first."""
    calls = []

    def interrupt(number, frame):
        for call in calls:
            call()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)

    def ring(seconds, also=None):
        calls[:] = [also] if also else []
        signal.setitimer(signal.ITIMER_REAL, seconds)

    yield ring
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


only_process = pytest.mark.parametrize("process", [True], ids=["process"])

REQUESTS = {
    "generate": lambda worker: worker.generate(PROMPTS, SamplingParams(response_length=3)),
    "digests": lambda worker: worker.weights_digest(),
    "read": lambda worker: worker.read_tensor("model.norm.weight"),
}


@only_process
@pytest.mark.parametrize("request_", REQUESTS)
def test_the_answer_to_an_interrupted_request_is_not_taken_for_the_next(place, alarm, request_):
    pid = pid_of(place.worker)
    stop(pid)
    try:
        for _ in range(2):
            alarm(0.05)
            with pytest.raises(KeyboardInterrupt):
                REQUESTS[request_](place.worker)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert_in_step(place.worker, place.trainer)


@only_process
@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_update_interrupted_while_it_waits(place, alarm, at):
    pid = pid_of(place.worker)

    def inject(bucket):
        if bucket.index == at:
            stop(pid)
            alarm(0.1, also=lambda: os.kill(pid, signal.SIGCONT))
        return bucket

    with within(15), pytest.raises(KeyboardInterrupt):
        place.worker.sync_weights(place.changed(3), capacity=1000, inject=inject)
    if at == 3 or is_unusable(place.worker):  # before, nothing may have been loaded
        assert_unusable(place.worker, place.before)
    else:
        assert_as_before(place)
    trainer = place.changed(4)
    place.worker.sync_weights(trainer, capacity=1000)
    assert_has(place.worker, trainer)
    assert_in_step(place.worker, trainer)


@only_process
def test_a_refusal_that_comes_late_is_the_error_of_the_update(place):
    """The answer to the last bucket arrives when the digests are waited for already."""
    pid = pid_of(place.worker)

    def inject(bucket):
        if bucket.index == LAST:
            stop(pid)
            threading.Timer(0.1, os.kill, (pid, signal.SIGCONT)).start()
            return flipped(bucket)
        return bucket

    with pytest.raises(IntegrityError, match=f"bucket {LAST} .* is damaged"):
        place.worker.sync_weights(place.changed(3), capacity=CAPACITY, inject=inject)
    assert_unusable(place.worker, place.before)


def test_a_source_may_ask_the_worker_while_it_is_read(place, process):
    """It belongs to the same thread, and every slot is in use by then."""

    class Asking(Failing):
        def __getitem__(self, name):
            place.worker.read_tensor(name)
            return self.weights[name]

    def slow_down(bucket):
        if process and bucket.index in (2, 4, 6):  # still loading when the source asks
            stop(pid_of(place.worker))
            threading.Timer(0.05, os.kill, (pid_of(place.worker), signal.SIGCONT)).start()
        return bucket

    trainer = place.changed(3)
    with within(15):
        place.worker.sync_weights(Asking(tensors_of(trainer), "", None), capacity=1000, inject=slow_down)
    assert_in_step(place.worker, trainer)


@only_process
def test_ctrl_c_in_the_terminal_does_not_end_the_worker(place):
    os.kill(pid_of(place.worker), signal.SIGINT)
    assert_in_step(place.worker, place.trainer)


def test_threads_take_turns(place):
    expected, digest = greedy(place.worker), place.worker.weights_digest()
    norm = bytes_of(place.trainer.model.norm.weight)
    wrong = []

    def use(number):
        for _ in range(6):
            if number == 0 and greedy(place.worker) != expected:
                wrong.append("tokens")
            if number == 1 and place.worker.weights_digest() != digest:
                wrong.append("digest")
            if number == 2 and bytes_of(place.worker.read_tensor("model.norm.weight")) != norm:
                wrong.append("tensor")
            if number == 3:
                place.worker.sync_weights(place.trainer, capacity=1000)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert place.worker.version == place.before + 6


# A process that ends, or does not answer

DEAD = r"the worker process \(pid \d+, ended with exit code -9 \(SIGKILL\)\): the other process closed"


def assert_dead(worker, pid, message):
    """Every later call says at once what happened."""
    assert not is_there(pid)
    for call in (*REQUESTS.values(), lambda w: w.sync_weights(Failing({}, "", None))):
        with within(5), pytest.raises(TransferError, match=f"{message}.*; close this worker and make another"):
            call(worker)
    with within(5):
        worker.close()
        worker.close()
    with pytest.raises(WorkerError, match="the worker is closed"):
        worker.weights_digest()


def killed(pid):
    os.kill(pid, signal.SIGKILL)
    while is_there(pid):  # the worker waits for it
        time.sleep(0.01)


@pytest.fixture
def fresh(folders, nothing_left):
    """A worker with a process of its own, that a test may kill."""
    made = []

    def make(kind="qwen2 tied", **options):
        made.append(start(folders, kind, True, **options))
        return made[-1], pid_of(made[-1])

    yield make
    for worker in made:
        worker.close()
        del worker
    made.clear()


@pytest.mark.parametrize(
    "step", ["before begin", "middle", "last bucket", "generate", "digests", "stopped and killed", "source fails too"]
)
def test_a_killed_worker_is_reported_and_not_waited_for(fresh, originals, step):
    worker, pid = fresh()
    trainer = originals["qwen2 tied"]
    version = 0
    if step == "before begin":
        killed(pid)
        with within(15), pytest.raises(TransferError, match=DEAD):
            worker.sync_weights(trainer)
    elif step in ("middle", "last bucket"):
        version = worker.sync_weights(trainer, capacity=CAPACITY).version

        def kill(bucket):
            if bucket.index == {"middle": 2, "last bucket": LAST}[step]:
                killed(pid)
            return bucket

        with within(15), pytest.raises(TransferError, match=DEAD):
            worker.sync_weights(trainer, capacity=CAPACITY, inject=kill)
    elif step == "source fails too":
        planted = OSError("the source's own")

        def kill_and_fail(bucket):
            killed(pid)
            raise planted

        with within(15), pytest.raises(OSError, match="the source's own") as raised:
            worker.sync_weights(trainer, inject=kill_and_fail)
        assert raised.value is planted
        del raised
        planted.__traceback__ = None
    elif step == "stopped and killed":  # while this side waits for a slot

        def halt(bucket):
            if bucket.index == 1:
                stop(pid)
                threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
            return bucket

        with within(15), pytest.raises(TransferError, match=DEAD):
            worker.sync_weights(trainer, capacity=1000, inject=halt)
    else:
        stop(pid)  # so that the request is under way for as long as it takes
        threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
        with within(15), pytest.raises(TransferError, match=DEAD):
            REQUESTS[step](worker)
    assert worker.version == version
    assert_dead(worker, pid, DEAD)


def test_a_worker_that_does_not_answer_is_killed(fresh):
    worker, pid = fresh(timeout=0.5)
    stop(pid)
    message = r"the worker process \(pid \d+, killed for it\): no answer from the other process within 0.5 s"
    with within(15), pytest.raises(TransferError, match=message):
        worker.generate(PROMPTS, GREEDY)
    assert_dead(worker, pid, message)


def test_a_worker_that_takes_nothing_in_is_killed(fresh):
    worker, pid = fresh(timeout=0.5)
    stop(pid)
    with within(15), pytest.raises(TransferError, match="took no message in within 0.5 s"):
        worker.generate([[1] * 1000] * 1000, GREEDY)
    assert_dead(worker, pid, "took no message in")


def test_closing_does_not_wait_for_a_stopped_process_nor_for_another_thread(fresh):
    worker, pid = fresh(timeout=0.5)
    stop(pid)
    with within(15):
        worker.close()
    assert not is_there(pid)

    worker, pid = fresh()
    stop(pid)
    errors = []

    def wait():
        try:
            worker.generate(PROMPTS, GREEDY)
        except TransferError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    with within(15):
        worker.close()
        thread.join()
    assert len(errors) == 1
    assert "exit code -9 (SIGKILL)" in errors[0]
    assert not is_there(pid)


def test_a_closed_worker_leaves_nothing(fresh, originals):
    with fresh()[0] as worker:
        pid = pid_of(worker)
        worker.sync_weights(originals["qwen2 tied"])
        code = worker._link.host.process
    assert not is_there(pid)
    assert code.returncode == 0, "it ended by itself, and in order"
    for call in REQUESTS.values():
        with pytest.raises(WorkerError, match="the worker is closed"):
            call(worker)


SCRIPT = """
import os, signal, sys, threading, time
from rollout_core.workers import HFWorker, SamplingParams

made = []
thread = threading.Thread(target=lambda: made.append(HFWorker(sys.argv[1], threads=1)))
thread.start()
thread.join()
worker = made[0]
time.sleep(1)  # the thread that started it is gone, and the worker is not
tokens = worker.generate([[1, 2]], SamplingParams(response_length=2))[0].token_ids
pid = worker._link.host.process.pid
if sys.argv[2] == "fork":
    holder = os.fork()
    if holder == 0:  # holds the socket open
        time.sleep(30)
        os._exit(0)
    print(pid, holder, *tokens, flush=True)
    os.kill(pid, signal.SIGSTOP)  # reads nothing from now on, as if it were busy
    os.kill(os.getpid(), signal.SIGKILL)
print(pid, 0, *tokens, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("way", ["exit", "fork"])
def test_a_worker_does_not_outlive_its_trainer(folders, originals, tmp_path, way):
    """From a script without a __main__ guard, started in a thread, and the script ended without a word, or killed."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    output = tmp_path / "output"
    with output.open("w") as file:  # a pipe would stay open for as long as a process of the script's is there
        done = subprocess.run([sys.executable, script, folders["qwen2 tied"], way], stdout=file, stderr=file, timeout=60)
    assert done.returncode == (0 if way == "exit" else -signal.SIGKILL), output.read_text()
    pid, holder, *tokens = map(int, output.read_text().splitlines()[-1].split())
    try:
        if way == "fork":
            os.kill(pid, signal.SIGCONT)
        assert tokens == argmax_loop(originals["qwen2 tied"], [1, 2], 2)
        end = time.monotonic() + 5
        while is_there(pid) and state_of(pid) != "Z" and time.monotonic() < end:
            time.sleep(0.05)
        assert not is_there(pid) or state_of(pid) == "Z"  # whoever inherits it may not wait for it
    finally:
        if holder:
            os.kill(holder, signal.SIGKILL)


# Starting


def broken_folders(tmp_path, folders):
    empty = tmp_path / "empty"
    empty.mkdir()
    yield "empty", empty
    yield "missing", tmp_path / "missing"
    yield "a file", folders["qwen2 tied"] / "config.json"
    for name, text in (("config", "{"), ("type", '{"model_type": "wat"}'), ("code", '{"auto_map": {"AutoConfig": "c.C"}}')):
        folder = tmp_path / name
        shutil.copytree(folders["qwen2 tied"], folder)
        (folder / "config.json").write_text(text)
        yield name, folder
    folder = tmp_path / "weights"
    shutil.copytree(folders["qwen2 tied"], folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 40)
    yield "weights", folder


def test_a_folder_without_a_model_is_named(tmp_path, folders, nothing_left, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("something was looked for on the network"))
    for name, folder in broken_folders(tmp_path, folders):
        with within(15), pytest.raises(WorkerError) as raised:
            HFWorker(folder, process=False)
        assert str(folder) in str(raised.value), name
        if name in ("missing", "a file"):
            assert "is no folder" in str(raised.value), "not for transformers to look up in its cache"


def test_a_process_that_cannot_load_its_model_says_why_and_is_gone(tmp_path, nothing_left):
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/not \xff utf-8"))
    folder.mkdir()
    (folder / "config.json").write_text("{")
    with pytest.raises(WorkerError, match=r"the model in .*/not \\udcff utf-8 could not be loaded") as raised:
        HFWorker(folder, threads=1)
    assert "in the other process:\nTraceback" in "".join(raised.value.__notes__)
    del raised


@pytest.mark.parametrize("dtype", ["float99", "int32", "bool", "nn", "", "torch.float32", torch.float32, None])
def test_a_bad_dtype_is_refused(folders, process, dtype):
    with within(5), pytest.raises(WorkerError, match="floating-point torch dtype, for example 'float32'"):
        HFWorker(str(folders["qwen2 tied"]), dtype=dtype, process=process)


PROGRAMS = {
    "exits": ("import sys; sys.exit(7)", r"ended with exit code 7\): the other process closed"),
    "killed": ("import os; os.kill(os.getpid(), 11)", r"ended with exit code -11 \(SIGSEGV\)\): the other process closed"),
    "silent": ("import time; time.sleep(30)", r"killed for it\): no answer from the other process within 0.5 s"),
    "babbles": (
        "import os, sys; fd = int([a for a in sys.argv if 'channel' in a][0].split('=')[1]); os.write(fd, b'Hello, world')",
        "sent what is no message: it begins with b'Hello, w'",
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_process_that_does_not_start_is_reported(monkeypatch, nothing_left, program):
    text, message = PROGRAMS[program]
    monkeypatch.setattr(hosts, "_PROGRAM", text)
    with within(15), pytest.raises(TransferError, match=message) as raised:
        HFWorker("anywhere", start_timeout=0.5 if program == "silent" else 20)
    del raised


def test_a_program_that_is_not_there_leaves_nothing(monkeypatch, nothing_left):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        HFWorker("anywhere")
