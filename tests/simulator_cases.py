"""Random small cases for the simulator's tests, and what it means that two runs are the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np

from llmopt.evaluate.run import SimRun
from llmopt.plan import STATE_FEATURES, Router, index_router
from llmopt.scenario import Scenario
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


def build(pool_rows: list[dict[str, Any]], horizon: float = 10.0) -> Scenario:
    law = {"law": "uniform", "low": 1, "high": LONGEST}
    classes = [{"name": name, "share": 0.5, "prompt": law, "output": law} for name in ("a", "b")]
    workload = {"rate": 4.0, "classes": classes}
    return Scenario.model_validate(
        {"name": "small", "workload": workload, "pools": pool_rows, "evaluation": {"horizon": horizon}}
    )


def assert_same(ours: SimRun, truth: SimRun) -> None:
    for name in ("replica", "preemptions"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(truth, name), name)
    for name in ("scheduled", "first_token", "finish"):
        np.testing.assert_allclose(getattr(ours, name), getattr(truth, name), rtol=1e-9, atol=1e-9, err_msg=name)
    for name in ("pool", "steps", "prefill_tokens", "decode_tokens", "preemptions", "held", "wasted", "peak"):
        np.testing.assert_array_equal(getattr(ours.replicas, name), getattr(truth.replicas, name), name)
    for name in ("busy", "held_time"):
        np.testing.assert_allclose(getattr(ours.replicas, name), getattr(truth.replicas, name), rtol=1e-9, err_msg=name)
