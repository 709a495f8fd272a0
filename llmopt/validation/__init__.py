"""Validation: what the simulator predicts for a recorded run, against what was measured in it."""

from __future__ import annotations

from llmopt.validation.judge import validate
from llmopt.validation.result import Validation

__all__ = ["Validation", "validate"]
