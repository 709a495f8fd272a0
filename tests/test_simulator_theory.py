"""The simulator against queueing theory and published dynamics; every number has its source beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmopt.arrays import Floats, Ints
from llmopt.evaluate.kernel import CompiledCore
from llmopt.evaluate.saturate import SaturatedRun, saturated_throughput
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, index_router
from llmopt.scenario import Pool, Scenario
from llmopt.workload import Requests

Lengths = Callable[[np.random.Generator, int], tuple[Ints, Ints]]
UNLIMITED = {"max_batch": 1_000_000, "token_budget": 100_000_000}


def make_pool(mode: str, **settings: Any) -> Pool:
    """A replica as in the queueing papers: steps of 1 s, memory in tokens, no first token from prefill."""
    paper = {"block_size": 1, "first_token": "decode", "preemption": mode, "step_time": [{"base": 1.0}], **UNLIMITED}
    return Pool.model_validate({"name": "p", "replicas": 1, **paper, **settings})


def play(pool: Pool, sample: Requests) -> Any:
    law = {"law": "constant", "value": 1}
    classes = [{"name": "c", "share": 1.0, "prompt": law, "output": law}]
    scenario = Scenario.model_validate(
        {"name": "one", "workload": {"rate": 1.0, "classes": classes}, "pools": [pool.model_dump()]}
    )
    return simulate(scenario, Plan("only", index_router(scenario)), requests=sample)


def sample_of(arrival: Floats, prompt: Any, output: Any) -> Requests:
    n = len(arrival)
    lengths = [np.broadcast_to(np.asarray(x, np.int64), n).copy() for x in (prompt, output)]
    return Requests(np.asarray(arrival, float), *lengths, np.zeros(n, np.int64), np.zeros(n))


def poisson(rate: float, n: int, seed: int = 0) -> Floats:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, n))


def area(prompt: Ints, output: Ints, chunk: int) -> Ints:
    """g(s, o) of theory/stability.md 1.1, exact for every s."""
    full = -(-prompt // chunk) - 1
    return np.asarray(chunk * full * (full + 1) // 2 + prompt + output * prompt + output * (output + 1) // 2)


def uniform(s: int, o: int) -> Lengths:
    return lambda rng, n: (rng.integers(10, s + 1, n), rng.integers(10, o + 1, n))


def constant(s: int, o: int) -> Lengths:
    return lambda rng, n: (np.full(n, s), np.full(n, o))


def geometric(rng: np.random.Generator, n: int) -> tuple[Ints, Ints]:
    return np.minimum(rng.geometric(1 / 200, n), 2000), np.minimum(rng.geometric(1 / 200, n), 2000)


def two_point(rng: np.random.Generator, n: int) -> tuple[Ints, Ints]:
    short = rng.random(n) < 0.5
    return np.where(short, 40, 400), np.where(short, 400, 40)


# theory/stability.md 1.5: saturated throughput over mu; the geometric rows there exceed the bound 1 by their noise
TABLE: dict[str, tuple[Lengths, int, int, dict[str, float]]] = {
    "paper 1:1": (
        uniform(1600, 1600),
        131_000,
        512,
        dict(reserve=0.707, lookahead=0.983, restart=0.983, recompute=0.990, swap=0.991),
    ),
    "paper 2:1": (
        uniform(2133, 1066),
        131_000,
        512,
        dict(reserve=0.791, lookahead=0.987, restart=0.987, recompute=0.990, swap=0.992),
    ),
    "paper 1:2": (
        uniform(1066, 2133),
        131_000,
        512,
        dict(reserve=0.630, lookahead=0.977, restart=0.977, recompute=0.991, swap=0.991),
    ),
    "U160, 3200": (
        uniform(160, 160),
        3_200,
        64,
        dict(reserve=0.698, lookahead=0.960, restart=0.958, recompute=0.977, swap=0.987),
    ),
    "U160, 1000": (
        uniform(160, 160),
        1_000,
        64,
        dict(reserve=0.644, lookahead=0.875, restart=0.862, recompute=0.931, swap=0.945),
    ),
    "geometric": (geometric, 40_000, 512, dict(reserve=0.669, lookahead=1.0, restart=1.0, recompute=1.0, swap=1.0)),
    "two-point": (
        two_point,
        20_000,
        128,
        dict(reserve=0.578, lookahead=0.690, restart=0.645, recompute=0.980, swap=0.990),
    ),
    "(100, 100)": (
        constant(100, 100),
        20_000,
        512,
        dict(reserve=0.751, lookahead=0.751, restart=0.751, recompute=0.991, swap=0.996),
    ),
    "(2, 200)": (
        constant(2, 200),
        20_000,
        512,
        dict(reserve=0.505, lookahead=0.510, restart=0.507, recompute=0.993, swap=0.998),
    ),
}


@pytest.mark.parametrize("instance", TABLE)
@pytest.mark.parametrize("mode", ["reserve", "lookahead", "restart", "recompute", "swap"])
def test_saturated_throughput_of_every_preemption_mode(instance: str, mode: str) -> None:
    lengths, memory, chunk, published = TABLE[instance]
    prompt, output = lengths(np.random.default_rng(1), 50_000)
    run = saturated_throughput(make_pool(mode, kv_capacity=memory, prefill_chunk=chunk), prompt, output)
    mean_area = area(prompt, output, chunk).mean()
    assert run.rate * mean_area / memory == pytest.approx(published[mode], abs=0.02)
    # conservation, theory/stability.md 1.4 (iv): X E[g] / M = mean use / M - discarded / M
    assert run.rate * mean_area == pytest.approx(run.use - run.waste, rel=0.01)


def test_saturated_throughput_when_other_resources_bind() -> None:
    """theory/stability.md 1.4 (v): batch slots max_batch / E[K + o], token budget budget / E[s + o]."""
    prompt, output = uniform(400, 100)(np.random.default_rng(1), 20_000)
    slots = make_pool("recompute", kv_capacity=100_000, max_batch=16, prefill_chunk=64)
    steps = -(-prompt // 64) + output
    assert saturated_throughput(slots, prompt, output).rate == pytest.approx(16 / steps.mean(), rel=0.01)
    budget = make_pool("recompute", kv_capacity=100_000, token_budget=96)
    assert saturated_throughput(budget, prompt, output).rate == pytest.approx(96 / (prompt + output).mean(), rel=0.01)


@pytest.mark.parametrize("mode", ["lookahead", "restart"])
def test_a_burst_locks_homogeneous_requests_in(mode: str) -> None:
    """theory/stability.md 1.5: at load 0.8 stable from empty, at 0.7499 for ever after a burst of 2000 requests."""
    memory, mean_area = 20_000, int(area(np.array([100]), np.array([100]), 512)[0])
    pool = make_pool(mode, kv_capacity=memory, prefill_chunk=512)
    arrival = poisson(0.80 * memory / mean_area, 80_000, seed=4)
    times = np.array([0.5, 1.0]) * arrival[-1]
    calm = play(pool, sample_of(arrival, 100, 100))
    assert calm.throughput(*times) * mean_area / memory == pytest.approx(0.80, abs=0.01)
    assert calm.waiting(times).max() < 100
    burst = play(pool, sample_of(np.concatenate([np.zeros(2000), arrival]), 100, 100))
    assert burst.throughput(*times) * mean_area / memory == pytest.approx(0.7499, abs=0.002)
    before, after = burst.waiting(times).ravel()
    assert after - before == pytest.approx(0.05 * memory / mean_area * np.diff(times)[0], rel=0.1)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_burst_is_absorbed_where_progress_is_kept(mode: str) -> None:
    memory, mean_area = 20_000, int(area(np.array([100]), np.array([100]), 512)[0])
    arrival = np.concatenate([np.zeros(2000), poisson(0.95 * memory / mean_area, 80_000, seed=4)])
    run = play(make_pool(mode, kv_capacity=memory, prefill_chunk=512), sample_of(arrival, 100, 100))
    assert run.waiting(arrival[-1:]).max() < 300


def test_one_request_at_a_time_is_an_m_d_1_queue() -> None:
    """Mean wait rho S / (2 (1 - rho)); S = 1 prefill + 15 decode steps of 1/16 s each."""
    pool = make_pool("recompute", kv_capacity=1000, max_batch=1, step_time=[{"base": 1 / 16}])
    run = play(pool, sample_of(poisson(0.8, 400_000, seed=2), 20, 15))
    assert run.queue_time.mean() == pytest.approx(0.8 / (2 * 0.2), rel=0.03)
    assert run.utilisation[0] == pytest.approx(0.8, rel=0.01)


def test_one_request_at_a_time_is_an_m_g_1_queue() -> None:
    """Pollaczek-Khinchine: lambda E[S^2] / (2 (1 - rho)); service in steps of which some cost more."""
    rng = np.random.default_rng(3)
    n = 400_000
    prompt, output = rng.integers(1, 300, n), rng.integers(1, 40, n)
    pool = make_pool(
        "recompute", kv_capacity=1000, max_batch=1, prefill_chunk=64, step_time=[{"base": 0.01, "prefill": 0.001}]
    )
    service = 0.01 * (-(-prompt // 64) + output) + 0.001 * prompt
    rate = 0.7 / service.mean()
    run = play(pool, sample_of(poisson(rate, n, seed=5), prompt, output))
    assert run.queue_time.mean() == pytest.approx(rate * (service**2).mean() / (2 * 0.3), rel=0.03)
    assert run.replicas.busy[0] == pytest.approx(service.sum())


def test_an_empty_system_serves_a_request_alone() -> None:
    """Max-affine step times summed by hand over one request."""
    pieces = [{"base": 0.02, "kv": 1e-5}, {"base": 0.01, "prefill": 1e-3, "kv": 5e-5, "pairs": 1e-6}]
    pool = make_pool("recompute", kv_capacity=5000, prefill_chunk=256, first_token="prefill", step_time=pieces)
    run = play(pool, sample_of(np.array([1.5]), 600, 1000))
    chunks, before = np.array([256, 256, 88]), np.array([0, 256, 512])
    prefill = np.maximum(0.02, 0.01 + 1e-3 * chunks + 1e-6 * (chunks * before + chunks**2 / 2))
    read = 600 + np.arange(999)
    decode = np.maximum(0.02 + 1e-5 * read, 0.01 + 5e-5 * read)
    assert run.ttft[0] == pytest.approx(prefill.sum(), rel=1e-12)
    assert run.e2e[0] == pytest.approx(prefill.sum() + decode.sum(), rel=1e-12)
    assert run.tpot[0] == pytest.approx(decode.mean(), rel=1e-12)
    used = np.concatenate([np.cumsum(chunks), read + 1])
    assert run.replicas.held_time[0] == pytest.approx(used @ np.concatenate([prefill, decode]), rel=1e-12)


def test_sarathi_locks_into_the_published_state() -> None:
    """Dai et al. 2504.07347 (theory/batching.md 6): budget 128, at most 100 requests, (290, 990) every ten steps."""
    pool = make_pool("recompute", kv_capacity=10_000_000, token_budget=128, max_batch=100)
    arrival = 10.0 * np.arange(4000)
    core = CompiledCore([pool], sample_of(arrival, 290, 990))
    states = set()
    for i, time in enumerate(arrival):
        core.look(time)
        core.arrive(0, i, time)
        for step in range(1, 11 if i > 3900 else 0):
            core.look(time + step)
            states.add((int(core.world.reps["prefill"][0]), int(core.world.reps["decode"][0])))
    assert states == {(29, 99)}


def test_peak_use_of_the_slotted_algorithm() -> None:
    """Dong and Cao 2604.11001 Theorem 3.3: four of each class per slot use exactly 4 (410 + 1220 + 2430) = 16240."""
    slots = 200
    arrival = np.repeat(np.arange(slots, dtype=float), 12)
    # usage l + j after j tokens: the prefill of l + 1 tokens gives the first one
    pool = make_pool("recompute", kv_capacity=16_492, first_token="prefill")
    run = play(pool, sample_of(arrival, 11, np.tile([20] * 4 + [40] * 4 + [60] * 4, slots)))
    assert run.replicas.peak[0] == 16_240
    assert run.queue_time.max() == 0 and run.replicas.preemptions[0] == 0
    assert run.replicas.steps[0] == slots + 59


@pytest.mark.parametrize(("first", "completions"), [(20, (20, 20)), (19, (0, 35)), (46, (0, 35))])
def test_homogeneous_waves_of_eviction(first: int, completions: tuple[int, int]) -> None:
    """Ao et al. 2606.15555: two stages of 3 and 4 tokens in 140; [20, 20] stays, [21, 19] enters [46, 0] -> [0, 35]."""
    pool = make_pool("restart", kv_capacity=140, first_token="prefill")
    arrival = np.concatenate([np.zeros(first), np.ones(20_000)])
    run = play(pool, sample_of(arrival, 3, 2))
    per_step = np.bincount(run.finish.astype(int), minlength=502)[400:500].reshape(-1, 2)
    assert {tuple(sorted(pair)) for pair in per_step.tolist()} == {completions}


def test_saturation_needs_enough_requests() -> None:
    from llmopt.errors import ScenarioError

    pool = make_pool("reserve", kv_capacity=1000)
    with pytest.raises(ScenarioError, match="give more requests"):
        saturated_throughput(pool, np.full(3, 10), np.full(3, 10))
    with pytest.raises(ScenarioError, match="1001 tokens exceeds the 1000 that its KV memory"):
        saturated_throughput(pool, np.array([1, 1000]), np.array([1, 1]))


def test_the_window_of_saturation_is_consistent() -> None:
    pool = make_pool("recompute", kv_capacity=3000, prefill_chunk=64)
    run = saturated_throughput(pool, *uniform(160, 160)(np.random.default_rng(0), 5000))
    assert isinstance(run, SaturatedRun)
    assert run.completed / (run.end - run.start) == run.rate
    assert run.totals.busy[0] == pytest.approx(run.end - run.start)
    assert run.step_time == pytest.approx(1.0)
    assert 0 < run.waste < run.use <= 3000
