"""A/F ratios without a model of the cycle, or with a wrong one, and the ratio that simulation of all of them finds.

Each is a frozen dataclass that chooses the Attention workers of the bundle as given. None solves a program; the
simulation is a second one, written for this file alone, so that it also checks the rules' theory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from llmopt import ratio
from llmopt.arrays import Floats, Ints
from llmopt.bundle import Bundle
from llmopt.errors import PolicyError
from llmopt.machines import model_shape
from llmopt.plan import Plan
from llmopt.policy import Policy
from llmopt.scenario import Scenario

SAMPLED = 200_000
"""Requests among which the simulation draws."""
CELLS = 20_000_000
"""Loads that the simulation keeps at most: micro-batches x steps x workers."""
PLAYED, STEPS = 20_000_000, 4_000
"""Stages that it plays at most, steps x micro-batches x ratios x workers; and steps, evenly spaced, but at least 50."""
SLOTS = 4_000_000
"""Slots that it follows at most."""


@dataclass(frozen=True)
class OneToOne:
    """As many Attention workers as FFN servers.

    Source: the first of the ratios that Song et al., arXiv 2601.21351 v1, simulate; what who does not know the ratio
    would do.
    """

    name: str = "afd-one"

    def plan(self, scenario: Scenario) -> Plan:
        """One worker for each server."""
        bundle = ratio.kept_bundle(scenario, self.name)
        return _plan(self.name, scenario, bundle, bundle.ffn_servers, 1.0)


@dataclass(frozen=True)
class MeanLengths:
    """The mean-field rule with the load of a slot taken as mean prompt + mean output.

    A request is at its full length in its last step alone, but a slot is met in long requests more often: only for
    geometric outputs do the two errors cancel.

    Source: the practical recipe of Song et al., arXiv 2601.21351 v1.
    """

    name: str = "afd-mean-lengths"

    def plan(self, scenario: Scenario) -> Plan:
        """The rule with muP + muD in place of theta."""
        return _with_load(self.name, scenario, 1.0)


@dataclass(frozen=True)
class HalfOutput:
    """The mean-field rule with the load of a slot taken as mean prompt + half the mean output.

    Right on average over the steps of one request, and if all outputs are equal; it forgets that a slot is met in long
    requests more often.

    Source: the middle of a request's life, a rule of thumb for KV use; no publication proposes it for the A/F ratio.
    """

    name: str = "afd-half-output"

    def plan(self, scenario: Scenario) -> Plan:
        """The rule with muP + muD / 2 in place of theta."""
        return _with_load(self.name, scenario, 0.5)


@dataclass(frozen=True)
class FlopBalance:
    """Devices of both roles in proportion to the operations of a token in Attention and in FFN.

    Counted are multiplications and additions in all layers: the matrices of Attention and its products with theta KV
    tokens, on the other side the matrices of dense, shared and visited routed experts and the routers. It forgets that
    decode attention is bound by memory.

    Source: cutting a pipeline where the estimated operations of its stages are equal, as GPipe does (Huang et al.,
    arXiv 1811.06965); that the roles of AFD are cut so is ours.
    """

    name: str = "afd-flop-balance"

    def plan(self, scenario: Scenario) -> Plan:
        """Devices x attention_devices : y ffn_devices as FLOPs of Attention : FLOPs of FFN, x rounded.

        Raises
        ------
        PolicyError, ScenarioError
            If the pool names no model, or one that is not known.
        """
        bundle, pool = ratio.kept_bundle(scenario, self.name), scenario.pools[0]
        if not pool.model:
            raise PolicyError(
                f"policy {self.name!r}: pool {pool.name!r} names no model, so that its operations are not known; set "
                'model in [[pools]], such as "DeepSeek-V3"'
            )
        attention, ffn = flops_of_roles(pool.model, scenario.slot_load.theta)
        exact = attention / bundle.attention_devices / (ffn / bundle.ffn_devices)
        return _plan(self.name, scenario, bundle, round(exact * bundle.ffn_servers), exact)


@dataclass(frozen=True)
class Simulated:
    """Every number of Attention workers is simulated with full slots, and the best is taken.

    Loads are followed request by request, start and mix as the scenario has them, and played through max{A, C, F} or
    through a pipeline, in which each step goes through one layer: loads change slowly, so that its cycles are those of
    all layers. requests: that each micro-batch of a worker finishes on average, at most; seed: of its random numbers,
    which are none of those that judge the policies.

    Source: the search over r in the simulation of Song et al., arXiv 2601.21351 v1; the code is ours.
    """

    requests: int = 10_000
    seed: int = 2601
    name: str = "afd-simulated"

    def plan(self, scenario: Scenario) -> Plan:
        """The best number of workers by simulation.

        Raises
        ------
        PolicyError
            If there are too many slots to simulate.
        """
        bundle = ratio.kept_bundle(scenario, self.name)
        made = simulated_throughput(scenario, bundle, self.requests, self.seed)
        best = int(np.argmax(made)) + 1
        plan = _plan(self.name, scenario, bundle, best, best / bundle.ffn_servers)
        return replace(plan, figures={**plan.figures, "throughput": float(made[best - 1])})


def flops_of_roles(model: str, context: float) -> tuple[float, float]:
    """Operations of one token in all layers: of Attention over `context` KV tokens, and of the FFN.

    Raises
    ------
    ScenarioError
        If the model is not known.
    """
    shape = model_shape(model)
    projections = 2.0 * shape.layers * shape.attention_weights
    whole = shape.flops_per_kv * context
    window = shape.window_layers * min(context, shape.window) * 4.0 * shape.heads * shape.head_dim
    return projections + whole + window, shape.flops_per_token - projections


def simulated_throughput(scenario: Scenario, bundle: Bundle, requests: int, seed: int) -> Floats:
    """Tokens/s per unit of weight with 1, 2, ... most_attention workers, shape (most_attention,)."""
    most, rng = scenario.fleet.most_attention, np.random.default_rng(seed)
    series = 1 if bundle.pipeline == "ideal" else bundle.micro_batches
    if series * most * bundle.batch > SLOTS:
        raise PolicyError(
            f"policy 'afd-simulated': {series * most * bundle.batch:,} slots are more than the {SLOTS:,} it simulates; "
            "lower batch or fleet.most_attention, or take afd-gaussian"
        )
    count = min(requests, scenario.evaluation.requests)
    steps = min(ceil(count * scenario.slot_load.mean_decode / bundle.batch), CELLS // (series * most))
    prompt, decode = _sample(scenario, rng)
    cold = scenario.evaluation.start == "cold"
    loads = np.stack([_loads(prompt, decode, bundle.batch, steps, most, cold, rng) for _ in range(series)])
    x = np.arange(1, most + 1)
    cycle = (_ideal if bundle.pipeline == "ideal" else _pipeline)(bundle, loads, x)
    weight = x * bundle.weights[0] + bundle.ffn_servers * bundle.weights[1]
    return np.asarray(x * bundle.batch / (weight * bundle.layers * cycle))


def _sample(scenario: Scenario, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Prompts and decode steps of requests of the mix that stay a step or more, arrays of one length."""
    classes, rates = scenario.workload.classes, scenario.workload.rates
    counts = rng.multinomial(SAMPLED, rates / rates.sum())
    pairs = [cls.sample(rng, int(n)) for cls, n in zip(classes, counts, strict=True)]
    prompt, output = (np.concatenate(part) for part in zip(*pairs, strict=True))
    decode = output - scenario.pools[0].first_step
    if not (decode > 0).any():
        raise PolicyError("policy 'afd-simulated': none of the sampled requests stays a decode step; lengthen outputs")
    return prompt[decode > 0], decode[decode > 0]


