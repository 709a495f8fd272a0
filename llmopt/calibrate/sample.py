"""Which steps to fit a step time on: those that an engine with given limits can have, spread evenly over their kinds.

The rule knows the engine's limits and nothing of any workload. Half of the steps have no prefill. Batch sizes are half
spread evenly, as in a replica that is loaded, and half by their logarithm, as in one that is not; mean contexts by
their logarithm, as far as KV memory goes; prefill tokens evenly over the token budget, cut from one to three prompts,
half of which are the continuation of a prompt that came before, even where no profile has measured one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llmopt.arrays import Floats
from llmopt.calibrate.result import Caps
from llmopt.steptable import StepTable

SHORTEST = 64.0
"""Smallest mean context of the decode sequences, tokens; below it attention is too small a part of a step to matter."""
FILLS = (0.05, 1.0)
"""Part of the token budget that decode leaves which prefill takes."""
PROMPTS = 3
"""Most prompts in one step."""
CHUNKS = 4.0
"""Most budgets' worth of tokens that a continued prompt has in cache."""


def sample_steps(table: StepTable, caps: Caps, *, count: int = 1024, seed: int = 0) -> tuple[Floats, Floats]:
    """Steps within both the engine's limits and the measured ranges.

    Parameters
    ----------
    table
        The measured step time, for its ranges.
    caps
        The engine's limits.
    count
        Number of steps, at least 2; powers of two spread most evenly (Sobol points).
    seed
        Of the scrambled Sobol sequence.

    Returns
    -------
    Features (n, 4) as in `hardware.FEATURES` without the base, and weights (n,): half for the steps without prefill.
    """
    half = max(count // 2, 1)
    pure = _pure(table, caps, _points(half, 3, seed))
    mixed = _mixed(table, caps, _points(half, 6, seed + 1))
    weights = np.concatenate([np.full(len(part), 0.5 / len(part)) for part in (pure, mixed)])
    return np.concatenate([pure, mixed]), weights


def _points(n: int, dimensions: int, seed: int) -> Floats:
    """Points of the unit cube, shape (n, dimensions)."""
    from scipy.stats import qmc

    size = int(np.ceil(np.log2(n)))
    return np.asarray(qmc.Sobol(dimensions, rng=np.random.default_rng(seed)).random_base2(size)[:n])


def _batches(u: Floats, least: int, most: float) -> Floats:
    """Batch sizes from `least` to `most`: for u below 1/2 by their logarithm, above it evenly."""
    most = max(np.floor(most), least)
    logarithmic = np.exp(np.log(least + 1.0) + 2.0 * u * np.log((most + 1.0) / (least + 1.0))) - 1.0
    even = least + (2.0 * u - 1.0) * (most - least)
    return np.asarray(np.round(np.where(u < 0.5, logarithmic, even)))


def _kv(u: Floats, decode: Floats, longest: float, room: Floats) -> Floats:
    """KV tokens that `decode` sequences read: mean contexts by their logarithm, up to `longest`, all within `room`."""
    sequences = np.maximum(decode, 1.0)
    most = np.minimum(longest, room / sequences)
    least = np.minimum(SHORTEST, most)
    return np.asarray(np.round(decode * least * (most / np.maximum(least, 1e-9)) ** u))


def _pure(table: StepTable, caps: Caps, u: Floats) -> Floats:
    tokens, sequences, batch, longest = table.ends[:4]
    most = min(caps.max_batch, caps.token_budget, caps.kv_capacity, tokens, sequences, batch)
    decode = _batches(u[:, 0], 1, most)
    kv = _kv(u[:, 1], decode, longest, np.full(len(u), float(caps.kv_capacity)))
    return np.column_stack([np.zeros(len(u)), decode, kv, np.zeros(len(u))])


def _mixed(table: StepTable, caps: Caps, u: Floats) -> Floats:
    tokens, sequences, _, _, chunk, cached, batch, longest = table.ends
    prompts = 1.0 + np.floor(PROMPTS * u[:, 3])
    most = min(caps.max_batch, sequences, tokens - 1, caps.token_budget - 1, caps.kv_capacity - 1, batch + 1) - 1
    decode = _batches(u[:, 0], 0, most)
    fill = FILLS[0] + (FILLS[1] - FILLS[0]) * u[:, 2]
    room = np.minimum(min(caps.token_budget, tokens) - decode, chunk)
    prefill = np.maximum(np.round(fill * np.minimum(room, caps.kv_capacity - decode)), 1.0)
    before = np.where(u[:, 4] < 0.5, 0.0, u[:, 5] * CHUNKS * caps.token_budget)
    # a table without cached prompts extrapolates them by their pairs, which first chunks alone do not tell from tokens
    reach = cached if cached > 0 else np.inf
    before = np.round(np.clip(before, 0.0, np.minimum(reach, (caps.kv_capacity - prefill - decode) / 2)))
    one = prefill / prompts
    pairs = prefill * one / 2 + one * before
    kv = _kv(u[:, 1], decode, longest, caps.kv_capacity - prefill - before)
    return np.column_stack([prefill, decode, kv, pairs])


def beyond(table: StepTable, caps: Caps) -> Iterator[str]:
    """One sentence for each limit of the engine that lies beyond the measured ranges, where the fit is a guess."""
    tokens, sequences, batch, context, chunk, _, mixed, joint = table.ends
    limits = (
        ("token_budget", caps.token_budget, tokens, "tokens of a step"),
        ("token_budget", caps.token_budget, chunk, "prefill tokens of a step"),
        ("max_batch", caps.max_batch, sequences, "sequences of a step"),
        ("max_batch", caps.max_batch, batch, "decode sequences without prefill"),
        ("max_batch", caps.max_batch, mixed, "decode sequences beside prefill"),
    )
    for name, cap, end, what in limits:
        if cap > end:
            yield f"{name} = {cap} is beyond the {end:g} {what} that were measured; the fit is extrapolated there"
    longest = min(context, joint)
    if longest < caps.kv_capacity:
        yield f"contexts were measured to {longest:g} tokens; longer ones are extrapolated"
