"""Plans: what a policy decides, as data that the fluid model and both simulator cores execute alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llmopt.errors import PolicyError
from llmopt.scenario import Scenario
from llmopt.solution import Solve

STATE_FEATURES = ("waiting", "running", "kv_tokens", "outstanding_tokens")
"""What a router may see of a replica at the instant of an arrival.

waiting: requests queued or preempted; running: requests in the batch; kv_tokens: KV tokens allocated, in whole
blocks; outstanding_tokens: prompt tokens still to prefill plus output tokens still to decode over all its requests.
"""


class Incoming(NamedTuple):
    """The request to be routed, as a router sees it; `output` is the true length, for rules that have an oracle."""

    number: int
    time: float
    prompt: int
    output: int
    cls: int
    u: float


class ReplicaState(NamedTuple):
    """State of a replica at the instant of an arrival; tokens and counts as in `STATE_FEATURES`."""

    replica: int
    pool: int
    waiting: int
    running: int
    kv_tokens: int
    outstanding_tokens: int


class RouterRule(Protocol):
    """Any Python rule: given the request and the state of every replica, return the index of a replica."""

    def __call__(self, request: Incoming, replicas: list[ReplicaState]) -> int:
        """Choose a replica."""
        ...


@dataclass(frozen=True)
class Router:
    """A routing rule as data: choose a pool, then a replica.

    1. If `fractions` (shape (n_classes, n_pools), rows summing to 1) is given, the request's class splits over the
       pools: `spread="random"` draws the pool, `spread="cyclic"` keeps every class as close to its fractions as
       whole requests allow (largest deficit first). Without fractions every pool that `mask` allows is a candidate.
    2. Of the candidate replicas, `choices` are drawn at random with replacement (0: all of them).
    3. The replica with the smallest score wins, where score = sum_f weights[pool, f] * state_f; `weights` has shape
       (n_pools, n_features) with columns `STATE_FEATURES`. Ties go to the replica chosen least
       recently, so that zero weights give round-robin.

    `mask` has shape (n_classes, n_pools).
    """

    weights: NDArray[np.float64]
    fractions: NDArray[np.float64] | None = None
    spread: Literal["random", "cyclic"] = "random"
    choices: int = 0
    mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Plan:
    """The answer of a policy: the rule handed to the engine, the proof if there is one, and named figures."""

    policy: str
    router: Router | RouterRule
    solve: Solve | None = None
    figures: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def index_router(scenario: Scenario, choices: int = 0, **weights: float | Sequence[float]) -> Router:
    """A router that sends every request to the replica with the smallest weighted state.

    Each weight is one number, or one number per pool; names as in `STATE_FEATURES`.
    """
    table = np.zeros((len(scenario.pools), len(STATE_FEATURES)))
    for feature, weight in weights.items():
        table[:, STATE_FEATURES.index(feature)] = weight
    return Router(table, choices=choices, mask=np.array(scenario.allowed))


def split_router(
    scenario: Scenario,
    fractions: NDArray[np.float64],
    spread: Literal["random", "cyclic"] = "random",
    **weights: float | Sequence[float],
) -> Router:
    """A router that splits each class over the pools by `fractions`, then applies an index inside the pool."""
    inside = index_router(scenario, 0, **weights)
    clean = np.clip(np.asarray(fractions, dtype=float), 0.0, None)
    return Router(inside.weights, clean / clean.sum(axis=1, keepdims=True), spread, mask=inside.mask)


def check_plan(plan: Plan, scenario: Scenario) -> None:
    """Refuse a plan that does not fit its scenario.

    Raises
    ------
    PolicyError
        Naming the policy, what is wrong and the shape that is needed.
    """
    if not isinstance(plan, Plan):
        raise PolicyError(f"a policy returned {type(plan).__name__} instead of a Plan; return llmopt.Plan(...)")
    if isinstance(plan.router, Router):
        _check_router(plan.policy, plan.router, scenario)
    elif not callable(plan.router):
        raise PolicyError(f"policy {plan.policy!r}: the router is neither a Router nor callable; return one of them")


def _check_router(name: str, router: Router, scenario: Scenario) -> None:
    pools, classes = len(scenario.pools), len(scenario.workload.classes)
    if router.weights.shape != (pools, len(STATE_FEATURES)) or not np.isfinite(router.weights).all():
        raise PolicyError(
            f"policy {name!r}: router weights have shape {router.weights.shape} or are not finite; "
            f"give ({pools}, {len(STATE_FEATURES)}) finite numbers"
        )
    if router.fractions is None:
        return
    if router.fractions.shape != (classes, pools) or not np.isfinite(router.fractions).all():
        raise PolicyError(f"policy {name!r}: fractions need shape ({classes}, {pools}) and finite entries")
    if router.fractions.min() < 0 or np.abs(router.fractions.sum(axis=1) - 1).max() > 1e-6:
        raise PolicyError(f"policy {name!r}: fractions must be non-negative and each row must sum to 1")
    if (router.fractions > 1e-9)[~np.array(scenario.allowed)].any():
        raise PolicyError(f"policy {name!r}: a class is sent to a pool whose KV memory its largest request exceeds")
