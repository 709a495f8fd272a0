"""What comparisons do alike: look at the names of policies, tell progress, time stages, say what failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from llmopt.errors import Infeasible, LLMOptError, PolicyError
from llmopt.plan import Plan, check_plan
from llmopt.policy import Policy
from llmopt.scenario import Scenario

Progress = Callable[[int, int, str], None]
"""Called with (jobs done, jobs in all, what starts now)."""


@dataclass(kw_only=True)
class Jobs:
    """The state of the progress display, and the wall-clock seconds of the stages of one policy."""

    progress: Progress | None
    total: int
    done: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, key: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to `key`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start

    def planned(self, policy: Policy, scenario: Scenario) -> Plan:
        """The policy's plan, checked; the solver's seconds are part of those of planning."""
        self.tell(f"{policy.name}: plan")
        with self.timed("plan"):
            plan = policy.plan(scenario)
        plan = check_plan(plan, scenario)
        if plan.solve:
            self.seconds |= {"build": plan.solve.build_seconds, "solve": plan.solve.solve_seconds}
        return plan

    def tell(self, what: str, jobs: int = 1) -> None:
        """Report that `what` starts, and count it as `jobs`."""
        if self.progress is not None:
            self.progress(self.done, self.total, what)
        self.done += jobs


def check_names(policies: Sequence[Policy]) -> None:
    """Refuse no policies at all, and two of one name.

    Raises
    ------
    PolicyError
        Naming them.
    """
    names = [policy.name for policy in policies]
    if not names:
        raise PolicyError("compare was given no policy; name at least one")
    if len(set(names)) < len(names):
        raise PolicyError(f"compare needs policies with different names, but was given {names}; rename or drop some")


def reason(error: Exception) -> str:
    """One line for the status column."""
    text = " ".join(str(error).split())
    if isinstance(error, Infeasible):
        return f"infeasible: {text}"
    return text if isinstance(error, LLMOptError) else f"raised {type(error).__name__}: {text}"
