"""The barrier: published means of the largest normal, quadrature, Monte Carlo, and what must hold for all inputs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from afd import PIPELINES, PUBLISHED, bundle_of, geometric_load
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import log_ndtr

from llmopt.barrier import barrier_cycle, best_barrier, expected_largest, imbalance, mean_attention
from llmopt.bundle import Bundle
from llmopt.errors import ScenarioError
from llmopt.ratio import best_whole, cycle, throughput
from llmopt.slot_law import SlotLaw
from llmopt.slots import SlotLoad

TWO_PIECES = [{"base": 200e-6, "kv": 0.5e-9}, {"base": 20e-6, "kv": 2e-9}]


def of_load(bundle: Bundle, kv: float | np.ndarray, ratio: float) -> Any:
    """The cycle if the fullest worker holds `kv` tokens, written out from the stages."""
    a, c, f = bundle.attention_time(kv), bundle.transfer_time(ratio), bundle.ffn_time(ratio)
    if bundle.pipeline == "ideal":
        return np.maximum(a, max(c, f))
    own_a = a + c * (bundle.pipeline in ("attention-blocking", "blocking"))
    own_f = f + c * (bundle.pipeline == "blocking")
    return np.maximum(np.maximum(own_a, own_f), (a + f + 2 * c) / bundle.micro_batches)


def by_quadrature(bundle: Bundle, load: SlotLoad, workers: int, servers: int = 1) -> float:
    """E[tau(T)] against the density of the largest of `workers` normals."""
    mean, spread = bundle.batch * load.theta, math.sqrt(bundle.batch) * load.deviation

    def integrand(x: float) -> float:
        density = workers * math.exp((workers - 1) * log_ndtr(x) - x * x / 2) / math.sqrt(2 * math.pi)
        return float(of_load(bundle, mean + spread * x, workers / servers)) * density * 1e4

    cuts = np.linspace(-9, 9, 25)
    return sum(quad(integrand, a, b, epsabs=1e-12, epsrel=1e-10)[0] for a, b in itertools.pairwise(cuts)) / 1e4


def test_the_largest_of_normals_as_published() -> None:
    found = [expected_largest(n) for n in (1, 2, 4, 8, 16, 32)]
    assert found == pytest.approx([0, 0.5642, 1.0294, 1.4236, 1.7660, 2.0697], abs=5e-5)
    assert expected_largest(2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-13)
    assert expected_largest(3) == pytest.approx(1.5 / math.sqrt(math.pi), rel=1e-13)


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_the_largest_of_no_number_is_one_sentence(n: Any) -> None:
    with pytest.raises(ScenarioError, match="give a whole number of at least 1"):
        expected_largest(n)


@pytest.mark.parametrize(("pipeline", "micro_batches"), [("ideal", 3), *((p, 1) for p in PIPELINES[1:])])
@pytest.mark.parametrize("workers", [1, 6, 40, 512])
def test_the_cycle_is_the_integral_over_the_fullest_load(pipeline: str, micro_batches: int, workers: int) -> None:
    bundle = bundle_of(pipeline=pipeline, micro_batches=micro_batches, attention=TWO_PIECES)
    load = SlotLoad(500.0, 400.0**2, 100.0, 500.0)
    exact = by_quadrature(bundle, load, workers, servers=max(1, workers // 4))
    assert barrier_cycle(bundle, load, workers, max(1, workers // 4)) == pytest.approx(exact, rel=1e-9)


def drawn(load: SlotLoad, batch: int, shape: tuple[int, ...]) -> np.ndarray:
    """Loads of micro-batches, normal and independent."""
    return np.random.default_rng(7).normal(batch * load.theta, math.sqrt(batch) * load.deviation, shape)


def test_the_ideal_cycle_is_the_mean_of_sampled_cycles() -> None:
    bundle, load, workers = bundle_of(), geometric_load(100, 500), 9
    cycles = of_load(bundle, drawn(load, 256, (100_000, workers)).max(axis=1), workers)
    error = cycles.std() / math.sqrt(len(cycles))
    assert abs(barrier_cycle(bundle, load, workers) - cycles.mean()) < 4 * error


def round_time(bundle: Bundle, kv: np.ndarray, ratio: float) -> Any:
    """Seconds in which all micro-batches go round once; kv: loads of shape (..., M, x)."""
    a, c, f = bundle.attention_time(kv), bundle.transfer_time(ratio), bundle.ffn_time(ratio)
    sends_a = c * (bundle.pipeline in ("attention-blocking", "blocking"))
    sends_f = c * (bundle.pipeline == "blocking")
    own = (a + sends_a).sum(axis=-2).max(axis=-1)
    return np.maximum(np.maximum(own, kv.shape[-2] * (f + sends_f)), a.max(axis=(-2, -1)) + f + 2 * c)


@pytest.mark.parametrize("pipeline", PIPELINES[1:])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4])
def test_rounds_of_unequal_loads_last_as_long_as_played(pipeline: str, micro_batches: int) -> None:
    """The recurrence of a pipeline, written out event by event, for loads that stay."""
    bundle = bundle_of(pipeline=pipeline, micro_batches=micro_batches)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        kv, ratio = rng.normal(1.5e5, 2e4, (micro_batches, 5)), float(rng.uniform(2, 20))
        c, f = bundle.transfer_time(ratio), bundle.ffn_time(ratio)
        worker, server, back, ends = np.zeros(5), 0.0, np.zeros(micro_batches), []
        for _ in range(200):
            for m in range(micro_batches):
                done = np.maximum(worker, back[m]) + bundle.attention_time(kv[m])
                worker = done + (0.0 if pipeline == "non-blocking" else c)
                end = max(server, done.max() + c) + f
                server, back[m] = end + (c if pipeline == "blocking" else 0.0), end + c
            ends.append(server)
        assert (ends[-1] - ends[99]) / 100 == pytest.approx(float(round_time(bundle, kv, ratio)), rel=1e-9)


@pytest.mark.parametrize("pipeline", PIPELINES[1:])
@pytest.mark.parametrize(("micro_batches", "workers"), [(2, 7), (2, 10), (3, 9), (3, 14), (4, 10)])
def test_the_cycle_of_a_pipeline_is_that_of_sampled_rounds(pipeline: str, micro_batches: int, workers: int) -> None:
    """Never shorter, since the fullest mean and the fullest load are taken as independent, and at most 0.3 % longer."""
    bundle, load = bundle_of(pipeline=pipeline, micro_batches=micro_batches), geometric_load(100, 500)
    cycles = round_time(bundle, drawn(load, 256, (20_000, micro_batches, workers)), workers) / micro_batches
    error, here = cycles.std() / math.sqrt(len(cycles)), barrier_cycle(bundle, load, workers)
    assert cycles.mean() - 4 * error <= here <= 1.003 * cycles.mean() + 4 * error


def test_the_cycle_of_a_pipeline_is_that_of_two_independent_extremes() -> None:
    bundle = bundle_of(pipeline="non-blocking", micro_batches=2, attention=TWO_PIECES)
    load, workers, rng = SlotLoad(500.0, 400.0**2, 100.0, 500.0), 7, np.random.default_rng(3)
    mean, spread = 256 * load.theta, 16 * load.deviation
    means = rng.normal(mean, spread / math.sqrt(2), (100_000, workers)).max(axis=1)
    loads = rng.normal(mean, spread, (100_000, 2 * workers)).max(axis=1)
    c, f = bundle.transfer_time(workers), bundle.ffn_time(workers)
    cycles = np.maximum(np.maximum(bundle.attention_time(means), f), (bundle.attention_time(loads) + f + 2 * c) / 2)
    error = cycles.std() / math.sqrt(len(cycles))
    assert abs(barrier_cycle(bundle, load, workers) - cycles.mean()) < 4 * error


def test_the_attention_stage_of_one_worker_on_average() -> None:
    bundle, load = bundle_of(attention=TWO_PIECES), SlotLoad(500.0, 400.0**2, 100.0, 500.0)
    sampled = bundle.attention_time(drawn(load, 256, (400_000,)))
    assert abs(mean_attention(bundle, load) - sampled.mean()) < 4 * sampled.std() / math.sqrt(len(sampled))
    assert mean_attention(bundle_of(), load) == pytest.approx(float(bundle_of().attention_time(256 * 500)), rel=1e-12)


def test_the_cycle_at_the_extremes() -> None:
    load = geometric_load(100, 500)
    slow = bundle_of(ffn=[{"base": 1.0, "decode": 1e-9}])
    assert barrier_cycle(slow, load, 512) == pytest.approx(slow.ffn_time(512), rel=1e-15)
    fast = bundle_of(ffn=[{"base": 1e-9, "decode": 1e-15}], transfer=[{}])
    held = 256 * 599 + math.sqrt(256) * load.deviation * expected_largest(512)
    assert barrier_cycle(fast, load, 512) == pytest.approx(50e-6 + 0.00165e-6 * held, rel=1e-10)
    still = SlotLoad(599.0, 0.0, 100.0, 500.0)
    for workers in (1, 9, 512):
        assert barrier_cycle(bundle_of(), still, workers) == cycle(bundle_of(), still, workers)
    plain = bundle_of(attention=[{"base": 50e-6, "decode": 1e-6}])
    assert barrier_cycle(plain, load, 9) == pytest.approx(cycle(plain, load, 9), rel=1e-15)


def test_a_measured_ffn_table_enters_with_its_own_times() -> None:
    table = {"tokens": [256, 512, 768, 1024], "seconds": [1e-4, 1.1e-4, 5e-4, 5.01e-4]}
    bundle, load = bundle_of(ffn=[], ffn_table=table), geometric_load(100, 500)
    for workers in (1, 2, 3, 4):
        assert barrier_cycle(bundle, load, workers) == pytest.approx(by_quadrature(bundle, load, workers), rel=1e-9)


CASES = st.fixed_dictionaries(
    {
        "pipeline": st.sampled_from(PIPELINES),
        "micro_batches": st.integers(1, 4),
        "batch": st.integers(1, 1000),
        "attention": st.sampled_from([PUBLISHED["attention"], TWO_PIECES, [{"decode": 1e-6}]]),
    }
)


@settings(max_examples=60, deadline=None)
@given(CASES, st.floats(10.0, 3000.0), st.floats(0.0, 2.0), st.integers(1, 60))
def test_waiting_costs_time_and_more_workers_wait_longer(
    case: dict[str, Any], theta: float, spread: float, workers: int
) -> None:
    bundle, load = bundle_of(**case), SlotLoad(theta, (spread * theta) ** 2, 100.0, 100.0)
    here = barrier_cycle(bundle, load, workers)
    assert here >= cycle(bundle, load, workers) * (1 - 1e-12)
    assert barrier_cycle(bundle, load, workers + 1) >= here * (1 - 1e-12)
    # At the same ratio twice the bundle waits longer, for the same work of every device.
    assert barrier_cycle(bundle, load, 2 * workers, 2) >= here * (1 - 1e-12)
    wider = SlotLoad(theta, (2 * spread * theta) ** 2, 100.0, 100.0)
    assert barrier_cycle(bundle, wider, workers) >= here * (1 - 1e-12)


@pytest.mark.parametrize(
    ("batch", "prompt", "output", "noted"),
    [(128, 100, 500, 8), (256, 100, 500, 10), (512, 100, 500, 11), (256, 100, 100, 2), (256, 500, 500, 18)],
)
def test_best_numbers_of_workers_as_noted_for_steady_state(batch: int, prompt: int, output: int, noted: int) -> None:
    assert best_barrier(bundle_of(batch=batch), geometric_load(prompt, output), 32) == noted


@settings(max_examples=30, deadline=None)
@given(CASES, st.floats(10.0, 3000.0), st.integers(1, 3), st.integers(1, 24))
def test_the_best_number_is_the_best_of_all(case: dict[str, Any], theta: float, servers: int, most: int) -> None:
    bundle, load = bundle_of(**case), SlotLoad(theta, theta**2, 100.0, 100.0)
    every = [throughput(bundle, barrier_cycle(bundle, load, x, servers), x, servers) for x in range(1, most + 1)]
    best = best_barrier(bundle, load, most, servers)
    assert every[best - 1] >= max(every) * (1 - 1e-11)
    still = SlotLoad(theta, 0.0, 100.0, 100.0)
    alone = best_whole(bundle, still, most, servers)
    assert best_barrier(bundle, still, most, servers) == alone


def test_imbalance_is_that_of_sampled_workers() -> None:
    bundle, load = bundle_of(), geometric_load(100, 500)
    held = np.random.default_rng(9).normal(256 * load.theta, 16 * load.deviation, (100_000, 8))
    assert imbalance(bundle, load, 8) == pytest.approx(held.max(axis=1).mean() / (256 * load.theta) - 1, rel=0.01)
    assert imbalance(bundle, load, 1) == pytest.approx(0.0, abs=1e-15)


LUMPY = SlotLaw(np.array([10, 11, 400, 1500]), np.array([0.4, 0.3, 0.2, 0.1]))
"""A slot's load that is nothing like normal; its sums are on single tokens."""


