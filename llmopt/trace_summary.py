"""What a trace looks like: counts, rate, burstiness, lengths, prefix sharing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.slots import slot_load_of
from llmopt.trace_data import Prefixes, Trace

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
WINDOWS = (1.0, 10.0, 60.0)


@dataclass(frozen=True)
class Spread:
    """Distribution of one quantity: mean, coefficient of variation, extremes, quantiles ``p10`` to ``p99``."""

    mean: float
    cv: float
    min: float
    max: float
    quantiles: Mapping[str, float]

    @classmethod
    def of(cls, values: Floats | Ints) -> Spread:
        """Over all `values`; NaN throughout if there are none."""
        if not len(values):
            return cls(np.nan, np.nan, np.nan, np.nan, {f"p{100 * q:g}": np.nan for q in QUANTILES})
        mean = float(values.mean())
        quantiles = np.quantile(values, QUANTILES).tolist()
        return cls(
            mean=mean,
            cv=float(values.std() / mean) if mean else np.nan,
            min=float(values.min()),
            max=float(values.max()),
            quantiles={f"p{100 * q:g}": x for q, x in zip(QUANTILES, quantiles, strict=True)},
        )


@dataclass(frozen=True)
class TraceSummary:
    """Statistics of a trace; times in seconds, rates in requests/s, NaN where the trace has no times.

    rate: requests less one over the span; gaps: times between arrivals; burstiness: (cv - 1) / (cv + 1) of the gaps,
    -1 for a clock, 0 for Poisson (Goh and Barabasi 2008); dispersion: variance over mean of the counts in windows
    of so many seconds, 1 for Poisson; peak_rate: largest rate over 60 s; correlation: of prompt and output lengths,
    Pearson's; rank_correlation: Spearman's; prefix_blocks: KV blocks of all prompts; prefix_hits: share of them that
    an infinite cache would hold already, NaN without hashes. slot_load, slot_deviation: mean and standard deviation of
    the KV tokens in an always occupied batch slot, a step for each output token (`llmopt.slots`); slot_error: standard
    error of that mean.
    """

    format: str
    requests: int
    skipped: int
    reordered: int
    span: float
    rate: float
    peak_rate: float
    gaps: Spread
    burstiness: float
    dispersion: Mapping[str, float]
    prompt: Spread
    output: Spread
    correlation: float
    rank_correlation: float
    prefix_blocks: int
    prefix_hits: float
    slot_load: float
    slot_deviation: float
    slot_error: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def trace_summary(trace: Trace) -> TraceSummary:
    """Statistics of a trace, see `TraceSummary`."""
    timed = trace.timed and len(trace) > 1
    arrival = trace.arrival if timed else np.zeros(0)
    span = float(arrival[-1]) if timed else np.nan
    gaps = Spread.of(np.diff(arrival))
    slot = slot_load_of(trace.prompt, trace.output, ordered=timed)
    return TraceSummary(
        format=trace.format,
        requests=len(trace),
        skipped=len(trace.skipped),
        reordered=trace.reordered,
        span=span,
        rate=(len(trace) - 1) / span if span > 0 else np.nan,
        peak_rate=_peak_rate(arrival),
        gaps=gaps,
        burstiness=(gaps.cv - 1) / (gaps.cv + 1),
        dispersion={f"{w:g} s": _dispersion(arrival, w) for w in WINDOWS},
        prompt=Spread.of(trace.prompt),
        output=Spread.of(trace.output),
        correlation=_correlation(trace.prompt, trace.output),
        rank_correlation=_correlation(_ranks(trace.prompt), _ranks(trace.output)),
        prefix_blocks=len(trace.prefixes.ids) if trace.prefixes else 0,
        prefix_hits=_hits(trace.prefixes),
        slot_load=slot.theta,
        slot_deviation=slot.deviation,
        slot_error=slot.error,
    )


def window_counts(arrival: Floats, window: float) -> Ints:
    """Arrivals in each whole window of `window` seconds, shape (n_windows,)."""
    n = int(arrival[-1] // window) if len(arrival) else 0
    index = (arrival // window).astype(np.int64)
    return np.asarray(np.bincount(index[index < n], minlength=n), dtype=np.int64)


def _dispersion(arrival: Floats, window: float) -> float:
    counts = window_counts(arrival, window)
    return float(counts.var() / counts.mean()) if len(counts) > 1 and counts.any() else np.nan


def _peak_rate(arrival: Floats, window: float = 60.0) -> float:
    """Over every interval of `window` seconds that starts at an arrival."""
    if not len(arrival) or arrival[-1] < window:
        return np.nan
    first = arrival[arrival <= arrival[-1] - window]
    return float((np.searchsorted(arrival, first + window) - np.arange(len(first))).max() / window)


def _correlation(x: Floats | Ints, y: Floats | Ints) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 and x.std() > 0 and y.std() > 0 else np.nan


def _ranks(values: Ints) -> Floats:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values), dtype=float)


def _hits(prefixes: Prefixes | None) -> float:
    """A block is a hit if any request before it, or an earlier block of its own, has the same hash."""
    if prefixes is None or not len(prefixes.ids):
        return np.nan
    return 1 - len(np.unique(prefixes.ids)) / len(prefixes.ids)
