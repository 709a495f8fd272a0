"""Batching rules that cannot run are refused before anything runs, each in one sentence with a remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from factories import pool, request_class, scenario

from llmopt.batcher import FIFO, Batcher, Hold, Replan, check_batcher
from llmopt.errors import PolicyError
from llmopt.evaluate.rules import rules_of
from llmopt.plan import Plan, check_plan
from llmopt.predictions import ORACLE, Noise, Predicted, PredictorBase, Unknown
from llmopt.workload import Requests

QUESTION = scenario(
    [pool("big"), pool("small", kv_capacity=3_000)],
    [request_class("short", share=0.5), request_class("long", 2000, 51, share=0.5)],
)
REQUESTS = Requests(
    np.array([0.0, 1.0, 2.0]),
    np.array([100, 2000, 100]),
    np.array([101, 51, 101]),
    np.array([0, 1, 0]),
    np.array([0.1, 0.5, 0.9]),
)


@pytest.mark.parametrize(
    ("batcher", "sentence"),
    [
        ("fifo", r"the batcher is str; give a Batcher or None"),
        (Batcher(admission="eager"), r"admission = 'eager'; choose one of \('pool', 'lookahead', 'optimistic'\)"),
        (Batcher(overflow="drop"), r"overflow = 'drop'; choose one of \('pool', 'recompute', 'swap', 'restart'\)"),
        (Batcher(victims="first"), r"victims = 'first'; choose one of \('youngest', 'last', 'least', 'all', 'each'\)"),
        (Batcher(belief="mean"), r"belief = 'mean'; choose one of \('point', 'low', 'high'\)"),
        (Batcher(mixing="chunked"), r"mixing = 'chunked'; choose one of \('decode-first', 'prefill-first', "),
        (Batcher(order="shortest"), r"order = 'shortest'; give 'arrival', 'predicted' or a function"),
        (Batcher(clearing=0.0), r"clearing = 0.0; give a number from 0.0 to 1.0"),
        (Batcher(clearing=1.5), r"clearing = 1.5; give a number from 0.0 to 1.0"),
        (Batcher(clearing=float("nan")), r"clearing = nan; give a number from 0.0 to 1.0"),
        (Batcher(protected=0.99), r"protected = 0.99; give a number from 0.0 to 0.95"),
        (Batcher(protected=-0.1), r"protected = -0.1; give a number from 0.0 to 0.95"),
        (Batcher(skips=-1), r"skips = -1; give a number from 0 to 1000000000"),
        (Batcher(levels=(0, 5)), r"levels = \(0, 5\); give increasing numbers of tokens from 1 on"),
        (Batcher(levels=(5, 5)), r"levels = \(5, 5\); give increasing numbers of tokens from 1 on"),
        (Batcher(replan=Replan(0.0, lambda s: s.arrival)), r"replan = .* cannot be used; give Replan"),
        (Batcher(replan=Replan(float("inf"), lambda s: s.arrival)), r"plans every inf s; give a finite number"),
        (Batcher(hold=Hold("class", (1,))), r"thresholds are \(1,\); give 2 whole numbers from 1 on"),
        (Batcher(hold=Hold("class", (1, 0))), r"thresholds are \(1, 0\); give 2 whole numbers from 1 on"),
        (Batcher(hold=Hold("stage", (1, 1), (1, 2))), r"thresholds are \(1, 1\); give 3 whole numbers from 1 on"),
        (Batcher(hold=Hold("stage", (1, 1), (0,))), r"edges = \(0,\); give increasing numbers of tokens from 1 on"),
        (Batcher(hold=Hold("stage", (1, 1, 1), (4, 4))), r"edges = \(4, 4\); give increasing numbers of tokens"),
        (Batcher(mixing="decode-only", levels=(5,)), r"has levels and mixing, which each decide who moves; keep one"),
        (Batcher(hold=Hold("class", (1, 1)), levels=(5,)), r"has hold and levels, which each decide who moves; keep"),
        (Batcher(hold=Hold("class", (1, 1)), mixing="prefill-only"), r"has hold and mixing, which each decide who"),
        (Batcher(levels=(5,), overflow="restart"), r"levels with overflow = 'restart' never finish; use 'recompute'"),
        (Batcher(levels=(5,), order="predicted"), r"levels and hold serve in order of arrival; drop order, replan and"),
        (
            Batcher(hold=Hold("class", (1, 1)), release=lambda c: c.arrival),
            r"levels and hold serve in order of arrival",
        ),
    ],
)
def test_a_rule_that_cannot_run_is_refused(batcher: Any, sentence: str) -> None:
    with pytest.raises(PolicyError, match=r"^policy 'mine': " + sentence) as refused:
        check_plan(Plan("mine", batcher=batcher), QUESTION)
    assert "\n" not in str(refused.value)


def test_only_the_engines_own_rule_schedules_ahead() -> None:
    ahead = QUESTION.replace(**{"pools.1.async_scheduling": True})
    check_batcher("mine", FIFO, ahead)
    with pytest.raises(PolicyError, match=r"pool 'small' schedules ahead, .*; set async_scheduling = false"):
        check_batcher("mine", Batcher(skips=1), ahead)


@pytest.mark.parametrize(
    "batcher",
    [
        FIFO,
        Batcher(order=lambda c: c.prompt, release=lambda c: c.arrival, replan=Replan(1.0, lambda s: s.arrival)),
        Batcher(hold=Hold("class", (8, 1)), victims="each", clearing=0.2),
        Batcher(hold=Hold("stage", (8,))),
        Batcher(levels=(1, 10), overflow="swap"),
        Batcher(mixing="decode-only", order="predicted", protected=0.95),
    ],
)
def test_rules_that_can_run_pass(batcher: Batcher) -> None:
    check_batcher("mine", batcher, QUESTION)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda c: 1 / 0, r"raised ZeroDivisionError: division by zero"),
        (lambda c: c.output, r"raised AttributeError: .*'output'"),
        (lambda c: np.zeros(2), r"returned numbers of shape \(2,\)"),
        (lambda c: c.prompt / 0.0 * np.nan, r"returned nan for request 0"),
        (lambda c: 1.0, r"returned numbers of shape \(\)"),
    ],
)
@pytest.mark.parametrize("what", ["order", "release"])
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_a_broken_function_is_named(what: str, function: Any, words: str) -> None:
    plan = Plan("mine", batcher=Batcher(**{what: function}))
    with pytest.raises(PolicyError, match=rf"^policy 'mine': its {what} {words}.*; return one finite number for each"):
        rules_of(QUESTION, plan, REQUESTS)


@pytest.mark.parametrize("what", ["order", "release"])
def test_what_is_no_number_is_refused(what: str) -> None:
    plan = Plan("mine", batcher=Batcher(**{what: lambda c: ["a", "b", "c"]}))
    with pytest.raises(
        PolicyError, match=rf"^policy 'mine': its {what} .*; return one finite number for each of the 3"
    ):
        rules_of(QUESTION, plan, REQUESTS)


class Careless(PredictorBase):
    """Returns what it should not."""

    value: int

    def guess(self, requests: Requests, classes: Any) -> Any:
        raise AssertionError("predict is overridden")

    def predict(self, requests: Requests, classes: Any, room: int) -> Predicted:
        values = np.full(len(requests), self.value)
        return Predicted(values, values, values)


@pytest.mark.parametrize(
    ("value", "sentence"), [(0, "request 0 predicts point = 0 output"), (10**6, "more than fit in memory; cap them")]
)
def test_impossible_predictions_are_refused(value: int, sentence: str) -> None:
    with pytest.raises(PolicyError, match=f"^policy 'mine': .*{sentence}"):
        rules_of(QUESTION, Plan("mine", batcher=Batcher(predictor=Careless(value=value))), REQUESTS)


def test_rules_carry_beliefs_keys_and_releases() -> None:
    batcher = Batcher(
        order=lambda c: c.prompt + c.high,
        release=lambda c: c.arrival + c.u,
        belief="low",
        predictor=Unknown(law="none"),
    )
    rules = rules_of(QUESTION, Plan("mine", batcher=batcher), REQUESTS)
    assert rules.believed.tolist() == [1, 1, 1]
    assert rules.keys.tolist() == [201, 2101, 201] and rules.release.tolist() == [0.1, 1.5, 2.9]
    own = rules_of(QUESTION, Plan("mine"), REQUESTS)
    assert own.batcher == FIFO and not own.keys.any() and own.believed.tolist() == REQUESTS.output.tolist()


def test_the_predictor_in_force() -> None:
    noisy = QUESTION.replace(predictions={"law": "noise", "sigma": 1.0})
    assert Batcher().predictor_of(noisy) == Noise(law="noise", sigma=1.0)
    assert Batcher(predictor=Unknown(law="none")).predictor_of(noisy) == Unknown(law="none")
    assert Batcher(predictor=Unknown(law="none"), clairvoyant=True).predictor_of(noisy) == ORACLE


@pytest.mark.parametrize(
    ("mode", "batcher", "expected"),
    [
        ("recompute", FIFO, "recompute"),
        ("reserve", FIFO, "reserve"),
        ("lookahead", Batcher(overflow="swap"), "lookahead"),
        ("reserve", Batcher(admission="lookahead"), "lookahead"),
        ("reserve", Batcher(admission="optimistic"), "recompute"),
        ("lookahead", Batcher(admission="optimistic", overflow="restart"), "restart"),
        ("swap", Batcher(admission="optimistic"), "swap"),
        ("recompute", Batcher(overflow="swap"), "swap"),
        ("recompute", Batcher(admission="lookahead", overflow="restart"), "lookahead"),
    ],
)
def test_the_pool_as_the_theory_sees_it(mode: str, batcher: Batcher, expected: str) -> None:
    given = scenario([pool(preemption=mode, prefix_caching=mode == "recompute", kv_capacity=10_000)]).pools[0]
    seen = Batcher(**{**vars(batcher), "protected": 0.25}).engine(given)
    assert (seen.preemption, seen.kv_capacity) == (expected, 7500)
    assert seen.prefix_caching == (given.prefix_caching and expected == "recompute")
    assert batcher.engine(given).kv_capacity == 10_000


@pytest.mark.parametrize(
    "change",
    [
        {"skips": 1.5},
        {"skips": True},
        {"skips": "2"},
        {"protected": "a"},
        {"levels": 5},
        {"levels": (1.5, 10)},
        {"hold": 3},
        {"hold": Hold("foo", (1,))},  # type: ignore[arg-type]
        {"hold": Hold("class", (1,), (5,))},
        {"hold": Hold("class", (10**30,))},
        {"replan": 5},
        {"replan": Replan(1e-9, lambda snapshot: snapshot.arrival)},
        {"predictor": "noise"},
        {"release": 3.0},
    ],
    ids=str,
)
def test_fields_of_another_kind_are_refused_in_one_sentence(change: dict[str, Any]) -> None:
    field = next(iter(change))
    with pytest.raises(PolicyError, match=f"policy 'x': {field} = .* cannot be used; give ") as refused:
        check_batcher("x", Batcher(**change), QUESTION)
    assert "\n" not in str(refused.value)


def test_keys_that_depend_on_later_requests_are_refused_unless_clairvoyant() -> None:
    sample = QUESTION.workload.sample(20.0, 1)
    for rule in (lambda c: np.arange(len(c.arrival))[::-1], lambda c: c.prompt / c.prompt.sum()):
        plan = check_plan(Plan("seer", batcher=Batcher(order=rule)), QUESTION)
        with pytest.raises(PolicyError, match=r"its order gives the first \d+ requests other numbers"):
            rules_of(QUESTION, plan, sample)
        rules_of(QUESTION, check_plan(Plan("seer", batcher=Batcher(order=rule, clairvoyant=True)), QUESTION), sample)
