"""The plain-Python core: the source of the compiled kernels, executed by the Python interpreter.

Rebinding the undecorated functions to each other gives a second core without a second program: it needs no compiler
and can be stepped through in a debugger. Requests and replicas are objects instead of records, arrays are lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import make_dataclass
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np

from llmopt.evaluate import (
    kernel_admit,
    kernel_ahead,
    kernel_belief,
    kernel_cache,
    kernel_glide,
    kernel_hold,
    kernel_lists,
    kernel_mix,
    kernel_queue,
    kernel_replan,
    kernel_route,
    kernel_step,
    kernel_table,
    kernel_types,
    kernel_victims,
)
from llmopt.evaluate.kernel import RESULTS, Core, collect
from llmopt.evaluate.kernel_route import Routing
from llmopt.evaluate.kernel_types import Table, World
from llmopt.evaluate.kernel_world import build_world
from llmopt.evaluate.rules import Rules, first_come
from llmopt.evaluate.run import SimRun
from llmopt.scenario import Pool
from llmopt.workload import Requests

MODULES = (
    kernel_types,
    kernel_lists,
    kernel_table,
    kernel_cache,
    kernel_belief,
    kernel_glide,
    kernel_ahead,
    kernel_hold,
    kernel_queue,
    kernel_admit,
    kernel_victims,
    kernel_mix,
    kernel_step,
    kernel_route,
    kernel_replan,
)


@cache
def plain() -> SimpleNamespace:
    """The kernels as ordinary Python functions that call each other."""
    space: dict[str, Any] = {}
    for module in MODULES:
        space |= vars(module)
    for name, value in list(space.items()):
        if hasattr(value, "py_func"):
            space[name] = FunctionType(value.py_func.__code__, space, name)
        elif isinstance(value, np.ndarray):
            space[name] = value.tolist()
    return SimpleNamespace(**space)


class PythonCore(Core):
    """As objects, played by the kernels as ordinary Python functions."""

    name = "python"

    def __init__(self, pools: Sequence[Pool], requests: Requests, rules: Rules | None = None) -> None:
        self.requests, self.kernels = requests, plain()
        self._tables = build_world(pools, requests, rules or first_come(requests))
        lists: Any = {name: array.tolist() for name, array in self._tables._asdict().items()}
        for name in ("reqs", "reps", "terms"):
            lists[name] = _objects(getattr(self._tables, name))
        self.world: Any = make_dataclass("PlainWorld", World._fields, slots=True)(**lists)
        self._classes, self._draws = requests.cls.tolist(), requests.u.tolist()
        self._routing: tuple[Routing, Any] | None = None

    def route(self, routing: Routing, first: int, last: int) -> int:
        """Play the arrivals of requests `first` to `last - 1`; returns -1, or one that its replica can never hold."""
        if self._routing is None or self._routing[0] is not routing:
            lists: Any = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in routing._asdict().items()}
            self._routing = routing, Routing(**lists)
        return int(self.kernels.run(self.world, self._classes, self._draws, self._routing[1], first, last))

    def look(self, time: float) -> list[tuple[int, int, int, int]]:
        """The state features of every replica at `time`, as in `STATE_FEATURES`."""
        for r in range(len(self.world.reps)):
            self.kernels.advance(self.world, r, time)
        return [self.kernels.observe(rep, time) for rep in self.world.reps]

    @property
    def stuck(self) -> int:
        """A request that was preempted too often, or -1."""
        return max(int(rep.stuck) for rep in self.world.reps)

    def result(self) -> SimRun:
        """The run so far."""
        for objects, table in ((self.world.reqs, self._tables.reqs), (self.world.reps, self._tables.reps)):
            for name in set(table.dtype.names or ()) & RESULTS:
                table[name] = [getattr(item, name) for item in objects]
        return collect(self.name, self.requests, self._tables.reqs, self._tables.reps)


def _objects(table: Table) -> list[Any]:
    """One object per record."""
    names = table.dtype.names or ()
    kind = make_dataclass("Record", names, slots=True)
    return list(map(kind, *(table[name].tolist() for name in names)))
