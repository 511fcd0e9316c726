"""vLLM's door in a real vLLM engine on the CPU: its official calls, its model, its factory. The reference is transformers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.errors import IncompleteStreamError, TransferError
from rollout_core.transfer import send, send_stream
from rollout_core.transfer.carriers.memory import MemorySender

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own, and those of what it imports

PROMPTS = [list(range(10, 22)), [5, 9, 300, 411, 7], list(range(100, 130))]
LENGTH = 8
CAPACITY = 200_000  # bytes: several buckets, and the embeddings split
TIMEOUT = 20.0
PLACE = "rollout_core.transfer.doors.vllm"


def reference_model(seed):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=128,  # 4 heads of 32: vLLM's CPU attention takes no smaller ones
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).float().eval()


def greedy(model):
    out = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            full = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH)
        out.append(full[0, len(prompt) :].tolist())
    return out


@pytest.fixture(scope="module")
def models():
    """Weights by seed, each with its greedy tokens; all of them differ."""
    found = {seed: reference_model(seed) for seed in range(3)}
    tokens = {seed: greedy(model) for seed, model in found.items()}
    assert tokens[0] != tokens[1] != tokens[2] != tokens[0]
    return {seed: (dict(model.state_dict()), tokens[seed]) for seed, model in found.items()}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    folder = tmp_path_factory.mktemp("model")
    reference_model(0).save_pretrained(folder)
    return LLM(
        model=str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=32 << 20,
        skip_tokenizer_init=True,
        worker_extension_cls=f"{PLACE}.WorkerExtension",
        weight_transfer_config=WeightTransferConfig(backend="rollout_core"),
    )


def generated(llm):
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=LENGTH, min_tokens=LENGTH, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def versions(llm):
    return llm.collective_rpc("rollout_core_version")


class Trainer:
    """The other side, in a thread: vLLM's calls wait for it."""

    def __init__(self, llm, carrier):
        self.llm, self.carrier = llm, carrier
        self.pool = ThreadPoolExecutor(1)

    def send(self, source, version):
        return send(plan_buckets(specs_of(source), CAPACITY), source, self.carrier, version=version, timeout=TIMEOUT)

    def send_as_a_stream(self, source, version):
        return send_stream(iter(source.items()), self.carrier, capacity=CAPACITY, version=version, timeout=TIMEOUT)

    def send_half(self, source, version):
        plan = plan_buckets(specs_of(source), CAPACITY)
        return send(plan, broken_off(source, len(source) - 3), self.carrier, version=version, timeout=TIMEOUT)

    def sync(self, source, version, *, update_info=None, using=None):
        """One update by vLLM's official calls. The first error of either side is raised, vLLM's before the trainer's."""
        self.llm.start_weight_update()
        self.sending = self.pool.submit(using or self.send, source, version)
        try:
            self.llm.update_weights({"update_info": update_info or {}})
        finally:
            self.failure = self.sending.exception()
        self.llm.finish_weight_update(weight_version=f"v{version}")
        return self.sending.result()


@contextmanager
def connected(llm, address, **init_info):
    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(MemorySender.listen, address, timeout=TIMEOUT)
        llm.init_weight_transfer_engine({"init_info": {"address": address, "timeout": TIMEOUT, **init_info}})
        with listening.result() as carrier:
            trainer = Trainer(llm, carrier)
            try:
                yield trainer
            finally:
                trainer.pool.shutdown()
                llm.collective_rpc("shutdown_weight_transfer_engine")


_NUMBERS = iter(range(1, 1000))


@pytest.fixture
def address():
    return f"doors-{os.getpid()}-{next(_NUMBERS)}"


