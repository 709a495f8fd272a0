"""Calibration from measured operator tables: compose them, fit where the engine works, hold against physics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmopt.arrays import Floats
from llmopt.calibrate.fit import DEFAULT_FIT, FitOptions, fit_step_time
from llmopt.calibrate.regions import KINDS, error_table, kind_of
from llmopt.calibrate.result import DIGITS, Calibration, Caps, Machine, Points, memory, physics, rounded
from llmopt.calibrate.sample import beyond, sample_steps
from llmopt.errors import ScenarioError
from llmopt.hardware import StepTime
from llmopt.machines import model_shape
from llmopt.machines.physics import Steps, probe
from llmopt.profiles import compose, read_profile

if TYPE_CHECKING:
    import pandas as pd

    from llmopt.calibrate.fit import Fit

COUNT = 1024
"""Steps that are fitted: twice as many change the errors by less than a tenth of them."""


def calibrate_profile(
    paths: Sequence[str | Path],
    *,
    accelerator: str = "",
    model: str = "",
    tensor_parallel: int | None = None,
    precision: str = "",
    max_batch: int = 256,
    token_budget: int = 2048,
    kv_capacity: int | None = None,
    decode_pieces: int = 1,
    mixed_pieces: int = 2,
    host_overhead: float = 0.0,
    allow_unphysical: bool = False,
    count: int = COUNT,
    options: FitOptions = DEFAULT_FIT,
) -> Calibration:
    """The max-affine step time that follows a profile in the steps which an engine with these limits has.

    Parameters
    ----------
    paths
        Files and folders with one profile, or with several that the next four tell apart.
    accelerator, model, tensor_parallel, precision
        Which profile; what is not given must be unique in the files.
    max_batch, token_budget, kv_capacity
        Limits of the engine, as of a pool; the KV capacity by the rule of `llmopt.machines` if absent.
    decode_pieces, mixed_pieces, options
        As of `fit_step_time`.
    host_overhead
        Seconds of a step besides its kernels, passed on to the catalog entry.
    allow_unphysical
        Note instead of refusing what peak arithmetic and bandwidth do not allow.
    count
        Number of sampled steps.

    Raises
    ------
    ScenarioError
        In one sentence, if the profile cannot be read or composed, or is impossible.
    """
    if not 0 <= host_overhead <= 1:
        raise ScenarioError(f"host_overhead = {host_overhead:g} s is not 0 to 1 s; give seconds")
    profile = read_profile(
        *paths, accelerator=accelerator, model=model, tensor_parallel=tensor_parallel, precision=precision
    )
    machine = Machine.named(profile.accelerator, profile.model, profile.tensor_parallel, profile.precision)
    table = compose(profile, model_shape(profile.model), machine.chip, precision=precision)
    room, why = memory(machine, max_batch, token_budget, kv_capacity)
    caps = Caps(max_batch, token_budget, room)
    features, weights = sample_steps(table, caps, count=count)
    fit = fit_step_time(
        features,
        table.many(features),
        decode_pieces=decode_pieces,
        mixed_pieces=mixed_pieces,
        weights=weights,
        options=options,
    )
    pieces = rounded(fit.pieces)
    step_time = StepTime.from_pieces(pieces)
    predicted = step_time.many(features)
    errors = error_table(features, fit.seconds, predicted, token_budget)
    met = np.concatenate([features, probe(caps.token_budget, caps.max_batch, caps.kv_capacity)])
    claims: dict[str, tuple[Steps, Floats]] = {
        "the profile": (table, met[table.covers(met)]),
        "the fit": (step_time, met),
    }
    return Calibration(
        machine=machine,
        caps=caps,
        pieces=pieces,
        errors=errors,
        points=Points(fit.seconds, predicted, kind_of(features, token_budget), KINDS, "step time"),
        summary=summary(errors),
        kind="fitted to measured kernel times",
        source=table.source,
        method=_method(fit, caps),
        physics=tuple(physics(machine, claims, allow_unphysical)),
        notes=(*beyond(table, caps), *table.notes),
        path=fit.path,
        host_overhead=host_overhead,
        constants={"kv_capacity": (room, why)},
    )


def summary(errors: pd.DataFrame) -> str:
    """The errors in one line: all steps, then each kind."""
    parts = []
    for kind in ("all", *KINDS):
        rows = errors[(errors["kind"] == kind) & (errors["batch"] == "all")]
        for _, row in rows.iterrows():
            name = "all steps" if kind == "all" else kind
            parts.append(
                f"{name}: median {row['median']:.1%}, 95 % within {row['p95']:.1%}, largest {row['largest']:.0%}"
            )
    return "; ".join(parts)


def _method(fit: Fit, caps: Caps) -> str:
    return (
        f"least mean relative error ({fit.error:.2%}) at {len(fit.seconds):,} steps of an engine with max_batch "
        f"{caps.max_batch}, token_budget {caps.token_budget} and kv_capacity {caps.kv_capacity}, to {DIGITS} digits"
    )
