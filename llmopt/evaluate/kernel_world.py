"""The arrays of a run, built from pools and requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.batcher import FIFO, Batcher
from llmopt.evaluate.kernel_table import flatten
from llmopt.evaluate.kernel_types import (
    ADMISSIONS,
    BY_CLASS,
    BY_LEVEL,
    BY_STAGE,
    COEFFICIENTS,
    KEYS,
    LOOKAHEAD,
    MIXINGS,
    NONE,
    OPTIMISTIC,
    ORDERS,
    OVERFLOWS,
    REPLICA,
    REQUEST,
    TERMS,
    UNGATED,
    VICTIMS,
    WORD,
    Table,
    World,
)
from llmopt.evaluate.rules import Rules
from llmopt.scenario import Pool
from llmopt.workload import Requests

GATINGS = {"class": BY_CLASS, "stage": BY_STAGE}


def build_world(pools: Sequence[Pool], requests: Requests, rules: Rules) -> World:
    """Empty replicas, in order of their pools, and requests before their arrival, with the rule that serves them."""
    reps = _replicas(pools, rules.batcher)
    _rule(reps, requests, rules)
    size = _ring_size(int(requests.output.max(initial=1)))
    reps["mask"], reps["ring"] = size - 1, size * np.arange(len(reps))
    slots = size * len(reps)
    classes = int(reps["block"].sum())
    reps["classes"] = np.cumsum(reps["block"]) - reps["block"]
    if reps["guess"].any():
        size = _ring_size(int(rules.believed.max(initial=1)))
        reps["near_mask"], reps["near_ring"] = size - 1, slots + size * np.arange(len(reps))
        reps["spent_classes"] = classes + reps["classes"]
        slots, classes = slots + size * len(reps), 2 * classes
    reps["scratch"] = classes
    counters = classes + int(reps["block"].max())
    for name in ("", "near_"):
        reps[f"{name}bits"] = reps[f"{name}ring"] // WORD
    return World(
        reqs=_requests(requests),
        reps=reps,
        terms=_terms(requests, rules),
        costs=_costs(pools, reps),
        ring=np.full(slots, NONE, np.int32),
        bits=np.zeros(slots // WORD, np.int64),
        classes=np.concatenate([np.zeros(counters, np.int64), _gates(rules.batcher, reps, counters)]),
    )


def _ring_size(longest: int) -> int:
    """Slots of a ring for ends up to `longest` steps away."""
    return 1 << max(5, (longest + 1).bit_length())


def _terms(requests: Requests, rules: Rules) -> Table:
    table = np.zeros(0 if rules.batcher == FIFO else len(requests), TERMS)
    if len(table):
        table["key"], table["release"], table["u"] = rules.keys, rules.release, requests.u
        table["believed"], table["cls"] = rules.believed, requests.cls
    return table


def _rule(reps: Table, requests: Requests, rules: Rules) -> None:
    """The fields by which replicas know their rule; believing the truth of all requests cannot err."""
    batcher = rules.batcher
    reps["ruled"] = batcher != FIFO
    reps["first_order"] = ORDERS.index(batcher.order) if isinstance(batcher.order, str) else KEYS
    reps["order"] = KEYS if batcher.replan else reps["first_order"]
    plain = batcher.order == "arrival" and batcher.skips == 0 and not (batcher.release or batcher.replan)
    reps["heap"] = not plain or batcher.stepwise
    reps["guess"] = (reps["mode"] == LOOKAHEAD) & bool((rules.believed != requests.output).any())
    reps["steady"] = 0 if batcher.stepwise else 1 - reps["ahead"]
    reps["victims"], reps["clearing"] = VICTIMS.index(batcher.victims), batcher.clearing
    reps["skips"] = batcher.skips
    reps["kept"] = np.floor(batcher.protected * reps["blocks"])
    reps["wake"] = reps["halt"] = np.inf
    reps["pending"] = -1.0
    for name in ("stuck", "lost_head"):
        reps[name] = NONE


def _gates(batcher: Batcher, reps: Table, first: int) -> Ints:
    """The numbers of a rule that holds back, placed from `first` on; sets what makes running requests pause."""
    hold, whole = batcher.hold, batcher.mixing in ("prefill-only", "decode-only")
    counts, marks = (hold.counts, hold.edges) if hold else ((), batcher.levels)
    gating = GATINGS[hold.by] if hold else BY_LEVEL if marks else UNGATED
    reps["stepwise"], reps["mixing"], reps["gating"] = batcher.stepwise, MIXINGS.index(batcher.mixing), gating
    reps["whole"], reps["counts"], reps["marks"] = whole, len(counts), len(marks)
    if whole:
        reps["chunk"] = reps["budget"]
    numbers = [*counts, *(0 for _ in range(3 * len(counts))), *marks]
    reps["gates"] = first + len(numbers) * np.arange(len(reps))
    return np.tile(np.array(numbers, np.int64), len(reps))


def _requests(requests: Requests) -> Table:
    table = np.zeros(len(requests), REQUEST)
    table["arrival"], table["prompt"], table["output"] = requests.arrival, requests.prompt, requests.output
    table["target"], table["prefilling"] = requests.prompt, 1
    for name in ("queued", "scheduled", "first_token", "finish"):
        table[name] = np.nan
    return table


def _replicas(pools: Sequence[Pool], batcher: Batcher) -> Table:
    table = np.zeros(sum(pool.replicas for pool in pools), REPLICA)
    for name in ("queue_head", "queue_tail", "batch_head", "batch_tail", "single_head", "single_tail"):
        table[name] = NONE
    row = 0
    for j, pool in enumerate(pools):
        mine = table[row : row + pool.replicas]
        mine["pool"], mine["first_step"] = j, pool.first_step
        mine["mode"], mine["overflow"] = _admission(pool, batcher), OVERFLOWS.index(batcher.preemption(pool))
        mine["block"], mine["slots"], mine["blocks"] = pool.block_size, pool.lookahead_slots, pool.kv_blocks
        mine["chunk"], mine["budget"], mine["max_batch"] = pool.chunk, pool.token_budget, pool.max_batch
        mine["ahead"], mine["host"] = pool.async_scheduling, pool.host_overhead
        mine["caching"] = batcher.engine(pool).prefix_caching
        row += pool.replicas
    table["pushed"] = table["blocks"]
    return table


def _admission(pool: Pool, batcher: Batcher) -> int:
    """How the rule admits on the pool's replicas."""
    kind = pool.preemption if batcher.admission == "pool" else batcher.admission
    return ADMISSIONS.index(kind) if kind in ADMISSIONS else OPTIMISTIC


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
