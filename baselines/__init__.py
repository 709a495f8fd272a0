"""Heuristics that production uses, as policies with no model; each says its rule and its source."""

from __future__ import annotations

from baselines import af_ratio, batching, routing
from llmopt.policy import Policy

POLICIES: dict[str, tuple[Policy, ...]] = {
    "routing": routing.POLICIES,
    "batching": batching.POLICIES,
    "af-ratio": af_ratio.POLICIES,
}
"""The heuristics of each problem."""
