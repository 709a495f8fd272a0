"""Calibration from measured operator tables: compose them, fit where the engine works, hold against physics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from llmopt.scenario import Pool

if TYPE_CHECKING:
    import pandas as pd

    from llmopt.calibrate.fit import Fit
    from llmopt.steptable import StepTable

Load = Callable[[Pool], tuple[Floats, Floats]]
"""From a replica, the steps (n, 4) that a load makes of it, and the seconds that each stands for (n,)."""
LOAD, LOAD_SHARE = "the load", 0.8
"""Name of these steps, and their part of the weight: with half of it, the fit may still miss the rate that a load can
reach by more than a tenth; with all of it, nothing holds elsewhere."""
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
    load: Load | None = None,
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
    load
        What the engine is for, see `Load`; its steps then have `LOAD_SHARE` of the weight.
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
    sampled, weights = sample_steps(table, caps, count=count)
    numbers: dict[str, Any] = {"decode_pieces": decode_pieces, "mixed_pieces": mixed_pieces, "options": options}
    fit = fit_step_time(sampled, table.many(sampled), weights=weights, **numbers)
    if load is not None:
        met, stands_for = load(_replica(table, caps, fit, host_overhead))
        weights = np.concatenate([(1.0 - LOAD_SHARE) * weights, LOAD_SHARE * stands_for / stands_for.sum()])
        steps = np.concatenate([sampled, met])
        fit = fit_step_time(steps, table.many(steps), weights=weights, **numbers)
    step_time = StepTime.from_pieces(rounded(fit.pieces))
    errors, points = _judged(fit, step_time, len(sampled), token_budget)
    probed = np.concatenate([fit.features, probe(caps.token_budget, caps.max_batch, caps.kv_capacity)])
    claims: dict[str, tuple[Steps, Floats]] = {
        "the profile": (table, probed[table.covers(probed)]),
        "the fit": (step_time, probed),
    }
    return Calibration(
        machine=machine,
        caps=caps,
        pieces=rounded(fit.pieces),
        errors=errors,
        points=points,
        summary=summary(errors),
        kind="fitted to measured kernel times",
        source=table.source,
        method=_method(fit, caps, len(sampled)),
        physics=tuple(physics(machine, claims, allow_unphysical)),
        notes=(*beyond(table, caps), *table.notes),
        path=fit.path,
        host_overhead=host_overhead,
        constants={"kv_capacity": (room, why)},
    )


def _replica(table: StepTable, caps: Caps, fit: Fit, host_overhead: float) -> Pool:
    """One replica that is played with the table, with the engine settings that vLLM has by default."""
    return Pool(
        name="replica",
        replicas=1,
        step_time=fit.pieces,
        table=table,
        host_overhead=host_overhead,
        async_scheduling=True,
        prefix_caching=True,
        **vars(caps),
    )


def _judged(fit: Fit, step_time: StepTime, sampled: int, token_budget: int) -> tuple[pd.DataFrame, Points]:
    """Errors by region of the first `sampled` steps, and of the load's steps that follow them, if there are any."""
    import pandas as pd

    features, measured, predicted = fit.features, fit.seconds, step_time.many(fit.features)
    errors = error_table(features[:sampled], measured[:sampled], predicted[:sampled], token_budget)
    kind = kind_of(features, token_budget)
    kinds: tuple[str, ...] = KINDS
    if len(measured) > sampled:
        rows = error_table(features[sampled:], measured[sampled:], predicted[sampled:], token_budget)
        errors = pd.concat([errors, rows.iloc[:1].assign(kind=LOAD)], ignore_index=True)
        kind = np.where(np.arange(len(measured)) < sampled, kind, len(KINDS))
        kinds = (*KINDS, LOAD)
    return errors, Points(measured, predicted, kind, kinds, "step time")


def summary(errors: pd.DataFrame) -> str:
    """The errors in one line: all steps, then each kind."""
    parts = []
    for kind in ("all", *KINDS, LOAD):
        rows = errors[(errors["kind"] == kind) & (errors["batch"] == "all")]
        for _, row in rows.iterrows():
            name = "all steps" if kind == "all" else kind
            parts.append(
                f"{name}: median {row['median']:.1%}, 95 % within {row['p95']:.1%}, largest {row['largest']:.0%}"
            )
    return "; ".join(parts)


def _method(fit: Fit, caps: Caps, sampled: int) -> str:
    met = len(fit.seconds) - sampled
    load = f" and, with {LOAD_SHARE:.0%} of the weight, {met:,} that the load makes," if met else ""
    return (
        f"least mean relative error ({fit.error:.2%}) at {sampled:,} steps{load} of an engine with max_batch "
        f"{caps.max_batch}, token_budget {caps.token_budget} and kv_capacity {caps.kv_capacity}, to {DIGITS} digits"
    )
