"""The arrays of a run, built from pools and requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmopt.arrays import Floats
from llmopt.evaluate.kernel_table import flatten
from llmopt.evaluate.kernel_types import COEFFICIENTS, MODES, NONE, REPLICA, REQUEST, WORD, Table, World
from llmopt.evaluate.rules import Rules
from llmopt.scenario import Pool
from llmopt.workload import Requests


def build_world(pools: Sequence[Pool], requests: Requests, rules: Rules) -> World:
    """Empty replicas, in order of their pools, and requests before their arrival, with the rule that serves them."""
    reps = _replicas(pools)
    size = 1 << max(5, int(requests.output.max(initial=1) + 1).bit_length())
    reps["mask"], reps["ring"] = size - 1, size * np.arange(len(reps))
    reps["bits"] = reps["ring"] // WORD
    reps["classes"] = np.cumsum(reps["block"]) - reps["block"]
    ring = np.full(size * len(reps), NONE, np.int32)
    return World(
        reqs=_requests(requests),
        reps=reps,
        costs=_costs(pools, reps),
        ring=ring,
        bits=np.zeros(len(ring) // WORD, np.int64),
        classes=np.zeros(int(reps["block"].sum()), np.int64),
        scratch=np.zeros(int(reps["block"].max()), np.int64),
    )


def _requests(requests: Requests) -> Table:
    table = np.zeros(len(requests), REQUEST)
    table["arrival"], table["prompt"], table["output"] = requests.arrival, requests.prompt, requests.output
    table["target"], table["prefilling"] = requests.prompt, 1
    for name in ("queued", "scheduled", "first_token", "finish"):
        table[name] = np.nan
    return table


def _replicas(pools: Sequence[Pool]) -> Table:
    table = np.zeros(sum(pool.replicas for pool in pools), REPLICA)
    for name in ("queue_head", "queue_tail", "batch_head", "batch_tail", "single_head", "single_tail"):
        table[name] = NONE
    row = 0
    for j, pool in enumerate(pools):
        mine = table[row : row + pool.replicas]
        mine["pool"], mine["mode"], mine["first_step"] = j, MODES.index(pool.preemption), pool.first_step
        mine["block"], mine["slots"], mine["blocks"] = pool.block_size, pool.lookahead_slots, pool.kv_blocks
        mine["chunk"], mine["budget"], mine["max_batch"] = pool.chunk, pool.token_budget, pool.max_batch
        mine["ahead"], mine["caching"], mine["host"] = pool.async_scheduling, pool.prefix_caching, pool.host_overhead
        row += pool.replicas
    table["pushed"] = table["blocks"]
    return table


def _costs(pools: Sequence[Pool], reps: Table) -> Floats:
    """All pieces, then all step tables, in a row; sets where each replica's start."""
    pieces = [pool.stepper.coefficients.ravel() for pool in pools]
    tables = [np.zeros(0) if pool.table is None else flatten(pool.table) for pool in pools]
    lengths = np.array([len(part) for part in pieces + tables])
    starts = np.cumsum(lengths) - lengths
    starts[len(pools) :][lengths[len(pools) :] == 0] = NONE
    mine = reps["pool"]
    reps["piece"], reps["pieces"] = starts[mine], lengths[mine] // COEFFICIENTS
    reps["table"] = starts[len(pools) + mine]
    return np.concatenate(pieces + tables)