@pytest.fixture
def next_version(llm):
    """A version above whatever earlier tests have left; reads it of the engine's target, usable or not."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.weight_transfer_engine.target.version + 1


def test_the_factory_knows_it(llm):
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert type(worker.weight_transfer_engine) is WeightTransferEngineFactory._registry["rollout_core"]()
    assert type(worker.weight_transfer_engine).__module__ == PLACE


@pytest.mark.parametrize("staged", [False, True])
def test_greedy_tokens_are_the_reference_s_after_each_of_several_updates(llm, models, address, next_version, staged):
    with connected(llm, address, staged=staged) as trainer:
        for number, seed in enumerate([1, 2, 0]):
            source, tokens = models[seed]
            report = trainer.sync(source, next_version + number, update_info={"version": next_version + number})
            assert report.buckets > 3
            assert generated(llm) == tokens
            assert versions(llm) == [next_version + number]
            assert llm.get_weight_version() == f"v{next_version + number}"


def test_a_stream_does_as_well(llm, models, address, next_version):
    source, tokens = models[1]
    with connected(llm, address) as trainer:
        trainer.sync(source, next_version, using=trainer.send_as_a_stream)
        assert generated(llm) == tokens


def broken_off(source, at):
    """The source, which fails before its tensor number ``at``."""
    for number, pair in enumerate(source.items()):
        if number == at:
            raise ZeroDivisionError("the trainer's own error")
        yield pair


def test_staged_an_update_that_fails_leaves_the_old_weights(llm, models, address, next_version):
    with connected(llm, address, staged=True) as trainer:
        trainer.sync(models[1][0], next_version)
        with pytest.raises(TransferError, match="the trainer's own error") as caught:
            trainer.sync(models[2][0], next_version + 1, using=trainer.send_half)
        assert "unusable" not in str(caught.value)
        assert type(trainer.failure) is ZeroDivisionError
        with pytest.raises(RuntimeError, match="without a matching start_weight_update"):
            llm.finish_weight_update(weight_version="never")
        assert llm.get_weight_version() == f"v{next_version}"
        assert versions(llm) == [next_version]
        assert generated(llm) == models[1][1]
        trainer.sync(models[2][0], next_version + 1)
        assert generated(llm) == models[2][1]


def test_direct_an_update_that_fails_says_that_the_weights_are_unusable(llm, models, address, next_version):
    with connected(llm, address) as trainer:
        trainer.sync(models[1][0], next_version)
        with pytest.raises(TransferError, match="the trainer's own error.*the weights are unusable: .* was not completed"):
            trainer.sync(models[2][0], next_version + 1, using=trainer.send_half)
        with pytest.raises(RuntimeError, match="without a matching start_weight_update"):
            llm.finish_weight_update(weight_version="never")
        assert llm.get_weight_version() == f"v{next_version}"
        with pytest.raises(TransferError, match="unusable"):
            versions(llm)
        trainer.sync(models[2][0], next_version + 1)  # and a whole one mends it
        assert generated(llm) == models[2][1]
        assert versions(llm) == [next_version + 1]


def test_a_flipped_bit_never_reaches_a_staged_model(llm, models, address, next_version):
    with connected(llm, address, staged=True) as trainer:
        trainer.sync(models[1][0], next_version)
        slots, lay_out, push = [], trainer.carrier.lay_out, trainer.carrier.push

        def noting(*args):
            made = lay_out(*args)
            slots[:] = made[0]
            return made

        def damaging(slot, nbytes):
            slots[slot][nbytes // 2] ^= 16
            return push(slot, nbytes)

        trainer.carrier.lay_out, trainer.carrier.push = noting, damaging
        with pytest.raises(Exception, match="bucket 0 of version .* is damaged"):
            trainer.sync(models[2][0], next_version + 1)
        assert "is damaged" in str(trainer.failure)
        assert generated(llm) == models[1][1]
        assert versions(llm) == [next_version]


def test_another_version_than_the_call_s_is_refused(llm, models, address, next_version):
    with connected(llm, address) as trainer:
        trainer.sync(models[1][0], next_version)
        with pytest.raises(TransferError, match=f"was called for version {next_version + 2}, and the sender sends version"):
            trainer.sync(models[2][0], next_version + 1, update_info={"version": next_version + 2})
        assert versions(llm) == [next_version]
        assert generated(llm) == models[1][1]


@pytest.mark.parametrize("staged", [False, True])
def test_a_parameter_that_is_not_sent_is_missed(llm, models, address, next_version, staged):
    """vLLM leaves it as it was, and only logs it."""
    source, tokens = models[2]
    without = {name: tensor for name, tensor in source.items() if name != "model.layers.1.mlp.down_proj.weight"}
    with connected(llm, address, staged=staged) as trainer:
        trainer.sync(models[1][0], next_version)
        with pytest.raises(TransferError, match="nothing for 1 parameters of the model, such as 'model.layers.1.mlp.down"):
            trainer.sync(without, next_version + 1)
        assert "such as" in str(trainer.failure)
        with pytest.raises(TransferError, match="unusable"):
            versions(llm)
        trainer.sync(source, next_version + 1)
        assert generated(llm) == tokens


@pytest.mark.parametrize("partial", [False, True])
def test_a_part_of_a_fused_layer_that_is_not_sent_is_missed(llm, models, address, next_version, partial):
    """vLLM goes on with memory that was never written, whether parts are allowed or not."""
    without = {name: tensor for name, tensor in models[2][0].items() if name != "model.layers.0.self_attn.k_proj.weight"}
    with connected(llm, address, partial=partial) as trainer:
        trainer.sync(models[1][0], next_version)
        with pytest.raises(TransferError, match="a part only of 1 layers, such as 'model.layers.0.self_attn.qkv_proj'"):
            trainer.sync(without, next_version + 1)
        with pytest.raises(TransferError, match="unusable"):
            versions(llm)
        trainer.sync(models[2][0], next_version + 1)
        assert generated(llm) == models[2][1]


EVERY = {(number, shard) for number in range(2) for shard in ("w1", "w2", "w3")}


@pytest.mark.parametrize(
    ("came", "lacks"),
    [
        pytest.param(EVERY, False, id="all"),
        pytest.param(EVERY - {(1, "w3")}, True, id="one-matrix"),
        pytest.param({one for one in EVERY if one[0]}, True, id="one-expert"),
        pytest.param({one for one in EVERY if one[1] != "w1"}, True, id="every-gate"),
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_an_expert_that_is_not_sent_is_missed(came, lacks, partial):
    """Also by 0.26, which counts what pads them, so that they are never complete by the count."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    from rollout_core.transfer.doors.vllm import _Model

    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    for name, shape in (("w13_weight", (2, 8, 4)), ("w2_weight", (2, 4, 4))):
        model.experts.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
    info = get_layerwise_info(model.experts)
    info.load_numel, info.load_numel_total = 60, 96
    for number, shard in came:
        call = SimpleNamespace(arguments={"expert_id": number, "shard_id": shard})
        info.loaded_weights.append(("w2_weight" if shard == "w2" else "w13_weight", call))
    target = _Model(model, SimpleNamespace(quantization=None))
    target.partial = partial
    target._loaded = {"experts.w13_weight", "experts.w2_weight"}
    if not lacks:
        target._complete()
        return
    with pytest.raises(IncompleteStreamError, match="a part only of 1 layers, such as 'experts'"):
        target._complete()


