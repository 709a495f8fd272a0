"""The published bundle and the load of geometric lengths, for tests of Attention/FFN disaggregation."""

from __future__ import annotations

from typing import Any

from llmopt.bundle import Bundle
from llmopt.slots import SlotLoad

PIPELINES = ("ideal", "non-blocking", "attention-blocking", "blocking")
PUBLISHED: dict[str, Any] = {
    "attention": [{"base": 50e-6, "kv": 0.00165e-6}],
    "transfer": [{"base": 20e-6, "decode": 0.022e-6}],
    "ffn": [{"base": 100e-6, "decode": 0.083e-6}],
    "batch": 256,
    "micro_batches": 2,
    "pipeline": "ideal",
    "kv_capacity": 100_000_000,
}
"""Coefficients of Song et al., arXiv 2601.21351 v1, for DeepSeek-V3 on Ascend 910C, taken as microseconds."""


def bundle_of(**changes: Any) -> Bundle:
    """The published bundle with some keys changed."""
    return Bundle.model_validate(PUBLISHED | changes)


def geometric_load(prompt: float, output: float) -> SlotLoad:
    """The load of geometric lengths, from the closed form."""
    nu2 = prompt * (prompt - 1) + output * (output - 1)
    return SlotLoad(prompt + output - 1, nu2, prompt, output)
