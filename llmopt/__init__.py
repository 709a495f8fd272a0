"""llmopt: formulate, evaluate and provision LLM-serving policies with mathematical programs."""

from __future__ import annotations

__version__ = "0.1.0"
