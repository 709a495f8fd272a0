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
    kernel_ahead,
    kernel_cache,
    kernel_glide,
    kernel_lists,
    kernel_route,
    kernel_step,
    kernel_table,
    kernel_types,
)
from llmopt.evaluate.kernel import RESULTS, collect
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
    kernel_glide,
    kernel_ahead,
    kernel_step,
    kernel_route,
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


class PythonCore:
    """All replicas and requests of one run, as objects."""

    name = "python"

    def __init__(self, pools: Sequence[Pool], requests: Requests, rules: Rules | None = None) -> None:
        self.requests = requests
        self._tables = build_world(pools, requests, rules or first_come(requests))
        plain: Any = {name: array.tolist() for name, array in self._tables._asdict().items()}
        plain["reqs"] = self._reqs = _objects(self._tables.reqs)
        plain["reps"] = self._reps = _objects(self._tables.reps)
        self.world: Any = make_dataclass("PlainWorld", World._fields, slots=True)(**plain)

    def run(self, routing: Routing) -> int:
        """Play all requests; returns -1, or the number of a request that its replica can never hold."""
        lists: Any = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in routing._asdict().items()}
        return int(plain().run(self.world, self.requests.cls.tolist(), self.requests.u.tolist(), Routing(**lists)))

    def look(self, time: float) -> list[tuple[int, int, int, int]]:
        """The state features of every replica at `time`, as in `STATE_FEATURES`."""
        kernels = plain()
        for r in range(len(self.world.reps)):
            kernels.advance(self.world, r, time)
        return [kernels.observe(rep, time) for rep in self.world.reps]

    def arrive(self, r: int, i: int, time: float) -> None:
        """Hand request `i` to replica `r`, which has been looked at at `time`."""
        plain().arrive(self.world, r, i, time)

    def drain(self) -> None:
        """Play what is in the replicas to its end."""
        plain().drain(self.world)

    def result(self) -> SimRun:
        """The run so far."""
        for objects, table in ((self._reqs, self._tables.reqs), (self._reps, self._tables.reps)):
            for name in set(table.dtype.names or ()) & RESULTS:
                table[name] = [getattr(item, name) for item in objects]
        return collect(self.name, self.requests, self._tables.reqs, self._tables.reps)


def _objects(table: Table) -> list[Any]:
    """One object per record."""
    names = table.dtype.names or ()
    kind = make_dataclass("Record", names, slots=True)
    return list(map(kind, *(table[name].tolist() for name in names)))
