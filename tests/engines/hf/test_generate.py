"""``hf_generate.generate`` on small real transformers models, against loops that never call ``model.generate``."""

import copy
import math
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from rollout_core.errors import WorkerError
from rollout_core.workers.contract import Completion, SamplingParams, to_batch
from rollout_core.workers.hf.generate import generate

VOCAB = 128
PAD = 0
# Lengths 1 to 9, so that every row but one is padded; pad ids stand inside prompts.
PROMPTS = [[5], [17, 3, 99, 41, 2, 77, 8, 120, 64], [PAD, 30], [9, PAD, PAD, 12, 55], [100, 101, 102]]
STEPS = 12
# A float32 pass of the same tokens differs from another by rounding alone, batched, padded and cached or not: 5e-6 was
# the most seen on these models' logits of up to 6. Ten times that is still far below the 1e-2 between the best and the
# second token wherever the greedy loops below choose.
TOLERANCE = 5e-5


def build(kind: str, vocab: int = VOCAB, spread: float = 0.2) -> Any:
    """A model in eval mode whose weights are wide enough that its choices depend on context and position."""
    torch.manual_seed(7)
    shared = {"vocab_size": vocab, "initializer_range": spread, "bos_token_id": None, "eos_token_id": None}
    if kind == "qwen2":
        config = transformers.Qwen2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **shared,
        )
        return transformers.Qwen2ForCausalLM(config).eval()
    # Learned absolute positions: unlike rotary ones these feel a shift by the padding. Dropout stays at its 0.1. Tied
    # embeddings would make a random model repeat its last token.
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False, **shared)
    return transformers.GPT2LMHeadModel(config).eval()


MODELS = {kind: build(kind) for kind in ("qwen2", "gpt2")}


@pytest.fixture(params=sorted(MODELS))
def model(request):
    return copy.deepcopy(MODELS[request.param])


@torch.no_grad()
def greedy_reference(model: Any, prompt: list[int], steps: int, ends: set[int]) -> list[int]:
    """The whole sequence through the model for each token: no padding, no mask, no cache."""
    tokens: list[int] = []
    while len(tokens) < steps and not (tokens and tokens[-1] in ends):
        tokens.append(int(model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].float().argmax()))
    return tokens


@torch.no_grad()
def logprob_reference(model: Any, prompt: list[int], tokens: tuple[int, ...]) -> list[float]:
    """log softmax of the raw logits at each token of one response, in float64."""
    logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].double()
    table = logits - logits.exp().sum(-1, keepdim=True).log()
    return [float(table[len(prompt) - 1 + place, token]) for place, token in enumerate(tokens)]


def run(model: Any, prompts: list[list[int]] = PROMPTS, **changes: Any) -> list[Completion]:
    """Greedy, STEPS tokens, no EOS, unless told otherwise; sampling parameters and generate's own may be mixed."""
    own = {"eos_token_ids": (), "pad_token_id": PAD}
    own |= {name: changes.pop(name) for name in ("eos_token_ids", "pad_token_id", "max_batch", "weight_version") if name in changes}
    return generate(model, prompts, SamplingParams(**{"response_length": STEPS, **changes}), **own)


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [list(completion.token_ids) for completion in completions]


