"""Requests: their tokens, their shapes, and what becomes of them when they are aborted or the weights change."""

from __future__ import annotations

import copy
from typing import Any

from rollout_core.preflight.checks.context import CheckFailed, Context, expect, greedy
from rollout_core.workers.contract import Completion, SamplingParams, to_batch


def greedy_equals(context: Context) -> str:
    """The worker's greedy tokens are those of the trainer's model, one unpadded forward pass at a time."""
    eos = context.models.eos_token_ids(context.trainer)
    completions = greedy(context)
    _check_places(context, completions, 1)
    nearest = float("inf")
    for prompt, completion in zip(context.prompts, completions, strict=True):
        expected, gap = context.models.greedy_reference(context.trainer, prompt, context.response_length, eos)
        nearest = min(nearest, gap)
        found = list(completion.token_ids)
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
            mine, theirs = (str(tokens[at]) if at < len(tokens) else "missing" for tokens in (expected, found))
            raise CheckFailed(
                f"prompt {completion.prompt_index} ({len(prompt)} tokens): response token {at} is {theirs} from the worker and "
                f"{mine} from the trainer's model; nearest tie on the way {gap:.2g}"
            )
    count = sum(len(completion.token_ids) for completion in completions)
    figure = f"{count} tokens of {len(context.prompts)} prompts equal, nearest tie {nearest:.2g}"
    if not context.first_tokens:
        return figure
    changed = sum(completion.token_ids != first for completion, first in zip(completions, context.first_tokens, strict=True))
    expect(changed > 0, "the changed weights change the tokens of no prompt, so tokens of the old weights would look the same")
    return f"{figure}, {changed} changed with the weights"


def batch_holds(context: Context) -> str:
    """The batch contract on sampled output: several samples a prompt, two response lengths, and a stop id that is met."""
    eos = context.models.eos_token_ids(context.trainer)
    samples, rows, ended = 4, 0, 0
    repeats = "seeds" in context.running().capabilities
    heat, seed = 1.0, 7 if repeats else None
    for length in (1, context.response_length):
        params = SamplingParams(response_length=length, n=samples, temperature=heat, seed=seed)
        completions = _check_rows(context, params, eos)
        if repeats:
            again = context.running().generate(context.prompts, params)
            # Not the logprobs: on a GPU what is computed beside other requests differs in its last bits.
            expect(_tokens_of(completions) == _tokens_of(again), "the same seed gave other samples")
        rows += len(completions)
        ended += sum(completion.status == "stop" for completion in completions)
    if not repeats:  # greedy ones do
        heat = 0.0
        completions = _check_rows(context, SamplingParams(response_length=length, n=samples), eos)
    longest = max(completions, key=lambda completion: len(completion.token_ids))
    tokens = longest.token_ids
    stop = tokens[len(tokens) // 2]
    params = SamplingParams(response_length=length, n=samples, temperature=heat, seed=seed, stop_token_ids=(stop,))
    stopped = _check_rows(context, params, eos | {stop})
    cut = next(c.token_ids for c in stopped if (c.prompt_index, c.sample_index) == (longest.prompt_index, longest.sample_index))
    expected = tokens[: tokens.index(stop) + 1]
    expect(cut == expected, f"{longest.place}: with stop id {stop} it is {list(cut)}, expected {list(expected)}")
    return f"{rows + len(stopped)} rows hold, {ended} ended by an EOS, and one by a stop id"


def _tokens_of(completions: list[Completion]) -> list[tuple[str, tuple[int, ...]]]:
    return [(completion.status, tuple(completion.token_ids)) for completion in completions]


def _check_rows(context: Context, params: SamplingParams, ends: set[int]) -> list[Completion]:
    """Clause W3 for one call; returns its completions."""
    completions = context.running().generate(context.prompts, params)
    _check_places(context, completions, params.n)
    batch = to_batch(context.prompts, completions, response_length=params.response_length, pad_token_id=0, n=params.n)
    width = max(map(len, context.prompts))
    for row, completion in enumerate(completions):
        _check_row(completion, context.prompts[completion.prompt_index], width, params.response_length, ends, _row(batch, row))
    return completions


def _check_places(context: Context, completions: list[Completion], samples: int) -> None:
    """One completion for each sample of each prompt, in order, all of the worker's version."""
    rows = len(context.prompts) * samples
    expect(len(completions) == rows, f"{len(completions)} completions for {len(context.prompts)} prompts of {samples} samples")
    version = context.running().version
    for row, completion in enumerate(completions):
        place = (completion.prompt_index, completion.sample_index)
        expect(place == divmod(row, samples), f"completion {row} is of {completion.place}, expected prompt {row // samples}")
        expect(
            completion.weight_version == version,
            f"{completion.place}: its tokens are of weight version {completion.weight_version}, and the worker says {version}",
        )
        others = set(completion.versions) - {version}
        expect(not others, f"{completion.place}: tokens of weight versions {sorted(others)}, and the worker says {version}")


def _row(batch: Any, row: int) -> dict[str, list[int]]:
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: getattr(batch, name)[row].tolist() for name in names}


