"""Optimized policies: mathematical programs, one problem a file; see README.md for their mathematics."""

from __future__ import annotations

from formulations.af_ratio import ConvexRatio, FleetRatio, IntegerRatio
from formulations.af_ratio_rules import Barrier, Gaussian, MeanField, PublishedRatio
from formulations.batching_hindsight import HindsightReplay
from formulations.batching_rolling import RollingHorizon
from formulations.batching_rules import AMax, AMin, McSf
from formulations.batching_sorted import LpSwap, SortedF, SortedLp
from formulations.batching_wait import NestedWait, Wait
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
    "batching": (
        HindsightReplay(),
        McSf(),
        SortedF(),
        SortedF(at_once=True),
        SortedLp(),
        LpSwap(),
        RollingHorizon(),
        AMax(),
        AMin(),
        Wait(),
        NestedWait(),
    ),
    "af-ratio": (
        Optimized(FleetRatio()),
        Optimized(IntegerRatio()),
        Optimized(ConvexRatio()),
        Barrier(),
        Gaussian(),
        MeanField(),
        PublishedRatio(),
    ),
}
"""The policies of each problem, the exact program first."""
