"""KV load of a slot: brute force over ages, special cases in closed form, and standard errors against repetition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.errors import ScenarioError
from llmopt.reading import load_scenario
from llmopt.slots import BLOCKS, SlotLoad, area, area_of_square, block_error, slot_load, slot_load_of
from llmopt.workload import Pairs, RequestClass

LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=12)


def class_of(prompt: dict[str, Any], output: dict[str, Any]) -> RequestClass:
    return RequestClass.model_validate({"name": "r", "share": 1.0, "prompt": prompt, "output": output})


def geometric(mean: float) -> dict[str, Any]:
    return {"law": "geometric", "mean": mean, "max": int(60 * mean)}


def load_of(prompt: dict[str, Any], output: dict[str, Any], first_step: int = 0) -> SlotLoad:
    return slot_load([class_of(prompt, output)], np.ones(1), first_step)


@given(LENGTHS)
def test_theta_and_nu_are_mean_and_deviation_over_all_steps_of_all_requests(pairs: list[tuple[int, int]]) -> None:
    held = np.concatenate([p + np.arange(d) for p, d in pairs])
    found = slot_load_of(*np.array(pairs).T)
    assert found.theta == pytest.approx(held.mean())
    assert found.deviation == pytest.approx(held.std(), abs=1e-5)


@given(LENGTHS, st.integers(0, 1))
def test_a_class_of_pairs_is_its_requests(pairs: list[tuple[int, int]], first_step: int) -> None:
    prompt, output = np.array(pairs).T
    cls = class_of({"law": "constant", "value": 1}, {"law": "constant", "value": 1})
    cls = cls.model_copy(update={"pairs": Pairs(prompt, output)})
    if output.sum() == first_step * len(output):
        with pytest.raises(ScenarioError, match="no request stays a single decode step"):
            slot_load([cls], np.ones(1), first_step)
        return
    by_class, by_hand = slot_load([cls], np.ones(1), first_step), slot_load_of(prompt, output - first_step)
    numbers = ("theta", "variance", "mean_prompt", "mean_decode", "error")
    for key in numbers:
        assert getattr(by_class, key) == pytest.approx(getattr(by_hand, key), rel=1e-9, abs=1e-6)
    assert by_class.requests == len(pairs)


def test_areas_are_sums_over_the_steps() -> None:
    p, d = np.array([5.0, 7.0, 1.0]), np.array([1.0, 4.0, 0.0])
    ages = [np.arange(k) for k in (1, 4, 0)]
    assert area(p, d) == pytest.approx([(x + k).sum() for x, k in zip(p, ages, strict=True)])
    assert area_of_square(p, d) == pytest.approx([((x + k) ** 2).sum() for x, k in zip(p, ages, strict=True)])


def test_geometric_decodes_have_the_published_moments() -> None:
    found, p = load_of(geometric(100.0), geometric(500.0)), 1 / 500
    var_prompt = 100.0**2 * (1 - 1 / 100)
    assert found.theta == pytest.approx(100 + 500 - 1, rel=1e-9)
    assert found.variance == pytest.approx(var_prompt + (1 - p) / p**2, rel=1e-9)
    assert (found.error, found.requests) == (0.0, 0)


def test_constant_lengths_and_the_convention_of_steps() -> None:
    lengths = ({"law": "constant", "value": 100}, {"law": "constant", "value": 500})
    assert load_of(*lengths).theta == pytest.approx(349.5)
    assert load_of(*lengths).variance == pytest.approx((500**2 - 1) / 12)
    assert load_of(*lengths, first_step=1).theta == pytest.approx(349.0)


@given(LENGTHS)
def test_correlation_raises_theta_by_the_covariance_over_the_mean_decode(pairs: list[tuple[int, int]]) -> None:
    p, d = np.array(pairs).T
    product = np.array([(a, b) for a in p for b in d]).T
    apart = slot_load_of(*product).theta
    covariance = np.cov(p, d, ddof=0)[0, 1]
    assert slot_load_of(p, d).theta - apart == pytest.approx(covariance / d.mean(), abs=1e-9)


def test_classes_mix_by_their_requests_not_by_their_loads() -> None:
    short = class_of({"law": "constant", "value": 10}, {"law": "constant", "value": 1})
    long = class_of({"law": "constant", "value": 10}, {"law": "constant", "value": 99})
    mixed = slot_load([short, long], np.array([3.0, 1.0]))
    assert mixed.theta == pytest.approx(np.concatenate([[10.0] * 3, 10 + np.arange(99)]).mean())


def sample(rng: np.random.Generator, law: str, size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Lengths as in the notes on the estimator: geometric, or lognormal with sigma = 1 and the same means."""
    if law == "geometric":
        return rng.geometric(1 / 100, size), rng.geometric(1 / 500, size)
    draws = [np.exp(rng.normal(np.log(mean) - 0.5, 1.0, size)) for mean in (100.0, 500.0)]
    return np.ceil(draws[0]).astype(np.int64), np.ceil(draws[1]).astype(np.int64)