def expected(model: Any, ends: set[int], steps: int = STEPS, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [greedy_reference(model, prompt, steps, ends) for prompt in prompts]


@pytest.mark.parametrize("max_batch", [1, 2, 64])
def test_greedy_with_left_padding_is_the_unpadded_argmax_loop(model, max_batch):
    completions = run(model, max_batch=max_batch, weight_version=6)
    assert tokens_of(completions) == expected(model, set())
    assert [completion.prompt_index for completion in completions] == list(range(len(PROMPTS)))
    assert {completion.status for completion in completions} == {"length"}
    assert {(completion.weight_version, completion.sample_index) for completion in completions} == {(6, 0)}


def test_a_pad_id_that_is_an_eos_and_stands_in_prompts_changes_nothing(model):
    free = expected(model, set())
    eos = free[1][3]
    prompts = [[eos], [eos, *PROMPTS[1]], [17, eos, eos], [4, 4, eos, 4]]
    completions = run(model, prompts, eos_token_ids=(eos,), pad_token_id=eos)
    assert tokens_of(completions) == expected(model, {eos}, prompts=prompts)
    # The reference must really stop and really go on, or this shows little.
    prompts.append(PROMPTS[1])
    completions = run(model, prompts, eos_token_ids=(eos,), pad_token_id=eos)
    assert tokens_of(completions) == expected(model, {eos}, prompts=prompts)
    assert {completion.status for completion in completions} == {"stop", "length"}


def test_each_of_several_eos_ids_ends_a_response_and_stays_in_it(model):
    free = expected(model, set())
    ends = {free[0][2], free[1][5], free[3][STEPS - 1]}
    completions = run(model, eos_token_ids=tuple(ends))
    wanted = expected(model, ends)
    assert tokens_of(completions) == wanted
    statuses = ["stop" if tokens[-1] in ends else "length" for tokens in wanted]
    assert [completion.status for completion in completions] == statuses
    assert [len(completion.logprobs or ()) for completion in completions] == [len(tokens) for tokens in wanted]
    assert len({len(tokens) for tokens in wanted}) > 2


def test_responses_may_end_at_their_first_token(model):
    ends = {tokens[0] for tokens in expected(model, set(), 1)}
    wanted = expected(model, set(), 1)
    passes = []
    model.register_forward_hook(lambda module, arguments, output: passes.append(1))
    completions = run(model, eos_token_ids=sorted(ends))
    assert tokens_of(completions) == wanted
    assert {completion.status for completion in completions} == {"stop"}
    assert len(passes) == 1  # with every row at its end there is nothing left to decode


def test_a_pad_id_sampled_as_a_token_ends_nothing(model):
    free = expected(model, set())
    pad, eos = free[1][2], free[1][5]
    assert eos not in free[1][:5]
    completions = run(model, pad_token_id=pad, eos_token_ids=(eos,))
    assert tokens_of(completions) == expected(model, {eos})
    assert pad in completions[1].token_ids


def test_an_eos_as_the_last_token_allowed_is_a_stop(model):
    (free,) = expected(model, set(), prompts=PROMPTS[1:2])
    place = max(place for place, token in enumerate(free) if token not in free[:place])
    for length, status in ((place, "length"), (place + 1, "stop"), (place + 2, "stop")):
        (completion,) = run(model, PROMPTS[1:2], eos_token_ids=(free[place],), response_length=length)
        assert (list(completion.token_ids), completion.status) == (free[: min(length, place + 1)], status)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_response_length_is_the_calls_own(model, length):
    assert tokens_of(run(model, response_length=length)) == expected(model, set(), length)
    assert tokens_of(run(model)) == expected(model, set())


def test_stop_ids_end_a_response_and_ignore_eos_spares_only_eos_ids(model):
    free = expected(model, set())
    eos, stop = free[1][1], free[1][3]
    assert len({eos, stop}) == 2
    assert tokens_of(run(model, eos_token_ids=(eos,), stop_token_ids=(stop,))) == expected(model, {eos, stop})
    ignoring = run(model, eos_token_ids=(eos,), stop_token_ids=(stop,), ignore_eos=True)
    assert tokens_of(ignoring) == expected(model, {stop})
    assert ignoring[1].status == "stop"
    ignoring = run(model, eos_token_ids=(eos,), ignore_eos=True)
    assert tokens_of(ignoring) == free
    assert {completion.status for completion in ignoring} == {"length"}


def test_greedy_samples_are_grouped_by_prompt_and_identical(model):
    completions = run(model, n=3, max_batch=2)
    places = [(completion.prompt_index, completion.sample_index) for completion in completions]
    assert places == [(index, sample) for index in range(len(PROMPTS)) for sample in range(3)]
    assert tokens_of(completions) == [tokens for tokens in expected(model, set()) for _ in range(3)]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "seed": 5}, {"temperature": 1.0, "top_k": 5, "seed": 1}])
def test_logprobs_are_of_the_raw_logits_and_samples_belong_to_their_prompt(model, sampling):
    completions = run(model, n=2, max_batch=3, eos_token_ids=(11, 12, 13, 14), **sampling)
    places = [(completion.prompt_index, completion.sample_index) for completion in completions]
    assert places == [(index, sample) for index in range(len(PROMPTS)) for sample in range(2)]
    for completion in completions:
        wanted = logprob_reference(model, PROMPTS[completion.prompt_index], completion.token_ids)
        assert completion.logprobs == pytest.approx(wanted, abs=TOLERANCE, rel=0)


def test_the_batch_given_back_to_the_model_repeats_the_logprobs(model):
    """Clause W3 from end to end: masks and positions of the batch are those the tokens were sampled under."""
    ends = tuple(range(100, 120))
    completions = run(model, n=2, temperature=1.0, seed=3, eos_token_ids=ends, pad_token_id=ends[0])
    batch = to_batch(PROMPTS, completions, response_length=STEPS, pad_token_id=ends[0], n=2)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits
    table = logits[:, -STEPS - 1 : -1].double().log_softmax(-1)
    again = table.gather(2, batch.responses[..., None])[..., 0] * batch.response_mask
    assert batch.logprobs is not None
    torch.testing.assert_close(again, batch.logprobs.double(), atol=TOLERANCE, rtol=0)
    lengths = batch.response_mask.sum(1)
    assert lengths.tolist() == [len(completion.token_ids) for completion in completions]
    assert lengths.min() < STEPS


