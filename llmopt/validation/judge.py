"""From a run folder and profiles to a validation."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np

from llmopt.arrays import Floats
from llmopt.errors import ScenarioError
from llmopt.limits import pool_physics
from llmopt.runs import EngineRun, read_run
from llmopt.scenario import Scenario
from llmopt.steptable import StepTable
from llmopt.validation.constants import FIRST, HOST_OVERHEAD, engine_constants
from llmopt.validation.engine import Engine, StepTimes, engine_of, with_overhead
from llmopt.validation.overhead import Estimate, estimate_overhead
from llmopt.validation.replay import play, predicted_curves, recorded_scenario
from llmopt.validation.result import Validation

Overhead = Literal["common", "fit"] | float


def validate(
    run: EngineRun | str | Path,
    profiles: str | Path | StepTable,
    *,
    step_time: StepTimes = "table",
    host_overhead: Overhead = "common",
    first: int = FIRST,
    gpu: str | None = None,
    model: str | None = None,
) -> Validation:
    """Replay the recorded arrivals of a run through the simulator and compare what was measured.

    Parameters
    ----------
    run
        A run folder (see `llmopt.runs.read_run`), or what was read from it.
    profiles
        A folder with the profiles of the run's GPU and model, or a step table.
    step_time
        ``table``, interpolation in the profiles, or ``max-affine``, the fit to them that the programs use.
    host_overhead
        Seconds that every step takes besides its kernels: ``common`` for the constant of all machines, ``fit`` to
        estimate it from the first `first` requests and judge the others only, or a number.
    gpu, model
        Names to use instead of the recorded ones.

    Raises
    ------
    ScenarioError
        If the run or the profiles cannot be used.
    """
    start = perf_counter()
    recorded = run if isinstance(run, EngineRun) else read_run(run)
    engine = engine_of(recorded, profiles, step_time, gpu, model)
    read = perf_counter()
    host, why, estimate = _overhead(recorded, engine, host_overhead, first)
    estimated = perf_counter()
    engine = with_overhead(engine, host)
    scenario = recorded_scenario(recorded, engine.pool)
    sim = play(scenario)
    played = perf_counter()
    curves = predicted_curves(scenario, sim, _times(recorded, sim.end))
    return Validation(
        run=recorded,
        scenario=scenario,
        sim=sim,
        step_time=step_time,
        overhead=host_overhead if isinstance(host_overhead, str) else "given",
        settings=engine.settings,
        constants=engine_constants(host, why, engine.pool.replicas),
        notes=(*engine.notes, *_physics(engine, scenario)),
        curves=curves,
        skipped=first if estimate else 0,
        estimate=estimate,
        seconds={
            "read": read - start,
            "estimate": estimated - read,
            "replay": played - estimated,
            "curves": perf_counter() - played,
            "all": perf_counter() - start,
        },
    )


def _overhead(run: EngineRun, engine: Engine, choice: Overhead, first: int) -> tuple[float, str, Estimate | None]:
    """The overhead in seconds, why it has this value, and the estimate if it is one."""
    if choice == "common":
        return (
            HOST_OVERHEAD,
            "one constant for all machines, between what the two recorded runs at hand name for theirs",
            None,
        )
    if choice == "fit":
        estimate = estimate_overhead(run, engine.pool, first)
        how = "slope of the delays of decode spans" if estimate.sloped else "median delay a step of decode spans"
        return estimate.overhead, f"{how}, from the first {first} requests of this run", estimate
    if not isinstance(choice, float | int) or not 0 <= choice <= 1:
        raise ScenarioError(f"host overhead {choice!r} is neither common, fit nor 0 to 1 seconds; give one of them")
    return float(choice), "given", None


def _physics(engine: Engine, scenario: Scenario) -> list[str]:
    """What peak arithmetic and bandwidth say of the step time, where the GPU and the model are in the catalogs."""
    # the peaks are those of the model's own weights
    quantised = engine.settings["quantization"].value is not None
    physics = None if quantised else pool_physics(scenario.pools[0])
    return [physics.sentence] if physics is not None and physics.impossible else []


def _times(run: EngineRun, end: float) -> Floats:
    """When to look at the engine: at the recorded times, and then, or without any, every second to the end."""
    recorded = run.curves.times if run.curves is not None else np.array([0.0])
    return np.concatenate([recorded, np.arange(recorded[-1] + 1.0, end + 1.0)])
