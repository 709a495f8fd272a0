"""The saturated bundle simulator: every number of Attention workers, played on one load series.

All slots of all micro-batches are always full; what varies from step to step is how many KV tokens they hold, and the
fullest worker of a micro-batch decides when it goes on. Semantics of a pipeline: `bundle_kernel`, and for "ideal"
a cycle that lasts max{max_j A_j, C, F} (section 4.2 of the notes on Song et al., arXiv 2601.21351).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple

import numpy as np

from llmopt.arrays import Floats
from llmopt.bundle import Bundle
from llmopt.errors import ScenarioError
from llmopt.evaluate.bundle_load import load_series
from llmopt.scenario import Scenario


@dataclass(frozen=True)
class BundleRun:
    """A simulated bundle with 1..W Attention workers; entry x - 1 of every array of shape (W,) is that of x workers.

    bundle: as simulated, its own number of workers ignored; servers: FFN servers y; steps: K, token steps of every
    micro-batch. makespan: from the start of an empty pipeline until the last micro-batch is back from its last step, s.
    throughput: tokens/s per instance, of which there are x + y. per_weight: tokens/s per unit of weight, x w_A + y w_F,
    with `Bundle.weights`: the objective. idle_attention, idle_ffn: shares of the makespan in which the mean worker or
    server does not compute; sending is not computing. tpot, tpot_p99: mean and 99th percentile of the seconds between a
    slot's consecutive tokens, over all slots and steps, the first token counted from the start; a token is there when
    its micro-batch is back from the last layer, and all slots of a micro-batch get theirs together.
    """

    bundle: Bundle
    servers: int
    steps: int
    makespan: Floats
    throughput: Floats
    per_weight: Floats
    idle_attention: Floats
    idle_ffn: Floats
    tpot: Floats
    tpot_p99: Floats

    @property
    def best(self) -> int:
        """The number of workers of largest throughput per unit of weight, the smallest among equals."""
        return int(np.argmax(self.per_weight)) + 1


class Stages(NamedTuple):
    """Seconds of one layer for 1..W workers.

    attention, shape (M, K, W): of each worker; ffn, hop, shape (W,): of an FFN server and a hop; send_attention,
    send_ffn, shape (W,): for how long a device is occupied after it has computed.
    """

    attention: Floats
    ffn: Floats
    hop: Floats
    send_attention: Floats
    send_ffn: Floats


def simulate_bundle(
    scenario: Scenario, seed: int, bundle: Bundle | None = None, workers: int | None = None
) -> BundleRun:
    """Simulate the scenario's bundle, or another, with 1..`workers` Attention workers under its workload.

    Each micro-batch of a worker finishes `evaluation.requests` requests on average, in ceil(requests E[D] / B) steps.

    Parameters
    ----------
    seed
        Of the sampled lengths; the same seed gives the same bytes, and a worker the same load whatever `workers` is.
    workers
        `fleet.most_attention` if absent, or the bundle's own if that is more.

    Raises
    ------
    ScenarioError
        If the A/F ratio is not the scenario's open decision, workers is not positive, or the series would not fit into
        memory.
    """
    bundle = bundle or scenario.bundle
    workers = max(scenario.fleet.most_attention, bundle.attention_workers) if workers is None else workers
    evaluation, workload = scenario.evaluation, scenario.workload
    steps = ceil(evaluation.requests * scenario.slot_load.mean_decode / bundle.batch)
    first_step = scenario.pools[0].first_step
    series = load_series(workload.classes, workload.rates, first_step, bundle, workers, steps, seed, evaluation.start)
    return play_bundle(bundle, series, bundle.ffn_servers)


def play_bundle(
    bundle: Bundle, series: Floats, servers: int = 1, core: Literal["compiled", "python"] = "compiled"
) -> BundleRun:
    """Play every number of workers x = 1..W on a load series, with `servers` FFN servers in each bundle.

    Parameters
    ----------
    series
        KV tokens of each worker's micro-batches, shape (M, K, W), as from `load_series`. An ideal pipeline takes any M:
        its cycles are those of all series.
    core
        ``compiled`` by numba, or ``python``: the same loop in the interpreter.

    Raises
    ------
    ScenarioError
        If the series is empty, or has not one part for each micro-batch of a pipeline that is not ideal.
    """
    stages = stage_times(bundle, series, servers)
    played = _ideal(bundle, stages) if bundle.pipeline == "ideal" else _pipeline(bundle, stages, core)
    return _summary(bundle, stages, servers, *played)


def stage_times(bundle: Bundle, series: Floats, servers: int = 1) -> Stages:
    """Times of all stages on a load series, as in `play_bundle`, which says what is refused."""
    series = np.asarray(series, dtype=float)
    if series.ndim != 3 or 0 in series.shape:
        raise ScenarioError(f"a load series of shape {series.shape} cannot be played; give (M, K, W) loads")
    if bundle.pipeline != "ideal" and len(series) != bundle.micro_batches:
        raise ScenarioError(
            f"a load series of {len(series)} micro-batches does not fit a bundle with micro_batches = "
            f"{bundle.micro_batches}; give one part for each"
        )
    ratios = [x / servers for x in range(1, series.shape[2] + 1)]
    hop = np.array([bundle.transfer_time(r) for r in ratios])
    return Stages(
        np.stack([bundle.attention_time(part) for part in series]),
        np.array([bundle.ffn_time(r) for r in ratios]),
        hop,
        hop if bundle.pipeline in ("attention-blocking", "blocking") else np.zeros(len(hop)),
        hop if bundle.pipeline == "blocking" else np.zeros(len(hop)),
    )


def _ideal(bundle: Bundle, stages: Stages) -> tuple[Floats, Floats, Floats]:
    """Makespan, mean and 99th percentile of the time per token, shape (W,), where cycles last their slowest stage."""
    workers = len(stages.ffn)
    cycles = np.maximum.accumulate(stages.attention, axis=2).reshape(-1, workers)
    np.maximum(cycles, np.maximum(stages.ffn, stages.hop), out=cycles)
    rounds = bundle.micro_batches * bundle.layers
    makespan = bundle.layers * cycles.sum(axis=0)
    return makespan, rounds * cycles.mean(axis=0), rounds * np.quantile(cycles, 0.99, axis=0)


def _pipeline(bundle: Bundle, stages: Stages, core: str) -> tuple[Floats, Floats, Floats]:
    """The same where M micro-batches are played through the pipeline."""
    from llmopt.evaluate.bundle_kernel import Times, plain, play

    kernel: Callable[..., None] = plain() if core == "python" else play
    micro_batches, steps, workers = stages.attention.shape
    returned, found = np.empty((micro_batches, steps)), np.empty((3, workers))
    for x in range(1, workers + 1):
        times = Times(stages.attention, *(float(stage[x - 1]) for stage in stages[1:]))
        kernel(times, x, bundle.layers, returned)
        gaps = np.diff(returned, axis=1, prepend=0.0)
        found[:, x - 1] = returned[:, -1].max(), gaps.mean(), np.quantile(gaps, 0.99)
    return found[0], found[1], found[2]


def _summary(
    bundle: Bundle, stages: Stages, servers: int, makespan: Floats, tpot: Floats, tpot_p99: Floats
) -> BundleRun:
    micro_batches, steps, _ = stages.attention.shape
    x = np.arange(1, len(makespan) + 1)
    rate = micro_batches * steps * bundle.batch * x / makespan
    attention = bundle.layers * np.cumsum(stages.attention.sum(axis=(0, 1))) / x
    ffn = bundle.layers * micro_batches * steps * stages.ffn
    w_a, w_f = bundle.weights
    return BundleRun(
        bundle=bundle,
        servers=servers,
        steps=steps,
        makespan=makespan,
        throughput=rate / (x + servers),
        per_weight=rate / (x * w_a + servers * w_f),
        idle_attention=1 - attention / makespan,
        idle_ffn=1 - ffn / makespan,
        tpot=tpot,
        tpot_p99=tpot_p99,
    )
