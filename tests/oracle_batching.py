"""The scheduler of the naive simulator under a batching rule, from docs/simulator.md, "Batching rules".

Nothing is shared with the kernels, and nothing is clever: every step looks at every request, the queue is a sorted
list, and the projection of `lookahead` plays every later step. It schedules one step at a time, never ahead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llmopt.batcher import FIFO, Batcher, Snapshot
from llmopt.evaluate.rules import Rules
from llmopt.scenario import Pool
from llmopt.workload import Requests
from tests.oracle_engine import Order, Scheduler, StepPlan

MOST_PREEMPTIONS = 10_000
GOLDEN = 0.6180339887498949


class EndlessLoop(Exception):
    """A request was preempted again and again."""


@dataclass
class RuledOrder(Order):
    """A request with what the rule makes of it; `key` is its place in the queue, `believed` the output tokens."""

    cls: int = 0
    u: float = 0.0
    arrival: float = 0.0
    release: float = 0.0
    key: float = 0.0
    believed: int = 1
    preemptions: int = 0


def scheduler_of(pool: Pool, rules: Rules, requests: Requests) -> Scheduler:
    """The engine's own rule has a scheduler of its own, which may schedule ahead."""
    return Scheduler(pool) if rules.batcher == FIFO else RuledScheduler(pool, rules, requests)


