"""Random small cases for the simulator's tests, and what it means that two runs are the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np

from llmopt.evaluate.run import SimRun
from llmopt.plan import STATE_FEATURES, Router, index_router
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
