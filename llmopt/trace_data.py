"""A request trace in memory: arrival times and lengths, what was skipped, and prefix hashes if the file has them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from llmopt.arrays import Floats, Ints


class Skipped(NamedTuple):
    """A row of a trace file that is no request: its line number (or row or entry, see `Trace.unit`) and why."""

    line: int
    reason: str


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Hashes of the prompts' KV blocks; equal leading hashes mean a shared prefix.

    Request i has the hashes `ids[start[i]:start[i + 1]]`; a block holds `block` tokens.
    """

    ids: Ints
    start: Ints
    block: int

    def of(self, i: int) -> Ints:
        """Hashes of request `i`."""
        return self.ids[self.start[i] : self.start[i + 1]]

    def take(self, order: Ints) -> Prefixes:
        """The prefixes of the requests `order`, in that order."""
        counts = np.diff(self.start)[order]
        start = np.concatenate([[0], np.cumsum(counts)])
        index = np.repeat(self.start[:-1][order] - start[:-1], counts) + np.arange(start[-1])
        return Prefixes(self.ids[index], start, self.block)


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests of a trace file in order of arrival; every array has shape (n_requests,).

    arrival: seconds from the first request, zero throughout if the file has no times (`timed` is false then);
    prompt, output: tokens; line: where each request stands in the file, counted in `unit`s from 1; skipped: rows
    that are no requests; reordered: requests that arrived before the one above them in the file; format: the layout
    that was recognised; path: the file.
    """

    arrival: Floats
    prompt: Ints
    output: Ints
    line: Ints
    format: str
    path: str
    unit: str = "line"
    timed: bool = True
    skipped: tuple[Skipped, ...] = ()
    reordered: int = 0
    prefixes: Prefixes | None = None

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.prompt)

    def take(self, order: Ints) -> Trace:
        """The requests `order`, in that order; times are kept."""
        return replace(
            self,
            arrival=self.arrival[order],
            prompt=self.prompt[order],
            output=self.output[order],
            line=self.line[order],
            prefixes=self.prefixes and self.prefixes.take(order),
        )

    def stretched(self, scale: float) -> Trace:
        """The requests at `scale` times their distance from the first."""
        return replace(self, arrival=(self.arrival - self.arrival[0]) * scale)
