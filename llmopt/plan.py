"""Plans: what a policy decides, as data that the fluid model and both simulator cores execute alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from llmopt.arrays import Bools, Floats
from llmopt.batcher import FIFO, Batcher, check_batcher
from llmopt.bundle import Bundle
from llmopt.errors import PolicyError
from llmopt.explain import suggestion
from llmopt.scenario import Scenario
from llmopt.solution import Solve
from llmopt.workload import Requests

STATE_FEATURES = ("waiting", "running", "kv_tokens", "outstanding_tokens")
"""What a router may see of a replica at the instant of an arrival.

waiting: requests queued or preempted; running: requests in the batch; kv_tokens: KV tokens allocated, in whole
blocks; outstanding_tokens: prompt tokens still to prefill plus output tokens still to decode over all its requests.
"""


Spread = Literal["random", "cyclic"]
"""How a class spreads over the pools by its fractions, see `Router`."""


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

    `mask` has shape (n_classes, n_pools); absent, every pool is a candidate.
    """

    weights: Floats
    fractions: Floats | None = None
    spread: Spread = "random"
    choices: int = 0
    mask: Bools | None = None


@dataclass(frozen=True)
class Plan:
    """The answer of a policy: the rules handed to the engine, the proof if there is one, and named figures.

    A plan that leaves the router open gets round-robin (`check_plan`), and the engine's own rule where it leaves the
    batcher open. `bound` is a certificate of its own: given requests, no rule has a smaller sum of end-to-end
    latencies (s).

    Where the A/F ratio is open, `bundle` is the bundle decided on (its workers, servers and micro-batch size) and
    `bundles` how many of it there are; `others` are bundles of further shapes with their numbers.
    """

    policy: str
    router: Router | RouterRule | None = None
    solve: Solve | None = None
    figures: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    batcher: Batcher = FIFO
    bound: Callable[[Requests], float] | None = None
    bundle: Bundle | None = None
    bundles: int = 1
    others: tuple[tuple[Bundle, int], ...] = ()

    @property
    def fractions(self) -> Floats | None:
        """The fixed split of a data router, shape (n_classes, n_pools); None where the rule decides by state."""
        return self.router.fractions if isinstance(self.router, Router) else None


def index_router(scenario: Scenario, choices: int = 0, **weights: float | Sequence[float]) -> Router:
    """A router that sends every request to the replica with the smallest weighted state.

    Each weight is one number, or one number per pool; names as in `STATE_FEATURES`.

    Raises
    ------
    PolicyError
        If a weight has another name.
    """
    table = np.zeros((len(scenario.pools), len(STATE_FEATURES)))
    for feature, weight in weights.items():
        if feature not in STATE_FEATURES:
            raise PolicyError(f"a router sees no {feature!r}; {suggestion(feature, STATE_FEATURES)}")
        table[:, STATE_FEATURES.index(feature)] = weight
    return Router(table, choices=choices, mask=np.array(scenario.allowed))


def split_router(
    scenario: Scenario,
    fractions: Floats,
    spread: Spread = "random",
    **weights: float | Sequence[float],
) -> Router:
    """A router that splits each class over the pools by `fractions`, then applies an index inside the pool."""
    inside = index_router(scenario, 0, **weights)
    clean = np.clip(np.asarray(fractions, dtype=float), 0.0, None)
    return Router(inside.weights, clean / clean.sum(axis=1, keepdims=True), spread, mask=inside.mask)


def ask(rule: RouterRule, policy: str, request: Incoming, states: list[ReplicaState]) -> int:
    """The replica that a Python rule chooses.

    Raises
    ------
    PolicyError
        If the rule raises, or returns anything but the index of a replica.
    """
    count = len(states)
    remedy = f"return a replica index from 0 to {count - 1}"
    try:
        choice = rule(request, states)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise PolicyError(f"policy {policy!r}: its rule raised {what} at request {request.number}; {remedy}") from error
    # True is an integer to Python, but nobody who returns it means replica 1.
    if isinstance(choice, bool) or not isinstance(choice, int | np.integer):
        what = f"its rule returned {choice!r}, not an integer,"
        raise PolicyError(f"policy {policy!r}: {what} at request {request.number}; {remedy}")
    r = int(choice)
    if not 0 <= r < count:
        raise PolicyError(f"policy {policy!r}: its rule returned {r} at request {request.number}; {remedy}")
    return r


def check_plan(plan: Plan, scenario: Scenario) -> Plan:
    """The plan, its open router filled in; refused if it does not fit its scenario.

    Raises
    ------
    PolicyError
        Naming the policy, what is wrong and the shape that is needed.
    """
    if not isinstance(plan, Plan):
        raise PolicyError(f"a policy returned {type(plan).__name__} instead of a Plan; return llmopt.Plan(...)")
    if plan.router is None:
        plan = replace(plan, router=index_router(scenario))
    if isinstance(plan.router, Router):
        _check_router(plan.policy, plan.router, scenario)
    elif not callable(plan.router):
        raise PolicyError(f"policy {plan.policy!r}: the router is neither a Router nor callable; return one of them")
    check_batcher(plan.policy, plan.batcher, scenario)
    if scenario.problem == "af-ratio":
        _check_bundle(plan, scenario)
    return plan


