"""The max-affine step time of a table, fitted where a load takes it.

A few affine pieces cannot follow a table everywhere: a decode sequence may cost twice as much beside prefill as
without, and no maximum of affine functions jumps between the two. They need to follow it in the steps that the engine
makes. Which these are follows from the arrivals, the lengths and the table; nothing that was measured in a run is used.
"""

from __future__ import annotations

import numpy as np

from llmopt.arrays import Floats
from llmopt.evaluate.run import SimRun
from llmopt.hardware import Piece
from llmopt.runs import EngineRun
from llmopt.scenario import Pool, Scenario
from llmopt.validation.constants import HOST_OVERHEAD
from llmopt.validation.replay import driven, play, recorded_scenario

LOOKS = 200
"""Instants, evenly spread over the replay, at which the decode batch is looked at."""


def fitted_pieces(run: EngineRun, pool: Pool) -> tuple[Piece, ...]:
    """Pieces that follow the pool's table in the steps which the replay of the run makes of it.

    Raises
    ------
    SolveError
        If the fit finds no solution.
    """
    scenario = recorded_scenario(run, pool.model_copy(update={"host_overhead": HOST_OVERHEAD}))
    return pieces_met(scenario, play(scenario))


def pieces_met(scenario: Scenario, sim: SimRun) -> tuple[Piece, ...]:
    """One decode-only and two mixed pieces that follow the table of a scenario's pool in the steps of a simulated run.

    The table's seconds are fitted without the host overhead, which a pool adds by itself.

    Raises
    ------
    SolveError
        If the fit finds no solution.
    """
    from llmopt.calibrate.fit import FitOptions, fit_step_time

    table = scenario.pools[0].table
    assert table is not None
    features = met_steps(scenario, sim)
    seconds = table.many(features)
    weights = stood_for(features, seconds, float(sim.replicas.busy.sum()))
    quick = FitOptions(kicks=0)
    return fit_step_time(features, seconds, weights=weights, options=quick).pieces


def met_steps(scenario: Scenario, sim: SimRun) -> Floats:
    """Steps that a simulated run makes: features (n, 4) as of a table.

    Decode-only steps are those at `LOOKS` instants; steps with prefill those that admit a request.
    """
    instants = np.linspace(0.0, sim.end, LOOKS + 1)[1:]
    admissions, which = np.unique(sim.scheduled, return_inverse=True)
    prompt = sim.requests.prompt.astype(float)
    tokens, pairs = np.bincount(which, prompt), np.bincount(which, prompt**2 / 2)
    replica = np.zeros(len(admissions), np.int64)
    replica[which] = sim.replica
    steps = []
    for k, core in driven(scenario, sim, np.concatenate([instants, admissions])):
        i = k - LOOKS
        if i < 0:
            steps += [(0.0, one["gliding"], one["kv"], 0.0) for one in core.world.reps if one["gliding"]]
            continue
        batch = core.world.reps[replica[i]]
        taken = min(tokens[i], scenario.pools[0].token_budget - float(batch["gliding"]))
        if taken > 0:
            steps.append((taken, batch["gliding"], batch["kv"], pairs[i] * taken / tokens[i]))
    return np.array(steps, dtype=float)


def stood_for(features: Floats, seconds: Floats, busy: float) -> Floats:
    """Seconds of the run that each step stands for: its own with prefill, an equal part of the rest without."""
    mixed = features[:, 0] > 0
    rest = max(busy - float(seconds[mixed].sum()), 0.0) / max(int((~mixed).sum()), 1)
    return np.where(mixed, seconds, rest)
