"""Random small cases for the simulator's tests, and what it means that two runs are the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np

from llmopt.batcher import Batcher, Hold, Replan
from llmopt.evaluate.run import SimRun
from llmopt.plan import STATE_FEATURES, Router, index_router
from llmopt.predictions import Buckets, Interval, Noise, PredictorBase, Quantile, Unknown
from llmopt.scenario import Scenario
from llmopt.steptable import StepTable
from llmopt.workload import Requests

MODES = ("reserve", "lookahead", "recompute", "swap", "restart")
LONGEST = 24
# binary fractions: sums of step times are exact, so that simultaneous events stay simultaneous in every core
COEFFICIENTS = st.fixed_dictionaries(
    {
        "base": st.sampled_from([0.0, 0.015625, 0.25, 1.0]),
        "prefill": st.sampled_from([0.0, 0.00390625]),
        "decode": st.sampled_from([0.0, 0.0078125]),
        "kv": st.sampled_from([0.0, 0.0009765625]),
        "pairs": st.sampled_from([0.0, 0.00006103515625]),
    }
)


def piece(draw: st.DrawFn) -> dict[str, float]:
    drawn = draw(COEFFICIENTS)
    return drawn if any(drawn.values()) else {"base": 0.125}


def exact_table(rng: np.random.Generator) -> StepTable:
    """A table whose step times are binary fractions: knots at powers of 2, and nothing depends on quotients."""
    batch, chunk, zero = np.array([0.0, 2.0, 8.0]), np.array([1.0, 2.0, 8.0, 16.0]), np.zeros(1)
    mixed = np.cumsum(rng.integers(0, 8, (4, 1, 3, 1)), axis=2) / 256.0
    mixed[:, :, 0] = 0.125
    return StepTable(
        tokens=np.array([1.0, 2.0, 4.0, 8.0, 16.0]),
        token_time=np.cumsum(rng.integers(0, 8, 5)) / 128.0,
        sequences=np.array([1.0, 2.0, 4.0]),
        sequence_time=np.cumsum(rng.integers(0, 4, 3)) / 256.0,
        decode_batch=batch,
        decode_context=zero,
        decode_time=np.cumsum(rng.integers(0, 4, (3, 1)), axis=0) / 256.0,
        chunk=chunk,
        cached=zero,
        mixed_batch=batch,
        mixed_context=zero,
        mixed_time=mixed,
    )


def random_table(rng: np.random.Generator, monotone: bool = True) -> StepTable:
    """A table with random knots and times, of one knot on some axes, whose measured ranges may end before its knots."""

    def axis(first: float = 1.0) -> np.ndarray:
        return first + np.cumsum(rng.uniform(0.5, 12.0, rng.integers(1, 5))) - rng.choice([0.0, 1.0])

    def times(*axes: np.ndarray) -> np.ndarray:
        values = rng.uniform(0.001, 0.02, [len(a) for a in axes])
        for d in range(len(axes) if monotone else 0):
            values = np.cumsum(values, axis=d)
        return values

    tokens, sequences, batch, context, chunk, cached, mixed_context = (axis() for _ in range(7))
    mixed_batch = np.concatenate([[0.0], axis()])
    axes = (tokens, sequences, batch, context, chunk, cached, mixed_batch, mixed_context)
    limits = tuple(float(a[-1]) - rng.choice([0.0, 2.0]) for a in axes) if rng.random() < 0.5 else ()
    return StepTable(
        tokens=tokens,
        token_time=times(tokens),
        sequences=sequences,
        sequence_time=times(sequences),
        decode_batch=batch,
        decode_context=context,
        decode_time=times(batch, context),
        chunk=chunk,
        cached=cached,
        mixed_batch=mixed_batch,
        mixed_context=mixed_context,
        mixed_time=times(chunk, cached, mixed_batch, mixed_context),
        limits=limits,
    )


TABLES = {"exact": exact_table, "rising": random_table, "any": lambda rng: random_table(rng, monotone=False)}


@st.composite
def engine_options(draw: st.DrawFn, mode: str) -> dict[str, Any]:
    """What a real engine has besides the basic rules, every combination of it."""
    kind = draw(st.sampled_from([None, None, *TABLES]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)) if kind else 0)
    return {
        "table": TABLES[kind](rng) if kind else None,
        "host_overhead": draw(st.sampled_from([0.0, 0.0078125])),
        "async_scheduling": draw(st.booleans()),
        "prefix_caching": mode == "recompute" and draw(st.booleans()),
    }


@st.composite
def pools(draw: st.DrawFn) -> list[dict[str, Any]]:
    made = []
    for j in range(draw(st.integers(1, 3))):
        block = draw(st.sampled_from([1, 2, 3, 16]))
        pool = {
            "name": f"p{j}",
            "replicas": draw(st.integers(1, 3)),
            "step_time": [piece(draw) for _ in range(draw(st.integers(1, 3)))],
            "kv_capacity": 2 * LONGEST + 3 + block + draw(st.integers(0, 120)),
            "block_size": block,
            "max_batch": draw(st.sampled_from([1, 2, 5, 100])),
            "token_budget": draw(st.sampled_from([1, 2, 3, 7, 40, 1000])),
            "preemption": draw(st.sampled_from(MODES)),
            "first_token": draw(st.sampled_from(["prefill", "decode"])),
            "lookahead_slots": draw(st.sampled_from([0, 0, 1, 3])),
        }
        if draw(st.booleans()):
            pool["prefill_chunk"] = draw(st.integers(1, 12))
        pool |= draw(engine_options(pool["preemption"]))
        made.append(pool)
    return made


@st.composite
def requests(draw: st.DrawFn, most: int = 40) -> Requests:
    """Lengths and gaps from a drawn seed: hypothesis alone prefers few and short requests, which never meet."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, longest = draw(st.integers(1, most)), draw(st.sampled_from([3, LONGEST]))
    prompt, output = rng.integers(1, longest + 1, n), rng.integers(1, longest + 1, n)
    gap = rng.choice([0, 1, 3, draw(st.sampled_from([0, 2, 40]))], n)
    return Requests(np.cumsum(gap) / 64.0, prompt, output, rng.integers(0, 2, n), rng.random(n))


