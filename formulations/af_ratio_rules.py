"""Rules for the A/F ratio in closed form: mean field, barrier, and the published one; no program is solved.

They choose the Attention workers alone: micro-batch size and FFN servers stay as given, and what KV memory and TPOT
allow is not asked (the programs of `af_ratio` ask). Equation numbers of README.md, "A/F ratio".
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Any

from formulations.af_ratio_shapes import given
from llmopt import barrier, ratio
from llmopt.bundle import Bundle
from llmopt.plan import Plan
from llmopt.scenario import Scenario


@dataclass(frozen=True)
class MeanField:
    """The whole number beside the ratio of largest throughput if every worker held its mean load (A1).

    The best ratio is a kink of tau or sqrt(a_i w_F / (b_i w_A)), so that it is found without a solver.

    Source: the mean-field rule of Song et al., arXiv 2601.21351 v2 to v4, here for any pipeline, pieces and prices.
    """

    name: str = "afd-mean-field"

    def plan(self, scenario: Scenario) -> Plan:
        """Floor or ceiling of the best ratio (lemma in README.md)."""
        bundle, load = given(scenario, self.name), scenario.slot_load
        optimum = ratio.best_ratio(bundle, load)
        whole = ratio.best_whole(bundle, load, scenario.fleet.most_attention, bundle.ffn_servers)
        return _plan(self.name, bundle, whole, ratio=optimum.ratio, cycle=optimum.cycle, regime=optimum.regime)


@dataclass(frozen=True)
class Gaussian:
    """The number of workers of largest throughput if the fullest of them decides, loads being normal (A15).

    Source: the barrier-aware rule of Song et al., arXiv 2601.21351 v2 to v4, with the maximum inside the expectation;
    here for any pipeline, pieces and prices. All numbers up to the most are tried: the lemma needs a mean field.
    """

    name: str = "afd-gaussian"

    def plan(self, scenario: Scenario) -> Plan:
        """The best of all whole numbers."""
        bundle, load = given(scenario, self.name), scenario.slot_load
        servers = bundle.ffn_servers
        best = barrier.best_barrier(bundle, load, scenario.fleet.most_attention, servers)
        cycle = barrier.barrier_cycle(bundle, load, best, servers)
        fuller = barrier.imbalance(bundle, load, best)
        return _plan(self.name, bundle, best, ratio=best / servers, cycle=cycle, imbalance=fuller)


@dataclass(frozen=True)
class PublishedRatio:
    """max{r_A, r_C, r_peak}, whatever the pipeline and the prices are, rounded to the better of both neighbours.

    A run from empty slots to `evaluation.requests` finished requests counts with its average load, if the scenario
    starts cold; else the load is that of an endless run, and lengths enter by their means alone.

    Source: Song et al., arXiv 2601.21351 v1, Theorem 4.4 with Proposition 4.3. The paper gives a real ratio; that the
    better neighbour is taken, by its own cycle max{A, C, F} and per instance, is ours.
    """

    name: str = "afd-published"

    def plan(self, scenario: Scenario) -> Plan:
        """Floor or ceiling of the published ratio."""
        bundle, load, judged = given(scenario, self.name), scenario.slot_load, scenario.evaluation
        requests = judged.requests if judged.start == "cold" else None
        slot = ratio.horizon_load(load.mean_prompt, load.mean_decode, bundle.batch, requests)
        rule = ratio.published(bundle, slot)
        most, servers = scenario.fleet.most_attention, bundle.ffn_servers
        beside = [min(max(n, 1), most) for n in (floor(rule.ratio * servers), floor(rule.ratio * servers) + 1)]
        best = min(beside, key=lambda workers: _published_cost(bundle, slot, workers, servers))
        return _plan(self.name, bundle, best, kv_per_slot=slot, **rule._asdict())


def _published_cost(bundle: Bundle, per_slot: float, workers: int, servers: int) -> float:
    """(1 + 1 / r) max{A, C, F}: instance-seconds of B tokens in a layer under the published cycle."""
    at = workers / servers
    attention = float(bundle.attention_time(bundle.batch * per_slot))
    return (1 + 1 / at) * max(attention, bundle.transfer_time(1.0), bundle.ffn_time(at))


def _plan(name: str, bundle: Bundle, workers: int, **figures: Any) -> Plan:
    return Plan(name, bundle=bundle.sized(workers), figures=figures)