def _loads(
    prompt: Ints, decode: Ints, batch: int, steps: int, workers: int, cold: bool, rng: np.random.Generator
) -> Floats:
    """KV tokens of each worker's micro-batch in each step, shape (steps, workers).

    A request in service since step s holds prompt - s + k tokens in step k, so that the load is B k + sum (prompt - s):
    its second part changes where requests come and go, and is summed up once.
    """
    slots = np.repeat(np.arange(workers), batch)
    if cold:
        chosen, begun = rng.integers(len(decode), size=len(slots)), np.zeros(len(slots), np.int64)
    else:  # a slot is met in a request as often as it has steps, at any of them
        share = np.cumsum(decode)
        chosen = np.searchsorted(share, rng.random(len(slots)) * share[-1], side="right")
        begun = -np.floor(rng.random(len(slots)) * decode[chosen]).astype(np.int64)
    change = np.zeros((steps + 1) * workers)
    while len(slots):
        end = begun + decode[chosen]
        np.add.at(change, np.maximum(begun, 0) * workers + slots, prompt[chosen] - begun)
        np.add.at(change, np.minimum(end, steps) * workers + slots, begun - prompt[chosen])
        going_on = end < steps
        slots, begun = slots[going_on], end[going_on]
        chosen = rng.integers(len(decode), size=len(slots))
    level = np.cumsum(change.reshape(steps + 1, workers)[:-1], axis=0)
    return np.asarray(level + batch * np.arange(steps)[:, None])