@st.composite
def routers(draw: st.DrawFn, scenario: Scenario) -> Router:
    count = len(scenario.pools)
    weight = st.sampled_from([0.0, 0.0, 1.0, 0.3])
    router = index_router(scenario, 0, **{name: [draw(weight) for _ in range(count)] for name in STATE_FEATURES})
    if draw(st.booleans()):
        shares = [[draw(st.integers(0, 3)) for _ in range(count)] for _ in range(2)]
        table = np.array(shares) + np.eye(count)[draw(st.integers(0, count - 1))]
        spread = draw(st.sampled_from(["random", "cyclic"]))
        router = replace(router, fractions=table / table.sum(axis=1, keepdims=True), spread=spread)
    elif draw(st.booleans()):
        router = replace(router, mask=np.eye(count, dtype=bool)[[0, -1]])
    return replace(router, choices=draw(st.sampled_from([0, 0, 1, 2, 3])))


def build(pool_rows: list[dict[str, Any]], horizon: float = 10.0, longest: int = LONGEST) -> Scenario:
    law = {"law": "uniform", "low": 1, "high": longest}
    classes = [{"name": name, "share": 0.5, "prompt": law, "output": law} for name in ("a", "b")]
    workload = {"rate": 4.0, "classes": classes}
    return Scenario.model_validate(
        {"name": "small", "workload": workload, "pools": pool_rows, "evaluation": {"horizon": horizon}}
    )


BATCHERS = ("queue", "mixing", "class", "stage", "levels")
KEYS = (
    lambda c: c.prompt + c.predicted,
    lambda c: -c.arrival,
    lambda c: c.prompt % 3,
    lambda c: c.high - c.low + c.u,
    lambda c: (c.cls == 1) * 1000.0 - c.predicted,
)
RELEASES = (lambda c: c.arrival + c.prompt % 4 / 8, lambda c: np.ceil(c.arrival) + (c.u < 0.3) * 2.0)
RANKS = (
    lambda s: s.predicted - s.emitted,
    lambda s: -s.arrival,
    lambda s: (7 * s.running_computed.sum() + 5 * s.waiting + s.running_emitted.sum()) % 11,
    lambda s: (s.prompt * (3 + s.running_predicted.sum()) + 64 * s.time + s.running_prompt.sum()) % 7,
)


def random_predictor(rng: np.random.Generator) -> PredictorBase | None:
    """Every quality of prediction, and that of the scenario."""
    edges = tuple(np.cumsum(rng.integers(1, 12, 3)).tolist())
    several = (
        None,
        Noise(law="noise", sigma=float(rng.choice([0.2, 1.0, 2.0])), factor=float(rng.choice([0.3, 1.0]))),
        Interval(law="interval", factor=4.0),
        Buckets(law="buckets", edges=edges),
        Quantile(law="quantile", q=0.2),
        Unknown(law="none"),
    )
    return several[rng.integers(len(several))]


