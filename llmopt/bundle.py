"""Bundles of Attention workers and FFN servers (Attention/FFN disaggregation, AFD): what they are and how they step.

x Attention workers hold the KV caches of M micro-batches of B sequences each and share y FFN servers, so the A/F ratio
is r = x / y. In every layer a micro-batch is attended by all its workers at once (the slowest one decides: a barrier),
sent to the FFN servers, computed there, and sent back. After all layers each of its sequences has one token more.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError, model_validator

from llmopt.arrays import Floats
from llmopt.errors import ScenarioError
from llmopt.hardware import FEATURES, Piece, StepTime
from llmopt.model import InputModel
from llmopt.stagetable import StageTable

Pipeline = Literal["ideal", "non-blocking", "attention-blocking", "blocking"]
"""Who waits for a transfer, and how the stages of different micro-batches overlap.

ideal: a cycle lasts as long as its slowest stage, max{A, C, F}, the published assumption. The others play M
micro-batches exactly. non-blocking: a device computes on while it sends; attention-blocking: an Attention worker is
occupied until its data have arrived; blocking: so is an FFN server.
"""
Stage = Annotated[tuple[Piece, ...], Field(strict=False, min_length=1)]
Price = Annotated[float, Field(ge=0, le=100_000)]
OF_POOL = ("step_time", "kv_capacity", "max_batch", "price")
"""Keys of a pool that its bundle determines."""
ELSEWHERE = 10_000_000
"""Token budget of a bundle that computes no prompts: their KV caches arrive, however long, in one step."""
BUDGET = 8192
"""Prompt tokens in one step of a bundle that computes them, unless its pool's token_budget says otherwise."""


class Line(NamedTuple):
    """One affine piece of the cycle of a micro-batch through a layer, in seconds.

    cycle >= worker @ (1, P, D, K, Q of one Attention worker's micro-batch) + server @ (the same of one FFN server);
    both arrays have shape (5,) with columns as in `hardware.FEATURES`. stage: attention, transfer, ffn or pipeline.
    """

    stage: str
    worker: Floats
    server: Floats


class Colocated(InputModel):
    """The same model without disaggregation: groups of devices, each of which attends and computes FFN layers in turn.

    workers: Attention workers' worth of devices in one group, which together compute the FFN of all their tokens; as
    many as make one FFN server's devices if absent. kv_capacity: KV tokens of one worker's devices, beside all weights.
    exchange: whether the group pays both hops of `transfer` in a layer, as with experts spread over devices.
    attention, transfer, ffn: stages on these devices, those of the bundle if absent. price: USD/hour of one worker's
    devices, the bundle's attention_price if absent.
    """

    kv_capacity: Annotated[int, Field(ge=1, le=10_000_000_000)]
    workers: Annotated[int, Field(ge=1, le=4096)] | None = None
    exchange: bool = False
    attention: Annotated[tuple[Piece, ...], Field(strict=False)] = ()
    transfer: Annotated[tuple[Piece, ...], Field(strict=False)] = ()
    ffn: Annotated[tuple[Piece, ...], Field(strict=False)] = ()
    price: Price | None = None


