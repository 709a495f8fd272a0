"""The compiled loop of the bundle simulator: M micro-batches through L layers, for one number of workers.

In every step, layer and micro-batch m in this order, with T the time of each worker j in this step:

    start_j = max(free_j, ready_m),  done_j = start_j + T_mj,  free_j = done_j + send_a
    back = max(free_F, max_j done_j + hop) + ffn,  free_F = back + send_f,  ready_m = back + hop

The loads of a step are the same in all layers, so that what happens soon repeats itself, and the layers of a step are
not all played. The core, ready_m of all m and free_F, is a convex, increasing function F of the core and of free_j one
layer before. Let it have moved by the same d, each entry by its own, in three layers. While it goes on like that, l
layers later

    free_j = max{free_j + l S_j, max_m ready_m + R_mj + (l - 1) max(d_m, S_j)},  R_mj = sum_{i >= m} (T_ij + send_a),

where S_j = R_0j: worker j has not waited since, or last waited for micro-batch m in the first or the last layer, as all
that lies between is linear in the layer. Counted from the end of the first of the three layers, the right side is
convex in l >= 0: at l = 0 it is free_j itself, as free_j >= ready_m - d_m + R_mj after any layer. So the core one layer
further is convex in l. It agreed with a straight line in the second and the third layer; if it does so again after n
others, it did so in between, and all moved the core by d. A leap of n layers and one layer played, to see whether it
agrees, stand for n + 1 layers; if it does not, shorter leaps are tried. Agreement is up to rounding, and to keep that
small, times are counted from the start of each step.

One file of its own, because numba keeps compiled code on disk by the file it stands in. Unlike the other kernels this
one is compiled with its loops vectorised: the loops over the workers are all it does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np

from llmopt.arrays import Floats

F = TypeVar("F", bound=Callable[..., Any])
ALIKE = 3
"""Layers that must have moved the core alike before a leap."""
SHORTEST = 4
"""Layers of the shortest leap: a leap and its layer cost about as much as these."""
ROUNDING = 256 * 2.0**-52
"""Two moves are alike if they differ by less than this part of the time since the step began."""


class Times(NamedTuple):
    """Seconds of one layer: of Attention, shape (M, K, W); of an FFN server and a hop; spent on sending afterwards."""

    attention: Floats
    ffn: float
    hop: float
    send_a: float
    send_f: float


class State(NamedTuple):
    """When all are free, s. workers: free_j, shape (x,); core: ready_m of all m and free_F, shape (M + 1,)."""

    workers: Floats
    core: Floats


class Space(NamedTuple):
    """Arrays to work in, as to allocate them takes longer than a layer.

    saved: the state to go back to; move: d; before: the core before a layer; cycle: S_j; rest: R_mj of one m.
    """

    saved: State
    move: Floats
    before: Floats
    cycle: Floats
    rest: Floats


def compiled(function: F) -> F:
    """Compile with numba, cached on disk; a maximum may be taken in any order, as no time is NaN."""
    return cast(F, numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"nnan", "nsz"})(function))


@compiled
def play(times: Times, workers: int, layers: int, returned: Floats) -> None:
    """Play a bundle of `workers` workers, the first columns of the times, from an empty pipeline.

    returned, shape (M, K): seconds from the start until each micro-batch is back from the last layer of each step.
    """
    micro_batches, steps, _ = times.attention.shape
    core, free = np.zeros(micro_batches + 1), np.zeros(workers)
    state, saved = State(free, core), State(free.copy(), core.copy())
    space = Space(saved, core.copy(), core.copy(), free.copy(), free.copy())
    began = 0.0
    for k in range(steps):
        now = core[0]
        began += now
        core -= now
        free -= now
        play_step(times, k, layers, state, space)
        for m in range(micro_batches):
            returned[m, k] = began + core[m]


@compiled
def play_step(times: Times, k: int, layers: int, state: State, space: Space) -> None:
    """All layers of step k."""
    alike, left, farthest = 0, layers, layers
    while left > 0:
        leap = min(farthest, left - 1)
        if alike >= ALIKE and leap >= SHORTEST:
            farthest = leap // 2
            if leap_over(times, k, leap, state, space):
                left -= leap + 1
            continue
        space.before[:] = state.core
        play_layer(times, k, state)
        left -= 1
        if alike > 0 and moved_alike(state, space):
            alike += 1
        else:
            alike, farthest = 1, layers
        np.subtract(state.core, space.before, space.move)


@compiled
def play_layer(times: Times, k: int, state: State) -> None:
    """One layer of step k: the recurrence."""
    workers, core = state
    last = len(core) - 1
    for m in range(last):
        attention, ready, latest = times.attention[m, k], core[m], 0.0
        for j in range(len(workers)):
            done = max(workers[j], ready) + attention[j]
            workers[j] = done + times.send_a
            latest = max(latest, done)
        back = max(core[last], latest + times.hop) + times.ffn
        core[last] = back + times.send_f
        core[m] = back + times.hop


@compiled
def leap_over(times: Times, k: int, leap: int, state: State, space: Space) -> bool:
    """Leap over layers and play one; whether that moves the core as those before. If not, the state is as before."""
    space.saved.workers[:] = state.workers
    space.saved.core[:] = state.core
    foresee(times, k, leap, state, space)
    space.before[:] = state.core
    play_layer(times, k, state)
    if moved_alike(state, space):
        return True
    state.workers[:] = space.saved.workers
    state.core[:] = space.saved.core
    return False


@compiled
def foresee(times: Times, k: int, leap: int, state: State, space: Space) -> None:
    """The state `leap` layers later, if every layer moves the core by `space.move`: the formula for free_j above."""
    workers, core = state
    move, cycle, rest = space.move, space.cycle, space.rest
    cycle[:] = 0.0
    for m in range(len(core) - 1):
        attention = times.attention[m, k]
        for j in range(len(workers)):
            cycle[j] += attention[j] + times.send_a
    for j in range(len(workers)):
        workers[j] += leap * cycle[j]
        rest[j] = 0.0
    for m in range(len(core) - 2, -1, -1):
        attention, ready, pace = times.attention[m, k], core[m], move[m]
        for j in range(len(workers)):
            rest[j] += attention[j] + times.send_a
            workers[j] = max(workers[j], ready + rest[j] + (leap - 1) * max(pace, cycle[j]))
    for i in range(len(core)):
        core[i] += leap * move[i]


@compiled
def moved_alike(state: State, space: Space) -> bool:
    """Whether every entry of the core has moved by `space.move` since `space.before`, up to rounding."""
    worst = 0.0
    for i in range(len(state.core)):
        worst = max(worst, abs(state.core[i] - space.before[i] - space.move[i]))
    return bool(worst <= ROUNDING * state.core[-1])


@cache
def plain() -> Callable[..., None]:
    """The same `play` as an ordinary Python function that calls ordinary Python functions."""
    space = dict(globals())
    for name, value in globals().items():
        if hasattr(value, "py_func"):
            space[name] = FunctionType(value.py_func.__code__, space, name)
    return cast(Callable[..., None], space["play"])
