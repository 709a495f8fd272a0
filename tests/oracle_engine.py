"""The scheduler of the naive simulator: it plans steps, one ahead of the replica if scheduling is asynchronous.

It knows blocks by name and, as vLLM does, what is in each: blocks that are free keep their content until somebody takes
them. Nothing here is shared with the kernels; both were written from docs/simulator.md.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from llmopt.scenario import Pool
from llmopt.steptable import StepTable


@dataclass
class Order:
    """What the scheduler thinks of one request, all planned steps included."""

    number: int
    prompt: int
    output: int
    target: int
    computed: int = 0
    emitted: int = 0
    prefilling: bool = True
    blocks: list[int] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.emitted == self.output


@dataclass
class StepPlan:
    """Tokens of each request, and who moves, in turn: admitted with how many tokens computed, or (None) preempted."""

    take: dict[int, int] = field(default_factory=dict)
    moves: list[tuple[int, int | None]] = field(default_factory=list)

    @property
    def preempted(self) -> list[int]:
        return [number for number, computed in self.moves if computed is None]


class Scheduler:
    """Waiting queue, running list and blocks of one replica."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.kept: str = pool.preemption
        self.reserves = pool.preemption == "reserve"
        self.caching = pool.prefix_caching
        self.waiting: list[Order] = []
        self.running: list[Order] = []
        self.free = deque(range(pool.kv_blocks))
        self.content: dict[int, tuple[int, int]] = {}
        self.cached: dict[tuple[int, int], int] = {}

    def join(self, number: int, prompt: int, output: int) -> None:
        self.waiting.append(Order(number, prompt, output, prompt))

    def wake(self, now: float) -> float:
        """When to look again if the step at `now` has no tokens."""
        raise AssertionError(f"first come first served has tokens in every step, but not at {now}")

    def blocks(self, tokens: int) -> int:
        return math.ceil((tokens + self.pool.lookahead_slots) / self.pool.block_size)

    def wants(self, order: Order, budget: int) -> int:
        return min(order.target - order.computed if order.prefilling else 1, self.pool.chunk, budget)

    def plan(self, now: float) -> StepPlan:
        """Form the batch of the next step that has none yet, at `now`."""
        plan, budget = StepPlan(), self.pool.token_budget
        for order in list(self.running):
            if order not in self.running or budget == 0:
                break
            if order.ended:
                continue
            tokens = self.wants(order, budget)
            while order in self.running and not self.grow(order, tokens):
                self.preempt([o for o in self.running if not o.ended][-1], plan)
            if order in self.running:
                plan.take[order.number] = tokens
                budget -= tokens
        while not plan.preempted and self.waiting and budget > 0 and len(self.running) < self.pool.max_batch:
            tokens = self.wants(self.waiting[0], budget)
            if not self.admissible(self.waiting[0], tokens, plan):
                break
            order = self.waiting.pop(0)
            self.find_blocks(order)
            tokens = self.wants(order, budget)
            self.running.append(order)
            assert self.grow(order, tokens)
            plan.take[order.number] = tokens
            plan.moves.append((order.number, order.computed))
            budget -= tokens
        for order in self.running:
            self.carry_out(order, plan.take.get(order.number, 0))
        return plan

    def grow(self, order: Order, tokens: int) -> bool:
        """Allocate the blocks for `tokens` more, or say that there are too few."""
        total = order.computed + tokens
        if self.reserves:
            total = order.prompt + order.output - self.pool.first_step
        more = self.blocks(total) - len(order.blocks)
        if more > len(self.free):
            return False
        for _ in range(more):
            block = self.free.popleft()
            what = self.content.pop(block, None)
            if what is not None and self.cached.get(what) == block:
                del self.cached[what]
            order.blocks.append(block)
        return True

    def release(self, order: Order) -> None:
        self.free.extend(reversed(order.blocks))
        order.blocks = []

    def find_blocks(self, order: Order) -> None:
        """Take back the request's own full blocks, from the first on, as long as they are still there."""
        if not self.caching:
            return
        while len(order.blocks) < (order.target - 1) // self.pool.block_size:
            block = self.cached.get((order.number, len(order.blocks)))
            if block is None:
                break
            self.free.remove(block)
            order.blocks.append(block)
        order.computed = len(order.blocks) * self.pool.block_size

    def admissible(self, order: Order, tokens: int, plan: StepPlan) -> bool:
        if self.reserves:
            return self.blocks(order.prompt + order.output - self.pool.first_step) <= len(self.free)
        if self.pool.preemption == "lookahead":
            return self.projection_fits(order, tokens, plan)
        return self.blocks(max(order.target, order.computed + tokens)) <= len(self.free)

    def projection_fits(self, candidate: Order, tokens: int, plan: StepPlan) -> bool:
        """Play the running requests and the candidate forward, step by step, with nobody else."""
        orders = [o for o in self.running if not o.ended] + [candidate]
        late = sum(len(o.blocks) for o in self.running if o.ended)
        # one row per request: computed, emitted, output, target, prefilling
        rows = [[o.computed, o.emitted, o.output, o.target, o.prefilling] for o in orders]
        first = [plan.take.get(o.number, 0) for o in orders[:-1]] + [tokens]
        return self.stays_below(rows, first, self.pool.kv_blocks, late)

    def stays_below(self, rows: list[list[int]], first: list[int], limit: int, late: int = 0) -> bool:
        """Play rows of computed, emitted, output, target, prefilling; `late` blocks count in the first step only."""
        step = 0
        while rows:
            for i, row in enumerate(rows):
                computed, _, _, target, prefilling = row
                tokens = first[i] if step == 0 else min(target - computed, self.pool.chunk) if prefilling else 1
                row[0] += tokens
                if prefilling and row[0] == target:
                    row[1] += self.pool.first_step
                    row[4] = False
                elif not prefilling:
                    row[1] += tokens
            if sum(self.blocks(row[0]) for row in rows) + late > limit:
                return False
            rows = [row for row in rows if row[1] < row[2]]
            late = 0
            step += 1
        return True

    def preempt(self, order: Order, plan: StepPlan) -> None:
        self.running.remove(order)
        self.release(order)
        self.waiting.insert(0, order)
        plan.moves.append((order.number, None))
        self.forget(order)

    def forget(self, order: Order) -> None:
        """What a preempted request loses."""
        if self.kept != "swap":
            order.emitted = 0 if self.kept == "restart" else order.emitted
            order.computed, order.target, order.prefilling = 0, order.prompt + order.emitted, True

    def carry_out(self, order: Order, tokens: int) -> None:
        """What will be true once the planned step is over."""
        order.computed += tokens
        if not order.prefilling:
            order.emitted += tokens
        elif tokens and order.computed == order.target:
            order.emitted += self.pool.first_step
            order.prefilling = False
        for k in range(order.computed // self.pool.block_size if self.caching else 0):
            self.content[order.blocks[k]] = (order.number, k)
            self.cached[order.number, k] = order.blocks[k]

    def end(self, numbers: list[int]) -> None:
        """Some requests have ended."""
        for order in [o for o in self.running if o.number in numbers]:
            self.running.remove(order)
            self.release(order)


def table_seconds(table: StepTable, prefill: int, decode: int, kv: int, pairs: float) -> float:
    """The step time of a table, by scipy."""
    context = kv / max(decode, 1)
    total = grid((table.tokens,), table.token_time, (prefill + decode,))
    total += grid((table.sequences,), table.sequence_time, (decode + (prefill > 0),))
    if prefill == 0:
        total += grid((table.decode_batch, table.decode_context), table.decode_time, (decode, context))
        return max(total, 0.0)
    axes = (table.chunk, table.cached, table.mixed_batch, table.mixed_context)
    cached = pairs / prefill - prefill / 2
    total += grid(axes, table.mixed_time, (prefill, max(cached, 0), decode, context))
    if cached < 0:
        launch = min(np.min(table.mixed_time[i, :, 0, :]) for i in range(len(table.chunk)))
        lone = grid(axes, table.mixed_time, (prefill, 0, 0, 0)) - launch
        total -= lone * (1 - pairs / (prefill**2 / 2))
    return max(total, 0.0)


def grid(axes: tuple[np.ndarray, ...], values: np.ndarray, point: tuple[float, ...]) -> float:
    """Linear interpolation, constant below the first knot, extrapolated above the last."""
    from scipy.interpolate import RegularGridInterpolator

    several = [d for d, axis in enumerate(axes) if len(axis) > 1]
    values = values.reshape([len(axes[d]) for d in several])
    if not several:
        return float(values)
    look = RegularGridInterpolator([axes[d] for d in several], values, bounds_error=False, fill_value=None)
    return float(look([max(point[d], axes[d][0]) for d in several])[0])


def is_measured(table: StepTable, prefill: int, decode: int, kv: int, pairs: float) -> bool:
    """Whether a step lies inside the ranges of everything that is looked up for it."""
    context = kv / max(decode, 1)
    tokens, sequences, *pure_and_mixed = table.ends
    if prefill + decode > tokens or decode + (prefill > 0) > sequences:
        return False
    if prefill == 0:
        return decode <= pure_and_mixed[0] and context <= pure_and_mixed[1]
    point = (prefill, pairs / prefill - prefill / 2, decode, context)
    return all(value <= end for value, end in zip(point, pure_and_mixed[2:], strict=True))
