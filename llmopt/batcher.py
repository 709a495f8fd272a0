"""Batching rules as data: in which order, on what terms and beside whom waiting requests join the batch.

What each field makes a replica do, step by step, is written in docs/simulator.md, "Batching rules".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal, NamedTuple, get_args, get_type_hints

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.errors import PolicyError
from llmopt.predictions import ORACLE, PredictorBase
from llmopt.scenario import Pool, Scenario

Admission = Literal["pool", "lookahead", "optimistic"]
Overflow = Literal["pool", "recompute", "swap", "restart"]
Belief = Literal["point", "low", "high"]
Victims = Literal["youngest", "last", "least", "all", "each"]
Mixing = Literal["decode-first", "prefill-first", "prefill-only", "decode-only"]


class Candidates(NamedTuple):
    """What a rule may know of the requests, in order of arrival; every array has shape (n,).

    arrival (s); prompt (tokens); cls: class number; u: the request's uniform random number; predicted: believed output
    tokens (by the rule's `belief`), low and high: the interval. True outputs are not here: they are what an oracle
    predicts.
    """

    arrival: Floats
    prompt: Ints
    cls: Ints
    u: Floats
    predicted: Ints
    low: Ints
    high: Ints

    def head(self, n: int) -> Candidates:
        """The first `n` requests."""
        return Candidates(*(column[:n] for column in self))  # type: ignore[arg-type]


class Snapshot(NamedTuple):
    """One replica between two steps, for a rule that ranks its queue anew.

    time (s); pool; waiting: increasing numbers of its waiting requests, shape (w,), with their arrival (s), prompt,
    predicted output and the output tokens they had emitted before they were preempted; for those that run, shape (r,):
    prompt, predicted, computed KV tokens and emitted output tokens.
    """

    time: float
    pool: Pool
    waiting: Ints
    arrival: Floats
    prompt: Ints
    predicted: Ints
    emitted: Ints
    running_prompt: Ints
    running_predicted: Ints
    running_computed: Ints
    running_emitted: Ints


Rule = Callable[[Candidates], Floats]
Ranking = Callable[[Snapshot], Floats]


@dataclass(frozen=True)
class Replan:
    """Every `every` seconds `rank` gives the waiting requests of each replica new keys, shape (w,), smaller first."""

    every: float
    rank: Ranking

    def __str__(self) -> str:
        return f"every {self.every:.4g} s"


@dataclass(frozen=True)
class Hold:
    """Hold requests back until enough of them are together.

    by = "class": `counts` (n_classes,); a class moves, in prefill and decode, only in steps that find at least its
    count of it waiting, and then admits that many. by = "stage": `edges` (m - 1,) increasing numbers of output tokens
    divide a request's life into m segments, `counts` (m,); a segment moves only if all before it do and at least its
    count of requests is at its first stage, of which that many go on.
    """

    by: Literal["class", "stage"]
    counts: tuple[int, ...]
    edges: tuple[int, ...] = ()

    def __str__(self) -> str:
        counts = ", ".join(map(str, self.counts))
        edges = f", cut at {', '.join(map(str, self.edges))} output tokens" if self.edges else ""
        return f"until {counts} wait, by {self.by}{edges}"


@dataclass(frozen=True)
class Batcher:
    """A batching rule, the same on every replica; the default is the engine's own rule, first come first served.

    order: "arrival"; "predicted" (fewest believed output tokens first); or a function of `Candidates` that returns keys
    of shape (n,), smaller first. Ties go to the earlier arrival. The key of a request must depend on its own row only,
    unless the rule is `clairvoyant`: what depends on later ones is refused.
    release: a function of `Candidates` that returns the time (s) before which a request is not admitted; likewise.
    admission: "lookahead" (the batch with the candidate fits at every later step, as believed), "optimistic" (it fits
    now), or what the pool's engine does.
    overflow: what happens to a preempted request; "pool" means recompute where the pool's engine never preempts.
    victims: who is preempted when memory runs out: the youngest of the batch, the last by order, the one with the
    least believed output, all, or each with probability `clearing`.
    belief: which of the predictions is believed; predictor: a predictor of the rule's own instead of the scenario's.
    skips: how many waiting requests that do not fit may be passed over in a step; 0 stops at the first.
    protected: part of the KV memory that admissions leave free.
    mixing: whom a step serves: "decode-first" (running requests, then new ones), "prefill-first" (prefills, then
    decodes with what is left), "prefill-only" (whole prefills alone if there are any), "decode-only" (nobody joins
    before all have left).
    hold: thresholds, see `Hold`; levels: numbers of output tokens at which a request sinks to the next level of a
    multi-level feedback queue; replan: ranks the queue anew at regular times.
    """

    order: Literal["arrival", "predicted"] | Rule = "arrival"
    release: Rule | None = None
    admission: Admission = "pool"
    overflow: Overflow = "pool"
    victims: Victims = "youngest"
    clearing: float = 1.0
    belief: Belief = "point"
    predictor: PredictorBase | None = None
    skips: int = 0
    protected: float = 0.0
    mixing: Mixing = "decode-first"
    hold: Hold | None = None
    levels: tuple[int, ...] = ()
    replan: Replan | None = None
    clairvoyant: bool = False

    def engine(self, pool: Pool) -> Pool:
        """The pool as the theory may see it under this rule: its way to admit, and memory less what is protected."""
        mode = self.preemption(pool) if self.admission == "optimistic" else pool.preemption
        mode = "lookahead" if self.admission == "lookahead" else mode
        if mode in ("recompute", "swap", "restart"):
            mode = self.preemption(pool)
        kept = int(pool.kv_capacity * (1 - self.protected))
        caching = pool.prefix_caching and mode == "recompute"
        return pool.model_copy(update={"preemption": mode, "kv_capacity": kept, "prefix_caching": caching})

    def served(self, scenario: Scenario) -> Scenario:
        """The scenario as the theory may see it under this rule; itself under the engine's own."""
        if self == FIFO:
            return scenario
        return scenario.model_copy(update={"pools": tuple(self._holding(scenario, p) for p in scenario.pools)})

    def _holding(self, scenario: Scenario, pool: Pool) -> Pool:
        """`engine`, but with room for whatever the pool can hold: an empty replica protects nothing."""
        needed = max((c.largest for c in scenario.workload.classes if pool.fits(c.largest)), default=0)
        kept = self.engine(pool)
        least = needed + pool.lookahead_slots + pool.block_size
        return kept.model_copy(update={"kv_capacity": min(max(kept.kv_capacity, least), pool.kv_capacity)})

    def preemption(self, pool: Pool) -> Literal["recompute", "swap", "restart"]:
        """What is kept of a preempted request."""
        if self.overflow != "pool":
            return self.overflow
        return pool.preemption if pool.preemption in ("recompute", "swap", "restart") else "recompute"

    def described(self) -> dict[str, str]:
        """The fields that differ from the engine's own rule, functions by their names."""
        own = ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default)
        return {name: getattr(value, "__name__", None) or str(value) for name, value in own if value is not None}

    @property
    def stepwise(self) -> bool:
        """Whether running requests may pause, so that every step must look at each of them."""
        return self.mixing != "decode-first" or self.hold is not None or bool(self.levels)

    def predictor_of(self, scenario: Scenario) -> PredictorBase:
        """The predictor in force: an oracle for clairvoyant rules, else the rule's own or the scenario's."""
        if self.clairvoyant:
            return ORACLE
        return self.predictor or scenario.predictions


