"""Scenarios: what is given. TOML in, validated frozen object out.

`llmopt.reading.load_scenario` is the only way in: it reads the file, resolves catalog entries and a trace, checks
everything and says in one sentence what is wrong, where, and how to fix it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cached_property
from math import ceil
from typing import Annotated, Any, Literal

from pydantic import Field, InstanceOf, ValidationError, model_validator

from llmopt.bundle import OF_POOL, Bundle, Fleet, implied, unfit_for_ratio
from llmopt.errors import ScenarioError
from llmopt.explain import explain
from llmopt.hardware import Piece, StepTime
from llmopt.model import InputModel, Name, put
from llmopt.predictions import ORACLE, Predictor
from llmopt.slot_law import SlotLaw, slot_law
from llmopt.slots import SlotLoad, slot_load
from llmopt.steptable import StepTable
from llmopt.workload import Workload

Preemption = Literal["reserve", "lookahead", "recompute", "swap", "restart"]


class Pool(InputModel):
    """Identical replicas of one model on one kind of accelerator, and the engine settings they run with.

    replicas: number of replicas; price: USD/hour of one replica; step_time: max-affine pieces, s; kv_capacity:
    KV tokens a replica holds; max_batch: sequences in one step (vLLM max_num_seqs); token_budget: tokens in one
    step (vLLM max_num_batched_tokens); prefill_chunk: most prefill tokens of one request in one step (vLLM
    long_prefill_token_threshold), the token budget if absent; block_size: tokens of a KV block.

    preemption: `reserve` (admit only if prompt + output fit to the end), `lookahead` (admit only if the projected
    use fits at every later step), or optimistic admission with the youngest request preempted when memory runs
    out: `recompute` (its tokens are prefilled again), `swap` (its KV cache is parked and returns at no cost),
    `restart` (its output is thrown away). The first two need output lengths known in advance.

    first_token: `prefill` as in vLLM, where the last prefill chunk gives the first token, or `decode` as in the
    queueing papers, where it gives none. lookahead_slots: KV slots kept free per sequence beyond the computed
    tokens (vLLM num_lookahead_tokens). catalog: the catalog entry whose constants fill what is not given here.

    host_overhead: seconds that every step takes besides its kernels (scheduler, launches, sampling). async_scheduling:
    the batch of a step is formed while the step before it runs, as in vLLM since 0.14: it does not yet see what that
    step frees, nor who arrived during it. prefix_caching: a preempted request finds those of its full blocks that
    nobody has overwritten (vLLM enable_prefix_caching; prompts share nothing with each other).

    accelerator, model, tensor_parallel: what a replica runs on and serves, and over how many accelerators it divides
    every matrix. Both known to `llmopt.machines`, they fill a step_time and kv_capacity that are not given, and tell
    what physics allows.

    bundle: Attention workers and FFN servers that make up one replica; they determine `OF_POOL`. Prompts that it does
    not compute are prefilled elsewhere and arrive in one step.

    profile: folder of measured tables; then `table` is what the simulator plays, while the theory and the programs
    still use `step_time`, its max-affine fit.
    """

    name: Name
    replicas: Annotated[int, Field(ge=1, le=100_000)]
    step_time: Annotated[tuple[Piece, ...], Field(strict=False, min_length=1)]
    kv_capacity: Annotated[int, Field(ge=1, le=10_000_000_000)]
    accelerator: str = ""
    model: str = ""
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    price: Annotated[float, Field(ge=0, le=100_000)] = 0.0
    max_batch: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    token_budget: Annotated[int, Field(ge=1, le=100_000_000)] = 2048
    prefill_chunk: Annotated[int, Field(ge=1)] | None = None
    block_size: Annotated[int, Field(ge=1, le=4096)] = 16
    preemption: Preemption = "recompute"
    first_token: Literal["prefill", "decode"] = "prefill"
    lookahead_slots: Annotated[int, Field(ge=0, le=64)] = 0
    host_overhead: Annotated[float, Field(ge=0, le=1)] = 0.0
    async_scheduling: bool = False
    prefix_caching: bool = False
    bundle: Bundle | None = None
    profile: str = ""
    table: Annotated[InstanceOf[StepTable] | None, Field(exclude=True)] = None
    source: str = ""
    catalog: str = ""

    @model_validator(mode="before")
    @classmethod
    def _from_bundle(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("bundle") is None:
            return data
        given = [key for key in OF_POOL if key in data]
        if given:
            raise ValueError(
                f"has a bundle, which determines {', '.join(given)}; drop {', '.join(given)} or the bundle"
            )
        return {"replicas": 1} | implied(data["bundle"]) | data

    @model_validator(mode="after")
    def _can_step(self) -> Pool:
        if self.kv_capacity < self.block_size:
            raise ValueError(f"has kv_capacity = {self.kv_capacity}, below one block of {self.block_size}; raise it")
        if self.prefix_caching and self.preemption != "recompute":
            raise ValueError(
                f"has prefix_caching with preemption = {self.preemption!r}, where nothing is computed twice; "
                'drop it or set preemption = "recompute"'
            )
        if self.stepper.coefficients.max() <= 0:
            raise ValueError("has a step_time that is zero for every batch; give at least one positive coefficient")
        return self

    @cached_property
    def stepper(self) -> StepTime:
        """The max-affine step time as arrays, the host's part in the base of every piece."""
        pieces = StepTime.from_pieces(self.step_time)
        pieces.coefficients[:, 0] += self.host_overhead
        return pieces

    @property
    def chunk(self) -> int:
        """Most prefill tokens of one request in one step."""
        return min(self.prefill_chunk or self.token_budget, self.token_budget)

    @property
    def kv_blocks(self) -> int:
        """Whole KV blocks of one replica."""
        return self.kv_capacity // self.block_size

    @property
    def first_step(self) -> int:
        """1 if the last prefill chunk gives the first token, so that o - 1 decode steps remain; else 0."""
        return int(self.first_token == "prefill")

    @property
    def largest(self) -> int:
        """Largest prompt + output in tokens that an empty replica holds to its end, in one worker if it is a bundle."""
        blocks = min(self.kv_blocks, self.bundle.kv_capacity // self.block_size) if self.bundle else self.kv_blocks
        return blocks * self.block_size - self.lookahead_slots + self.first_step

    def fits(self, tokens: int) -> bool:
        """Whether a request with prompt + output = `tokens` fits into an empty replica."""
        return tokens <= self.largest


class Evaluation(InputModel):
    """How policies are judged: `horizon` (s) of arrivals, `warmup` (s) cut from the metrics, `seeds`.

    Where the A/F ratio is open, bundles are always full instead: `requests` is how many each micro-batch of an
    Attention worker finishes on average, and `start` whether its slots begin empty-handed with new requests, all at
    age 0 (cold), or as in steady state.

    Requests that arrive in [warmup, horizon) are measured, each until its end, however late: there is no drain cut.
    `seed = 7` is short for `seeds = [7]`. `confidence` is the level of the intervals over seeds.
    """

    horizon: Annotated[float, Field(gt=0, le=1e8)] = 600.0
    warmup: Annotated[float, Field(ge=0)] = 0.0
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)] = (1, 2, 3)
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    requests: Annotated[int, Field(ge=1, le=100_000_000)] = 10_000
    start: Literal["cold", "stationary"] = "stationary"

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "seed" not in data:
            return data
        if "seeds" in data:
            raise ValueError("has both seed and seeds; drop one of the two")
        return {key: value for key, value in data.items() if key != "seed"} | {"seeds": [data["seed"]]}

    @model_validator(mode="after")
    def _order(self) -> Evaluation:
        if self.warmup >= self.horizon:
            raise ValueError(
                f"has warmup = {self.warmup:g} s, which leaves nothing of horizon = {self.horizon:g} s; shorten it"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"has repeated seeds {list(self.seeds)}; repeats are not new evidence, drop them")
        return self


