"""Recorded runs of real engines: per-request times, the settings they were made with, and curves over time."""

from __future__ import annotations

from llmopt.runs.folder import EngineRun, read_run
from llmopt.runs.records import Curves, Records
from llmopt.runs.settings import Origin, Setting, assumed_for

__all__ = ["Curves", "EngineRun", "Origin", "Records", "Setting", "assumed_for", "read_run"]
