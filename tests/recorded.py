"""Run folders as a recorder would have written them, but of simulated engines, so that every number is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.evaluate.run import SimRun
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, index_router
from llmopt.scenario import Scenario
from llmopt.steptable import StepTable
from llmopt.workload import Requests
from tests import factories

UNIX, BOOT = 65_536.0, 4096.0
"""What the client's and the engine's clocks show at the first arrival, s; small enough to cost no digits."""
BLOCKS = 160
"""KV blocks of 16 that requests can use."""


def small_table() -> StepTable:
    """A step table with few knots: 8 ms and 20 us a token, attention by products of features, mixed steps dearer."""
    tokens = np.array([1.0, 64.0, 512.0, 2048.0])
    batch, context = np.array([1.0, 8.0, 64.0]), np.array([16.0, 512.0, 4096.0])
    chunk, cached = np.array([16.0, 256.0, 2048.0]), np.array([0.0, 1024.0])
    mixed_batch, mixed_context = np.array([0.0, 8.0, 64.0]), np.array([16.0, 4096.0])
    c, h, n, k = np.meshgrid(chunk, cached, mixed_batch, mixed_context, indexing="ij")
    return StepTable(
        tokens=tokens,
        token_time=0.008 + 2e-5 * tokens,
        sequences=np.array([1.0, 128.0]),
        sequence_time=np.array([5e-4, 2e-3]),
        decode_batch=batch,
        decode_context=context,
        decode_time=1e-4 + 2e-8 * np.outer(batch, context),
        chunk=chunk,
        cached=cached,
        mixed_batch=mixed_batch,
        mixed_context=mixed_context,
        mixed_time=2e-4 + 2e-9 * c * (h + c / 2) + 4e-8 * n * k,
        source="made up for tests",
    )


def requests(n: int = 120, rate: float = 12.0, seed: int = 3) -> Requests:
    """Random requests that arrive at `rate`/s, the first at 0."""
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1 / rate, n))
    prompt, output = rng.integers(20, 900, n), rng.integers(5, 200, n)
    return Requests(arrival - arrival[0], prompt, output, np.zeros(n, np.int64), np.zeros(n))


def engine(host: float = 0.0, **settings: Any) -> Scenario:
    """A small vLLM-like engine with `small_table`; by default it runs out of memory now and then."""
    basics: dict[str, Any] = {
        "step_time": ({"name": "unused", "base": 0.01},),
        "kv_capacity": 16 * BLOCKS,
        "max_batch": 64,
        "token_budget": 2048,
        "async_scheduling": True,
        "prefix_caching": True,
        "host_overhead": host,
        "table": small_table(),
    }
    law = {"law": "uniform", "low": 1, "high": 1000}
    one = {"name": "recorded", "share": 1.0, "prompt": law, "output": law}
    return factories.scenario([factories.pool("engine", **basics | settings)], [one])


def played(scenario: Scenario, given: Requests) -> SimRun:
    """The run behind vLLM's data-parallel balancer."""
    return simulate(scenario, Plan("t", index_router(scenario, waiting=4.0, running=1.0)), requests=given)


def settings(**changes: Any) -> dict[str, Any]:
    """A meta.json for `engine`, with keys of engine_kwargs, or dotted ones of the whole, changed; None removes."""
    meta: dict[str, Any] = {
        "model": "Llama-3.1-8B",
        "vllm_version": "0.19.0",
        "engine_kwargs": {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "dtype": "bfloat16"},
        "kv_cache": {"num_gpu_blocks": BLOCKS + 1, "block_size": 16, "enable_prefix_caching": True},
        "hardware": {"device_name": "NVIDIA GeForce RTX 4090"},
    }
    for key, value in changes.items():
        whole = "__" in key or key in meta or key == "started_at"
        path = key.split("__") if whole else ["engine_kwargs", key]
        node = meta
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return meta


def lines(run: SimRun) -> list[dict[str, Any]]:
    """One line of requests.jsonl for each request, clients and engine on their own clocks."""
    given = run.requests
    return [
        {
            "request_id": f"bench-{i}",
            "input_toks": int(given.prompt[i]),
            "output_toks": int(given.output[i]),
            "arrival_time": UNIX + float(given.arrival[i]),
            "queued_ts": BOOT + float(run.queued[i]),
            "scheduled_ts": BOOT + float(run.scheduled[i]),
            "first_token_ts": BOOT + float(run.first_token[i]),
            "last_token_ts": BOOT + float(run.finish[i]),
        }
        for i in range(len(given))
    ]


def write_run(folder: Path, rows: list[dict[str, Any]], meta: dict[str, Any]) -> Path:
    """The folder with its two files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder
