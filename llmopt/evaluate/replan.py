"""Rules that rank the waiting requests anew at regular times, and the loop that asks them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from llmopt.arrays import Floats
from llmopt.batcher import Replan, Snapshot
from llmopt.errors import PolicyError
from llmopt.scenario import Scenario

if TYPE_CHECKING:
    from llmopt.evaluate.kernel import Core


def play_in_turns(
    engine: Core, scenario: Scenario, policy: str, replan: Replan, feed: Callable[[int, int], None]
) -> None:
    """Play all requests to their end and rank the queues anew at every multiple of the rule's time.

    Parameters
    ----------
    feed
        Plays the arrivals of requests ``first`` to ``last - 1``.

    Raises
    ------
    PolicyError
        If the rule fails or returns anything but one finite number for each waiting request.
    """
    pools = [pool for pool in scenario.pools for _ in range(pool.replicas)]
    arrival = engine.requests.arrival
    done = turn = 0
    busy = False
    while (busy or done < len(arrival)) and engine.stuck < 0:
        turn += 1
        if not busy:
            # nothing waits or runs before the next arrival, whom the rule sees at the first of its times after it
            turn = max(turn, math.floor(arrival[done] / replan.every))
            while turn * replan.every <= arrival[done]:
                turn += 1
        time = turn * replan.every
        last = int(np.searchsorted(arrival, time))
        engine.halt_at(time)
        feed(done, last)
        done = last
        counts = engine.halt(time)
        for r in np.flatnonzero(counts[:, 0]).tolist():
            seen = engine.snapshot(r, time, pools[r], counts[r])
            engine.rank(r, seen.waiting, _ranked(policy, replan, seen), time)
        busy = bool(counts.any())
    engine.halt_at(math.inf)


def _ranked(policy: str, replan: Replan, seen: Snapshot) -> Floats:
    """The keys that the rule gives."""
    remedy = f"return one finite number for each of the {len(seen.waiting)} waiting requests"
    try:
        keys = np.asarray(replan.rank(seen), dtype=float)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise PolicyError(f"policy {policy!r}: its replan raised {what} at {seen.time:g} s; {remedy}") from error
    if keys.shape != seen.waiting.shape or not np.isfinite(keys).all():
        raise PolicyError(f"policy {policy!r}: its replan at {seen.time:g} s cannot be used; {remedy}")
    return keys
