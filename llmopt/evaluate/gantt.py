"""Who did what when in a simulated bundle: the bars of some cycles, for a picture.

The same recurrence as `bundle_kernel.play`, for one number of workers, with every bar kept instead of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from llmopt.arrays import Floats
from llmopt.bundle import Bundle
from llmopt.errors import ScenarioError
from llmopt.evaluate.bundle_run import Stages, stage_times

Role = Literal["attention", "transfer", "ffn"]


@dataclass(frozen=True)
class Bar:
    """Something that lasts from `start` to `end`, s since the start of the run.

    role: attention, computing on worker `index`; ffn, computing on the servers, which all do the same (index 0);
    transfer, the hop that ends last of a micro-batch's, to the FFN servers (index 0) or back (index 1). micro_batch, in
    token step `step` and layer `layer`, all from 0. waited: s for which the device could have started and had nothing
    to do; 0 for a transfer. A device that sends and may not compute meanwhile does not wait.
    """

    role: Role
    index: int
    micro_batch: int
    step: int
    layer: int
    start: float
    end: float
    waited: float = 0.0


def bars(bundle: Bundle, series: Floats, workers: int, servers: int, first: int, cycles: int) -> list[Bar]:
    """Bars of `cycles` cycles from cycle `first` on, in which one micro-batch each passes one layer.

    Cycles are numbered as they are played: token step by token step, in a step layer by layer, in a layer micro-batch
    by micro-batch. In an ideal pipeline a cycle is a span of time, at whose start every stage begins, each with another
    micro-batch; it is not said which, and every bar bears the cycle's own.

    Parameters
    ----------
    series
        KV tokens of each worker's micro-batches, shape (M, K, W), W >= workers.
    first, cycles
        From 0; the window ends with the series.

    Raises
    ------
    ScenarioError
        If the series does not fit the bundle, has too few workers, or ends before the window begins.
    """
    if not 1 <= workers <= np.shape(series)[-1]:
        raise ScenarioError(
            f"a load series of shape {np.shape(series)} has no {workers} workers; simulate more of them"
        )
    stages = stage_times(bundle, np.asarray(series)[:, :, :workers], servers)
    total = stages.attention.shape[0] * stages.attention.shape[1] * bundle.layers
    if not 0 <= first < total or cycles < 1:
        raise ScenarioError(
            f"{cycles} cycles from cycle {first} on are not among the {total} of the series; give 0 <= first < {total} "
            "and at least 1 cycle"
        )
    play = _ideal if bundle.pipeline == "ideal" else _pipeline
    return [bar for cycle in islice(play(bundle, stages, first), cycles) for bar in cycle]


def _turns(bundle: Bundle, stages: Stages) -> Iterator[tuple[int, int, int]]:
    """Step, layer and micro-batch of every cycle."""
    micro_batches, steps, _ = stages.attention.shape
    return ((k, layer, m) for k in range(steps) for layer in range(bundle.layers) for m in range(micro_batches))


def _pipeline(bundle: Bundle, stages: Stages, first: int) -> Iterator[list[Bar]]:
    ffn, hop, send_a, send_f = (float(stage[-1]) for stage in stages[1:])
    free, free_f = np.zeros(stages.attention.shape[2]), 0.0
    ready = [0.0] * len(stages.attention)
    for cycle, (k, layer, m) in enumerate(_turns(bundle, stages)):
        start = np.maximum(free, ready[m])
        done = start + stages.attention[m, k]
        sent = float(done.max())
        start_f = max(free_f, sent + hop)
        done_f = start_f + ffn
        if cycle >= first:
            yield [
                *_of_workers((m, k, layer), start, done, start - free),
                Bar("transfer", 0, m, k, layer, sent, sent + hop),
                Bar("ffn", 0, m, k, layer, start_f, done_f, start_f - free_f),
                Bar("transfer", 1, m, k, layer, done_f, done_f + hop),
            ]
        free, free_f, ready[m] = done + send_a, done_f + send_f, done_f + hop


def _ideal(bundle: Bundle, stages: Stages, first: int) -> Iterator[list[Bar]]:
    ffn, hop = float(stages.ffn[-1]), float(stages.hop[-1])
    start, free, free_f = 0.0, np.zeros(stages.attention.shape[2]), 0.0
    for cycle, (k, layer, m) in enumerate(_turns(bundle, stages)):
        done = start + stages.attention[m, k]
        where = (m if len(stages.attention) > 1 else cycle % bundle.micro_batches, k, layer)
        if cycle >= first:
            yield [
                *_of_workers(where, np.full(len(done), start), done, start - free),
                Bar("transfer", 0, *where, start, start + hop),
                Bar("ffn", 0, *where, start, start + ffn, start - free_f),
            ]
        free, free_f, start = done, start + ffn, max(float(done.max()), start + ffn, start + hop)


def _of_workers(where: tuple[int, int, int], start: Floats, done: Floats, waited: Floats) -> Iterator[Bar]:
    for j, (begin, end, idle) in enumerate(zip(start.tolist(), done.tolist(), waited.tolist(), strict=True)):
        yield Bar("attention", j, *where, begin, end, idle)