def load_of(law: SlotLaw) -> SlotLoad:
    return SlotLoad(law.mean, law.variance, 100.0, 100.0)


def sums_by_hand(law: SlotLaw, n: int) -> tuple[np.ndarray, np.ndarray]:
    """All sums of n loads with their probabilities, one for each tuple of loads."""
    tokens = np.array([sum(v) for v in itertools.product(law.values.tolist(), repeat=n)], dtype=float)
    weight = np.array([math.prod(p) for p in itertools.product(law.probabilities.tolist(), repeat=n)])
    return tokens, weight


def largest_by_hand(tokens: np.ndarray, weight: np.ndarray, many: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest of many independent ones: its values and probabilities."""
    order = np.argsort(tokens)
    return tokens[order], np.diff(np.cumsum(weight[order]) ** many, prepend=0.0)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (3, 1), (300, 100)])
def test_the_exact_cycle_is_the_sum_over_all_loads(pipeline: str, workers: int, servers: int) -> None:
    bundle = bundle_of(
        pipeline=pipeline,
        batch=3,
        attention=[{"base": 70e-6, "kv": 2e-9}, {"base": 50e-6, "kv": 5e-8}],
        ffn=[{"base": 1e-4}],
    )
    ratio, c = workers / servers, bundle.transfer_time(1.0)
    one, two = sums_by_hand(LUMPY, 3), sums_by_hand(LUMPY, 6)
    if pipeline == "ideal":
        tokens, weight = largest_by_hand(*one, workers)
        exact = float(of_load(bundle, tokens, ratio) @ weight)
    else:
        means, p = largest_by_hand(two[0] / 2, two[1], workers)
        loads, q = largest_by_hand(*one, 2 * workers)
        own = np.maximum(
            bundle.attention_time(means) + c * (pipeline != "non-blocking"), 1e-4 + c * (pipeline == "blocking")
        )
        whole = (bundle.attention_time(loads) + 1e-4 + 2 * c) / 2
        exact = float(p @ np.maximum(own[:, None], whole) @ q)
    assert barrier_cycle(bundle, load_of(LUMPY), workers, servers, LUMPY) == pytest.approx(exact, rel=1e-10)


def test_mean_and_fullest_load_of_an_exact_law_are_sums_over_all_loads() -> None:
    bundle, (tokens, weight) = bundle_of(batch=4, attention=TWO_PIECES), sums_by_hand(LUMPY, 4)
    by_hand = float(bundle.attention_time(tokens) @ weight)
    assert mean_attention(bundle, load_of(LUMPY), LUMPY) == pytest.approx(by_hand, rel=1e-11)
    for workers in (1, 7, 512):
        values, p = largest_by_hand(tokens, weight, workers)
        fuller = float(values @ p) / float(tokens @ weight) - 1
        assert imbalance(bundle, load_of(LUMPY), workers, LUMPY) == pytest.approx(fuller, abs=1e-11)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_of_many_slots_the_exact_cycle_is_that_of_normal_loads(pipeline: str) -> None:
    even = SlotLaw(np.arange(100, 600), np.full(500, 1 / 500))
    bundle = bundle_of(pipeline=pipeline, batch=4096, attention=[{"base": 50e-6, "kv": 0.1e-9}])
    for workers in (1, 8, 200):
        normal, exact = (barrier_cycle(bundle, load_of(even), workers, 20, law) for law in (None, even))
        assert exact == pytest.approx(normal, rel=2e-7)
        assert imbalance(bundle, load_of(even), workers, even) == pytest.approx(
            imbalance(bundle, load_of(even), workers), abs=1e-5
        )


def test_heavy_tails_are_met_where_normal_loads_are_too_short() -> None:
    """Pareto loads of 16 slots, sampled."""
    tokens = np.arange(100, 20_000)
    law = SlotLaw(tokens, tokens**-2.0 / (tokens**-2.0).sum())
    bundle, rng = bundle_of(batch=16, attention=[{"base": 50e-6, "kv": 0.02e-6}]), np.random.default_rng(2)
    drawn = rng.choice(tokens, (10_000, 16, 16), p=law.probabilities).sum(axis=2).max(axis=1)
    cycles = of_load(bundle, drawn, 16)
    error = cycles.std() / math.sqrt(len(cycles))
    assert abs(barrier_cycle(bundle, load_of(law), 16, 1, law) - cycles.mean()) < 4 * error
    assert barrier_cycle(bundle, load_of(law), 16) < cycles.mean() - 20 * error


@settings(max_examples=20, deadline=None)
@given(CASES, st.integers(2, 60), st.integers(1, 3))
def test_exact_cycles_wait_too_and_the_best_is_the_best_of_all(case: dict[str, Any], spread: int, servers: int) -> None:
    law = SlotLaw(np.array([1, spread, spread**2]), np.array([0.5, 0.3, 0.2]))
    bundle, load = bundle_of(**case), load_of(law)
    cycles = [barrier_cycle(bundle, load, x, servers, law) for x in range(1, 17)]
    assert all(tau >= cycle(bundle, load, x / servers) * (1 - 1e-9) for x, tau in enumerate(cycles, 1))
    assert all(b >= a * (1 - 1e-12) for a, b in itertools.pairwise(cycles))
    made = [throughput(bundle, tau, x, servers) for x, tau in enumerate(cycles, 1)]
    assert made[best_barrier(bundle, load, 16, servers, law) - 1] >= max(made) * (1 - 1e-11)