def test_a_seed_repeats_a_call_and_leaves_the_callers_generator_alone(model):
    sampling = {"temperature": 1.0, "n": 2, "max_batch": 4}
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first = run(model, seed=1, **sampling)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(100)
    assert run(model, seed=1, **sampling) == first
    assert tokens_of(run(model, seed=2, **sampling)) != tokens_of(first)
    # Samples of one prompt differ, and later batches do not repeat the first one's draws.
    assert first[0].token_ids != first[1].token_ids
    twice = run(model, [[5], [5]], seed=1, temperature=1.0, max_batch=1)
    assert twice[0].token_ids != twice[1].token_ids


def test_without_a_seed_sampling_draws_from_the_global_generator_and_greedy_does_not(model):
    torch.manual_seed(99)
    first = run(model, temperature=1.0)
    assert tokens_of(run(model, temperature=1.0)) != tokens_of(first)
    torch.manual_seed(99)
    assert run(model, temperature=1.0) == first
    before = torch.get_rng_state()
    run(model, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampling", [{"top_k": 1, "temperature": 1.5}, {"top_p": 1e-6, "temperature": 1.0}])
def test_sampling_of_one_candidate_is_greedy(model, sampling):
    assert tokens_of(run(model, seed=1, **sampling)) == expected(model, set())


FIRST = {token for kind in MODELS for tokens in expected(MODELS[kind], set(), 1) for token in tokens}
TRAPS = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 9,
    "min_length": 20,
    "max_length": 3,
    "suppress_tokens": sorted(FIRST),
    "begin_suppress_tokens": sorted(FIRST),
    "bad_words_ids": [[token] for token in sorted(FIRST)],
    "sequence_bias": [[[1], 1e4]],
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 1,
    "eos_token_id": sorted(FIRST),
    "exponential_decay_length_penalty": (1, 50.0),
    "guidance_scale": 3.0,
    "watermarking_config": {"bias": 50.0},
    "num_beams": 3,
    "num_return_sequences": 2,
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 2,
    "top_p": 0.1,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "max_time": 0.0,
    "stop_strings": ["a"],
    "renormalize_logits": True,
    "return_dict_in_generate": True,
    "prompt_lookup_num_tokens": 2,
    "use_cache": False,
    "cache_implementation": "static",
}


@pytest.mark.parametrize("trap", sorted(TRAPS))
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "seed": 8}], ids=["greedy", "sampled"])
def test_the_checkpoints_generation_config_has_no_influence(model, trap, sampling):
    # An EOS id of the caller's own would hide the checkpoint's.
    ends = () if trap == "eos_token_id" else (expected(model, set())[1][4],)
    wanted = run(model, eos_token_ids=ends, **sampling)
    value = TRAPS[trap]
    if trap == "watermarking_config":
        value = transformers.WatermarkingConfig(**value)
    setattr(model.generation_config, trap, value)
    kept = model.generation_config
    assert run(model, eos_token_ids=ends, **sampling) == wanted
    assert model.generation_config is kept
    assert getattr(kept, trap) == value


def test_every_trap_at_once_beneath_a_wrapper():
    """An adapter's wrapper shows the inner model's settings as its own; the inner ones must be set aside too."""

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def generate(self, **arguments):
            return self.inner.generate(**arguments)

    inner = copy.deepcopy(MODELS["gpt2"])
    wanted = run(inner)
    inner.generation_config.update(repetition_penalty=5.0, suppress_tokens=sorted(FIRST), eos_token_id=sorted(FIRST))
    wrapper = Wrapper(inner)
    assert run(wrapper) == wanted
    assert inner.generation_config.repetition_penalty == 5.0
    assert "generation_config" not in vars(wrapper)


# With 8 ids Pearson's statistic of a right sampler follows chi-square with 7 degrees of freedom, and goes above this
# with probability 1e-4. The seed is fixed, so it is drawn anew only when torch changes its generator's stream. This
# many draws lift a sampler whose temperature is a fifth too low well above it.
CHI_SQUARE_7 = 29.88
DRAWS = 40_000


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampled_frequencies_follow_the_softmax(temperature):
    tiny = build("qwen2", vocab=8, spread=0.1)
    completions = run(tiny, [[3, 1, 2]], response_length=1, n=DRAWS, temperature=temperature, seed=11, max_batch=4000)
    drawn = torch.bincount(torch.tensor(tokens_of(completions)).flatten(), minlength=8).double()
    with torch.no_grad():
        logits = tiny(input_ids=torch.tensor([[3, 1, 2]])).logits[0, -1].double()
    wanted = DRAWS * (logits / temperature).softmax(-1)
    assert wanted.min() > 20  # Pearson's statistic is chi-square only where each id is expected several times
    assert float(((drawn - wanted) ** 2 / wanted).sum()) < CHI_SQUARE_7
    # The test's own power: a fifth off the temperature is refused.
    other = DRAWS * (logits / (0.8 * temperature)).softmax(-1)
    assert float(((drawn - other) ** 2 / other).sum()) > CHI_SQUARE_7