def random_batcher(rng: np.random.Generator, kind: str) -> Batcher:
    """A batching rule of one of the kinds `BATCHERS`, which differ in whom a step serves, and any memory rule."""

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    batcher = Batcher(
        admission=pick("pool", "lookahead", "optimistic", "optimistic"),
        overflow=pick("pool", "recompute", "swap", "restart" if kind != "levels" else "swap"),
        victims=pick("youngest", "last", "least", "all", "each"),
        clearing=pick(0.1, 0.5, 1.0),
        belief=pick("point", "low", "high"),
        predictor=random_predictor(rng),
        skips=pick(0, 0, 1, 3),
        protected=pick(0.0, 0.0, 0.1, 0.4),
    )
    if kind in ("queue", "mixing"):
        batcher = replace(
            batcher,
            order=pick("arrival", "predicted", "predicted", *KEYS),
            release=pick(None, None, *RELEASES),
            replan=pick(None, None, Replan(pick(0.25, 1.0, 3.0), pick(*RANKS))),
            mixing=pick("prefill-first", "prefill-only", "decode-only") if kind == "mixing" else "decode-first",
        )
    if kind == "class":
        return replace(batcher, hold=Hold("class", tuple(rng.integers(1, 5, 2).tolist())))
    edges = tuple(np.cumsum(rng.integers(1, 9, rng.integers(0, 4))).tolist())
    if kind == "stage":
        return replace(batcher, hold=Hold("stage", tuple(rng.integers(1, 4, len(edges) + 1).tolist()), edges))
    return replace(batcher, levels=edges or (2,)) if kind == "levels" else batcher


def random_pool(rng: np.random.Generator, name: str, kind: str) -> dict[str, Any]:
    """Memory for two or three of the longest requests, and budgets that may be short."""
    block = int(rng.choice([1, 2, 3, 16]))
    budgets = [2 * LONGEST, 1000] if kind == "mixing" else [3, 7, 40, 1000, 1000]
    mode = str(rng.choice(MODES))
    pieces = (
        {"base": 0.125},
        {"base": 0.015625, "decode": 0.0078125},
        {"base": 0.0, "kv": 0.0009765625, "prefill": 0.25},
    )
    pool = {
        "name": name,
        "replicas": int(rng.integers(1, 3)),
        "step_time": [pieces[k] for k in rng.permutation(3)[: rng.integers(1, 3)]],
        "kv_capacity": 2 * LONGEST + 3 + block + int(rng.choice([0, 0, 20, 60])),
        "block_size": block,
        "max_batch": int(rng.choice([1, 2, 5, 100, 100])),
        "token_budget": int(rng.choice(budgets)),
        "preemption": mode,
        "first_token": str(rng.choice(["prefill", "decode"])),
        "lookahead_slots": int(rng.choice([0, 0, 1, 3])),
        "prefix_caching": mode == "recompute" and rng.random() < 0.3,
    }
    return pool | ({"prefill_chunk": int(rng.integers(1, 12))} if rng.random() < 0.4 else {})


def random_requests(rng: np.random.Generator, most: int = 40) -> Requests:
    """Requests that meet, in two classes, some of them at the same time."""
    n, longest = int(rng.integers(1, most)), int(rng.choice([3, LONGEST, LONGEST]))
    gap = rng.choice([0, 0, 1, 3, 3, 40], n)
    lengths = rng.integers(1, longest + 1, (2, n))
    return Requests(np.cumsum(gap) / 64.0, *lengths, rng.integers(0, 2, n), rng.random(n))


def assert_same(ours: SimRun, truth: SimRun) -> None:
    for name in ("replica", "preemptions"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(truth, name), name)
    for name in ("queued", "scheduled", "first_token", "finish"):
        np.testing.assert_allclose(getattr(ours, name), getattr(truth, name), rtol=1e-9, atol=1e-9, err_msg=name)
    whole = (
        "pool",
        "steps",
        "prefill_tokens",
        "decode_tokens",
        "preemptions",
        "held",
        "wasted",
        "peak",
        "extrapolated",
    )
    for name in whole:
        np.testing.assert_array_equal(getattr(ours.replicas, name), getattr(truth.replicas, name), name)
    for name in ("busy", "held_time"):
        np.testing.assert_allclose(getattr(ours.replicas, name), getattr(truth.replicas, name), rtol=1e-9, err_msg=name)