def _ideal(bundle: Bundle, loads: Floats, x: Ints) -> Floats:
    """Mean over the steps of max{slowest of x workers, C, F}, seconds, shape (most,)."""
    slowest = np.maximum.accumulate(bundle.attention_time(loads[0]), axis=1)
    hop, ffn = _stages(bundle, x)
    return np.asarray(np.maximum(slowest, np.maximum(hop, ffn)).mean(axis=0))


def _pipeline(bundle: Bundle, loads: Floats, x: Ints) -> Floats:
    """Mean seconds between two micro-batches, every x at once, shape (most,); state (ratios, workers)."""
    series, steps, most = loads.shape
    kept = min(steps, STEPS, max(50, PLAYED // (series * most * most)))
    times = bundle.attention_time(loads[:, np.linspace(0, steps - 1, kept).astype(int)])
    hop, ffn = _stages(bundle, x)
    sends_back = bundle.pipeline == "blocking"
    sends = hop[:, None] if bundle.pipeline in ("attention-blocking", "blocking") else 0.0
    absent = np.where(np.arange(most)[None, :] < x[:, None], 0.0, -np.inf)
    worker, server, ready = np.zeros((most, most)), np.zeros(most), np.zeros((series, most))
    for k in range(kept):
        for m in range(series):
            done = np.maximum(worker, ready[m][:, None]) + times[m, k] + absent
            worker = done + sends
            computed = np.maximum(server, done.max(axis=1) + hop) + ffn
            server = computed + hop if sends_back else computed
            ready[m] = computed + hop
    return np.asarray(ready.max(axis=0) / (kept * series))


def _stages(bundle: Bundle, x: Ints) -> tuple[Floats, Floats]:
    """Seconds of a hop and of the FFN beside each number of workers, arrays of its shape."""
    ratios = [int(n) / bundle.ffn_servers for n in x]
    return np.array([bundle.transfer_time(r) for r in ratios]), np.array([bundle.ffn_time(r) for r in ratios])


def _with_load(name: str, scenario: Scenario, share: float) -> Plan:
    """The mean-field rule with mean prompt + `share` of the mean output tokens in a slot."""
    bundle, load = ratio.kept_bundle(scenario, name), scenario.slot_load
    mistaken = replace(load, theta=load.mean_prompt + share * load.mean_decode)
    whole = ratio.best_whole(bundle, mistaken, scenario.fleet.most_attention, bundle.ffn_servers)
    exact = ratio.best_ratio(bundle, mistaken).ratio
    plan = _plan(name, scenario, bundle, whole, exact)
    return replace(plan, figures={**plan.figures, "kv_per_slot": mistaken.theta})


def _plan(name: str, scenario: Scenario, bundle: Bundle, workers: int, exact: float) -> Plan:
    """The bundle with so many workers, at least 1 and no more than the fleet allows."""
    whole = min(max(int(workers), 1), scenario.fleet.most_attention)
    return Plan(name, bundle=bundle.sized(whole), figures={"ratio": exact})


POLICIES: tuple[Policy, ...] = (OneToOne(), MeanLengths(), HalfOutput(), FlopBalance(), Simulated())
