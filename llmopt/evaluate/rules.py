"""A batching rule made ready for one set of requests: keys, beliefs and releases as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.batcher import FIFO, Batcher, Candidates, Rule
from llmopt.errors import PolicyError
from llmopt.plan import Plan
from llmopt.predictions import ORACLE, Predicted, check_predicted
from llmopt.scenario import Scenario
from llmopt.workload import Requests


@dataclass(frozen=True)
class Rules:
    """What the engines need of a batcher; arrays of shape (n_requests,).

    keys: place in the queue, smaller first; believed: output tokens; release (s): not admitted before.
    """

    batcher: Batcher
    keys: Floats
    believed: Ints
    release: Floats


def first_come(requests: Requests) -> Rules:
    """The engine's own rule, which believes the truth."""
    zeros = np.zeros(len(requests))
    return Rules(FIFO, zeros, requests.output, zeros)


def rules_of(scenario: Scenario, plan: Plan, requests: Requests) -> Rules:
    """The plan's batcher for `requests`.

    Raises
    ------
    PolicyError
        If the predictor or a function of the batcher returns anything but an array that can be used, or a prompt that
        the rule never cuts fits into no step.
    """
    batcher = plan.batcher
    looks = any(pool.preemption == "lookahead" and not pool.async_scheduling for pool in scenario.pools)
    if batcher == FIFO and (scenario.predictions == ORACLE or not looks):
        return first_come(requests)
    if batcher.mixing in ("prefill-only", "decode-only"):
        _check_whole(scenario, plan, requests)
    room = max(pool.largest for pool in scenario.pools)
    predicted = _predicted(scenario, plan, requests, room)
    check_predicted(predicted, requests, room, plan.policy)
    seen = candidates(requests, predicted, batcher)
    keys, release = (_given(plan, what, seen) for what in ("order", "release"))
    return Rules(batcher, keys, seen.predicted, release)


def _predicted(scenario: Scenario, plan: Plan, requests: Requests, room: int) -> Predicted:
    """What the predictor in force says."""
    try:
        point, low, high = plan.batcher.predictor_of(scenario).predict(requests, scenario.workload.classes, room)
    except Exception as error:
        what = f"its predictor raised {type(error).__name__}: {error}"
        raise PolicyError(f"policy {plan.policy!r}: {what}; return point, low and high of every request") from error
    return Predicted(point, low, high)


def candidates(requests: Requests, predicted: Predicted, batcher: Batcher) -> Candidates:
    """What the batcher's functions may see."""
    believed = getattr(predicted, batcher.belief)
    return Candidates(
        requests.arrival, requests.prompt, requests.cls, requests.u, believed, predicted.low, predicted.high
    )


def _check_whole(scenario: Scenario, plan: Plan, requests: Requests) -> None:
    """Refuse what would wait for ever: a whole prompt, or what is prefilled again, above a token budget."""
    for pool in scenario.pools:
        again = plan.batcher.engine(pool).preemption != "reserve" and plan.batcher.preemption(pool) == "recompute"
        tokens = requests.prompt + (requests.output - 1 if again else 0)
        if len(tokens) and tokens.max() > pool.token_budget:
            i = int(tokens.argmax())
            raise PolicyError(
                f"policy {plan.policy!r}: request {i} prefills {tokens[i]} tokens in one step"
                f"{' if it is preempted late' if again else ''}, but pool {pool.name!r} has a token_budget of "
                f"{pool.token_budget}, so that it might never start; raise the budget or choose another mixing"
            )


def _given(plan: Plan, what: str, seen: Candidates) -> Floats:
    """The numbers that a field of the batcher gives if it is a function, else zeros."""
    rule = getattr(plan.batcher, what)
    if not callable(rule):
        return np.zeros(len(seen.arrival))
    values = _asked(plan.policy, what, rule, seen)
    if not plan.batcher.clairvoyant:
        _check_own_rows(plan.policy, what, rule, seen, values)
    return values


def _asked(policy: str, what: str, rule: Rule, seen: Candidates) -> Floats:
    """The numbers that a function of the batcher returns."""
    remedy = f"return one finite number for each of the {len(seen.arrival)} requests"
    try:
        values = np.asarray(rule(seen), dtype=float)
    except Exception as error:
        raise PolicyError(f"policy {policy!r}: its {what} raised {type(error).__name__}: {error}; {remedy}") from error
    if values.shape != seen.arrival.shape:
        raise PolicyError(f"policy {policy!r}: its {what} returned numbers of shape {values.shape}; {remedy}")
    if not np.isfinite(values).all():
        i = int(np.argmax(~np.isfinite(values)))
        raise PolicyError(f"policy {policy!r}: its {what} returned {values[i]} for request {i}; {remedy}")
    return values


def _check_own_rows(policy: str, what: str, rule: Rule, seen: Candidates, values: Floats) -> None:
    """Refuse a rule whose answer for the first half of the requests changes when the others are there."""
    half = len(values) // 2
    try:
        same = not half or np.array_equal(rule(seen.head(half)), values[:half])
    except Exception:
        # it answered for all of them, so that it needs the later ones
        same = False
    if not same:
        raise PolicyError(
            f"policy {policy!r}: its {what} gives the first {half} requests other numbers when later ones are there; "
            "let every row depend on itself alone, or set clairvoyant = True"
        )
