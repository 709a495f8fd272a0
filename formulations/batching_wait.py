"""WAIT and Nested WAIT: hold requests back until batches are as large as the fluid equilibrium needs them.

Equation numbers of README.md, "Rules".
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.batcher import Batcher, Hold
from llmopt.errors import ScenarioError
from llmopt.moments import Engine, moments
from llmopt.plan import Plan
from llmopt.scenario import Scenario
from llmopt.stability import caps, occupancy, work

NOBODY = "one request of each class at every stage already exceeds a cap, so that nobody is held back"
TRIES, HALVINGS, MOST = 100_000, 40, 1_000_000
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Flow:
    """What requests of each type ask of a replica that starts n_j of type j in every step, in steady state.

    rates (n_types,): requests/s of one replica; base (n_rows,): seconds of an empty step; work (n_types, n_rows):
    seconds that a request adds to steps over its life; held (n_types, n_caps): resource-steps of a request over its
    life; caps (n_types, n_caps) or (n_caps,): most of each resource in a step. Rows are pieces of step times.
    """

    rates: Floats
    base: Floats
    work: Floats
    held: Floats
    caps: Floats

    def step_time(self, counts: Floats) -> float:
        """DT(n) = max_i (a_i + sum_j n_j w_ij), seconds.                                                      (B21)"""
        return float((self.base + counts @ self.work).max())

    def fits(self, counts: Floats) -> bool:
        """sum_j n_j u_Rj <= cap_R for every resource.                                                         (B22)"""
        return bool((counts @ self.held <= self.caps * (1 + ROUNDING)).all())

    def feasible(self, counts: Floats) -> bool:
        """Whether thresholds are met as fast as they are used, lambda_j DT(n) <= n_j (B21), and fit (B22)."""
        enough = self.rates * self.step_time(counts) <= counts * (1 + ROUNDING)
        return bool(enough.all()) and self.fits(counts)

    def scaled(self, factor: float) -> Flow:
        """The same at `factor` times the rates."""
        return Flow(self.rates * factor, self.base, self.work, self.held, self.caps)


@dataclass(frozen=True, eq=False)
class Fluid:
    """Equilibrium without rounding: step time T* (s), thresholds n*_j (n_types,), resources held u* (n_caps,)."""

    step_time: float
    counts: Floats
    held: Floats


def fluid(flow: Flow) -> Fluid:
    """T* = max_i a_i / (1 - sum_j lambda_j w_ij), n*_j = lambda_j T*, u*_R = sum_j n*_j u_Rj.                 (B20)

    With one piece, base d0 and d1 seconds a token held: T* = d0 / (1 - d1 G), M* = d0 G / (1 - d1 G) with G = sum_j
    lambda_j (l'_j + 1)(l_j + l'_j / 2), Ao et al., arXiv 2504.11320. T* is inf where the work alone takes more time
    than there is.
    """
    slack = 1 - flow.rates @ flow.work
    if (slack <= 0).any():
        return Fluid(np.inf, np.full_like(flow.rates, np.inf), np.full(flow.held.shape[1], np.inf))
    time = float((flow.base / slack).max())
    return Fluid(time, flow.rates * time, flow.rates * time @ flow.held)


def least_thresholds(flow: Flow) -> Ints | None:
    """The least whole thresholds with (B21), (B22) and n_j >= 1, shape (n_types,); None if there are none.

    n -> max(1, ceil(lambda_j DT(n))) grows with n, so that its iteration from below climbs to a fixed point that is
    least in every component at once: it minimises memory, batch and step time together (Tarski), and needs no solver.
    It begins at the fluid's n*, which no feasible n is below.
    """
    ideal = fluid(flow)
    if not np.isfinite(ideal.step_time):
        return None
    counts = np.maximum(1.0, np.ceil(ideal.counts * (1 - ROUNDING)))
    for _ in range(TRIES):
        if not flow.fits(counts) or counts.max() > MOST:
            return None
        needed = np.maximum(1, np.ceil(flow.rates * flow.step_time(counts) * (1 - ROUNDING)))
        if (needed <= counts).all():
            return counts.astype(np.int64)
        counts = np.maximum(needed, counts)
    return None


def thresholds(flow: Flow) -> tuple[Ints, float | None]:
    """Least thresholds and the share of the rates that they sustain, 1 unless the replica cannot carry all.

    Where (B21) and (B22) exclude each other the rates are scaled down to the largest share at which they do not. Where
    one request of each type in every stage already exceeds a cap, all thresholds are 1 and nothing is said of the rates
    (None): steps that start one of each would have to be rarer than this rule makes them.
    """
    counts, low, high = least_thresholds(flow), 0.0, 1.0
    if counts is not None:
        return counts, 1.0
    counts = np.ones(len(flow.rates), dtype=np.int64)
    if not flow.fits(counts.astype(float)):
        return counts, None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = least_thresholds(flow.scaled(middle))
        counts, low, high = (found, middle, high) if found is not None else (counts, low, middle)
    return counts, low


def flow_of(scenario: Scenario) -> Flow:
    """What each class asks of a replica; with unlike pools the rows and caps of all of them together.

    Every replica that can hold a class gets the same share of it, as round-robin routing does.
    """
    classes = scenario.workload.classes
    allowed = np.array(scenario.allowed)
    homes = allowed @ np.array([pool.replicas for pool in scenario.pools])
    costs = [moments(Engine.of(pool), classes) for pool in scenario.pools]
    pairs = list(zip(scenario.pools, costs, strict=True))
    return Flow(
        scenario.workload.rates / homes,
        np.concatenate([pool.stepper.coefficients[:, 0] for pool in scenario.pools]),
        np.concatenate(
            [work(pool, m) * here[:, None] for (pool, m), here in zip(pairs, allowed.T, strict=True)], axis=1
        ),
        np.concatenate([occupancy(m) * here[:, None] for (_, m), here in zip(pairs, allowed.T, strict=True)], axis=1),
        np.concatenate([caps(pool) for pool in scenario.pools]),
    )


@dataclass(frozen=True)
class Wait:
    """A class moves only in steps that find n_c of it waiting, and then starts n_c.

    The thresholds are the least whole numbers with n_c >= lambda_c DT(n) and room for n_c requests at every stage,
    (B21) (B22): steps then come no faster than thresholds fill. They are per replica; rates are those of the scenario.
    Where no thresholds can sustain the rates, they sustain the largest share of them that some can (`sustained`). Where
    one request of each class in every stage already exceeds a cap (None), the equilibrium starts less than one request
    a step and there is nothing to gather: nobody is held back, and requests are admitted in order of arrival if they
    fit to their end. At light load n_c is 1 and requests pause between arrivals of their class: the rule is made for
    heavy traffic.

    Source: WAIT, Ao, Luo, Simchi-Levi, Wang, "Optimizing LLM Inference: Fluid-Guided Online Scheduling with Memory
    Constraints", arXiv 2504.11320. Reported guarantee: throughput near the fluid's in heavy traffic for known lengths
    and steps linear in tokens held. Here a class has a law of lengths and enters by its means, and steps are
    max-affine; no guarantee is claimed for that.
    """

    name: str = "wait"

    def plan(self, scenario: Scenario) -> Plan:
        """Thresholds from the fluid equilibrium."""
        flow = flow_of(scenario)
        counts, share = thresholds(flow)
        batcher = Batcher(hold=Hold("class", tuple(counts.tolist())))
        if share is None:
            batcher = Batcher(admission="lookahead")
        names = [cls.name for cls in scenario.workload.classes]
        figures = _figures(flow, dict(zip(names, counts.tolist(), strict=True)), counts, share)
        return Plan(self.name, batcher=batcher, figures=figures)


@dataclass(frozen=True)
class NestedWait:
    """Lives are cut into segments of output tokens; a segment moves only if those before it do and n_k have reached it.

    Edges are the quantiles 1/m, ..., (m - 1)/m of the outputs of all classes. n_1 is the threshold of `wait` for all
    classes as one. Of n_k requests n_k P(o > e_k | o > e_(k-1)) reach the next segment on average, and the next
    threshold is the least whole number above that, so that its first stage empties faster than it fills. What still
    gathers there is above b_k with a probability of at most `risk` / (m - 1), by Lundberg's exponent, (B23); memory
    for it is kept free of admissions. Where `wait` finds nothing to gather, nobody is held back here either.

    Source: Nested WAIT of Ao, Luo, Simchi-Levi, Wang, arXiv 2504.11320. Kept are the nested segments, the gate at their
    first stages, and a safety buffer that grows with the logarithm of the risk. Ours are the edges, n_k and the size of
    the buffer; the authors' public code in turn sweeps one total limit. No guarantee is claimed.
    """

    segments: int = 3
    risk: float = 0.01
    name: str = "nested-wait"

    def __post_init__(self) -> None:
        """Refuse settings without meaning.

        Raises
        ------
        ScenarioError
            For fewer than one segment or a risk outside (0, 1).
        """
        if self.segments < 1 or not 0 < self.risk < 1:
            raise ScenarioError(
                f"nested-wait has segments = {self.segments} and risk = {self.risk:g}; give at least 1 and one in 0..1"
            )

    def plan(self, scenario: Scenario) -> Plan:
        """Edges, thresholds and buffer."""
        flow, shares = merged(flow_of(scenario))
        first, share = thresholds(flow)
        edges = self.edges(scenario, shares)
        reach = survivors(scenario, shares, edges)
        counts = nested_counts(int(first[0]), reach)
        extra = [buffer(a, q, n, self.risk / len(edges)) for a, q, n in zip(counts, reach, counts[1:], strict=False)]
        tokens = self._tokens(scenario, shares, edges, extra)
        kept = min(0.5, max(tokens / pool.kv_capacity for pool in scenario.pools))
        figures = _figures(flow, {"edges": list(edges), "counts": list(counts)}, first, share)
        hold = None if share is None else Hold("stage", counts, edges)
        batcher = Batcher(admission="optimistic", protected=kept, hold=hold)
        return Plan(self.name, batcher=batcher, figures=figures | {"buffer_tokens": tokens, "buffer_requests": extra})

    def edges(self, scenario: Scenario, shares: Floats) -> tuple[int, ...]:
        """Distinct quantiles of the outputs that some request outlives, increasing."""
        values, probs = outputs(scenario, shares)
        quantiles = np.searchsorted(np.cumsum(probs), np.arange(1, self.segments) / self.segments - ROUNDING)
        found = np.unique(values[np.minimum(quantiles, len(values) - 1)])
        return tuple(int(e) for e in found if e < values[-1])

    @staticmethod
    def _tokens(scenario: Scenario, shares: Floats, edges: tuple[int, ...], extra: list[int]) -> float:
        """Tokens that the buffered requests hold: their prompt and what they have emitted."""
        prompt = float(shares @ np.array([cls.mean_prompt for cls in scenario.workload.classes]))
        return float(sum(b * (prompt + e) for b, e in zip(extra, edges, strict=True)))


def merged(flow: Flow) -> tuple[Flow, Floats]:
    """All types as one of their mean, and the share of each."""
    rate = flow.rates.sum()
    shares = flow.rates / rate
    one = (shares @ flow.work)[None, :], (shares @ flow.held)[None, :]
    return Flow(np.array([rate]), flow.base, *one, flow.caps), np.asarray(shares)


def outputs(scenario: Scenario, shares: Floats) -> tuple[Ints, Floats]:
    """Output lengths of all classes together, increasing, and their probabilities."""
    laws = [_law(cls.pairs.output) if cls.pairs is not None else cls.output.pmf for cls in scenario.workload.classes]
    values, where = np.unique(np.concatenate([v for v, _ in laws]), return_inverse=True)
    weights = np.concatenate([share * np.asarray(p) for share, (_, p) in zip(shares, laws, strict=True)])
    return values.astype(np.int64), np.asarray(np.bincount(where.reshape(-1), weights=weights), dtype=float)


def survivors(scenario: Scenario, shares: Floats, edges: tuple[int, ...]) -> tuple[float, ...]:
    """Probability to reach each edge from the one before, P(o > e_k | o > e_(k-1))."""
    values, probs = outputs(scenario, shares)
    beyond = [1.0, *(float(probs[values > e].sum()) for e in edges)]
    return tuple(b / a for a, b in pairwise(beyond))


def nested_counts(first: int, reach: tuple[float, ...]) -> tuple[int, ...]:
    """n_1 and n_(k+1) = floor(n_k P(reach)) + 1, the least that empties a first stage faster than it fills."""
    counts = [first]
    for q in reach:
        counts.append(int(np.floor(counts[-1] * q * (1 + ROUNDING))) + 1)
    return tuple(counts)


def buffer(inflow: int, reach: float, served: int, risk: float) -> int:
    """Least b with exp(-eta b) <= risk, eta > 0 solving E exp(eta (Binomial(n, q) - n_k)) = 1.                (B23)

    A first stage that gains Binomial(n, q) a step and loses n_k exceeds b with a probability of at most exp(-eta b)
    (Lundberg's inequality for the random walk with these increments, Kingman's bound). 0 if it never gains more than
    it loses.
    """
    if inflow <= served:
        return 0
    from scipy.optimize import brentq

    def exponent(eta: float) -> float:
        # log of 1 - q + q e^eta without overflow
        return inflow * float(np.logaddexp(np.log1p(-reach), np.log(reach) + eta)) - served * eta

    high = 1.0
    while exponent(high) < 0:
        high *= 2
    low = high
    while exponent(low) >= 0:
        low /= 2
    return int(np.ceil(-np.log(risk) / brentq(exponent, low, high)))


def _law(output: Ints) -> tuple[Ints, Floats]:
    values, count = np.unique(output, return_counts=True)
    return values, count / count.sum()


def _figures(flow: Flow, named: dict[str, object], counts: Ints, share: float | None) -> dict[str, object]:
    at = fluid(flow)
    finite = at.step_time if np.isfinite(at.step_time) else None
    known: dict[str, object] = {
        "thresholds": named,
        "sustained": share,
        "fluid_step_s": finite,
        "step_s": flow.step_time(counts.astype(float)),
    }
    return known if share is not None else known | {"note": NOBODY}