def _check_row(
    completion: Completion, prompt: list[int], width: int, length: int, stops: set[int], row: dict[str, list[int]]
) -> None:
    """Clause W3 for one row, in plain lists."""
    where, tokens = completion.place, list(completion.token_ids)
    pad = width - len(prompt)
    ends = [i for i, token in enumerate(tokens) if token in stops]
    expect(0 < len(tokens) <= length, f"{where}: {len(tokens)} tokens for a response length of {length}")
    expect(ends in ([], [len(tokens) - 1]), f"{where}: tokens go on after an EOS or stop id: {tokens}")
    expect(
        completion.status == ("stop" if ends else "length"), f"{where}: status {completion.status} with an EOS or stop id at {ends}"
    )
    expect(bool(ends) or len(tokens) == length, f"{where}: stopped at {len(tokens)} tokens without an EOS")
    expect(completion.logprobs is not None and max(completion.logprobs) <= 0, f"{where}: logprobs {completion.logprobs}")
    expect(row["input_ids"][pad : width + len(tokens)] == prompt + tokens, f"{where}: ids are not prompt and response")
    mask = [0] * pad + [1] * (len(prompt) + len(tokens)) + [0] * (length - len(tokens))
    expect(row["attention_mask"] == mask, f"{where}: attention mask {row['attention_mask']}, expected {mask}")
    positions = [0] * pad + list(range(len(prompt) + length))
    expect(row["position_ids"] == positions, f"{where}: positions {row['position_ids']}, expected {positions}")


def aborts_end(context: Context) -> str:
    """Requests that are aborted in the queue and while they decode end once, with a prefix; others go on, and a prefix can be."""
    worker = context.running()
    length, steps, most = context.stops()
    params = SamplingParams(response_length=length, ignore_eos=True)
    ids = [f"preflight-{place}" for place in range(len(context.prompts))]
    full = [context.models.greedy_reference(context.trainer, prompt, length, set())[0] for prompt in context.prompts]
    worker.pause()
    try:
        futures = worker.submit(context.prompts, params, request_ids=ids)
        queued = worker.abort([ids[0], "preflight-unknown"])
        expect(queued == ids[:1], f"aborting {ids[0]!r} in the queue, and an unknown id, ended {queued}")
        worker.step(steps)
        decoding = worker.abort(ids[:2])
        expect(decoding == ids[1:2], f"aborting {ids[1]!r} while it decodes, and {ids[0]!r} again, ended {decoding}")
        ended = [future.done() for future in futures]
        expect(ended[:2] == [True, True] and not any(ended[2:]), f"after two aborts these requests have ended: {ended}")
    finally:
        worker.resume()
    for future, expected, place in zip(futures, full, range(len(full)), strict=True):
        done = future.result(worker.timeout)
        status = "aborted" if place < 2 else "length"
        expect(done.status == status, f"{done.place}: status {done.status}, expected {status}")
        found = list(done.token_ids)
        expect(found == expected[: len(found)], f"{done.place}: {found} is no prefix of {expected}")
        expect((len(found) == length) == (place > 1), f"{done.place}: {len(found)} tokens, and its status is {status}")
    prefix = list(futures[1].result().token_ids)
    expect(0 < len(prefix) <= most, f"{len(prefix)} tokens came in {steps} steps")
    rest = SamplingParams(response_length=length - len(prefix), ignore_eos=True)
    (resumed,) = worker.submit([context.prompts[1] + prefix], rest)
    found = prefix + list(resumed.result(worker.timeout).token_ids)
    expect(found == full[1], f"resumed from {len(prefix)} tokens it is {found}, uninterrupted {full[1]}")
    return f"2 of {len(ids)} requests ended, 0 and {len(prefix)} tokens; resumed to the same {length}"


def weights_change_under_requests(context: Context) -> str:
    """Pause, swap, resume: each token is of the weights whose version it carries, and none of the old ones comes after the swap."""
    worker = context.running()
    length, steps, most = context.stops()
    before = copy.deepcopy(context.trainer)
    worker.pause()
    try:
        futures = worker.submit(context.prompts, SamplingParams(response_length=length, ignore_eos=True))
        worker.step(steps)
        context.models.perturb(context.trainer, context.perturbation, seed=1, computed=worker.takes_computed)
        old, new = worker.version, worker.sync_weights(context.trainer, capacity=context.capacity).version
    finally:
        worker.resume()
    kept = 0
    for prompt, future in zip(context.prompts, futures, strict=True):
        done = future.result(worker.timeout)
        tokens, count = list(done.token_ids), done.versions.count(old)
        kept += count
        expect(done.status == "length", f"{done.place}: status {done.status} after the weights changed ({done.error})")
        expected = (old,) * count + (new,) * (length - count)
        expect(done.versions == expected and count <= most, f"{done.place}: versions {done.versions} of {length} tokens")
        first = context.models.greedy_reference(before, prompt, count, set())[0]
        expect(tokens[:count] == first, f"{done.place}: {tokens[:count]} before the change, expected {first}")
        then = context.models.greedy_reference(context.trainer, prompt + tokens[:count], length - count, set())[0]
        expect(tokens[count:] == then, f"{done.place}: {tokens[count:]} after the change, expected {then}")
    return f"{kept} tokens of version {old}, {length * len(futures) - kept} of version {new}, each as its model says"
