"""Errors a user may meet; each message is one sentence with where, what and how to fix it."""

from __future__ import annotations


class LLMOptError(Exception):
    """Base of every error raised on purpose; the command line prints it and exits with `exit_code`."""

    exit_code = 2


class ScenarioError(LLMOptError):
    """Bad input: a scenario, a trace or an option that cannot be used as given."""


class PolicyError(LLMOptError):
    """A policy that cannot be found, raises, or returns a plan that does not fit its scenario."""


class SolveError(LLMOptError):
    """The solver stopped without a usable answer."""

    exit_code = 1


class Infeasible(SolveError):
    """The program has no solution; the message names the requirement that cannot hold."""
