"""Constants of the engine that no profile and no setting gives, each with its reason. There are no others."""

from __future__ import annotations

from dataclasses import dataclass

HOST_OVERHEAD = 0.6e-3
"""Seconds that a step of vLLM takes besides its profiled kernels, for machines of which nothing better is known.

Kernel profiles leave out what surrounds the kernels: launches, the copy of token ids, sampling, the scheduler's part
that no kernel hides. By their first 50 requests the two recorded runs of Llama-3.1-8B name 0.2 ms (RTX 4090) and 1.4 ms
(RTX PRO 6000). Their mean error together is as small as it gets, 3 %, anywhere from 0.2 to 1 ms; within that range
0.6 ms keeps the mean error of each below 4 % and every single error below 9 % (`python -m benchmarks.fidelity`).
"""
FIRST = 50
"""Requests of a run, in order of arrival, from which its own overhead is estimated; they are not judged then."""
NULL_BLOCKS = 1
"""vLLM keeps block 0 of the KV cache as a placeholder (vllm/v1/core/block_pool.py, null_block)."""
WAITING_WEIGHT, RUNNING_WEIGHT = 4.0, 1.0
"""vLLM's data-parallel balancer sends a request to the engine with the smallest 4 x waiting + running
(vllm/v1/engine/core_client.py)."""


@dataclass(frozen=True)
class Constant:
    """An engine constant as it was used: name, value, unit, and why it has this value."""

    name: str
    value: float
    unit: str
    reason: str


def engine_constants(host: float, why: str, replicas: int) -> tuple[Constant, ...]:
    """The constants behind a prediction with a host overhead of `host` s, chosen for the reason `why`."""
    used = [
        Constant("host_overhead", host, "s a step", why),
        Constant("null_blocks", NULL_BLOCKS, "blocks", "vLLM keeps block 0 of the KV cache as a placeholder"),
    ]
    if replicas > 1:
        why = "vLLM's data-parallel balancer takes the engine with the smallest 4 x waiting + running"
        used.append(Constant("balancer_waiting_weight", WAITING_WEIGHT, "per request", why))
        used.append(Constant("balancer_running_weight", RUNNING_WEIGHT, "per request", why))
    return tuple(used)