class Bundle(InputModel):
    """x Attention workers and y FFN servers that serve one model together.

    attention, transfer, ffn: max-affine times of one layer, s: of one Attention worker for its micro-batch (base;
    decode per sequence; kv per KV token; prefill and pairs of prompts); of one hop, per
    sequence of one worker (`transfer_of = "worker"`) or of all that one FFN server receives ("bundle"); of one FFN
    server, decode per token. ffn_table: measured times instead of `ffn`. layers: of the model, 1 where the times are
    those of a whole step.

    batch: B, sequences of one micro-batch on one Attention worker; micro_batches: M in flight; pipeline: see
    `Pipeline`. attention_workers, ffn_servers: x and y, unless a policy chooses them. kv_capacity: KV tokens of one
    Attention worker, for all its micro-batches. imbalance: by what fraction the fullest worker's KV tokens exceed the
    mean one's, where the bundle is a pool (where the ratio is chosen, the barrier is computed instead).

    prompts: whether the bundle computes them ("here") or they arrive prefilled ("elsewhere"); what the stages charge
    for prompts then only tells what prefill devices need.

    attention_price, ffn_price: USD/hour of one worker and one server; attention_devices, ffn_devices: accelerators
    in each. colocated: what the comparison with serving without disaggregation needs besides.
    """

    attention: Stage
    transfer: Stage = (Piece(),)
    transfer_of: Literal["worker", "bundle"] = "worker"
    ffn: Annotated[tuple[Piece, ...], Field(strict=False)] = ()
    ffn_table: StageTable | None = None
    layers: Annotated[int, Field(ge=1, le=1000)] = 1
    batch: Annotated[int, Field(ge=1, le=1_000_000)]
    micro_batches: Annotated[int, Field(ge=1, le=4)] = 3
    pipeline: Pipeline = "non-blocking"
    attention_workers: Annotated[int, Field(ge=1, le=4096)] = 1
    ffn_servers: Annotated[int, Field(ge=1, le=4096)] = 1
    kv_capacity: Annotated[int, Field(ge=1, le=10_000_000_000)]
    imbalance: Annotated[float, Field(ge=0, le=10)] = 0.0
    prompts: Literal["elsewhere", "here"] = "elsewhere"
    attention_price: Price = 0.0
    ffn_price: Price = 0.0
    attention_devices: Annotated[int, Field(ge=1, le=100_000)] = 1
    ffn_devices: Annotated[int, Field(ge=1, le=100_000)] = 1
    colocated: Colocated | None = None

    @model_validator(mode="after")
    def _stages(self) -> Bundle:
        if bool(self.ffn) == (self.ffn_table is not None):
            raise ValueError("needs exactly one of ffn and ffn_table; give one of them")
        for name, stage in (("attention", self.attention), ("ffn", self.ffn or self.table_hull)):
            if max(max(p.base, p.prefill, p.decode, p.kv) for p in stage) <= 0:
                raise ValueError(f"has an {name} stage that takes no time for any batch; give a positive coefficient")
        if any(piece.kv > 0 for piece in (*self.transfer, *self.ffn)):
            raise ValueError("charges KV tokens in transfer or ffn, where no KV cache is read; put kv into attention")
        if self.prompts == "here" and not self.charges_prompts:
            raise ValueError('computes prompts here, but its stages charge nothing for them; set prompts = "elsewhere"')
        if self.colocated:
            self._check_group(self.colocated)
        return self

    def _check_group(self, group: Colocated) -> None:
        if group.workers is None and self.ffn_devices % self.attention_devices:
            raise ValueError(
                f"has colocated groups of {self.ffn_devices} devices, of which an Attention worker's "
                f"{self.attention_devices} are no whole part; give colocated.workers and colocated.ffn"
            )
        if group.transfer and not group.exchange:
            raise ValueError("has colocated.transfer, but no exchange that takes it; set colocated.exchange = true")
        devices = self.group_workers * self.attention_devices
        if devices != self.ffn_devices and not group.ffn:
            raise ValueError(
                f"has colocated groups of {devices} devices, but FFN times of {self.ffn_devices}; give colocated.ffn"
            )

    @property
    def group_workers(self) -> int:
        """Attention workers' worth of devices in one colocated group."""
        given = self.colocated.workers if self.colocated else None
        return given or self.ffn_devices // self.attention_devices

    @property
    def charges_prompts(self) -> bool:
        """Whether Attention and FFN both say what prompt tokens cost."""
        stages = (self.attention, self.ffn or self.table_hull)
        return all(any(piece.prefill or piece.pairs for piece in stage) for stage in stages)

    @property
    def table_hull(self) -> tuple[Piece, ...]:
        """Pieces of the measured table's hull; empty without a table."""
        return self.ffn_table.hull if self.ffn_table else ()

    @property
    def ratio(self) -> float:
        """A/F ratio r = x / y."""
        return self.attention_workers / self.ffn_servers

    @property
    def slots(self) -> int:
        """Sequences of the whole bundle, x M B."""
        return self.attention_workers * self.micro_batches * self.batch

    @property
    def weights(self) -> tuple[float, float]:
        """What a worker and a server count for in the objective: their prices if both are given, else one each."""
        priced = self.attention_price > 0 and self.ffn_price > 0
        return (self.attention_price, self.ffn_price) if priced else (1.0, 1.0)

    @property
    def price(self) -> float:
        """USD/hour of the bundle; 0 unless both roles have prices."""
        return (
            0.0
            if 0.0 in (self.attention_price, self.ffn_price)
            else self.attention_workers * self.attention_price + self.ffn_servers * self.ffn_price
        )

    @property
    def devices(self) -> int:
        """Accelerators of the bundle."""
        return self.attention_workers * self.attention_devices + self.ffn_servers * self.ffn_devices

    def sized(self, workers: int, servers: int | None = None, batch: int | None = None) -> Bundle:
        """The same bundle with `workers` Attention workers and, if given, other FFN servers and micro-batch size.

        Raises
        ------
        ScenarioError
            If one of them is not a whole number of at least 1.
        """
        size = {"attention_workers": workers, "ffn_servers": servers or self.ffn_servers, "batch": batch or self.batch}
        for key, value in size.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ScenarioError(f"a bundle cannot have {key} = {value!r}; give a whole number of at least 1")
        return self.model_copy(update=size)

    def attention_time(self, kv: Floats | float, sequences: float | None = None) -> Floats:
        """Seconds of one Attention worker for a layer of a micro-batch with `kv` KV tokens; shape of `kv`."""
        pieces, tokens = StepTime.from_pieces(self.attention).coefficients, np.asarray(kv, dtype=float)
        constant = pieces[:, 0] + pieces[:, 2] * (self.batch if sequences is None else sequences)
        return np.asarray((constant + tokens[..., None] * pieces[:, 3]).max(axis=-1))

    def transfer_time(self, ratio: float) -> float:
        """Seconds of one hop at A/F ratio `ratio`."""
        sequences = self.batch * (ratio if self.transfer_of == "bundle" else 1.0)
        return StepTime.from_pieces(self.transfer)(decode=sequences)

    def ffn_time(self, ratio: float) -> float:
        """Seconds of one FFN server for a layer of its r B tokens."""
        tokens = ratio * self.batch
        return self.ffn_table(tokens) if self.ffn_table else StepTime.from_pieces(self.ffn)(decode=tokens)

    def near(self, tokens: float) -> Bundle:
        """The bundle with the affine FFN time that its measured table has near `tokens` tokens; itself without a table.

        A table's convex hull may be far below it. A base below zero gives way to the line through 0.
        """
        if self.ffn_table is None:
            return self
        now, less = self.ffn_table(tokens), self.ffn_table(0.999 * tokens)
        slope = min((now - less) / (0.001 * tokens), now / tokens)
        piece = Piece(base=max(0.0, now - slope * tokens), decode=slope, prefill=slope)
        return self.model_copy(update={"ffn": (piece,), "ffn_table": None})

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """The cycle as a maximum of affine functions, by the law of the pipeline.

        ideal: max{A, C, F}; else max{A', F', (A + F + 2 C) / M}, where A' = A, or A + C if Attention workers are
        occupied while they send, and F' likewise (theory and simulation: docs/afd.md).
        """
        return tuple(self._lines())

    def _lines(self) -> Iterator[Line]:
        attention = [(_vector(p), np.zeros(5)) for p in self.attention]
        ffn = [(np.zeros(5), _vector(p)) for p in self.ffn or self.table_hull]
        of_worker = self.transfer_of == "worker"
        hop = [(_vector(p), np.zeros(5)) if of_worker else (np.zeros(5), _vector(p)) for p in self.transfer]
        ideal, still = self.pipeline == "ideal", [(np.zeros(5), np.zeros(5))]
        for name, stage, sends in (
            ("attention", attention, self.pipeline in ("attention-blocking", "blocking")),
            ("ffn", ffn, self.pipeline == "blocking"),
        ):
            for one, sent in product(stage, hop if sends else still):
                yield Line(name, one[0] + sent[0], one[1] + sent[1])
        if ideal:
            yield from (Line("transfer", *one) for one in hop)
            return
        for a, f, c in product(attention, ffn, hop):
            total = [(a[k] + f[k] + 2 * c[k]) / self.micro_batches for k in (0, 1)]
            yield Line("pipeline", *total)

    def step_pieces(self) -> tuple[Piece, ...]:
        """The step time of the whole bundle, in which all M micro-batches gain one token: M L cycles.

        A worker's micro-batch has 1/(M x), a server's share 1/(M y) of the bundle's tokens. Of a measured FFN table it
        is the affine piece near full micro-batches: exact there, and too long for fewer tokens where times are concave.
        """
        if self.ffn_table is not None:
            return self.near(self.ratio * self.batch).step_pieces()
        x, y, rounds = self.attention_workers, self.ffn_servers, self.micro_batches * self.layers
        found: dict[str, int] = {}
        pieces = []
        for line in self.lines:
            total = self.layers * (line.worker / x + line.server / y)
            total[0] = rounds * (line.worker[0] + line.server[0])
            total[3] *= 1 + self.imbalance
            total[[1, 4]] *= self.prompts == "here"
            found[line.stage] = found.get(line.stage, 0) + 1
            name = line.stage if found[line.stage] == 1 else f"{line.stage} {found[line.stage]}"
            pieces.append(Piece(name=name, **dict(zip(FEATURES, map(float, total), strict=True))))
        return tuple(pieces)