def test_a_part_of_a_layer_would_lose_the_rest():
    """vLLM makes new memory for all of a layer's parameters when the first has come."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    from rollout_core.transfer.doors.vllm import _Model

    model = torch.nn.Module()
    model.mixer = torch.nn.Module()
    for name in ("A_log", "dt_bias", "e_score_correction_bias"):
        model.mixer.register_parameter(name, torch.nn.Parameter(torch.zeros(2)))
    info = get_layerwise_info(model.mixer)
    info.load_numel, info.load_numel_total = 2, 4
    info.loaded_weights.append(("A_log", SimpleNamespace(arguments={})))
    target = _Model(model, SimpleNamespace(quantization=None))
    target.partial, target._loaded = True, {"mixer.A_log"}
    with pytest.raises(IncompleteStreamError, match="a part only of 1 layers, such as 'mixer'"):
        target._complete()
    info.loaded_weights.append(("dt_bias", SimpleNamespace(arguments={})))
    target._complete()


def test_experts_are_known_by_the_name_that_an_older_vllm_gives_them():
    """0.26 says that it has loaded "experts.w2_weight" where its parameter is "experts.routed_experts.w2_weight"."""
    from rollout_core.transfer.doors.vllm import _Model

    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.routed_experts = torch.nn.Linear(2, 2)
    target = _Model(model, SimpleNamespace(quantization=None))
    target._loaded = {"experts.weight", "experts.bias"}
    target._complete()
    target._loaded = {"experts.weight"}
    with pytest.raises(IncompleteStreamError, match="nothing for 1 parameters of the model, such as 'experts.routed_experts.bias'"):
        target._complete()


def test_a_part_may_be_sent_when_asked_for(llm, models, address, next_version):
    changed = {**models[1][0], "model.norm.weight": models[1][0]["model.norm.weight"] * 3}
    model = reference_model(1)
    model.load_state_dict(changed)
    with connected(llm, address, partial=True) as trainer:
        trainer.sync(models[1][0], next_version)
        trainer.sync({"model.norm.weight": changed["model.norm.weight"]}, next_version + 1)
        assert generated(llm) == greedy(model)
        # After an update that left something half done, a part would not mend it.
        with pytest.raises(TransferError, match="unusable"):
            trainer.sync(models[2][0], next_version + 2, using=trainer.send_half)
        with pytest.raises(TransferError, match="nothing for"):
            trainer.sync({"model.norm.weight": changed["model.norm.weight"]}, next_version + 2)
        trainer.sync(models[2][0], next_version + 2)
        assert generated(llm) == models[2][1]


@pytest.mark.parametrize("staged", [False, True])
def test_what_vllm_cannot_load_fails_both_sides(llm, models, address, next_version, staged):
    odd = {"model.layers.0.nobody.weight": torch.ones(3), **models[2][0]}
    with connected(llm, address, staged=staged) as trainer:
        trainer.sync(models[1][0], next_version)
        with pytest.raises(TransferError, match="nobody.*unusable"):
            trainer.sync(odd, next_version + 1)
        assert "nobody" in str(trainer.failure)
        trainer.sync(models[2][0], next_version + 1)
        assert generated(llm) == models[2][1]


def test_calls_out_of_order(llm, models, address, next_version):
    with pytest.raises(TransferError, match="carrier is 'pigeon'; this worker knows cuda_ipc, memory"):
        llm.init_weight_transfer_engine({"init_info": {"carrier": "pigeon"}})
    with pytest.raises(ValueError, match="Invalid init_info"):
        llm.init_weight_transfer_engine({"init_info": {"wings": 2}})
    with pytest.raises(TransferError, match="no sender listens at"):
        llm.init_weight_transfer_engine({"init_info": {"address": address, "timeout": 0.2}})
    llm.start_weight_update()
    with pytest.raises(TransferError, match="call init_weight_transfer_engine before"):
        llm.update_weights({"update_info": {}})
    with connected(llm, address):
        with pytest.raises(TransferError, match="no sender listens at"):
            llm.init_weight_transfer_engine({"init_info": {"address": address + "-nobody", "timeout": 0.2}})
        llm.start_weight_update()
        with pytest.raises(TransferError, match="call init_weight_transfer_engine before"):
            llm.update_weights({"update_info": {}})  # the carrier before is closed
    with connected(llm, address + "-again") as trainer:
        llm.start_weight_update()
        with pytest.raises(TransferError, match="no update was received"):
            llm.finish_weight_update(weight_version="never")
        # The session is still open.
        source, tokens = models[1]
        sending = trainer.pool.submit(trainer.send, source, next_version)
        llm.update_weights({"update_info": {}})
        llm.finish_weight_update(weight_version="late")
        assert sending.result().version == next_version
        assert llm.get_weight_version() == "late"
        assert generated(llm) == tokens


TRAINER = """
import sys, time, torch
from rollout_core.bucketing import TensorSpec
from rollout_core.transfer import send_stream
from rollout_core.transfer.carriers.memory import MemorySender
carrier = MemorySender.listen(sys.argv[1], timeout=20)
def weights():
    for layer in range(2):
        yield f"model.layers.{layer}.mlp.down_proj.weight", torch.zeros(128, 256)
    print("half", flush=True)
    time.sleep(60)
    yield "model.norm.weight", torch.zeros(128)
