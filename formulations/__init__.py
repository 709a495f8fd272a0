"""Optimized policies: mathematical programs, one problem a file; see README.md for their mathematics."""

from __future__ import annotations

from formulations.routing import FewPools, MaxMargin, MinCost, MinDelay
from llmopt.policy import Optimized

POLICIES = (Optimized(MaxMargin()), Optimized(MinCost()), Optimized(MinDelay()), Optimized(FewPools()))