class Fleet(InputModel):
    """What a policy may choose where the A/F ratio is open.

    devices: accelerators that all bundles together may have, if that is limited; batches: micro-batch sizes B to choose
    from, the bundle's own if empty; most_attention, most_ffn: workers and servers of one bundle at most; kv_sigmas: by
    how many standard deviations a worker's mean KV load must stay below its capacity.
    """

    devices: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    batches: Annotated[tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...], Field(strict=False)] = ()
    most_attention: Annotated[int, Field(ge=1, le=512)] = 32
    most_ffn: Annotated[int, Field(ge=1, le=64)] = 1
    kv_sigmas: Annotated[float, Field(ge=0, le=20)] = 3.0


def implied(bundle: Any) -> dict[str, Any]:
    """What a bundle, or the plain data of one, determines of its pool, and the token budget it suggests.

    Of a bundle that is not valid it is something harmless: its own field says what is wrong.
    """
    try:
        known = bundle if isinstance(bundle, Bundle) else Bundle.model_validate(bundle)
    except ValidationError:
        return {"step_time": (Piece(base=1.0),), "kv_capacity": 1}
    kv = known.attention_workers * known.kv_capacity
    values = (known.step_pieces(), kv, known.slots, known.price)
    budget = known.slots + BUDGET if known.prompts == "here" else max(ELSEWHERE, known.slots)
    return dict(zip(OF_POOL, values, strict=True)) | {"token_budget": budget}


def unfit_for_ratio(bundle: Bundle, fleet: Fleet, theta: float) -> str:
    """Why no A/F ratio can be asked of a bundle whose slots hold `theta` KV tokens on average; empty if one can."""
    if bundle.prompts == "here":
        return 'has prompts = "here", but an A/F ratio is one of decode; set prompts = "elsewhere"'
    if bundle.ffn_servers > fleet.most_ffn:
        more = f"ffn_servers = {bundle.ffn_servers}, more than fleet.most_ffn = {fleet.most_ffn}"
        return f"pools[0].bundle has {more}; raise most_ffn"
    batch = min(fleet.batches or (bundle.batch,))
    need = bundle.micro_batches * batch * theta
    if need <= bundle.kv_capacity:
        return ""
    return (
        f"pools[0].bundle has kv_capacity = {bundle.kv_capacity} tokens, but {bundle.micro_batches} micro-batches of "
        f"{batch} sequences hold {need:.0f} on average; lower batch or micro_batches, or raise kv_capacity"
    )


def _vector(piece: Piece) -> Floats:
    return np.array([getattr(piece, feature) for feature in FEATURES], dtype=float)
