"""Optimized policies: mathematical programs, one problem a file; see README.md for their mathematics."""

from __future__ import annotations

from formulations.routing import FewPools, MaxMargin, MinCost, MinDelay
from llmopt.policy import Optimized, Policy
from llmopt.solution import SolveOptions

POLICIES: dict[str, tuple[Policy, ...]] = {
    "routing": (
        Optimized(MaxMargin()),
        Optimized(MinCost()),
        Optimized(MinDelay()),
        # A gap below the accuracy of the search would spend its rounds on proving the first program.
        Optimized(FewPools(), SolveOptions(gap=0.002)),
    ),
}
"""The policies of each problem, the exact program first."""
