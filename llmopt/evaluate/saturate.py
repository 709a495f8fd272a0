"""A replica that never runs out of work: its throughput is the capacity that the theory predicts."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from llmopt.arrays import Ints
from llmopt.errors import ScenarioError
from llmopt.evaluate.run import ReplicaTotals
from llmopt.scenario import Pool


@dataclass(frozen=True)
class SaturatedRun:
    """What a permanently backlogged replica does in the window (start, end], s.

    rate: completions/s; completed: completions; totals: arrays of shape (1,), `peak` over the whole run up to `end`.
    """

    rate: float
    start: float
    end: float
    completed: int
    totals: ReplicaTotals

    @property
    def use(self) -> float:
        """Mean KV tokens in use in a step."""
        return float(self.totals.held[0] / self.totals.steps[0])

    @property
    def waste(self) -> float:
        """Mean KV tokens in use in a step that preemption made useless."""
        return float(self.totals.wasted[0] / self.totals.steps[0])

    @property
    def step_time(self) -> float:
        """Mean step time, s."""
        return float(self.totals.busy[0] / self.totals.steps[0])


def saturated_throughput(pool: Pool, prompt: Ints, output: Ints, warmup: float = 0.2) -> SaturatedRun:
    """Throughput of one replica of `pool` that finds all requests waiting at time 0.

    The window starts when a fraction `warmup` of the requests is done and ends when the last request leaves the
    queue, so that neither the filling nor the draining of the batch counts. The error of the rate is of the order of
    one batch over the number of requests.

    Parameters
    ----------
    prompt, output
        Lengths in tokens, shape (n_requests,), in the order of the queue.

    Raises
    ------
    ScenarioError
        If a request does not fit into the replica, or there are too few requests to fill it.
    """
    from llmopt.evaluate.kernel import Backlog

    tokens = int((prompt + output).max())
    if not pool.fits(tokens):
        raise ScenarioError(
            f"pool {pool.name!r}: a request of {tokens} tokens exceeds the {pool.largest} that its KV memory holds; "
            "raise kv_capacity"
        )
    trial = Backlog(pool, prompt, output)
    trial.play()
    start, end = float(np.sort(trial.finish)[int(warmup * len(prompt))]), trial.drained
    if not start < end:
        raise ScenarioError(
            f"pool {pool.name!r}: {len(prompt)} requests do not keep a replica busy beyond warm-up; give more requests"
        )
    window = Backlog(pool, prompt, output)
    totals = _difference(window.play(start), window.play(end))
    completed = int(((trial.finish > start) & (trial.finish <= end)).sum())
    return SaturatedRun(completed / (end - start), start, end, completed, totals)


def _difference(first: ReplicaTotals, last: ReplicaTotals) -> ReplicaTotals:
    names = {field.name for field in fields(ReplicaTotals)} - {"pool", "peak"}
    window = {name: getattr(last, name) - getattr(first, name) for name in names}
    return ReplicaTotals(pool=last.pool, peak=last.peak, **window)
