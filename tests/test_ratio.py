"""The A/F ratio in closed form: the lemma on random instances, numerical minima, published numbers, bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from afd import PIPELINES, bundle_of, geometric_load
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from llmopt.bundle import Bundle
from llmopt.errors import ScenarioError
from llmopt.ratio import (
    best_ratio,
    best_whole,
    cycle,
    horizon_load,
    interval,
    kv_need,
    mean_field,
    published,
    regime,
    rows_at,
    throughput,
)
from llmopt.slots import SlotLoad


def at_horizon(bundle: Bundle, load: SlotLoad, requests: int = 10_000) -> SlotLoad:
    return replace(load, theta=horizon_load(load.mean_prompt, load.mean_decode, bundle.batch, requests))


def random_bundle(rng: np.random.Generator) -> tuple[Bundle, SlotLoad]:
    """Any pipeline, several pieces, prices or none; coefficients over two decades, some of them 0."""

    def some(low: float, zero: float = 0.3) -> float:
        return 0.0 if rng.random() < zero else float(low * 10 ** rng.uniform(0, 2))

    def pieces(count: int, kv: bool) -> list[dict[str, float]]:
        slope = "kv" if kv else "decode"
        return [{"base": some(1e-5), slope: some(1e-10 if kv else 1e-8, 0.0)} for _ in range(count)]

    priced = rng.random() < 0.5
    found = bundle_of(
        attention=pieces(int(rng.integers(1, 4)), kv=True),
        transfer=[{"base": some(1e-6), "decode": some(1e-9)}],
        transfer_of=str(rng.choice(["worker", "bundle"])),
        ffn=pieces(int(rng.integers(1, 4)), kv=False),
        pipeline=str(rng.choice(PIPELINES)),
        micro_batches=int(rng.integers(1, 5)),
        batch=int(rng.integers(1, 600)),
        attention_price=float(rng.uniform(0.5, 20)) if priced else 0.0,
        ffn_price=float(rng.uniform(0.5, 20)) if priced else 0.0,
    )
    return found, SlotLoad(float(rng.uniform(10, 5000)), 1e5, 100.0, 100.0)


def made(bundle: Bundle, load: SlotLoad, workers: float, servers: int = 1) -> float:
    """Throughput per weight, written out from the stages, not from rows."""
    a = max(p.base + p.decode * bundle.batch + p.kv * bundle.batch * load.theta for p in bundle.attention)
    r = workers / servers
    sent = bundle.batch * (r if bundle.transfer_of == "bundle" else 1)
    c = max(p.base + p.decode * sent for p in bundle.transfer)
    f = (
        bundle.ffn_table(r * bundle.batch)
        if bundle.ffn_table
        else max(p.base + p.decode * r * bundle.batch for p in bundle.ffn)
    )
    own_a, own_f = (
        a + c * ("attention" in bundle.pipeline or bundle.pipeline == "blocking"),
        f + c * (bundle.pipeline == "blocking"),
    )
    law = max(a, c, f) if bundle.pipeline == "ideal" else max(own_a, own_f, (a + f + 2 * c) / bundle.micro_batches)
    w_a, w_f = (bundle.attention_price, bundle.ffn_price) if bundle.attention_price and bundle.ffn_price else (1, 1)
    return workers * bundle.batch / ((workers * w_a + servers * w_f) * bundle.layers * law)


def test_the_best_whole_number_is_the_floor_or_the_ceiling_on_2000_instances() -> None:
    rng = np.random.default_rng(1)
    for _ in range(2000):
        bundle, load = random_bundle(rng)
        servers, most = int(rng.integers(1, 4)), 40
        every = [made(bundle, load, x, servers) for x in range(1, most + 1)]
        best = best_whole(bundle, load, most, servers)
        assert every[best - 1] >= max(every) * (1 - 1e-11)
        exact = min(best_ratio(bundle, load).ratio * servers, most)
        assert best in (max(1, math.floor(exact)), max(1, math.ceil(exact)))


def test_no_real_ratio_beats_the_best_one() -> None:
    rng = np.random.default_rng(2)
    for _ in range(150):
        bundle, load = random_bundle(rng)
        best = best_ratio(bundle, load)
        assert best.cycle == pytest.approx(cycle(bundle, load, best.ratio), rel=1e-12)
        reach = minimize_scalar(
            lambda logr, b=bundle, s=load: -made(b, s, math.exp(logr)),
            bounds=(math.log(best.ratio) - 3, math.log(best.ratio) + 3),
            method="bounded",
            options={"xatol": 1e-9},
        )
        assert made(bundle, load, best.ratio) >= -reach.fun * (1 - 1e-12)


def test_the_cost_is_convex_in_the_ratio() -> None:
    rng = np.random.default_rng(3)
    for _ in range(100):
        bundle, load = random_bundle(rng)
        r = np.sort(rng.uniform(0.1, 50, 2))
        cost = [1 / made(bundle, load, x) for x in (*r, r.mean())]
        assert cost[2] <= (cost[0] + cost[1]) / 2 * (1 + 1e-12)


def test_rows_and_throughput_say_what_the_stages_say() -> None:
    rng = np.random.default_rng(4)
    for _ in range(200):
        bundle, load = random_bundle(rng)
        workers, servers = int(rng.integers(1, 40)), int(rng.integers(1, 4))
        ratio = workers / servers
        a, b = mean_field(bundle, load)
        assert cycle(bundle, load, ratio) == pytest.approx(float((a + b * ratio).max()), rel=1e-12)
        by_api = throughput(bundle, cycle(bundle, load, ratio), workers, servers)
        assert by_api == pytest.approx(made(bundle, load, workers, servers), rel=1e-12)


@pytest.mark.parametrize(
    ("batch", "prompt", "output", "horizon", "endless"),
    [
        (256, 100, 500, 9.3007, 9.5547),
        (256, 500, 500, 17.2525, 17.5065),
        (256, 100, 100, 2.1694, 2.1694),
        (128, 100, 500, 7.0745, 7.2015),
        (512, 100, 500, 10.2234, 10.7313),
    ],
)
def test_the_published_rule_and_ours_agree_on_an_ideal_pipeline(
    batch: int, prompt: int, output: int, horizon: float, endless: float
) -> None:
    bundle, load = bundle_of(batch=batch), geometric_load(prompt, output)
    per_slot = horizon_load(prompt, output, batch, 10_000)
    assert published(bundle, per_slot).ratio == pytest.approx(horizon, abs=6e-5)
    assert published(bundle, load.theta).ratio == pytest.approx(endless, abs=6e-5)
    assert best_ratio(bundle, load).ratio == pytest.approx(endless, abs=6e-5)
    assert horizon_load(prompt, output, batch, None) == pytest.approx(load.theta)


@pytest.mark.parametrize(
    ("batch", "prompt", "output", "printed", "within"),
    [
        (256, 100, 500, 9.30, 0.005),
        (256, 500, 500, 17.25, 0.005),
        (256, 100, 100, 2.17, 0.005),
        (128, 100, 500, 7.08, 0.0708),
        (256, 100, 500, 9.34, 0.0934),
        (512, 100, 500, 10.31, 0.1031),
    ],
)
def test_the_printed_ratios(batch: int, prompt: int, output: int, printed: float, within: float) -> None:
    per_slot = horizon_load(prompt, output, batch, 10_000)
    assert abs(published(bundle_of(batch=batch), per_slot).ratio - printed) <= within


def test_the_horizon_load_is_the_mean_over_the_steps() -> None:
    p, batch, requests = 1 / 20, 8, 40
    steps = round(requests / (batch * p))
    mean = np.mean([100 + (1 - p) / p * (1 - (1 - p) ** k) for k in range(steps)])
    assert horizon_load(100, 20, batch, requests) == pytest.approx(mean)
    assert horizon_load(100, 1, batch, requests) == 100


@pytest.mark.parametrize(
    ("batch", "prompt", "output", "non_blocking", "attention_blocking"),
    [
        (256, 100, 500, 6.89, 9.30),
        (256, 500, 500, 14.84, 17.25),
        (256, 100, 100, 3.66, 3.66),
        (128, 100, 500, None, 7.08),
        (512, 100, 500, None, 10.22),
    ],
)
def test_two_micro_batches_move_the_optimum_and_three_restore_it(
    batch: int, prompt: int, output: int, non_blocking: float | None, attention_blocking: float
) -> None:
    def best(pipeline: str, micro_batches: int) -> float:
        bundle = bundle_of(batch=batch, pipeline=pipeline, micro_batches=micro_batches)
        return best_ratio(bundle, at_horizon(bundle, geometric_load(prompt, output))).ratio

    if non_blocking is not None:
        assert best("non-blocking", 2) == pytest.approx(non_blocking, abs=0.006)
    assert best("attention-blocking", 2) == pytest.approx(attention_blocking, abs=0.006)
    assert best("non-blocking", 3) == pytest.approx(best("ideal", 2))


def test_the_published_rule_with_several_ffn_pieces_is_the_optimum_of_the_ideal_cycle() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        bundle, load = random_bundle(rng)
        plain = {"pipeline": "ideal", "transfer_of": "worker", "attention_price": 0.0, "ffn_price": 0.0}
        bundle = Bundle.model_validate(bundle.model_dump() | plain)
        rule = published(bundle, load.theta)
        assert rule.ratio == pytest.approx(best_ratio(bundle, load).ratio, rel=1e-9)


def test_parts_of_the_published_rule_by_hand() -> None:
    rule = published(bundle_of(), 599.0)
    assert rule.r_attention == pytest.approx((0.00165 * 256 * 599 + 50 - 100) / (0.083 * 256))
    assert rule.r_transfer == pytest.approx((0.022 * 256 + 20 - 100) / (0.083 * 256))
    assert rule.r_peak == pytest.approx(math.sqrt(100 / (0.083 * 256)))
    flat_first = bundle_of(ffn=[{"base": 400e-6}, {"decode": 0.083e-6}])
    assert published(flat_first, 599.0) == (0.0, 0.0, *[pytest.approx(400 / (0.083 * 256))] * 2)


def test_regimes_by_the_ratio() -> None:
    bundle, load = bundle_of(), geometric_load(100, 500)
    assert regime(bundle, load, 2.0) == "Attention-bound"
    assert regime(bundle, load, 20.0) == "FFN-bound"
    assert best_ratio(bundle, load).regime == "Attention-bound and FFN-bound"
    slow = bundle_of(transfer=[{"base": 1e-3}])
    assert regime(slow, load, 2.0) == "transfer-bound"
    two = bundle_of(pipeline="non-blocking")
    assert regime(two, load, 9.0) == "pipeline-bound"
    assert best_ratio(two, load).regime == "Attention-bound and pipeline-bound"


def test_prices_move_the_stationary_point_and_leave_the_kinks() -> None:
    ffn_bound = bundle_of(attention=[{"base": 1e-6}], attention_price=1.0, ffn_price=4.0)
    assert best_ratio(ffn_bound, geometric_load(100, 500)).ratio == pytest.approx(math.sqrt(4 * 100 / (0.083 * 256)))
    kink = bundle_of(attention_price=1.0, ffn_price=4.0)
    assert best_ratio(kink, geometric_load(100, 500)).ratio == pytest.approx(9.5547, abs=6e-5)


TABLE = {
    "ffn": [],
    "ffn_table": {"tokens": [1024, 2048, 3072, 4096, 6144], "seconds": [0.19e-3, 0.22e-3, 0.276e-3, 0.31e-3, 0.417e-3]},
    "attention": [{"base": 0.127e-3}],
    "transfer": [{"base": 0.034e-3}],
    "batch": 1024,
    "micro_batches": 3,
    "pipeline": "non-blocking",
}


def test_a_measured_table_is_scanned_with_its_own_times() -> None:
    bundle, load = bundle_of(**TABLE), SlotLoad(100.0, 0.0, 100.0, 1.0)
    seconds = {1: 0.19e-3, 2: 0.22e-3, 3: 0.276e-3, 4: 0.31e-3, 6: 0.417e-3}
    for r, f in seconds.items():
        assert cycle(bundle, load, r) == pytest.approx(max(0.127e-3, f, (0.127e-3 + f + 0.068e-3) / 3))
    assert best_whole(bundle, load, 6) == 2
    assert {row.stage for row in rows_at(bundle, 2.0)} == {"attention", "ffn", "pipeline"}


def test_a_table_below_which_the_hull_misleads() -> None:
    """The hull has its best whole ratio at 3, where the measured time is far above it."""
    table = {"tokens": [256, 512, 768, 1024], "seconds": [1e-4, 1.1e-4, 5e-4, 5.01e-4]}
    bundle = bundle_of(ffn=[], ffn_table=table, attention=[{"base": 3e-4}])
    load = SlotLoad(100.0, 0.0, 100.0, 1.0)
    every = [made(bundle, load, x) for x in range(1, 5)]
    assert best_whole(bundle, load, 4) == int(np.argmax(every)) + 1
    hull = Bundle.model_validate(bundle.model_dump() | {"ffn": bundle.table_hull, "ffn_table": None})
    assert best_whole(hull, load, 4) != best_whole(bundle, load, 4)


def test_limits_clip_and_flat_stages_take_all() -> None:
    bundle, load = bundle_of(), geometric_load(100, 500)
    assert best_whole(bundle, load, 4) == 4
    assert best_whole(bundle, load, 32, servers=2) == 19
    assert best_whole(bundle_of(ffn=[{"base": 1e-3}]), load, 7) == 7
    assert best_whole(bundle_of(attention=[{"prefill": 1e-6}], ffn=[{"decode": 1e-6}], transfer=[{}]), load, 7) == 1


def test_without_a_best_ratio_it_is_one_sentence() -> None:
    load = geometric_load(100, 500)
    with pytest.raises(ScenarioError, match="always better; give ffn a decode coefficient"):
        best_ratio(bundle_of(ffn=[{"base": 1e-3}]), load)
    with pytest.raises(ScenarioError, match="give ffn a decode value"):
        published(bundle_of(ffn=[{"base": 1e-3}]), load.theta)
    with pytest.raises(ScenarioError, match="give attention a base, decode or kv coefficient"):
        best_ratio(bundle_of(attention=[{"prefill": 1e-6}], ffn=[{"decode": 1e-6}], transfer=[{}]), load)


def test_an_interval_is_a_point_for_a_law_and_follows_the_error_of_a_trace() -> None:
    bundle, load = bundle_of(), geometric_load(100, 500)
    best = best_ratio(bundle, load).ratio
    assert interval(bundle, load, 0.95) == (best, best)
    low, high = interval(bundle, replace(load, error=14.0, requests=2000), 0.95)
    assert (low, high) == pytest.approx(
        (best - 1.959964 * 14 * 0.00165 / 0.083, best + 1.959964 * 14 * 0.00165 / 0.083)
    )
    assert interval(bundle, replace(load, error=math.inf, requests=1), 0.95)[1] == math.inf
    with pytest.raises(ScenarioError, match="give a number between 0 and 1"):
        interval(bundle, load, 95.0)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.1, 400.0), st.floats(0.5, 0.99))
def test_an_interval_holds_the_best_ratio_and_grows_with_confidence(seed: int, error: float, confidence: float) -> None:
    bundle, load = random_bundle(np.random.default_rng(seed))
    load = replace(load, error=error)
    low, high = interval(bundle, load, confidence)
    assert low * (1 - 1e-9) <= best_ratio(bundle, load).ratio <= high * (1 + 1e-9)
    wider = interval(bundle, load, (1 + confidence) / 2)
    assert wider[0] <= low * (1 + 1e-9)
    assert wider[1] >= high * (1 - 1e-9)


def test_kv_need_of_a_worker() -> None:
    load = SlotLoad(600.0, 250_000.0, 100.0, 500.0)
    assert kv_need(bundle_of(micro_batches=4, batch=100), load) == 240_000
    assert kv_need(bundle_of(micro_batches=4, batch=100), load, 3.0) == 240_000 + 3 * 20 * 500
