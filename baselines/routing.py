"""Routing heuristics: what load balancers and LLM serving engines do today.

Each is a frozen dataclass whose `plan` returns a rule as data. None looks at the future or solves a program; the ones
that need weights take them from the stability rows (1), as an operator takes them from a benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmopt.arrays import Floats
from llmopt.plan import Plan, index_router, split_router
from llmopt.policy import Policy
from llmopt.scenario import Scenario
from llmopt.stability import stability_rows


@dataclass(frozen=True)
class Random:
    """Each request goes to a replica drawn uniformly at random.

    Source: the `random` policy of SGLang's router (sgl-router) and of the vLLM router.
    """

    name: str = "random"

    def plan(self, scenario: Scenario) -> Plan:
        """One random candidate, no score."""
        return Plan(self.name, index_router(scenario, choices=1))


@dataclass(frozen=True)
class RoundRobin:
    """Replicas take turns.

    Source: the `roundrobin` routing logic of vLLM production-stack and the default of nginx upstreams.
    """

    name: str = "round-robin"

    def plan(self, scenario: Scenario) -> Plan:
        """Equal scores, so that ties go to the next replica in cyclic order."""
        return Plan(self.name, index_router(scenario))


@dataclass(frozen=True)
class WeightedRoundRobin:
    """Pools take turns in proportion to their capacity, spread as evenly as whole requests allow.

    Source: smooth weighted round-robin, nginx `upstream` with `weight` (nginx 1.3.1). The weight of a pool is its
    critical rate by (1) at the mean class mix, `pool_capacity`: what a load test with production traffic gives.
    """

    name: str = "weighted-round-robin"

    def plan(self, scenario: Scenario) -> Plan:
        """The same weights for every class that the pools can hold."""
        weights = np.array(scenario.allowed) * pool_capacity(scenario)
        figures = {"fractions": (weights / weights.sum(axis=1, keepdims=True)).tolist()}
        return Plan(self.name, split_router(scenario, weights, "cyclic"), figures=figures)


@dataclass(frozen=True)
class ShortestQueue:
    """Fewest requests at the replica, waiting and running together.

    Source: join the shortest queue, Winston, J. Appl. Probab. 14 (1977) 181; `least_conn` of nginx, `leastconn` of
    HAProxy, SHORTEST_QUEUE of SGLang's data-parallel controller.
    """

    name: str = "jsq"

    def plan(self, scenario: Scenario) -> Plan:
        """Score: waiting + running."""
        return Plan(self.name, index_router(scenario, waiting=1.0, running=1.0))


@dataclass(frozen=True)
class WeightedShortestQueue:
    """Fewest requests relative to the capacity of the replica.

    Source: weighted least-connection scheduling of Linux Virtual Server (`ip_vs_wlc`), nginx `least_conn` with
    `weight`. The weight of a replica is its critical rate by (1) at the mean class mix.
    """

    name: str = "weighted-jsq"

    def plan(self, scenario: Scenario) -> Plan:
        """Score: (waiting + running) / capacity of one replica."""
        per_replica = pool_capacity(scenario) / np.array([p.replicas for p in scenario.pools])
        score = (per_replica.max() / per_replica).tolist()
        return Plan(self.name, index_router(scenario, waiting=score, running=score))


@dataclass(frozen=True)
class VllmDataParallel:
    """Fewest requests, a waiting one counting four times as much as a running one.

    Source: vLLM's internal data-parallel load balancer, `score = waiting * 4 + running` in
    `DPLBAsyncMPClient.get_core_engine_for_request`, vllm/v1/engine/core_client.py.
    """

    name: str = "vllm-dp"

    def plan(self, scenario: Scenario) -> Plan:
        """Score: 4 waiting + running."""
        return Plan(self.name, index_router(scenario, waiting=4.0, running=1.0))


@dataclass(frozen=True)
class LeastTokens:
    """Fewest outstanding tokens: prompt tokens to prefill plus output tokens to decode (an oracle knows them).

    Source: MINIMUM_TOKENS of SGLang's data-parallel controller and the token load of Ray Serve's KV-aware router,
    which both estimate what is known here.
    """

    name: str = "least-tokens"

    def plan(self, scenario: Scenario) -> Plan:
        """Score: outstanding tokens."""
        return Plan(self.name, index_router(scenario, outstanding_tokens=1.0))


@dataclass(frozen=True)
class LeastKV:
    """Smallest used fraction of the KV memory.

    Source: `kv-cache-utilization-scorer` of llm-d and of the Kubernetes Gateway API Inference Extension.
    """

    name: str = "least-kv"

    def plan(self, scenario: Scenario) -> Plan:
        """Score: KV tokens held / KV capacity."""
        return Plan(self.name, index_router(scenario, kv_tokens=[1.0 / p.kv_capacity for p in scenario.pools]))


@dataclass(frozen=True)
class PowerOfTwo:
    """The one with fewer requests of two replicas drawn at random.

    Source: Mitzenmacher, IEEE Trans. Parallel Distrib. Syst. 12 (2001) 1094; the default request router of Ray Serve
    and `power_of_two` of SGLang's router.
    """

    name: str = "power-of-two"

    def plan(self, scenario: Scenario) -> Plan:
        """Score: waiting + running, two candidates."""
        return Plan(self.name, index_router(scenario, choices=2, waiting=1.0, running=1.0))


@dataclass(frozen=True)
class LeastWork:
    """Least outstanding work in seconds: outstanding tokens times the seconds per token of the pool.

    Source: Dynamic-Least-Work-Remaining in Harchol-Balter, Crovella & Murta, J. Parallel Distrib. Comput. 59 (1999)
    204. Seconds per token come from the binding row (1) at the mean class mix.
    """

    name: str = "least-work"

    def plan(self, scenario: Scenario) -> Plan:
        """Score: outstanding tokens / (tokens per second of one replica)."""
        tokens = float(scenario.workload.rates @ mean_tokens(scenario)) / scenario.workload.total_rate
        per_replica = pool_capacity(scenario) / np.array([p.replicas for p in scenario.pools])
        return Plan(self.name, index_router(scenario, outstanding_tokens=(1.0 / (per_replica * tokens)).tolist()))


@dataclass(frozen=True)
class ClassAffinity:
    """Every class has a home: the longest requests live where KV memory is largest, every pool with the same load.

    Classes in order of length are laid over the pools in order of KV memory, each pool as wide as its capacity and
    each class as wide as its work, so that neighbours share a pool. Inside the pool the shortest queue wins.

    Source: SITA-E, size interval task assignment with equal load, Harchol-Balter, Crovella & Murta (1999); length
    tiers of SGLang's router (`bucket`).
    """

    name: str = "class-affinity"

    def plan(self, scenario: Scenario) -> Plan:
        """Overlaps of class intervals with pool intervals, where the pools can hold the class."""
        fractions = _overlaps(scenario) * np.array(scenario.allowed)
        homeless = fractions.sum(axis=1) <= 0
        fractions[homeless] = (np.array(scenario.allowed) * pool_capacity(scenario))[homeless]
        fractions /= fractions.sum(axis=1, keepdims=True)
        router = split_router(scenario, fractions, "cyclic", waiting=1.0, running=1.0)
        return Plan(self.name, router, figures={"fractions": fractions.tolist()})


def pool_capacity(scenario: Scenario) -> Floats:
    """Critical rate of each pool by (1) if it served the mean class mix alone, requests/s, shape (n_pools,)."""
    mix = scenario.workload.rates / scenario.workload.total_rate
    return np.array([rows.replicas / float((mix @ rows.seconds).max()) for rows in stability_rows(scenario)])


def mean_tokens(scenario: Scenario) -> Floats:
    """Mean prompt + output tokens of each class, shape (n_classes,)."""
    return np.array([c.mean_prompt + c.mean_output for c in scenario.workload.classes])


def _overlaps(scenario: Scenario) -> Floats:
    """Overlap of the interval of each class with the interval of each pool, shape (n_classes, n_pools)."""
    longest = np.argsort(-mean_tokens(scenario), kind="stable")
    largest = np.argsort([-p.kv_capacity for p in scenario.pools], kind="stable")
    capacity = pool_capacity(scenario)
    cost = np.mean([rows.seconds.max(axis=1) / rows.replicas for rows in stability_rows(scenario)], axis=0)
    work = _edges((scenario.workload.rates * cost)[longest])
    room = _edges(capacity[largest])
    overlap = np.minimum(work[1:, None], room[1:]) - np.maximum(work[:-1, None], room[:-1])
    table = np.zeros_like(overlap)
    table[np.ix_(longest, largest)] = np.maximum(overlap, 0.0)
    return table


def _edges(widths: Floats) -> Floats:
    """Ends of intervals with these widths laid side by side over [0, 1]."""
    return np.concatenate([[0.0], np.cumsum(widths) / widths.sum()])


POLICIES: tuple[Policy, ...] = (
    Random(),
    RoundRobin(),
    WeightedRoundRobin(),
    ShortestQueue(),
    WeightedShortestQueue(),
    VllmDataParallel(),
    LeastTokens(),
    LeastKV(),
    PowerOfTwo(),
    LeastWork(),
    ClassAffinity(),
)