FIFO = Batcher()
SHORTEST = 1e-3
"""Seconds between two rankings at least; steps take longer."""
_CHOICES = ("admission", "overflow", "victims", "belief", "mixing")


def check_batcher(name: str, batcher: object, scenario: Scenario) -> None:
    """Refuse a batching rule that cannot run on its scenario.

    Raises
    ------
    PolicyError
        Naming the policy, what is wrong and what is needed.
    """
    if not isinstance(batcher, Batcher):
        raise PolicyError(f"policy {name!r}: the batcher is {type(batcher).__name__}; give a Batcher or None")
    _check_kinds(name, batcher)
    for field in _CHOICES:
        known = get_args(get_type_hints(Batcher)[field])
        if getattr(batcher, field) not in known:
            raise PolicyError(f"policy {name!r}: {field} = {getattr(batcher, field)!r}; choose one of {known}")
    if not callable(batcher.order) and batcher.order not in ("arrival", "predicted"):
        raise PolicyError(f"policy {name!r}: order = {batcher.order!r}; give 'arrival', 'predicted' or a function")
    for field, low, high in (("clearing", 0.0, 1.0), ("protected", 0.0, 0.95), ("skips", 0, 10**9)):
        value = getattr(batcher, field)
        if not low <= value <= high or (field == "clearing" and value == 0):
            raise PolicyError(f"policy {name!r}: {field} = {value!r}; give a number from {low} to {high}")
    if any(b <= a for a, b in pairwise((0, *batcher.levels))):
        raise PolicyError(f"policy {name!r}: levels = {batcher.levels}; give increasing numbers of tokens from 1 on")
    if batcher.replan is not None and not batcher.replan.every < np.inf:
        raise PolicyError(f"policy {name!r}: plans every {batcher.replan.every!r} s; give a finite number of seconds")
    _check_hold(name, batcher.hold, scenario)
    _check_together(name, batcher, scenario)