@pytest.mark.parametrize(("law", "true", "noted"), [("geometric", 599.0, 14.0), ("lognormal", 784.8, 83.0)])
def test_the_error_of_2000_requests_is_the_spread_over_repetitions(law: str, true: float, noted: float) -> None:
    prompt, decode = sample(np.random.default_rng(5), law, (200, 2000))
    found = [slot_load_of(p, d) for p, d in zip(prompt, decode, strict=True)]
    thetas, errors = np.array([f.theta for f in found]), np.array([f.error for f in found])
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(thetas.std(), rel=0.2)
    assert thetas.mean() == pytest.approx(true, rel=0.02)
    # The notes' figure is the error of one sample, which varies much with a heavy tail.
    assert np.quantile(errors, 0.01) <= noted <= np.quantile(errors, 0.99)


def drifting(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Requests whose mean output wanders with a memory of about 100 requests."""
    level = np.empty(n)
    level[0] = rng.normal()
    steps = rng.normal(size=n) * np.sqrt(1 - 0.99**2)
    for i in range(1, n):
        level[i] = 0.99 * level[i - 1] + steps[i]
    return rng.geometric(1 / 100, n), np.maximum(1, (200 * np.exp(0.5 * level)).astype(np.int64))


def test_blocks_see_the_drift_that_independence_does_not() -> None:
    rng = np.random.default_rng(8)
    found = [slot_load_of(*drifting(rng, 20_000), ordered=True) for _ in range(20)]
    spread = float(np.std([f.theta for f in found], ddof=1))
    blocks = float(np.sqrt(np.mean([f.error**2 for f in found])))
    assert all(f.blocks == BLOCKS for f in found)
    assert blocks == pytest.approx(spread, rel=0.35)
    p, d = drifting(rng, 20_000)
    assert slot_load_of(p, d).error < 0.3 * blocks


def test_block_error_by_hand() -> None:
    prompt, decode = np.array([10, 20, 30, 40, 50]), np.array([1, 2, 1, 2, 1])
    theta = slot_load_of(prompt, decode).theta
    y = decode * prompt + decode * (decode - 1) / 2 - theta * decode
    by_hand = np.sqrt(2 * ((y[0] + y[1]) ** 2 + (y[2] + y[3] + y[4]) ** 2)) / decode.sum()
    assert block_error(prompt, decode, theta, 2) == pytest.approx(by_hand)


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_the_order_only_ever_raises_the_error(seed: int) -> None:
    prompt, decode = sample(np.random.default_rng(seed), "geometric", (200,))
    plain, ordered = slot_load_of(prompt, decode), slot_load_of(prompt, decode, ordered=True)
    blocks = block_error(prompt, decode, plain.theta)
    assert ordered.error == max(plain.error, blocks)
    assert (ordered.blocks > 0) == (blocks > plain.error)


def test_few_requests_have_no_blocks_and_one_has_no_error() -> None:
    few = np.arange(1, 2 * BLOCKS)
    assert slot_load_of(few, few, ordered=True).blocks == 0
    assert slot_load_of(np.array([5]), np.array([5])).error == float("inf")
    with pytest.raises(ScenarioError, match="3 requests cannot be cut into 5 blocks; give 2 to 3"):
        block_error(few[:3], few[:3], 1.0, 5)


@pytest.mark.parametrize(("prompt", "decode"), [([], []), ([10], [0])])
def test_nothing_to_estimate_from_is_one_sentence(prompt: list[int], decode: list[int]) -> None:
    with pytest.raises(ScenarioError, match="no requests to estimate a slot's load from; give a trace with outputs"):
        slot_load_of(np.array(prompt), np.array(decode))


def test_a_scenario_on_a_trace_takes_its_order_into_account(tmp_path: Path) -> None:
    prompt, output = drifting(np.random.default_rng(3), 4000)
    rows = "\n".join(f"{0.5 * i},{p},{o}" for i, (p, o) in enumerate(zip(prompt, output, strict=True)))
    (tmp_path / "t.csv").write_text(f"time,prompt,output\n{rows}\n")
    (tmp_path / "s.toml").write_text("""
name = "t"
[workload]
arrivals = { law = "replay" }
[workload.trace]
file = "t.csv"
columns = { arrival = "time", prompt = "prompt", output = "output" }
[[workload.classes]]
name = "r"
[[pools]]
name = "a"
replicas = 1
step_time = [{ base = 0.01 }]
kv_capacity = 100000
""")
    found = load_scenario(tmp_path / "s.toml").slot_load
    assert found.blocks == BLOCKS
    assert found.error == pytest.approx(block_error(prompt, output - 1, found.theta), rel=1e-9)


def test_a_scenario_of_laws_has_no_error() -> None:
    assert factories.scenario([factories.pool()]).slot_load == SlotLoad(149.5, (100**2 - 1) / 12, 100.0, 100.0)


@pytest.mark.parametrize("name", ["azure-llm-2023/AzureLLMInferenceTrace_conv.csv"])
def test_lengths_of_a_real_trace_drift(name: str, shared: Path) -> None:
    from llmopt.traces import read_trace

    trace = read_trace(shared / "data" / name)
    plain, ordered = slot_load_of(trace.prompt, trace.output), slot_load_of(trace.prompt, trace.output, ordered=True)
    assert ordered.blocks == BLOCKS
    assert ordered.error > plain.error