send_stream(weights(), carrier, capacity=140_000, version=int(sys.argv[2]), timeout=20)
"""


def test_a_trainer_that_is_killed(llm, models, address, next_version):
    """A process of its own, killed while vLLM waits for its next bucket."""
    with connected(llm, address, staged=True) as trainer:
        trainer.sync(models[1][0], next_version)
    place = address + "-killed"
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, place, str(next_version + 1)], stdout=subprocess.PIPE, text=True
    ) as other:
        llm.init_weight_transfer_engine({"init_info": {"address": place, "timeout": TIMEOUT, "staged": True}})

        def kill():
            assert other.stdout.readline() == "half\n"
            other.send_signal(signal.SIGKILL)

        killing = threading.Thread(target=kill)
        killing.start()
        llm.start_weight_update()
        start = time.monotonic()
        with pytest.raises(TransferError, match="the sender was lost in the middle of an update"):
            llm.update_weights({"update_info": {}})
        assert time.monotonic() - start < TIMEOUT
        killing.join()
    with pytest.raises(RuntimeError, match="without a matching start_weight_update"):
        llm.finish_weight_update(weight_version="never")
    assert generated(llm) == models[1][1]
    with connected(llm, address + "-next", staged=True) as trainer:
        trainer.sync(models[2][0], next_version + 1)
        assert generated(llm) == models[2][1]
