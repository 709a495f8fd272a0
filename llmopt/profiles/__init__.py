"""Measured profiles: per-operator tables of public profilers, and the step time composed of them."""

from __future__ import annotations

from llmopt.profiles.compose import compose
from llmopt.profiles.data import Curve, Experts, Grid, Link, Profile
from llmopt.profiles.distserve import FittedSteps, read_distserve
from llmopt.profiles.loading import find_profile, load_step_table, read_profile
from llmopt.profiles.summary import Measured, operators

__all__ = [
    "Curve",
    "Experts",
    "FittedSteps",
    "Grid",
    "Link",
    "Measured",
    "Profile",
    "compose",
    "find_profile",
    "load_step_table",
    "operators",
    "read_distserve",
    "read_profile",
]
