"""Measured transfers between GPUs: all-reduce and send/receive by bytes, and links out of hardware.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.arrays import Floats
from llmopt.errors import ScenarioError
from llmopt.profiles.data import Curve, Link
from llmopt.profiles.files import need, read_rows, sizes, times

SAMPLES = "measured.interconnect.samples"
MILLI, MICRO, NANO, GIBI = 1e-3, 1e-6, 1e-9, 2.0**30


def rising(size: Floats, seconds: Floats) -> Curve:
    """A curve that never falls: medians of repeated sizes, then the nearest increasing sequence (least squares).

    Small transfers are noise: below 64 KiB the published all-reduce of two A100 takes 7 to 60 us, in no order.
    """
    import pandas as pd
    from scipy.optimize import isotonic_regression

    medians = pd.Series(seconds).groupby(size).median()
    return Curve(medians.index.to_numpy(dtype=float), np.asarray(isotonic_regression(medians.to_numpy()).x))


def read_network(path: Path, collective: str, workers: int) -> Curve | None:
    """Seconds by bytes among `workers` GPUs of one node from Vidur's network files; nothing if not measured.

    The column `size` is bytes: taken as half-precision numbers, 8 H100 would all-reduce 64 MiB at 730 GB/s over NVLink,
    which moves 450 GB/s a direction; Vidur's predictor divides by two bytes per number too.
    """
    rows = read_rows(path)
    column = f"time_stats.{collective}.median"
    need(rows, ["num_workers", "devices_per_node", "size", column])
    inside = sizes(rows, "devices_per_node", 1) == sizes(rows, "num_workers", 1)
    rows = rows.take(inside & (sizes(rows, "num_workers", 1) == workers))
    if len(rows.line) == 0:
        return None
    return rising(sizes(rows, "size", 1), times(rows, column) * MILLI)


@dataclass(frozen=True)
class Hardware:
    """What a hardware.yaml of LLMServingSim's profiler says: what was measured, if anything, among how many GPUs.

    exchange: an all-gather and a reduce-scatter by bytes of one GPU, the input of the first and output of the other.
    """

    all_reduce: Curve | None
    exchange: Curve | None
    gpus: int
    link: Link | None


def read_hardware(path: Path) -> Hardware:
    """The interconnect in a hardware.yaml: `measured.interconnect.samples` and `defaults`.

    Raises
    ------
    ScenarioError
        If it is no YAML, or its samples are no times.
    """
    data = _yaml(path)
    wire = _table(_table(data.get("measured")).get("interconnect"))
    try:
        gpus = int(wire.get("npus") or 0)
    except (TypeError, ValueError):
        raise ScenarioError(f"{path}: {SAMPLES.removesuffix('samples')}npus is no number; correct it") from None
    gather, scatter = (_measured(path, wire, name) for name in ("all_gather", "reduce_scatter"))
    exchange = None
    if gather is not None and scatter is not None:
        knots = np.unique(np.concatenate([gather.at, scatter.at]))
        exchange = Curve(knots, gather(knots) + scatter(knots))
    return Hardware(_measured(path, wire, "all_reduce"), exchange, gpus, _link(path, _table(data.get("defaults"))))


def _measured(path: Path, wire: dict[str, Any], collective: str) -> Curve | None:
    """Seconds of a collective by the bytes of its samples."""
    samples = wire.get("samples")
    chosen = [s for s in samples if _is_of(s, collective)] if isinstance(samples, list) else []
    try:
        pairs = np.array([[float(s["bytes"]), float(s["us"]) * MICRO] for s in chosen]).reshape(-1, 2)
    except (KeyError, TypeError, ValueError):
        raise ScenarioError(f"{path}: {SAMPLES} holds no pairs of bytes and us; correct it") from None
    if not (np.isfinite(pairs) & (pairs > 0)).all():
        raise ScenarioError(f"{path}: {SAMPLES} holds a time that is not positive; measure it again")
    return rising(pairs[:, 0], pairs[:, 1]) if len(pairs) else None


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        return _table(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ScenarioError(f"{path}: is not valid YAML; correct it or take it out") from None
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_of(sample: Any, collective: str) -> bool:
    return isinstance(sample, dict) and str(sample.get("collective", "all_reduce")) == collective


def _link(path: Path, defaults: dict[str, Any]) -> Link | None:
    """GiB/s and nanoseconds, the all-reduce's own where given."""
    own = _table(_table(defaults.get("collective_links")).get("all_reduce"))
    bandwidth = _number(own.get("link_bw", defaults.get("link_bw")))
    latency = _number(own.get("link_latency", defaults.get("link_latency")))
    if not bandwidth:
        return None
    return Link(bandwidth * GIBI, (latency or 0.0) * NANO, path.name)


def _number(entry: Any) -> float | None:
    value = entry.get("value") if isinstance(entry, dict) else entry
    return float(value) if isinstance(value, int | float) and value > 0 else None


def ring(size: Floats, gpus: int, link: Link) -> Floats:
    """Seconds (n,) of an all-reduce of `size` (n,) bytes as a ring: 2 (g - 1) rounds, each moves a g-th of the bytes.

    Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, J. Parallel Distrib. Comput. 69 (2009); the same
    formula fits the latency and bandwidth in LLMServingSim's hardware.yaml.
    """
    return np.asarray(2.0 * (gpus - 1) * (link.latency + size / gpus / link.bandwidth))
