"""The best schedule with hindsight as a policy, for replicas that work in rounds; it comes with its certificate."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, isfinite

import numpy as np

from formulations.batching import TimeIndexed
from formulations.batching_bounds import CoarseRelaxation, area_bound
from formulations.batching_exact import ExactHindsight, Hindsight
from llmopt.arrays import Floats, Ints
from llmopt.batcher import Batcher, Candidates
from llmopt.errors import PolicyError
from llmopt.plan import Plan
from llmopt.policy import solved
from llmopt.rounds import Rounds
from llmopt.scenario import Pool, Scenario
from llmopt.solution import SolveOptions
from llmopt.workload import RequestClass, Requests

LARGEST = 20_000_000
"""Requests times rounds of the horizon that the chain tables take; some hundred megabytes."""
SMALL = 10_000
"""Requests times rounds for which the time-indexed program is worth solving; each is a binary variable."""
BLOCKS, EARLY = 60, 1e-6


@dataclass(frozen=True)
class HindsightReplay:
    """The best schedule found within about `time_limit` seconds when all requests and their true outputs are known from
    the start, replayed by its start rounds: by `ExactHindsight`, then on small instances by `TimeIndexed`.

    It needs a replica that works in rounds: one replica, steps that all last the same, blocks of one token, room for
    every whole prompt in a step. Then a request that is admitted in step p holds s + L + j - 1 tokens in the j-th of
    its o + 1 - e steps (L lookahead slots; e = 1 where prefill gives the first token), which is the round model with
    prompt s + L - 1 and output o + 1 - e. Arrivals between two steps count as arrived at the earlier one for the
    bound, and are replayed a step later.

    `Plan.bound` is the proven bound of the search if the pool restarts whoever loses memory (preemption = "restart").
    Other pools may take memory away and keep the tokens, which the round model does not know: rules that do can beat
    the schedule itself, and there the bound is the memory-area bound or the grid relaxation, whichever is larger:
    they count token-rounds and hold for every rule. A rule with an `overflow` of its own that keeps tokens on a pool
    that restarts is outside the first bound.

    Source: the hindsight program of Jaillet et al., arXiv 2502.07115; the search is described in README.md, "Batching".
    Guarantee: no rule within the bound's reach has a smaller sum of end-to-end latencies.
    """

    time_limit: float = 20.0
    name: str = "hindsight"

    def __post_init__(self) -> None:
        """Refuse a time limit that leaves no time.

        Raises
        ------
        ScenarioError
            If it is not positive.
        """
        ExactHindsight(self.time_limit)

    def plan(self, scenario: Scenario) -> Plan:
        """Order and release by start rounds; nothing is solved before the requests are known.

        Raises
        ------
        PolicyError
            If the scenario is not one replica that works in rounds, naming what is in the way.
        """
        replica = unit_rounds(self.name, scenario)
        known = _Known(replica, self.time_limit)
        batcher = Batcher(known.order, known.release, admission="lookahead", clairvoyant=True)
        figures = {"round_s": replica.seconds, "exact_bound": replica.restarts, "time_limit_s": self.time_limit}
        return Plan(self.name, batcher=batcher, bound=known.bound, figures=figures)


@dataclass(frozen=True)
class Replica:
    """A replica that works in rounds: `seconds` a round, `capacity` tokens, `most` requests in a step.

    before, after: what is added to prompts and outputs to make them those of the round model; restarts: whether whoever
    loses memory loses its tokens too.
    """

    seconds: float
    capacity: int
    most: int
    before: int
    after: int
    restarts: bool

    def rounds(self, arrival: Floats, prompt: Ints, output: Ints) -> Rounds:
        """The requests in the round model, arrivals moved back to the beginning of their round."""
        first = np.floor(arrival / self.seconds + EARLY).astype(np.int64)
        return Rounds(first, prompt + self.before, output + self.after, self.capacity)

    def late(self, arrival: Floats) -> bool:
        """Whether some request arrives inside a round."""
        at = arrival / self.seconds
        return bool((np.abs(at - np.rint(at)) > EARLY).any())


def unit_rounds(policy: str, scenario: Scenario) -> Replica:
    """The only replica of a scenario as one that works in rounds.

    Raises
    ------
    PolicyError
        If it does not, naming the setting that is in the way and its remedy.
    """
    pool, steps = scenario.pools[0], scenario.pools[0].stepper.coefficients
    prompt = max(_longest(cls) for cls in scenario.workload.classes)
    faults = (
        (len(scenario.pools) > 1 or pool.replicas > 1, "has several replicas; leave one"),
        (pool.table is not None or bool(steps[:, 1:].any()), "has steps that last longer the more they hold"),
        (pool.block_size > 1, f"has blocks of {pool.block_size} tokens; set block_size = 1"),
        (
            pool.chunk < prompt,
            f"prefills {pool.chunk} tokens a step, fewer than the longest prompt; raise token_budget",
        ),
        (pool.token_budget < pool.kv_capacity, "cannot prefill its whole memory in a step; raise token_budget"),
    )
    for wrong, what in faults:
        if wrong:
            raise PolicyError(
                f"policy {policy!r}: works in rounds of one length, but pool {pool.name!r} {what}; "
                "compare with the certified bound instead"
            )
    return _replica(pool)


def _replica(pool: Pool) -> Replica:
    seconds = float(pool.stepper.coefficients[:, 0].max())
    shift = (pool.lookahead_slots - 1, 1 - pool.first_step)
    return Replica(seconds, pool.kv_blocks, pool.max_batch, *shift, pool.preemption == "restart")


def _longest(cls: RequestClass) -> int:
    return int(cls.pairs.prompt.max()) if cls.pairs is not None else cls.prompt.largest


@dataclass(frozen=True, eq=False)
class _Known:
    """What is solved once the requests are known; order, release and bound share one search."""

    replica: Replica
    time_limit: float
    found: dict[bytes, Hindsight] = field(default_factory=dict)

    def order(self, candidates: Candidates) -> Floats:
        """Start round of each request as its key, shape (n,)."""
        return self._start(candidates).astype(float)

    def release(self, candidates: Candidates) -> Floats:
        """Start of the start round in seconds, shape (n,), a millionth of a round early against rounding."""
        return np.asarray((self._start(candidates) - EARLY) * self.replica.seconds)

    def bound(self, requests: Requests) -> float:
        """No rule within reach has a smaller sum of end-to-end latencies, s."""
        rounds = self.replica.rounds(requests.arrival, requests.prompt, requests.output)
        least = self._solved(rounds).bound if self.replica.restarts else preemptive_bound(rounds, self.time_limit)
        return self.replica.seconds * (least + float(rounds.arrival.sum())) - float(requests.arrival.sum())

    def _start(self, candidates: Candidates) -> Ints:
        rounds = self.replica.rounds(candidates.arrival, candidates.prompt, candidates.predicted)
        start = self._solved(rounds).start + int(self.replica.late(candidates.arrival))
        busiest = Rounds(start, 0 * start, rounds.output, len(start) + int(rounds.output.max(initial=1)))
        if _together(busiest) > self.replica.most:
            raise PolicyError(f"the best schedule serves more than {self.replica.most} requests; raise max_batch")
        return start

    def _solved(self, rounds: Rounds) -> Hindsight:
        if not len(rounds):
            return Hindsight(rounds.arrival, 0, 0)
        key = np.concatenate([rounds.arrival, rounds.prompt, rounds.output]).tobytes()
        if key not in self.found:
            if len(rounds) * rounds.horizon > LARGEST:
                raise PolicyError(
                    f"{len(rounds)} requests over {rounds.horizon} rounds are too many to search; shorten the horizon"
                )
            self.found[key] = best_known(rounds, self.time_limit)
        return self.found[key]


def _together(rounds: Rounds) -> int:
    """Most requests that are served in one round when each starts on arrival."""
    change = np.zeros(int((rounds.arrival + rounds.output).max(initial=0)) + 1, dtype=np.int64)
    np.add.at(change, rounds.arrival, 1)
    np.add.at(change, rounds.arrival + rounds.output, -1)
    return int(np.cumsum(change).max(initial=0))


def best_known(rounds: Rounds, time_limit: float) -> Hindsight:
    """The search, and where it leaves a gap on a small instance the time-indexed program for the second half of the
    time.

    The program knows equal requests, (B9), by which it closes instances of few kinds that the search does not.
    """
    small = len(rounds) * rounds.horizon <= SMALL
    found = ExactHindsight(time_limit / 2 if small else time_limit).solve(rounds)
    if not small or found.bound >= found.latency:
        return found
    program = TimeIndexed()
    model = program.build(rounds, found.start)
    record = solved(model, SolveOptions(time_limit=time_limit / 2, warm_start=True))
    start = min(found.start, program.extract(model, rounds), key=rounds.latency)
    least = found.bound if not isfinite(record.bound) else max(found.bound, ceil(record.bound - EARLY))
    return Hindsight(start, rounds.latency(start), min(least, rounds.latency(start)), found.seconds)


def preemptive_bound(rounds: Rounds, time_limit: float) -> int:
    """Least total latency, in whole rounds, of rules that may also take memory away and keep the tokens.

    The area bound (B2) and the grid relaxation (B3) (B4) ask only when token-rounds are used: token j of a request is
    made in a round that holds s + j tokens, and no later than o - j rounds before completion.
    """
    if not len(rounds):
        return 0
    program = CoarseRelaxation(max(1, rounds.horizon // BLOCKS), 0.0 if len(rounds) <= 100 else 0.05)
    record = solved(program.build(rounds), SolveOptions(time_limit=max(time_limit, 1.0)))
    least = max(area_bound(rounds), record.bound)
    return ceil(least - 1e-6 * max(abs(least), 1.0))