class RuledScheduler(Scheduler):
    """One replica under a batching rule."""

    waiting: list[RuledOrder]
    running: list[RuledOrder]

    def __init__(self, pool: Pool, rules: Rules, requests: Requests) -> None:
        super().__init__(pool)
        assert not pool.async_scheduling
        self.rules, self.rule, self.requests = rules, rules.batcher, requests
        self.admission = _admission(rules.batcher, pool)
        self.reserves = self.admission == "reserve"
        self.kept = rules.batcher.preemption(pool)
        self.caching = pool.prefix_caching and self.kept == "recompute" and self.admission == "optimistic"
        self.last_arrival = float(requests.arrival[-1])
        self.rounds = 0
        self.held = False
        self.step = StepPlan()
        self.budget = 0
        self.lost: list[RuledOrder] = []

    # the queue

    def join(self, number: int, prompt: int, output: int) -> None:
        room = self.pool.largest - prompt
        if self.rule.mixing in ("prefill-only", "decode-only"):
            most = prompt + output - 1 if self.kept == "recompute" else prompt
            assert most <= self.pool.token_budget, "a whole prompt that never fits into a step"
        data, rules = self.requests, self.rules
        order = RuledOrder(
            number,
            prompt,
            output,
            prompt,
            cls=int(data.cls[number]),
            u=float(data.u[number]),
            arrival=float(data.arrival[number]),
            release=float(rules.release[number]),
            believed=max(1, min(int(rules.believed[number]), room)),
        )
        order.key = self.key_now(order, float(rules.keys[number]))
        self.waiting.append(order)
        self.sort()

    def key_now(self, order: RuledOrder, given: float) -> float:
        """The key of a request that joins the queue now; `given` is that of a function, or the latest."""
        if self.rule.levels:
            return self.level(order)
        return order.believed if self.rule.order == "predicted" else given

    def rejoin(self, order: RuledOrder) -> None:
        order.key = self.key_to_rejoin(order)
        if self.rule.order == "arrival" and not self.rule.levels and self.rule.replan is None:
            self.waiting.insert(0, order)
        else:
            self.waiting.append(order)
            self.sort()

    def key_to_rejoin(self, order: RuledOrder) -> float:
        return order.key if self.rule.replan is not None else self.key_now(order, order.key)

    def sort(self) -> None:
        """Queues in order of arrival are in order already, with the preempted in front."""
        if self.rule.order != "arrival" or self.rule.levels or self.rule.replan is not None:
            self.waiting.sort(key=lambda o: (o.key, o.number))

    def rank_anew(self, time: float) -> None:
        assert self.rule.replan is not None
        if self.waiting:
            self.waiting.sort(key=lambda o: o.number)
            keys = self.rule.replan.rank(self.snapshot(time))
            for order, key in zip(self.waiting, keys, strict=True):
                order.key = float(key)
            self.sort()

    def snapshot(self, time: float) -> Snapshot:
        def column(orders: list[RuledOrder], name: str) -> np.ndarray:
            return np.array([getattr(o, name) for o in orders], dtype=np.int64)

        queue = [column(self.waiting, name) for name in ("number", "prompt", "believed", "emitted")]
        batch = [column(self.running, name) for name in ("prompt", "believed", "computed", "emitted")]
        arrival = np.array([o.arrival for o in self.waiting], dtype=float)
        return Snapshot(time, self.pool, queue[0], arrival, *queue[1:], *batch)

    def level(self, order: RuledOrder) -> int:
        return sum(edge <= order.emitted for edge in self.rule.levels)

    # steps

    def plan(self, now: float) -> StepPlan:
        """The step at `now`, scheduled again whenever everybody was preempted."""
        self.step = StepPlan()
        while True:
            self.budget, self.lost = self.pool.token_budget, []
            assert not self.step.take
            self.held = self.rule.hold is not None and now < self.last_arrival
            getattr(self, self.rule.mixing.replace("-", "_"))(now)
            if self.running or not self.lost:
                return self.step

    def wake(self, now: float) -> float:
        """When to look again if a step has no tokens: the earliest release, or when hold ends."""
        if self.held:
            return self.last_arrival
        assert not self.running
        later = [o.release for o in self.waiting if o.release > now]
        return min(later, default=math.inf)

    def decode_first(self, now: float) -> None:
        moving, welcome = self.running, self.everybody()
        if self.held:
            by_class = self.rule.hold is not None and self.rule.hold.by == "class"
            moving, welcome = self.by_class() if by_class else self.by_stage()
        self.serve(moving)
        if not self.lost:
            self.admit(now, welcome)

    def prefill_first(self, now: float) -> None:
        self.serve([o for o in self.running if o.prefilling])
        if not self.lost:
            self.admit(now, self.everybody())
        self.serve([o for o in self.running if not o.prefilling and o.number not in self.step.take])

    def prefill_only(self, now: float) -> None:
        self.admit(now, self.everybody())
        if not self.step.take:
            self.serve(self.running)

    def decode_only(self, now: float) -> None:
        if self.running:
            self.serve(self.running)
        else:
            self.admit(now, self.everybody())

    @property
    def whole(self) -> bool:
        return self.rule.mixing in ("prefill-only", "decode-only")

    def wants(self, order: Order, budget: int) -> int:
        if self.whole and order.prefilling:
            return order.target - order.computed
        return super().wants(order, budget)

    def everybody(self) -> dict[int, int]:
        """How many waiting requests of each class may be tried."""
        return {o.cls: 10**9 for o in self.waiting}

    def by_class(self) -> tuple[list[RuledOrder], dict[int, int]]:
        """Running requests that move, and how many waiting requests of each class may be tried."""
        assert self.rule.hold is not None
        ready = {
            cls: count
            for cls, count in enumerate(self.rule.hold.counts)
            if sum(o.cls == cls for o in self.waiting) >= count
        }
        return [o for o in self.running if o.cls in ready], ready

    def by_stage(self) -> tuple[list[RuledOrder], dict[int, int]]:
        hold = self.rule.hold
        assert hold is not None
        first = [0, *hold.edges]
        if len(self.waiting) < hold.counts[0]:
            return [o for o in self.running if o.prefilling], {}
        moving = [o for o in self.running if o.prefilling]
        for k, count in enumerate(hold.counts):
            segment = [o for o in self.running if not o.prefilling and sum(e <= o.emitted for e in hold.edges) == k]
            at_first = [o for o in segment if o.emitted == first[k]]
            if k > 0 and len(at_first) < count:
                break
            beyond = at_first[count:] if k > 0 else []
            moving += [o for o in segment if o not in beyond]
        return [o for o in self.running if o in moving], {-1: hold.counts[0]}

    def serve(self, moving: list[RuledOrder]) -> None:
        """Running requests take their tokens, in order, and others are preempted if memory runs out.

        What a request takes is fixed at its turn; tokens of the preempted are free for those whose turn comes later.
        """
        for order in list(moving):
            tokens = self.wants(order, self.budget)
            while order in self.running and tokens > 0:
                if self.grow(order, tokens):
                    self.take(order, tokens)
                    break
                self.overflow()

    def take(self, order: RuledOrder, tokens: int) -> None:
        assert tokens > 0
        self.step.take[order.number] = tokens
        self.budget -= tokens

    # memory

    def overflow(self) -> None:
        rule = self.rule
        if rule.levels:
            self.throw(self.sunk())
        elif rule.victims == "youngest":
            self.throw(self.running[-1])
        elif rule.victims == "last":
            self.throw(max(self.running, key=lambda o: (self.key_to_rejoin(o), o.number)))
        elif rule.victims == "least":
            self.throw(min(self.running, key=lambda o: (o.believed, o.number)))
        else:
            self.rounds += 1
            for order in list(reversed(self.running)):
                x = order.u + self.rounds * GOLDEN
                if rule.victims == "all" or x - math.floor(x) < rule.clearing:
                    self.throw(order)

    def sunk(self) -> RuledOrder:
        """The running request on the highest level, the last of the list among equals."""
        return max(reversed(self.running), key=self.level)

    def throw(self, order: RuledOrder) -> None:
        """Preempt: blocks and the tokens of this step are free again."""
        self.running.remove(order)
        self.release(order)
        self.budget += self.step.take.pop(order.number, 0)
        self.step.moves.append((order.number, None))
        self.lost.append(order)
        order.preemptions += 1
        if order.preemptions == MOST_PREEMPTIONS:
            raise EndlessLoop(f"request {order.number} was preempted {MOST_PREEMPTIONS} times")
        self.forget(order)
        self.rejoin(order)

    # admission

    def admit(self, now: float, welcome: dict[int, int]) -> None:
        failures, tried = 0, list(self.lost)
        while self.budget > 0 and failures <= self.rule.skips:
            if len(self.running) >= self.pool.max_batch and not self.rule.levels:
                return
            order = next((o for o in self.waiting if o not in tried and self.may_try(o, welcome)), None)
            if order is None:
                return
            tried.append(order)
            welcome[order.cls if order.cls in welcome else -1] -= 1
            fits = self.fits(order, now)
            while not fits and self.rule.levels and self.running and self.level(self.sunk()) > self.level(order):
                victim = self.sunk()
                tried.append(victim)
                self.throw(victim)
                fits = self.fits(order, now)
            if fits:
                self.accept(order)
            failures += not fits

    def may_try(self, order: RuledOrder, welcome: dict[int, int]) -> bool:
        """By class, or by the number of everybody (class -1)."""
        return welcome.get(order.cls, welcome.get(-1, 0)) > 0

    def accept(self, order: RuledOrder) -> None:
        self.waiting.remove(order)
        self.find_blocks(order)
        tokens = self.wants(order, self.budget)
        self.running.append(order)
        assert self.grow(order, tokens)
        self.take(order, tokens)
        self.step.moves.append((order.number, order.computed))

    def fits(self, order: RuledOrder, now: float) -> bool:
        """Whether a waiting request may join: batch slots, release, budget of whole prompts, memory."""
        tokens = self.wants(order, self.budget)
        if len(self.running) >= self.pool.max_batch or order.release > now or tokens > self.budget:
            return False
        kept = math.floor(self.rule.protected * self.pool.kv_blocks) if self.running else 0
        if self.admission == "reserve":
            return self.blocks(order.prompt + order.output - self.pool.first_step) + kept <= len(self.free)
        if self.admission == "optimistic":
            # the whole prompt must fit; what must stay free is counted after the tokens of this step
            now_and_kept = self.blocks(order.computed + tokens) + kept
            return max(self.blocks(order.target), self.blocks(order.computed + tokens), now_and_kept) <= len(self.free)
        running = [*self.running, order]
        rows = [[o.computed, o.emitted, o.believed, o.target, o.prefilling] for o in running]
        first = [self.step.take.get(o.number, super(RuledScheduler, self).wants(o, 10**9)) for o in self.running]
        return self.stays_below(rows, [*first, tokens], self.pool.kv_blocks - kept)

    # the end of a step

    def carry_out(self, order: Order, tokens: int) -> None:
        """Tokens count when the step ends."""
        super().carry_out(order, tokens)
        assert isinstance(order, RuledOrder)
        if not order.ended:
            order.believed = max(order.believed, order.emitted + 1)

    def end(self, numbers: list[int]) -> None:
        for order in self.running:
            self.carry_out(order, self.step.take.get(order.number, 0))
        super().end(numbers)


def _admission(batcher: Batcher, pool: Pool) -> str:
    if batcher.admission != "pool":
        return batcher.admission
    return pool.preemption if pool.preemption in ("reserve", "lookahead") else "optimistic"