def test_plain_sampling_reaches_the_whole_vocabulary_and_cut_sampling_does_not():
    """transformers' own default is top_k=50, which a vocabulary of 8 cannot show."""
    flat = build("qwen2", spread=0.01)
    ask = {"response_length": 1, "n": 3000, "temperature": 1.0, "seed": 2, "max_batch": 1000}
    seen = {tokens[0] for tokens in tokens_of(run(flat, [[3, 1, 2]], **ask))}
    assert len(seen) > 120  # of 128, each expected over 15 times
    with torch.no_grad():
        order = flat(input_ids=torch.tensor([[3, 1, 2]])).logits[0, -1].softmax(-1).sort(descending=True)
    cut = {tokens[0] for tokens in tokens_of(run(flat, [[3, 1, 2]], top_k=6, **ask))}
    assert cut == set(order.indices[:6].tolist())
    nucleus = int((order.values.double().cumsum(0) < 0.3).sum()) + 1
    cut = {tokens[0] for tokens in tokens_of(run(flat, [[3, 1, 2]], top_p=0.3, **ask))}
    assert cut == set(order.indices[:nucleus].tolist())


def test_no_more_than_max_batch_rows_are_decoded_at_once(model):
    rows = []
    model.register_forward_pre_hook(lambda module, arguments, named: rows.append(len(named["input_ids"])), with_kwargs=True)
    run(model, n=3, temperature=1.0, seed=0, max_batch=4)
    assert (max(rows), sum(rows)) == (4, 3 * len(PROMPTS) * STEPS)


def test_modes_and_settings_come_back_after_success_and_error():
    model = copy.deepcopy(MODELS["gpt2"])
    wanted = run(model)
    model.train()
    model.transformer.h[0].eval()  # a part frozen on purpose must not be woken
    modes = [module.training for module in model.modules()]
    kept = model.generation_config
    torch.manual_seed(0)
    assert run(model) == wanted  # dropout would have changed it
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    before = torch.get_rng_state()
    with pytest.raises(WorkerError, match="NaN or infinite logits for prompt 0 at response token 0"):
        run(model, temperature=1.0, seed=3)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is kept
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "n": 2}], ids=["greedy", "sampled"])
def test_bad_logits_name_the_prompt_and_token(sampling):
    model = copy.deepcopy(MODELS["qwen2"])
    calls = []

    def spoil(module, arguments, output):
        calls.append(len(output))
        if len(calls) == 4 + 2:  # the second batch's second token
            output[-1, -1, 3] = math.inf
        return output

    model.lm_head.register_forward_hook(spoil)
    samples = sampling.get("n", 1)
    with pytest.raises(WorkerError, match="logits for prompt 3 at response token 1: check the weights"):
        run(model, response_length=4, max_batch=2 * samples, **sampling)


def test_no_prompts_give_no_completions(model):
    assert run(model, []) == []


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [2, VOCAB]], {}, "prompt 1 position 1 is 128, not one of the model's 128 ids"),
        ([[1], [2, -1]], {}, "prompt 1 position 1 is -1"),
        ([[1], [2, True]], {}, "prompt 1 position 1 is True"),
        ([[1], [2] * (65 - STEPS)], {}, "prompt 1 has 53 tokens and with response_length 12 passes the model's 64 pos"),
        ([[1]], {"eos_token_ids": (VOCAB,)}, "eos_token_ids 128 is outside"),
        ([[1]], {"stop_token_ids": (3, VOCAB)}, "stop_token_ids 128 is outside"),
        ([[1]], {"pad_token_id": -1}, "pad_token_id -1 is outside"),
        ([[1]], {"pad_token_id": None}, "pad_token_id None is outside"),
        ([[1]], {"max_batch": 0}, "max_batch is 0"),
        ([[1]], {"weight_version": -1}, "weight_version is -1"),
    ],
    ids=["empty", "above", "below", "bool", "context", "eos", "stop", "pad", "no pad", "max_batch", "version"],
)
def test_bad_input_is_named(model, prompts, changes, message):
    with pytest.raises(WorkerError, match=message):
        run(model, prompts, **changes)


def test_a_prompt_and_response_may_fill_the_context_exactly(model):
    prompt = [index % 100 for index in range(64 - STEPS)]
    assert tokens_of(run(model, [prompt, [1]])) == expected(model, set(), prompts=[prompt, [1]])


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(WorkerError, match="T5ForConditionalGeneration is an encoder-decoder"):
        run(transformers.T5ForConditionalGeneration(config), [[1]])