def _check_kinds(name: str, batcher: Batcher) -> None:
    """Refuse fields of another kind than they are declared."""
    wrong = {
        "skips": not _whole(batcher.skips),
        "protected": not _real(batcher.protected),
        "clearing": not _real(batcher.clearing),
        "levels": not _wholes(batcher.levels),
        "release": not (batcher.release is None or callable(batcher.release)),
        "predictor": not (batcher.predictor is None or hasattr(batcher.predictor, "predict")),
        "hold": not (batcher.hold is None or _is_hold(batcher.hold)),
        "replan": not (batcher.replan is None or _is_replan(batcher.replan)),
    }
    for field, is_wrong in wrong.items():
        if is_wrong:
            value = getattr(batcher, field)
            raise PolicyError(f"policy {name!r}: {field} = {value!r} cannot be used; give {_KINDS[field]}")


_KINDS = {
    "skips": "a whole number from 0 on",
    "protected": "a number from 0 to 0.95",
    "clearing": "a number above 0 and up to 1",
    "levels": "a tuple of whole numbers of tokens",
    "release": "a function of Candidates or None",
    "predictor": "a predictor of llmopt.predictions, or None for the scenario's",
    "hold": "Hold('class', counts) or Hold('stage', counts, edges), of whole numbers up to a million",
    "replan": "Replan(every, rank): at least 0.001 s, and a function of Snapshot",
}


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _real(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _wholes(values: object) -> bool:
    return isinstance(values, tuple) and all(_whole(v) and v <= 10**6 for v in values)


def _is_hold(hold: object) -> bool:
    if not isinstance(hold, Hold) or not (_wholes(hold.counts) and _wholes(hold.edges)):
        return False
    return hold.by == "stage" or (hold.by == "class" and not hold.edges)


def _is_replan(replan: object) -> bool:
    return isinstance(replan, Replan) and _real(replan.every) and replan.every >= SHORTEST and callable(replan.rank)


def _check_hold(name: str, hold: Hold | None, scenario: Scenario) -> None:
    if hold is None:
        return
    needed = len(scenario.workload.classes) if hold.by == "class" else len(hold.edges) + 1
    if len(hold.counts) != needed or min(hold.counts) < 1:
        raise PolicyError(f"policy {name!r}: thresholds are {hold.counts}; give {needed} whole numbers from 1 on")
    if any(b <= a for a, b in pairwise((0, *hold.edges))):
        raise PolicyError(f"policy {name!r}: edges = {hold.edges}; give increasing numbers of tokens from 1 on")


def _check_together(name: str, batcher: Batcher, scenario: Scenario) -> None:
    """Refuse what has no meaning together."""
    several = [f.name for f in fields(Batcher) if f.name in ("hold", "levels") and getattr(batcher, f.name)]
    several += ["mixing"] if batcher.mixing != "decode-first" else []
    if len(several) > 1:
        raise PolicyError(f"policy {name!r}: has {' and '.join(several)}, which each decide who moves; keep one")
    if batcher.levels and batcher.overflow == "restart":
        raise PolicyError(f"policy {name!r}: levels with overflow = 'restart' never finish; use 'recompute' or 'swap'")
    if (batcher.levels or batcher.hold) and (batcher.order != "arrival" or batcher.replan or batcher.release):
        raise PolicyError(f"policy {name!r}: levels and hold serve in order of arrival; drop order, replan and release")
    ahead = [pool.name for pool in scenario.pools if pool.async_scheduling]
    if ahead and batcher != FIFO:
        raise PolicyError(
            f"policy {name!r}: pool {ahead[0]!r} schedules ahead, which only the engine's own first-come rule does; "
            "set async_scheduling = false"
        )
