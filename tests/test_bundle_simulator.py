"""The saturated bundle simulator against a naive one, closed forms, and the checked figures of the notes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import numpy as np
import oracle_bundle as oracle
import pytest
from afd import PIPELINES, PUBLISHED, bundle_of

from llmopt import ratio
from llmopt.arrays import Floats, Ints
from llmopt.bundle import Bundle
from llmopt.errors import ScenarioError
from llmopt.evaluate import bundle_load, gantt
from llmopt.evaluate.bundle_load import Start, load_series
from llmopt.evaluate.bundle_run import BundleRun, play_bundle, simulate_bundle
from llmopt.scenario import Scenario
from llmopt.slots import SlotLoad, slot_load
from llmopt.workload import Pairs, RequestClass

ARRAYS = ("makespan", "throughput", "per_weight", "idle_attention", "idle_ffn", "tpot", "tpot_p99")


def geometric(prompt: float, output: float) -> RequestClass:
    laws = {
        "prompt": {"law": "geometric", "mean": prompt, "max": int(40 * prompt)},
        "output": {"law": "geometric", "mean": output, "max": int(40 * output)},
    }
    return RequestClass.model_validate({"name": "r", "share": 1.0, **laws})


def constant(prompt: int, output: int, **settings: Any) -> RequestClass:
    laws = {name: {"law": "constant", "value": n} for name, n in (("prompt", prompt), ("output", output))}
    return RequestClass.model_validate({"name": f"c{output}", "share": 1.0, **laws, **settings})


def correlated(n: int = 400) -> RequestClass:
    rng = np.random.default_rng(7)
    output = rng.geometric(1 / 30, n)
    return constant(1, 1).model_copy(update={"pairs": Pairs(5 + 3 * output + rng.integers(0, 20, n), output)})


MIXES: dict[str, tuple[tuple[RequestClass, ...], list[float], int]] = {
    "geometric": ((geometric(100, 50),), [1.0], 0),
    "first token from the prefill": ((geometric(40, 3),), [2.0], 1),
    "classes": ((geometric(100, 20), constant(7, 90), constant(500, 1)), [1.0, 0.5, 2.0], 1),
    "pairs": ((correlated(),), [1.0], 1),
    "pairs and laws": ((correlated(), constant(11, 13)), [1.0, 3.0], 0),
}


def series_of(mix: str, batch: int, workers: int, steps: int, start: Start = "stationary", **settings: Any) -> Floats:
    classes, rates, first = MIXES[mix]
    return load_series(classes, np.array(rates), first, bundle_of(batch=batch, **settings), workers, steps, 5, start)


# The load series


class Watched:
    """A law, and the source of ages, that keeps its own books of which slot each request goes to."""

    def __init__(self, law: bundle_load._Law, batch: int, steps: int) -> None:
        self.law, self.steps, self.mean_decode = law, steps, law.mean_decode
        self.rng = np.random.default_rng(3)
        self.slots: list[list[oracle.Lengths]] = [[] for _ in range(batch)]
        self.ages = [0] * batch

    def integers(self, low: int, high: Ints) -> Ints:
        ages = self.rng.integers(low, high)
        self.ages = ages.tolist()
        return ages

    def draw_met(self, _: object, n: int) -> tuple[Ints, Ints]:
        return self.handed(*self.law.draw_met(self.rng, n))

    def draw(self, _: object, n: int) -> tuple[Ints, Ints]:
        return self.handed(*self.law.draw(self.rng, n))

    def handed(self, prompt: Ints, decode: Ints) -> tuple[Ints, Ints]:
        """The same number of requests for every slot that is not yet occupied to the end, slot after slot."""
        requests = [oracle.Lengths(p, d) for p, d in zip(prompt.tolist(), decode.tolist(), strict=True)]
        ends = [sum(d for _, d in slot) - age for slot, age in zip(self.slots, self.ages, strict=True)]
        waiting = [slot for slot, end in zip(self.slots, ends, strict=True) if end < self.steps]
        each, left = divmod(len(requests), len(waiting))
        assert left == 0
        for i, slot in enumerate(waiting):
            slot += requests[i * each : (i + 1) * each]
        return prompt, decode


@pytest.mark.parametrize("start", ["cold", "stationary"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("batch", [1, 6])
def test_a_series_adds_up_what_every_slot_holds_in_every_step(mix: str, batch: int, start: Start) -> None:
    classes, rates, first = MIXES[mix]
    law = Watched(bundle_load._Law(classes, np.array(rates), first), batch, 150)
    found = bundle_load._one(law, batch, 150, start, law)  # type: ignore[arg-type]
    slots = [oracle.slot_loads(iter(s), age, 150) for s, age in zip(law.slots, law.ages, strict=True)]
    assert found.tolist() == [sum(step) for step in zip(*slots, strict=True)]
    assert start == "stationary" or not any(law.ages)


@pytest.mark.parametrize("mix", MIXES)
def test_a_stationary_series_has_the_mean_and_variance_of_a_slot_at_every_step(mix: str) -> None:
    classes, rates, first = MIXES[mix]
    law, batch, workers = slot_load(classes, np.array(rates), first), 40, 400
    series = series_of(mix, batch, workers, 41)[0]
    for k in (0, 17, 40):
        assert abs(series[k].mean() / batch - law.theta) < 4 * law.deviation / np.sqrt(batch * workers)
        assert series[k].var() / batch == pytest.approx(law.variance, rel=4 * np.sqrt(2.5 / workers))


def test_a_cold_series_warms_up_as_the_horizon_formula_says() -> None:
    workers, batch, p = 150, 64, 1 / 50
    series = series_of("geometric", batch, workers, 200, "cold")[0]
    m = (1 - p) / p
    for k in (0, 1, 10, 60, 199):
        expected = batch * (m * (1 - (1 - p) ** k) + 100)
        error = series[k].std() / np.sqrt(workers)
        assert abs(series[k].mean() - expected) < 4 * error


def test_constant_lengths_give_a_sawtooth() -> None:
    alone = load_series([constant(10, 4)], np.ones(1), 0, bundle_of(batch=3), 1, 9, 1, "cold")
    assert alone[0, :, 0].tolist() == [3 * (10 + k % 4) for k in range(9)]
    steady = load_series([constant(10, 4)], np.ones(1), 1, bundle_of(batch=1), 20, 30, 1)[0]
    assert set(steady.ravel().tolist()) == {10.0, 11.0, 12.0}
    assert (steady[3:] == steady[:-3]).all()


def test_a_seed_is_a_series_and_a_worker_keeps_its_own() -> None:
    settings = {"batch": 16, "steps": 300, "pipeline": "blocking", "micro_batches": 3}
    eight, again, four = (series_of("classes", workers=w, **settings) for w in (8, 8, 4))
    assert eight.shape == (3, 300, 8) and eight.tobytes() == again.tobytes()
    assert (eight[:, :, :4] == four).all()
    columns = {column.tobytes() for column in eight.transpose(0, 2, 1).reshape(24, 300)}
    assert len(columns) == 24


# The pipeline


def random_bundle(rng: np.random.Generator, pipeline: str) -> Bundle:
    """Anything a bundle may be, small."""
    piece: Callable[..., dict[str, float]] = lambda **tops: {k: rng.uniform(0, top) for k, top in tops.items()}  # noqa: E731
    known: dict[str, Any] = {
        "attention": [piece(base=1e-4, decode=1e-6, kv=1e-6) for _ in range(rng.integers(1, 3))],
        "transfer": [piece(base=2e-5, decode=2e-6) for _ in range(rng.integers(1, 3))],
        "transfer_of": str(rng.choice(["worker", "bundle"])),
        "layers": int(rng.integers(1, 5)),
        "batch": int(rng.integers(1, 9)),
        "micro_batches": int(rng.integers(1, 5)),
        "pipeline": pipeline,
        "kv_capacity": 10_000,
    }
    if rng.random() < 0.5:
        return Bundle.model_validate({**known, "ffn": [piece(base=1e-4, decode=1e-5) for _ in range(2)]})
    table = {"tokens": [2.0, 5.0, 9.0, 30.0], "seconds": sorted(rng.uniform(1e-6, 2e-4, 4).tolist())}
    return Bundle.model_validate({**known, "ffn_table": table})


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_number_of_workers_plays_like_the_naive_simulator(pipeline: str) -> None:
    rng = np.random.default_rng(len(pipeline))
    for mix in [*MIXES] * 8:
        bundle, servers, workers = random_bundle(rng, pipeline), int(rng.integers(1, 4)), int(rng.integers(1, 6))
        classes, rates, first = MIXES[mix]
        steps = int(rng.integers(1, 9))
        series = load_series(classes, np.array(rates), first, bundle, workers, steps, int(rng.integers(100)))
        run = play_bundle(bundle, series, servers)
        for x in range(1, workers + 1):
            naive = oracle.play(bundle, series.tolist(), x, servers)
            tokens = len(series) * steps * x * bundle.batch
            expected = {
                "makespan": naive.makespan,
                "throughput": tokens / naive.makespan / (x + servers),
                "idle_attention": naive.idle_attention,
                "idle_ffn": naive.idle_ffn,
                "tpot": np.mean(naive.gaps),
                "tpot_p99": np.quantile(naive.gaps, 0.99),
            }
            for name, value in expected.items():
                assert getattr(run, name)[x - 1] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize(("pipeline", "micro_batches"), [*product(PIPELINES[1:], (1, 2, 3, 4))])
def test_constant_loads_obey_the_law_of_the_pipeline(pipeline: str, micro_batches: int) -> None:
    rng = np.random.default_rng(micro_batches)
    steps = 2500
    for _ in range(12):
        a, f, c = rng.uniform(0.05, 1.0, 3) * (1e-3, 1e-3, 5e-4)
        stages = {"attention": [{"base": a}], "ffn": [{"base": 0.5 * f, "decode": 0.05 * f}], "transfer": [{"base": c}]}
        known = {"batch": 10, "pipeline": pipeline, "micro_batches": micro_batches, "layers": int(rng.integers(1, 3))}
        bundle = bundle_of(**stages, **known)
        run = play_bundle(bundle, np.ones((micro_batches, steps, 2)))
        for x, ffn in ((1, f), (2, 1.5 * f)):
            sent_a = c if pipeline != "non-blocking" else 0.0
            sent_f = c if pipeline == "blocking" else 0.0
            law = max(a + sent_a, ffn + sent_f, (a + ffn + 2 * c) / micro_batches)
            assert run.makespan[x - 1] / (steps * micro_batches * bundle.layers) == pytest.approx(law, rel=1e-3)
            assert run.tpot[x - 1] == pytest.approx(micro_batches * bundle.layers * law, rel=1e-3)
            assert ratio.cycle(bundle, SlotLoad(1.0, 0.0, 1.0, 1.0), x) == pytest.approx(law)
            assert max(line.worker[0] + line.server[0] + 10 * x * line.server[2] for line in bundle.lines) == (
                pytest.approx(law)
            )


def same(one: BundleRun, other: BundleRun) -> bool:
    return all((getattr(one, name) == getattr(other, name)).all() for name in ARRAYS)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_neither_the_core_nor_further_workers_matter(pipeline: str) -> None:
    bundle = bundle_of(batch=8, pipeline=pipeline, micro_batches=3, layers=20)
    series = series_of("pairs", 8, 6, 30, pipeline=pipeline, micro_batches=3)
    run = play_bundle(bundle, series, 2)
    assert same(run, play_bundle(bundle, series, 2, core="python"))
    few = play_bundle(bundle, series[:, :, :4], 2)
    assert all((getattr(run, name)[:4] == getattr(few, name)).all() for name in ARRAYS)


def test_prices_weigh_and_the_best_is_the_largest_per_weight() -> None:
    series = series_of("geometric", 64, 12, 500)
    plain, priced = (
        play_bundle(bundle_of(batch=64, attention_price=a, ffn_price=f), series, 2) for a, f in ((0, 9), (2, 6))
    )
    assert (plain.throughput == plain.per_weight).all() and (plain.throughput == priced.throughput).all()
    x = np.arange(1, 13)
    assert priced.per_weight == pytest.approx(priced.throughput * (x + 2) / (2 * x + 12))
    assert priced.best == 1 + int(np.argmax(priced.per_weight)) > plain.best


# The figures of the notes on the published instances


def instance(batch: int, prompt: float, output: float, **settings: Any) -> Scenario:
    pool = {"name": "b", "first_token": "decode", "bundle": {**PUBLISHED, "batch": batch, **settings}}
    workload = {"rate": 1.0, "classes": [geometric(prompt, output).model_dump(by_alias=True, exclude_none=True)]}
    known: dict[str, Any] = {"name": "t", "problem": "af-ratio", "workload": workload, "pools": [pool]}
    return Scenario.model_validate(known)


@pytest.mark.parametrize(
    ("batch", "prompt", "output", "best", "throughput"),
    [
        (128, 100, 500, 8, 595.6),
        (256, 100, 500, 10, 717.1),
        (512, 100, 500, 11, 799.5),
        (256, 100, 100, 2, 1197.6),
        (256, 500, 500, 18, 477.9),
    ],
)
def test_best_throughputs_of_the_published_instances(
    batch: int, prompt: float, output: float, best: int, throughput: float
) -> None:
    scenario = instance(batch, prompt, output, pipeline="ideal")
    runs = [simulate_bundle(scenario, seed, workers=best + 1) for seed in range(100, 104)]
    assert np.mean([run.throughput for run in runs], axis=0).max() / 1000 == pytest.approx(throughput, rel=5e-3)
    assert np.mean([run.per_weight for run in runs], axis=0).argmax() + 1 == best
    assert all(run.steps == np.ceil(10_000 * scenario.slot_load.mean_decode / batch) for run in runs)


def cold_runs(pipeline: str, workers: int, seeds: range) -> list[BundleRun]:
    bundle, law = bundle_of(pipeline=pipeline, micro_batches=2), ([geometric(100, 500)], np.ones(1), 0)
    loads = (load_series(*law, bundle, workers, 10_000, seed, "cold") for seed in seeds)
    return [play_bundle(bundle, series) for series in loads]


def test_idle_shares_of_two_micro_batches() -> None:
    one = {kind: cold_runs(f"{kind}-blocking", 1, range(100, 108)) for kind in ("attention", "non")}
    idle = {kind: np.mean([(run.idle_attention, run.idle_ffn) for run in runs], axis=0) for kind, runs in one.items()}
    assert idle["attention"].ravel() == pytest.approx([0.082, 0.615], abs=0.005)
    assert idle["non"].ravel() == pytest.approx([0.002, 0.582], abs=0.005)
    (many,), (free,) = (cold_runs(f"{kind}-blocking", 32, range(100, 101)) for kind in ("attention", "non"))
    assert (many.idle_attention[31], many.idle_ffn[31]) == pytest.approx((0.625, 0.0), abs=0.001)
    assert free.best == 7


def test_with_occupied_senders_nine_workers_are_best_and_eight_to_ten_within_one_percent() -> None:
    mean = np.mean([run.throughput for run in cold_runs("attention-blocking", 12, range(100, 108))], axis=0)
    assert mean.argmax() + 1 == 9
    assert [x + 1 for x in np.flatnonzero(mean > 0.99 * mean.max())] == [8, 9, 10]


def test_a_scenario_says_how_long_and_from_what_start() -> None:
    scenario = instance(64, 100, 50, pipeline="non-blocking", micro_batches=2, attention_workers=3)
    more = {"fleet.most_attention": 5, "fleet.most_ffn": 2, "pools.0.bundle.ffn_servers": 2}
    scenario = scenario.replace(**{"evaluation.requests": 30}, **more)
    run = simulate_bundle(scenario, 4)
    law = scenario.workload.classes, scenario.workload.rates, 0, scenario.bundle
    assert same(run, play_bundle(scenario.bundle, load_series(*law, 5, 24, 4, "stationary"), 2))
    cold = simulate_bundle(scenario.replace(**{"evaluation.start": "cold"}), 4, scenario.bundle.sized(8, 1, 32))
    assert (cold.steps, len(cold.makespan), cold.servers) == (47, 8, 1)
    assert cold.makespan[0] < simulate_bundle(scenario, 4, scenario.bundle.sized(8, 1, 32)).makespan[0]


# The picture


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_bars_tile_the_run(pipeline: str) -> None:
    bundle = bundle_of(batch=8, pipeline=pipeline, micro_batches=3, layers=2, ffn_servers=2)
    series = series_of("classes", 8, 5, 20, pipeline=pipeline, micro_batches=3)
    run, cycles = play_bundle(bundle, series, 2), len(series) * 20 * 2
    found = gantt.bars(bundle, series, 4, 2, 0, cycles)
    assert max(bar.end for bar in found) == pytest.approx(run.makespan[3])
    sends = {"attention": pipeline in ("attention-blocking", "blocking"), "ffn": pipeline == "blocking"}
    for role, idle, devices in (("attention", run.idle_attention[3], 4), ("ffn", run.idle_ffn[3], 1)):
        mine = [bar for bar in found if bar.role == role]
        busy = sum(bar.end - bar.start for bar in mine)
        assert busy == pytest.approx((1 - idle) * devices * run.makespan[3])
        for j in range(devices):
            one = [bar for bar in mine if bar.index == j]
            hops = bundle.transfer_time(2.0) * (len(one) - 1) * sends[role]
            assert sum(bar.waited + bar.end - bar.start for bar in one) + hops == pytest.approx(one[-1].end)
            assert all(a.end <= b.start for a, b in pairwise(one))
    window = gantt.bars(bundle, series, 4, 2, 7, 5)
    assert window == found[7 * len(window) // 5 : 12 * len(window) // 5]


def test_the_last_of_the_workers_lets_a_micro_batch_go() -> None:
    bundle = bundle_of(batch=8, pipeline="non-blocking", micro_batches=2)
    series = series_of("geometric", 8, 3, 6, pipeline="non-blocking")
    found = gantt.bars(bundle, series, 3, 1, 0, 12)
    for k, m in product(range(6), range(2)):
        bars = [bar for bar in found if (bar.step, bar.micro_batch) == (k, m)]
        workers, (to, back), (ffn,) = ([b for b in bars if b.role == r] for r in ("attention", "transfer", "ffn"))
        assert [b.end - b.start for b in workers] == pytest.approx(bundle.attention_time(series[m, k]).tolist())
        assert to.start == max(b.end for b in workers) and ffn.start >= to.end and back.start == ffn.end
        if k:
            before = [b for b in found if (b.step, b.micro_batch, b.role, b.index) == (k - 1, m, "transfer", 1)]
            assert all(b.start >= before[0].end for b in workers)


# Bad input

ONES = np.ones((2, 3, 4))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: load_series([constant(5, 1)], np.ones(1), 1, bundle_of(), 2, 3, 1), "no request stays"),
        (lambda: load_series([constant(5, 2)], np.ones(1), 1, bundle_of(), 0, 3, 1), "give at least 1 of both"),
        (lambda: load_series([constant(5, 2)], np.ones(1), 1, bundle_of(), 9, 10**8, 1), "lower evaluation.requests"),
        (lambda: play_bundle(bundle_of(), np.ones((1, 0, 4))), "cannot be played"),
        (lambda: play_bundle(bundle_of(pipeline="blocking", micro_batches=3), ONES), "does not fit a bundle"),
        (lambda: gantt.bars(bundle_of(), ONES, 5, 1, 0, 1), "has no 5 workers"),
        (lambda: gantt.bars(bundle_of(), ONES, 4, 1, 6, 1), "not among the 6"),
    ],
)
def test_bad_input_is_one_sentence(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ScenarioError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
