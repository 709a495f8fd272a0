"""What a pool that names its accelerator and model but was never measured is taken to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmopt.machines.lookup import accelerator, model_shape
from llmopt.machines.memory import kv_capacity
from llmopt.machines.roofline import BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY, roofline

UTILISATION = 0.9
"""vLLM's gpu_memory_utilization up to 0.19; a pool that knows better gives its kv_capacity."""


def first_guess(pool: Mapping[str, Any], missing: set[str]) -> dict[str, Any]:
    """The keys of a `[[pools]]` table that its accelerator, model and tensor_parallel imply.

    Parameters
    ----------
    pool
        A table with `accelerator` and `model`, as read from a file.
    missing
        Which of ``step_time`` and ``kv_capacity`` to fill.

    Raises
    ------
    ScenarioError
        If either name is not in the catalogs, or if the model leaves no room for a KV cache.
    """
    shape, chip = model_shape(pool["model"]), accelerator(pool["accelerator"])
    degree = _whole(pool, "tensor_parallel", 1)
    filled: dict[str, Any] = {}
    said = []
    if "step_time" in missing:
        pieces = roofline(shape, chip, tensor_parallel=degree)
        filled["step_time"] = [piece.model_dump() for piece in pieces]
        said.append(
            f"roofline of {degree} x {chip.name} at {COMPUTE_EFFICIENCY:.1%} of its peak and "
            f"{BANDWIDTH_EFFICIENCY:.1%} of its memory bandwidth, not measured"
        )
    if "kv_capacity" in missing:
        filled["kv_capacity"] = kv_capacity(
            shape,
            chip,
            tensor_parallel=degree,
            utilisation=UTILISATION,
            token_budget=_whole(pool, "token_budget", 2048),
            max_batch=_whole(pool, "max_batch", 256),
            block_size=_whole(pool, "block_size", 16),
        ).tokens
        said.append(f"KV capacity computed as vLLM does at a memory utilisation of {UTILISATION:g}")
    return {"source": "; ".join(said), **filled}


def _whole(pool: Mapping[str, Any], key: str, default: int) -> int:
    """The value of a key if it is a count; what is wrong with another is for the pool itself to say."""
    value = pool.get(key, default)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else default
