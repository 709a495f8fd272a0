"""The steps that the load of a scenario makes of a replica, where the few pieces of a fit should be good."""

from __future__ import annotations

import numpy as np

from llmopt.arrays import Floats
from llmopt.errors import ScenarioError
from llmopt.evaluate.simulate import simulate
from llmopt.plan import Plan, index_router
from llmopt.scenario import Pool, Scenario
from llmopt.validation.fitting import met_steps, stood_for
from llmopt.workload import Requests

PROBED = 800
"""Requests that the replica finds waiting; twice as many move the coefficients by less than a hundredth."""


def load_steps(scenario: Scenario, pool: Pool) -> tuple[Floats, Floats]:
    """Steps of a replica with a table under requests of all classes of a scenario, which it never runs out of.

    Returns
    -------
    Features (n, 4) and, for each step, the seconds of the run that it stands for (n,).

    Raises
    ------
    ScenarioError
        If a request of the scenario does not fit into the replica, or it has too few.
    """
    alone = scenario.replace(pools=[pool.model_dump(exclude_none=True) | {"table": pool.table}])
    horizon = max(scenario.evaluation.horizon, 2.0 * PROBED / scenario.workload.total_rate)
    drawn = scenario.workload.sample(horizon, scenario.evaluation.seeds[0])
    if len(drawn) == 0:
        raise ScenarioError(f"{scenario.name}: has no requests to fit to; lengthen its horizon")
    chosen = np.arange(min(len(drawn), PROBED))
    waiting = Requests(
        np.zeros(len(chosen)), drawn.prompt[chosen], drawn.output[chosen], drawn.cls[chosen], drawn.u[chosen]
    )
    sim = simulate(alone, Plan("only", index_router(alone)), requests=waiting)
    features = met_steps(alone, sim)
    assert pool.table is not None
    return features, stood_for(features, pool.table.many(features), float(sim.replicas.busy.sum()))