NEW = {"predictions": ORACLE, "fleet": Fleet()}
"""Keys that came later, with their defaults: a scenario that says nothing of them keeps its digest."""


class Scenario(InputModel):
    """One question: a workload, pools that could serve it, and how to judge the answers.

    problem: the open decision, which replica serves a request ("routing"), whom a replica serves when ("batching"), or
    how many Attention workers share an FFN server ("af-ratio"). predictions: what rules know of output lengths. fleet:
    what may be chosen beside the A/F ratio.
    """

    name: Name
    problem: Literal["routing", "batching", "af-ratio"] = "routing"
    question: str = ""
    workload: Workload
    pools: Annotated[tuple[Pool, ...], Field(strict=False, min_length=1)]
    evaluation: Evaluation = Evaluation()
    predictions: Predictor = ORACLE
    fleet: Fleet = Fleet()

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        names = [p.name for p in self.pools]
        if len(set(names)) < len(names):
            raise ValueError(f"pool names repeat: {names}; name each pool once")
        for c, cls in enumerate(self.workload.classes):
            if not any(p.fits(cls.largest) for p in self.pools):
                room = max(p.largest for p in self.pools)
                raise ValueError(
                    f"workload.classes[{c}] ({cls.name!r}) can send a request of {cls.largest} tokens, more than the "
                    f"KV memory of every pool (at most {room}); lower its max lengths or raise kv_capacity"
                )
        if self.problem == "af-ratio":
            _check_ratio_question(self)
        return self

    @property
    def bundle(self) -> Bundle:
        """The bundle whose ratio is open.

        Raises
        ------
        ScenarioError
            If the A/F ratio is not the open decision.
        """
        bundle = self.pools[0].bundle
        if self.problem != "af-ratio" or bundle is None:
            raise ScenarioError(
                f'{self.name}: asks for no A/F ratio; set problem = "af-ratio" and give one pool a bundle'
            )
        return bundle

    @cached_property
    def slot_load(self) -> SlotLoad:
        """KV load of one always occupied slot under the mix of classes, in the first pool's convention of steps."""
        workload = self.workload
        return slot_load(workload.classes, workload.rates, self.pools[0].first_step, workload.replay)

    @cached_property
    def _laws(self) -> dict[int | None, SlotLaw]:
        return {}

    def law_at(self, batch: int) -> SlotLaw:
        """Exact law of that load over the judged run; from a cold start the larger `batch` is, the shorter that is."""
        cold = self.evaluation.start == "cold"
        steps = ceil(self.evaluation.requests * self.slot_load.mean_decode / batch) if cold else None
        if steps not in self._laws:
            workload, first_step = self.workload, self.pools[0].first_step
            self._laws[steps] = slot_law(workload.classes, workload.rates, first_step, steps)
        return self._laws[steps]

    def load_at(self, batch: int) -> SlotLoad:
        """`slot_load` as that run sees it: from a cold start less, on average, than in steady state."""
        if self.evaluation.start == "stationary":
            return self.slot_load
        return replace(self.slot_load, theta=self.law_at(batch).mean, variance=self.law_at(batch).variance)

    @property
    def slot_law(self) -> SlotLaw:
        """`law_at` the bundle's own batch."""
        return self.law_at(self.bundle.batch)

    @property
    def run_load(self) -> SlotLoad:
        """`load_at` the bundle's own batch."""
        return self.load_at(self.bundle.batch)

    @cached_property
    def allowed(self) -> tuple[tuple[bool, ...], ...]:
        """allowed[c][j]: every request of class c fits into a replica of pool j."""
        return tuple(tuple(p.fits(c.largest) for p in self.pools) for c in self.workload.classes)

    @property
    def digest(self) -> str:
        """SHA-256 over everything that determines results, a trace by its content; first 12 hex digits."""
        data = self.model_dump(mode="json", exclude={"workload": {"trace"}})
        for key, default in NEW.items():
            if getattr(self, key) == default:
                del data[key]
        for pool in data["pools"]:
            if pool["bundle"] is None:
                del pool["bundle"]
        if self.problem != "af-ratio":
            del data["evaluation"]["requests"], data["evaluation"]["start"]
        sha = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
        replay = self.workload.replay
        arrays = [] if replay is None else [replay.arrival, replay.prompt, replay.output, replay.cls]
        for cls in self.workload.classes:
            arrays += [] if cls.pairs is None else [cls.pairs.prompt, cls.pairs.output]
        for array in arrays:
            sha.update(array.tobytes())
        for pool in self.pools:
            if pool.table is not None:
                sha.update(json.dumps(pool.table.content(), sort_keys=True).encode())
        return sha.hexdigest()[:12]

    def replace(self, **updates: Any) -> Scenario:
        """A validated copy with dotted keys replaced, e.g. `replace(**{"workload.rate": 5.0, "pools.0.replicas": 3})`.

        A replayed trace keeps its requests at another rate: its horizon shrinks or grows with its times.

        Raises
        ------
        ScenarioError
            If a key leads nowhere or the copy is not a valid scenario.
        """
        data = self._raw()
        for key, value in updates.items():
            put(data, key, value)
        rate = data["workload"].get("rate")
        scaled = isinstance(rate, int | float) and rate > 0 and "evaluation.horizon" not in updates
        if self.workload.replay is not None and scaled:
            data["evaluation"]["horizon"] *= self.workload.total_rate / rate
        return Scenario.checked(data, f"scenario {self.name!r} changed by {', '.join(updates)}")

    @classmethod
    def checked(cls, data: dict[str, Any], where: str) -> Scenario:
        """The scenario that plain `data` describe; `where` starts the sentence of a `ScenarioError`."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ScenarioError(explain(error, data, cls, where)) from None

    def _raw(self) -> dict[str, Any]:
        """Plain data, aliases used, with the arrays of a replay carried over."""
        data: dict[str, Any] = json.loads(self.model_dump_json(by_alias=True, exclude_none=True))
        data["workload"]["replay"] = self.workload.replay
        for plain, cls in zip(data["workload"]["classes"], self.workload.classes, strict=True):
            plain["pairs"] = cls.pairs
        for plain, pool in zip(data["pools"], self.pools, strict=True):
            plain["table"] = pool.table
            for key, value in implied(pool.bundle).items() if pool.bundle else ():
                if key in OF_POOL or plain[key] == value:
                    del plain[key]
        return data


def _check_ratio_question(scenario: Scenario) -> None:
    """One pool with a bundle, and memory for what its slots hold on average."""
    if len(scenario.pools) != 1 or scenario.pools[0].bundle is None:
        raise ValueError('has problem = "af-ratio", which needs exactly one pool, with a bundle; add [pools.bundle]')
    unfit = unfit_for_ratio(scenario.bundle, scenario.fleet, scenario.slot_load.theta)
    if unfit:
        raise ValueError(unfit)
