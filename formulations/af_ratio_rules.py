"""Rules for the A/F ratio in closed form: mean field, barrier, and the published one; no program is solved.

They choose the Attention workers alone: micro-batch size and FFN servers stay as given, and what KV memory and TPOT
allow is not asked (the programs of `af_ratio` ask). Equation numbers of README.md, "A/F ratio".
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Any

import numpy as np

from llmopt import barrier, ratio
from llmopt.bundle import Bundle
from llmopt.plan import Plan
from llmopt.scenario import Scenario
from llmopt.slot_law import SlotLaw


@dataclass(frozen=True)
class MeanField:
    """The whole number nearest to the ratio of largest throughput if every worker held its mean load (A1).

    The best ratio is a kink of tau or sqrt(a_i w_F / (b_i w_A)), so that it is found without a solver. In the mean
    field its floor or ceiling is best (lemma in README.md; `afd-integer` takes that), but the barrier, which the mean
    field leaves out, moves the true optimum up, and near it the curve is flat, so that the nearest number loses less
    where the floor is the better one by a little. With a measured FFN table every number is tried in the mean field.

    Source: the mean-field rule of Song et al., arXiv 2601.21351 v2 to v4, here for any pipeline, pieces and prices.
    """

    name: str = "afd-mean-field"

    def plan(self, scenario: Scenario) -> Plan:
        """The best ratio times the servers, rounded."""
        bundle, load = ratio.kept_bundle(scenario, self.name), scenario.run_load
        optimum, most, servers = ratio.best_ratio(bundle, load), scenario.fleet.most_attention, bundle.ffn_servers
        if bundle.ffn_table is not None:
            whole = ratio.best_whole(bundle, load, most, servers)
        else:
            whole = int(np.clip(np.rint(optimum.ratio * servers), 1, most))
        return _plan(self.name, bundle, whole, ratio=optimum.ratio, cycle=optimum.cycle, regime=optimum.regime)


@dataclass(frozen=True)
class Gaussian:
    """The number of workers of largest throughput if the fullest of them decides, loads being normal (A17).

    Source: the barrier-aware rule of Song et al., arXiv 2601.21351 v2 to v4, with the maximum inside the expectation;
    here for any pipeline, pieces and prices. All numbers up to the most are tried: the lemma needs a mean field.
    """

    name: str = "afd-gaussian"

    def plan(self, scenario: Scenario) -> Plan:
        """The best of all whole numbers."""
        return _behind_barrier(self.name, scenario, None)


@dataclass(frozen=True)
class Barrier:
    """The number of workers of largest throughput if the fullest decides, by the exact law of loads (A15).

    Loads of long prompts and outputs are far from normal where micro-batches are small: the mean and the variance of a
    slot's load do not tell how full the fullest worker is. Here all of its law counts.

    Source: ours; the rule of `afd-gaussian` with the law of `llmopt.slot_law` in place of the normal one.
    """

    name: str = "afd-barrier"

    def plan(self, scenario: Scenario) -> Plan:
        """The best of all whole numbers."""
        return _behind_barrier(self.name, scenario, scenario.slot_law)


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
        bundle, load, judged = ratio.kept_bundle(scenario, self.name), scenario.run_load, scenario.evaluation
        requests = judged.requests if judged.start == "cold" else None
        slot = ratio.horizon_load(load.mean_prompt, load.mean_decode, bundle.batch, requests)
        rule = ratio.published(bundle, slot)
        most, servers = scenario.fleet.most_attention, bundle.ffn_servers
        beside = [min(max(n, 1), most) for n in (floor(rule.ratio * servers), floor(rule.ratio * servers) + 1)]
        best = min(beside, key=lambda workers: _published_cost(bundle, slot, workers, servers))
        return _plan(self.name, bundle, best, kv_per_slot=slot, **rule._asdict())


def _behind_barrier(name: str, scenario: Scenario, law: SlotLaw | None) -> Plan:
    bundle, load = ratio.kept_bundle(scenario, name), scenario.run_load
    servers = bundle.ffn_servers
    best = barrier.best_barrier(bundle, load, scenario.fleet.most_attention, servers, law)
    cycle = barrier.barrier_cycle(bundle, load, best, servers, law)
    fuller = barrier.imbalance(bundle, load, best, law)
    return _plan(name, bundle, best, ratio=best / servers, cycle=cycle, imbalance=fuller)


def _published_cost(bundle: Bundle, per_slot: float, workers: int, servers: int) -> float:
    """(1 + 1 / r) max{A, C, F}: instance-seconds of B tokens in a layer under the published cycle."""
    at = workers / servers
    attention = float(bundle.attention_time(bundle.batch * per_slot))
    return (1 + 1 / at) * max(attention, bundle.transfer_time(1.0), bundle.ffn_time(at))


def _plan(name: str, bundle: Bundle, workers: int, **figures: Any) -> Plan:
    return Plan(name, bundle=bundle.sized(workers), figures=figures)
