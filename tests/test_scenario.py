"""Scenarios: what pools hold, what replace and the digest do, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from llmopt.errors import ScenarioError
from llmopt.hardware import StepTime
from llmopt.reading import load_scenario
from llmopt.scenario import Evaluation, Pool, Scenario

STEP = {"base": 0.01, "prefill": 1e-4, "decode": 2e-4, "kv": 1e-7, "pairs": 1e-9}


def pool(**keys: Any) -> dict[str, Any]:
    return {"name": "p", "replicas": 1, "kv_capacity": 1000, "step_time": [{"base": 0.01}], **keys}


def data(**keys: Any) -> dict[str, Any]:
    one = {"name": "a", "share": 1.0, "prompt": constant(100), "output": constant(50)}
    return {"name": "s", "workload": {"rate": 2.0, "classes": [one]}, "pools": [pool()], **keys}


def constant(tokens: int) -> dict[str, Any]:
    return {"law": "constant", "value": tokens}


def test_step_time_is_the_largest_piece() -> None:
    made = Pool.model_validate(pool(step_time=[STEP, {"name": "floor", "base": 0.018}])).stepper
    assert made(prefill=10, decode=5, kv=10_000, pairs=1000) == 0.018
    assert made(prefill=90, decode=5, kv=10_000, pairs=1000) == pytest.approx(0.01 + 9e-3 + 1e-3 + 1e-3 + 1e-6)
    assert made() == 0.018
    assert made.names == ("piece 1", "floor")


def test_many_steps_at_once_agree_with_one_by_one() -> None:
    made = StepTime(np.array([[0.01, 1e-4, 2e-4, 1e-7, 1e-9], [0.03, 0, 0, 0, 0]]))
    features = np.random.default_rng(0).uniform(0, 500, (20, 4))
    assert made.many(features) == pytest.approx([made(*row) for row in features])


@pytest.mark.parametrize(
    ("tokens", "settings", "fits"),
    [
        (1000, {"block_size": 1, "first_token": "decode"}, True),
        (1001, {"block_size": 1, "first_token": "decode"}, False),
        (1001, {"block_size": 1}, True),
        (1001, {"block_size": 1, "lookahead_slots": 1}, False),
        (992, {"block_size": 16, "first_token": "decode"}, True),
        (993, {"block_size": 16, "first_token": "decode"}, False),
    ],
)
def test_a_request_fits_in_whole_blocks(tokens: int, settings: dict[str, Any], fits: bool) -> None:
    """1000 tokens are 62 blocks of 16; with a first token from prefill the last token is never stored."""
    one = Pool.model_validate(pool(**settings))
    assert one.fits(tokens) is fits
    assert one.fits(one.largest) and not one.fits(one.largest + 1)


def test_chunk_is_the_budget_unless_smaller() -> None:
    assert Pool.model_validate(pool(token_budget=512)).chunk == 512
    assert Pool.model_validate(pool(token_budget=512, prefill_chunk=128)).chunk == 128
    assert Pool.model_validate(pool(token_budget=512, prefill_chunk=4096)).chunk == 512


def test_one_seed_is_short_for_a_list() -> None:
    assert Evaluation.model_validate({"seed": 7}).seeds == (7,)
    assert Evaluation.model_validate({}).seeds == (1, 2, 3)


def test_a_class_is_allowed_where_its_largest_request_fits() -> None:
    pools = [pool(name="small", kv_capacity=140), pool(name="large")]
    assert Scenario.checked(data(pools=pools), "x").allowed == ((False, True),)


def test_replace_changes_keys_deep_inside() -> None:
    scenario = Scenario.checked(data(), "x")
    changed = scenario.replace(**{"workload.rate": 5.0, "pools.0.replicas": 4, "evaluation.seeds": [9]})
    assert (changed.workload.rate, changed.pools[0].replicas, changed.evaluation.seeds) == (5.0, 4, (9,))
    assert (scenario.workload.rate, scenario.pools[0].replicas) == (2.0, 1)
    assert changed.replace(**{"workload.rate": 2.0, "pools.0.replicas": 1, "evaluation.seeds": [1, 2, 3]}) == scenario


def test_replace_refuses_what_a_file_would_be_refused_for() -> None:
    scenario = Scenario.checked(data(), "x")
    with pytest.raises(
        ScenarioError, match=re.escape("changed by workload.rate: workload.rate = -5.0 must be above 0")
    ):
        scenario.replace(**{"workload.rate": -5.0})
    with pytest.raises(ScenarioError, match=r"pools\.7\.replicas: no such place"):
        scenario.replace(**{"pools.7.replicas": 1})
    with pytest.raises(ScenarioError, match=r"workload\.rat is not a known key; did you mean .rate.\?"):
        scenario.replace(**{"workload.rat": 1.0})


def test_digest_follows_what_matters() -> None:
    scenario = Scenario.checked(data(), "x")
    assert scenario.digest == Scenario.checked(data(), "y").digest
    assert scenario.digest != scenario.replace(**{"workload.rate": 2.5}).digest
    assert re.fullmatch("[0-9a-f]{12}", scenario.digest)


BAD = [
    ({"pools": [pool(replicas=0)]}, "pools[0].replicas = 0 must be at least 1"),
    ({"pools": [pool(replicas=True)]}, "pools[0].replicas = true must be a whole number"),
    ({"pools": [pool(replicas=2.0)]}, "pools[0].replicas = 2.0 must be a whole number"),
    ({"pools": [pool(price=-1.0)]}, "pools[0].price = -1.0 must be at least 0"),
    ({"pools": [pool(price=float("nan"))]}, "pools[0].price = nan is not a finite number"),
    ({"pools": [pool(kv_capcity=5)]}, "pools[0].kv_capcity is not a known key; did you mean 'kv_capacity'?"),
    ({"pools": [pool(horizon=5.0)]}, "pools[0].horizon is not a key of this table; it belongs in [evaluation]"),
    ({"pools": [pool(share=0.5)]}, "pools[0].share is not a key of this table; it belongs in [[workload.classes]]"),
    ({"pools": [pool(zzz=1)]}, "pools[0].zzz is not a known key; known are 'name', 'replicas'"),
    ({"pools": [pool(step_time=[{"base": 37.2}])]}, "base = 37.2 must be at most 10; times are in seconds, not"),
    ({"pools": [pool(step_time=[{"base": 0.0}])]}, "pools[0] has a step_time that is zero for every batch"),
    ({"pools": [pool(step_time=[])]}, "pools[0].step_time is too short; give at least 1"),
    ({"pools": [pool(kv_capacity=8)]}, "pools[0] has kv_capacity = 8, below one block of 16"),
    ({"pools": [pool(preemption="swop")]}, "pools[0].preemption = 'swop' is not known; did you mean 'swap'?"),
    ({"pools": [pool(name="a b")]}, "pools[0].name = 'a b' must consist of letters"),
    ({"pools": [pool(), pool()]}, "pool names repeat"),
    ({"pools": []}, "pools is too short; give at least 1"),
    ({"pools": 3}, "pools = 3 must be a list"),
    ({"pools": [3]}, "pools[0] = 3 must be a table"),
    (
        {"pools": [pool(kv_capacity=128)]},
        "workload.classes[0] ('a') can send a request of 150 tokens, more than the KV",
    ),
    ({"evaluation": {"horizon": 5.0, "warmup": 5.0}}, "evaluation has warmup = 5 s, which leaves nothing"),
    ({"evaluation": {"seeds": [1, 1]}}, "evaluation has repeated seeds [1, 1]"),
    ({"evaluation": {"seed": 1, "seeds": [1]}}, "evaluation has both seed and seeds"),
    ({"evaluation": {"seeds": [-1]}}, "evaluation.seeds[0] = -1 must be at least 0"),
    ({"problem": "rooting"}, "problem = 'rooting' is not known; did you mean 'routing'?"),
    ({"workload": {"rate": 1.0}}, "workload.classes is missing; add it"),
    ({"workload": None}, "workload = None must be a table"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_every_refusal_says_where_what_and_how(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ScenarioError) as refused:
        Scenario.checked(data(**change), "file.toml")
    message = str(refused.value)
    assert message.startswith("file.toml: ")
    assert words in message
    assert "\n" not in message


def test_a_second_problem_is_named_and_an_echo_is_not() -> None:
    """The missing `replicas` is what the misspelt `replcas` was meant to be; the price is a problem of its own."""
    wrong = pool(replcas=1, price=-1.0)
    del wrong["replicas"]
    with pytest.raises(ScenarioError) as refused:
        Scenario.checked(data(pools=[wrong]), "f")
    expected = "f: pools[0].replcas is not a known key; did you mean 'replicas'? (and 1 more: pools[0].price)"
    assert str(refused.value) == expected


def test_paths_leave_out_the_tags_of_laws() -> None:
    part = {"law": "uniform", "low": 0, "high": 5}
    workload = data()["workload"]
    workload["classes"][0]["prompt"] = {"law": "mixture", "parts": [part], "weights": [1.0]}
    with pytest.raises(
        ScenarioError, match=re.escape("workload.classes[0].prompt.parts[0].low = 0 must be at least 1")
    ):
        Scenario.checked(data(workload=workload), "f")


def test_a_copy_of_a_pool_computes_its_step_time_anew() -> None:
    pool = load_scenario("quickstart").pools[0]
    before = pool.stepper(decode=1)
    copy = pool.model_copy(update={"host_overhead": 0.5})
    assert copy.stepper(decode=1) == pytest.approx(before + 0.5)
    assert pool.stepper(decode=1) == before
