"""A naive simulator, written straight from docs/simulator.md: every step touches every request, nothing is clever."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from llmopt.batcher import Replan
from llmopt.evaluate.rules import rules_of
from llmopt.evaluate.run import ReplicaTotals, SimRun
from llmopt.plan import STATE_FEATURES, Plan, Router
from llmopt.scenario import Pool, Scenario
from llmopt.workload import Requests
from tests.oracle_batching import RuledScheduler, scheduler_of
from tests.oracle_engine import Scheduler, StepPlan, is_measured, table_seconds


@dataclass
class Job:
    """One request; `attempt` and `life` are the token-steps held by its current prefill and since its (re)start."""

    number: int
    prompt: int
    output: int
    target: int
    computed: int = 0
    emitted: int = 0
    prefilling: bool = True
    prefilled: bool = False
    attempt: int = 0
    life: int = 0
    preemptions: int = 0
    replica: int = -1
    queued: float = math.nan
    scheduled: float = math.nan
    first_token: float = math.nan
    finish: float = math.nan


class Logged(NamedTuple):
    """What a step serves: prefill tokens by request, decode requests in the order of the list, KV tokens allocated."""

    start: float
    prefill: dict[int, int]
    decode: list[int]
    held: int


@dataclass
class Replica:
    """One engine as the world sees it; `plan` is the step under way, `ahead` what is planned for the step after it."""

    pool: Pool
    number: int
    pool_number: int
    scheduler: Scheduler
    clock: float = 0.0
    end: float = 0.0
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    plan: StepPlan | None = None
    ahead: StepPlan | None = None
    idle: bool = False
    log: list[Logged] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)

    def add(self, key: str, amount: float) -> None:
        self.totals[key] = self.totals.get(key, 0) + amount

    def held(self, job: Job) -> int:
        """Blocks of a running request, those for its tokens of this step included."""
        if self.scheduler.reserves:
            return self.scheduler.blocks(job.prompt + job.output - self.pool.first_step)
        return self.scheduler.blocks(job.computed + (self.plan.take.get(job.number, 0) if self.plan else 0))

    def kv_tokens(self) -> int:
        return sum(self.held(job) for job in self.running) * self.pool.block_size

    def outstanding(self) -> int:
        jobs = self.waiting + self.running
        return sum((j.target - j.computed if j.prefilling else 0) + j.output - j.emitted for j in jobs)

    def arrive(self, job: Job, time: float) -> None:
        if not self.waiting and not self.running:
            self.clock = max(self.clock, time)
        if self.idle:
            # a replica that idles with requests looks again at every arrival
            self.clock = time
        job.replica, job.queued = self.number, time if self.plan is None else self.end
        self.waiting.append(job)
        self.scheduler.join(job.number, job.prompt, job.output)

    def advance(self, until: float) -> None:
        """Begin every step that starts before `until`, complete every step that ends by `until`."""
        while True:
            if self.plan is not None:
                if self.end > until:
                    return
                self.complete(self.plan)
            if self.clock >= until or not (self.waiting or self.running):
                return
            plan = self.ahead
            if plan is None or not plan.take:
                # nothing could be planned ahead; what was preempted in vain stays preempted
                plan, vain = self.scheduler.plan(self.clock), plan.moves if plan else []
                plan.moves = vain + plan.moves
            self.move(plan)
            if not plan.take:
                self.clock, self.idle = self.scheduler.wake(self.clock), True
                continue
            self.begin(plan)
            self.ahead = self.scheduler.plan(self.clock) if self.pool.async_scheduling else None

    def move(self, plan: StepPlan) -> None:
        """Preempt and admit as planned."""
        for number, computed in plan.moves:
            job = next(j for j in (self.running if computed is None else self.waiting) if j.number == number)
            if computed is None:
                self.running.remove(job)
                self.preempt(job)
                continue
            self.waiting.remove(job)
            job.computed = computed
            self.running.append(job)
            if math.isnan(job.scheduled):
                job.scheduled = self.clock

    def begin(self, plan: StepPlan) -> None:
        """Start a planned step at the clock."""
        self.plan, self.idle = plan, False
        self.end = self.clock + self.duration(plan.take)
        moving = [j for j in self.running if j.number in plan.take]
        chunks = {j.number: plan.take[j.number] for j in moving if j.prefilling}
        self.log.append(Logged(self.clock, chunks, [j.number for j in moving if not j.prefilling], self.kv_tokens()))

    def duration(self, take: dict[int, int]) -> float:
        prefill = decode = kv = 0
        pairs = 0.0
        for job in self.running:
            tokens, computed = take.get(job.number, 0), job.computed
            if tokens and job.prefilling:
                prefill += tokens
                pairs += tokens * computed + tokens**2 / 2
            elif tokens:
                decode += 1
                kv += computed
        self.add("prefill_tokens", prefill)
        self.add("decode_tokens", decode)
        if self.pool.table is None:
            return self.pool.stepper(prefill, decode, kv, pairs)
        self.add("extrapolated", not is_measured(self.pool.table, prefill, decode, kv, pairs))
        return table_seconds(self.pool.table, prefill, decode, kv, pairs) + self.pool.host_overhead

    def preempt(self, job: Job) -> None:
        job.preemptions += 1
        self.add("preemptions", 1)
        self.waiting.insert(0, job)
        mode = self.scheduler.kept
        if mode == "swap":
            return
        if mode == "restart":
            self.add("wasted", job.life)
            job.emitted, job.life, job.prefilled = 0, 0, False
        elif job.prefilling:
            self.add("wasted", job.attempt)
        job.computed, job.target, job.prefilling, job.attempt = 0, job.prompt + job.emitted, True, 0

    def complete(self, plan: StepPlan) -> None:
        """End the step under way."""
        e = self.pool.first_step
        for job in self.running:
            tokens = plan.take.get(job.number, 0)
            was_prefilling, before = job.prefilling, job.emitted
            job.computed += tokens
            job.life += job.computed
            if was_prefilling:
                job.attempt += job.computed
                if job.computed == job.target:
                    if job.prefilled:
                        self.add("wasted", job.attempt - e * job.computed)
                    job.emitted += e
                    job.prefilling, job.prefilled = False, True
            else:
                job.emitted += tokens
            if before == 0 and job.emitted == 1 and math.isnan(job.first_token):
                job.first_token = self.end
            if job.emitted == job.output:
                job.finish = self.end
        used = sum(job.computed for job in self.running)
        self.add("held", used)
        self.add("held_time", used * (self.end - self.clock))
        self.add("busy", self.end - self.clock)
        self.add("steps", 1)
        self.totals["peak"] = max(self.totals.get("peak", 0), used)
        self.scheduler.end([job.number for job in self.running if job.emitted == job.output])
        self.running = [job for job in self.running if job.emitted < job.output]
        self.plan, self.clock = None, self.end


class Dispatcher:
    """The data router of docs/simulator.md."""

    def __init__(self, router: Router, replicas: list[Replica]) -> None:
        self.router, self.replicas = router, replicas
        self.last = [-1] * len(replicas)
        self.sent: dict[tuple[int, int], int] = {}

    def choose(self, number: int, cls: int, u: float) -> int:
        pools, u = self.pools(cls, u)
        candidates = [r.number for r in self.replicas if r.pool_number in pools]
        if self.router.choices:
            drawn = []
            for _ in range(self.router.choices):
                k = min(int(u * len(candidates)), len(candidates) - 1)
                u = u * len(candidates) - k
                drawn.append(candidates[k])
            candidates = drawn
        best = min(candidates, key=lambda r: (self.score(self.replicas[r]), self.last[r], r))
        self.last[best] = number
        return best

    def pools(self, cls: int, u: float) -> tuple[list[int], float]:
        count = len(self.router.weights)
        if self.router.fractions is None:
            return [j for j in range(count) if self.router.mask is None or self.router.mask[cls, j]], u
        row = self.router.fractions[cls]
        if self.router.spread == "cyclic":
            total = sum(self.sent.get((cls, j), 0) for j in range(count)) + 1
            pool = max(range(count), key=lambda j: (row[j] * total - self.sent.get((cls, j), 0), -j))
            self.sent[cls, pool] = self.sent.get((cls, pool), 0) + 1
            return [pool], u
        below = 0.0
        for j in range(count):
            if row[j] > 0:
                pool, start = j, below
                below += row[j]
                if u < below:
                    break
        return [pool], min(max((u - start) / row[pool], 0.0), 1.0)

    def score(self, replica: Replica) -> float:
        state = (len(replica.waiting), len(replica.running), replica.kv_tokens(), replica.outstanding())
        weights = self.router.weights[replica.pool_number]
        return float(sum(weights[f] * state[f] for f in range(len(STATE_FEATURES))))


def simulate(scenario: Scenario, plan: Plan, requests: Requests) -> SimRun:
    """Run data routers only."""
    return _collect(requests, *play(scenario, plan, requests))


def play(scenario: Scenario, plan: Plan, requests: Requests) -> tuple[list[Job], list[Replica]]:
    """Every request and every replica after the last step."""
    assert isinstance(plan.router, Router)
    rules = rules_of(scenario, plan, requests)
    pools = [(j, pool) for j, pool in enumerate(scenario.pools) for _ in range(pool.replicas)]
    replicas = [Replica(pool, i, j, scheduler_of(pool, rules, requests)) for i, (j, pool) in enumerate(pools)]
    dispatcher = Dispatcher(plan.router, replicas)
    ticks = Ticks(plan.batcher.replan, replicas)
    jobs = []
    for i in range(len(requests)):
        prompt = int(requests.prompt[i])
        job = Job(i, prompt, int(requests.output[i]), target=prompt)
        time = float(requests.arrival[i])
        ticks.play(time)
        for replica in replicas:
            replica.advance(time)
        replicas[dispatcher.choose(i, int(requests.cls[i]), float(requests.u[i]))].arrive(job, time)
        jobs.append(job)
    ticks.play(math.inf)
    for replica in replicas:
        replica.advance(math.inf)
    return jobs, replicas


class Ticks:
    """The times at which queues are ranked anew."""

    def __init__(self, replan: Replan | None, replicas: list[Replica]) -> None:
        self.replan, self.replicas, self.count = replan, replicas, 1

    def play(self, until: float) -> None:
        """Everything up to the last of these times that is at most `until`, as long as there are requests."""
        while self.replan is not None and self.count * self.replan.every <= until:
            if until == math.inf and not any(r.waiting or r.running for r in self.replicas):
                return
            time = self.count * self.replan.every
            for replica in self.replicas:
                replica.advance(time)
                assert isinstance(replica.scheduler, RuledScheduler)
                replica.scheduler.rank_anew(time)
                if replica.idle:
                    # new ranks are as good a reason to look again as an arrival
                    replica.clock = time
            self.count += 1


def _collect(requests: Requests, jobs: list[Job], replicas: list[Replica]) -> SimRun:
    def ints(key: str) -> np.ndarray:
        return np.array([r.totals.get(key, 0) for r in replicas], dtype=np.int64)

    def floats(key: str) -> np.ndarray:
        return np.array([r.totals.get(key, 0.0) for r in replicas], dtype=float)

    whole = ("steps", "prefill_tokens", "decode_tokens", "preemptions", "held", "wasted", "peak", "extrapolated")
    totals = ReplicaTotals(
        pool=np.array([r.pool_number for r in replicas]),
        busy=floats("busy"),
        held_time=floats("held_time"),
        **{key: ints(key) for key in whole},
    )
    return SimRun(
        requests,
        replica=np.array([j.replica for j in jobs], dtype=np.int64),
        queued=np.array([j.queued for j in jobs], dtype=float),
        scheduled=np.array([j.scheduled for j in jobs], dtype=float),
        first_token=np.array([j.first_token for j in jobs], dtype=float),
        finish=np.array([j.finish for j in jobs], dtype=float),
        preemptions=np.array([j.preemptions for j in jobs], dtype=np.int64),
        replicas=totals,
        core="oracle",
    )
