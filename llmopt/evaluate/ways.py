"""The ways of serving, simulated where the theory put them.

Colocated groups, PD's decode groups and prefill groups are pools of the iteration-level simulator that never run out of
work; AFD's bundles are played with every cycle of every layer. Both see sampled lengths; the theory sees their moments.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np

from llmopt.barrier import expected_largest
from llmopt.bundle import BUDGET, Bundle
from llmopt.evaluate.bundle_load import load_series
from llmopt.evaluate.bundle_run import play_bundle
from llmopt.evaluate.margin import long_run
from llmopt.evaluate.saturate import SaturatedRun, saturated_throughput
from llmopt.scenario import Pool, Scenario
from llmopt.ways import serial
from llmopt.ways_report import Check, WaysComparison, compare_ways, missing
from llmopt.ways_served import Served

LIVES, MOST = 40, 200_000
"""Requests of a simulated pool: so many for each slot, and at most."""
ROUNDS = 20_000_000
"""Slots times steps of a simulated bundle, about."""
ROOM = 4.0
"""Prompt tokens that a step of a colocated group may take, over what comes on average: longer prompts are cut."""


def check_ways(ways: WaysComparison, seed: int = 1) -> WaysComparison:
    """The comparison with every way simulated at its point; equal seeds give equal figures."""
    checks = tuple(_check(ways, way, seed) for way in ways.served if way.bundle is not None)
    return replace(ways, checks=checks)


def checked_ways(scenario: Scenario, seed: int = 1) -> WaysComparison | str:
    """The comparison, simulated; or the sentence that says what it lacks."""
    ways = compare_ways(scenario)
    return missing(scenario) if ways is None else check_ways(ways, seed)


def _check(ways: WaysComparison, way: Served, seed: int) -> Check:
    bundle = way.bundle
    assert bundle is not None
    if way.way == "AFD":
        tokens, tpot = _bundle(ways.scenario, bundle, seed)
    else:
        run = _saturated(ways, _group(ways, bundle, way.way == "colocated"), bundle, seed)
        tokens = float(run.totals.decode_tokens[0]) / (run.end - run.start)
        tpot = run.step_time
    own = way.devices - way.prefill * _worker_devices(ways.scenario)
    prefill = 0.0 if way.way == "colocated" else tokens / ways.ask.decode * prefill_seconds(ways, seed)
    return Check(way.way, tokens / (own + prefill * _worker_devices(ways.scenario)), tpot)


def _worker_devices(scenario: Scenario) -> int:
    return scenario.bundle.attention_devices


def _bundle(scenario: Scenario, bundle: Bundle, seed: int) -> tuple[float, float]:
    """Tokens/s and mean TPOT of a bundle with always full slots."""
    x, work = bundle.attention_workers, scenario.workload
    steps = max(200, ROUNDS // (x * bundle.batch * bundle.micro_batches))
    first = scenario.pools[0].first_step
    series = load_series(work.classes, work.rates, first, bundle, x, steps, seed, "stationary")
    run = play_bundle(bundle, series, bundle.ffn_servers)
    return float(run.throughput[x - 1]) * (x + bundle.ffn_servers), float(run.tpot[x - 1])


def _group(ways: WaysComparison, bundle: Bundle, mixed: bool) -> Pool:
    """The pool of a colocated or decode group; its slots are so many more that `batch` of them decode on average."""
    ask, x = ways.ask, bundle.attention_workers
    prompts = bundle.batch * ask.prompt / ask.decode
    chunk = max(1, ceil(ROOM * prompts))
    # A request takes a slot while its prompt is computed: as many steps as chunks, or one where it arrives prefilled.
    steps = max(1.0, ask.prompt / (x * chunk)) if mixed else 1.0
    batch = max(1, round(bundle.batch * (1 + steps / ask.decode)))
    of = bundle.model_copy(
        update={
            "batch": batch,
            "imbalance": expected_largest(x) * ask.deviation / (bundle.batch**0.5 * ask.theta),
            "prompts": "here" if mixed else "elsewhere",
        }
    )
    of = of.near(x * (bundle.batch + (prompts if mixed else 0.0)))  # pools step by max-affine times
    budget = {"token_budget": x * (batch + chunk)} if mixed else {}
    return _pool(ways.scenario, of, **budget)


def prefill_seconds(ways: WaysComparison, seed: int = 1) -> float:
    """Simulated seconds of one worker's devices of a prefill group per request: prompts only, one-token outputs."""
    group = serial(ways.scenario.bundle).model_copy(update={"prompts": "here"})
    x = group.attention_workers
    group = group.near(x * BUDGET)
    pool = _pool(ways.scenario, group, token_budget=x * BUDGET, first_token="prefill")
    run = long_run(ways.scenario, seed, 20_000)
    done = saturated_throughput(pool, run.prompt, np.ones_like(run.output))
    return x / done.rate


def _pool(scenario: Scenario, bundle: Bundle, **settings: object) -> Pool:
    """A pool of this bundle in the conventions of the scenario's own; blocks of one token, as in the theory."""
    first = scenario.pools[0].first_token
    return Pool.model_validate({"name": "way", "first_token": first, "block_size": 1, "bundle": bundle} | settings)


def _saturated(ways: WaysComparison, pool: Pool, bundle: Bundle, seed: int) -> SaturatedRun:
    run = long_run(ways.scenario, seed, min(MOST, LIVES * bundle.slots + 20_000))
    return saturated_throughput(pool, run.prompt, run.output)