def _check_bundle(plan: Plan, scenario: Scenario) -> None:
    """Refuse a plan without a bundle, one that changes more of it than its size, or exceeds the fleet or its memory."""
    fleet, free = scenario.fleet, ("attention_workers", "ffn_servers", "batch")
    if not isinstance(plan.bundle, Bundle):
        raise PolicyError(
            f"policy {plan.policy!r}: the plan has no bundle, but the A/F ratio is open; take an af-ratio policy of "
            "`llmopt list`, or set Plan.bundle in your own"
        )
    if not all(isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], Bundle) for one in plan.others):
        raise PolicyError(f"policy {plan.policy!r}: others are not pairs of a bundle and its number; give such pairs")
    for bundle, count in ((plan.bundle, plan.bundles), *plan.others):
        base = scenario.bundle.model_copy(update={key: getattr(bundle, key) for key in free})
        if bundle != base:
            raise PolicyError(
                f"policy {plan.policy!r}: its bundle differs in more than {', '.join(free)}; keep the rest"
            )
        sizes = {key: getattr(bundle, key) for key in free} | {"bundles": count}
        for key, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PolicyError(f"policy {plan.policy!r}: {key} = {value!r}; give a whole number of at least 1")
        if bundle.attention_workers > fleet.most_attention or bundle.ffn_servers > max(fleet.most_ffn, 1):
            raise PolicyError(
                f"policy {plan.policy!r}: {bundle.attention_workers} workers and {bundle.ffn_servers} servers exceed "
                f"the fleet's most_attention = {fleet.most_attention} or most_ffn = {fleet.most_ffn}; choose fewer"
            )
        held = bundle.micro_batches * bundle.batch * scenario.slot_load.theta
        if held > bundle.kv_capacity:
            raise PolicyError(
                f"policy {plan.policy!r}: batch = {bundle.batch} makes a worker hold {held:.0f} KV tokens on average, "
                f"more than its kv_capacity = {bundle.kv_capacity}; choose a smaller batch"
            )


def _check_router(name: str, router: Router, scenario: Scenario) -> None:
    pools, classes = len(scenario.pools), len(scenario.workload.classes)
    _check_numbers(name, "weights", router.weights, (pools, len(STATE_FEATURES)))
    if router.spread not in get_args(Spread):
        raise PolicyError(f"policy {name!r}: spread = {router.spread!r} is not known; give one of {get_args(Spread)}")
    if not isinstance(router.choices, int) or router.choices < 0:
        raise PolicyError(f"policy {name!r}: choices = {router.choices!r}; give a whole number, 0 for all replicas")
    if router.fractions is not None:
        _check_numbers(name, "fractions", router.fractions, (classes, pools))
        _check_fractions(name, router.fractions, scenario)
    if router.mask is not None:
        _check_mask(name, router.mask, scenario)


def _check_numbers(name: str, what: str, table: object, shape: tuple[int, int]) -> None:
    if not isinstance(table, np.ndarray) or table.shape != shape or table.dtype.kind not in "fiu":
        raise PolicyError(f"policy {name!r}: {what} are {_kind(table)}; give an array of numbers of shape {shape}")
    if not np.isfinite(table).all():
        raise PolicyError(f"policy {name!r}: {what} have NaN or infinite entries; give finite numbers")


def _check_fractions(name: str, fractions: Floats, scenario: Scenario) -> None:
    if fractions.min() < 0 or np.abs(fractions.sum(axis=1) - 1).max() > 1e-6:
        raise PolicyError(f"policy {name!r}: fractions must not be negative and every row must sum to 1; scale them")
    lost = np.argwhere((fractions > 1e-9) & ~np.array(scenario.allowed))
    if len(lost):
        cls, pool = scenario.workload.classes[lost[0, 0]].name, scenario.pools[lost[0, 1]].name
        raise PolicyError(
            f"policy {name!r}: class {cls!r} is sent to pool {pool!r}, whose KV memory its largest request exceeds; "
            "send it only where scenario.allowed says so"
        )


def _check_mask(name: str, mask: object, scenario: Scenario) -> None:
    shape = (len(scenario.workload.classes), len(scenario.pools))
    if not isinstance(mask, np.ndarray) or mask.shape != shape or mask.dtype != bool:
        raise PolicyError(f"policy {name!r}: the mask is {_kind(mask)}; give a boolean array of shape {shape}")
    for cls, row in zip(scenario.workload.classes, mask, strict=True):
        if not row.any():
            raise PolicyError(f"policy {name!r}: the mask allows class {cls.name!r} no pool; allow at least one")


def _kind(table: object) -> str:
    return f"{table.dtype} of shape {table.shape}" if isinstance(table, np.ndarray) else type(table).__name__
