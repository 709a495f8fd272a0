"""Whether a pool's step time respects physics, where its accelerator and model are known."""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.errors import ScenarioError
from llmopt.machines import accelerator, floor, model_shape, violations
from llmopt.machines.physics import probe
from llmopt.scenario import Pool

REMEDY = (
    "check the units of step_time and tensor_parallel, or name the precision of the weights in model (Llama-3.1-8B-FP8)"
)


@dataclass(frozen=True)
class PoolPhysics:
    """What peaks say of a pool's step time.

    probed, impossible: steps looked at, and how many of them no engine could do in that time; worst: how many times too
    fast the fastest is, below 1 if none is; sentence: the same in words, with the figures.
    """

    probed: int
    impossible: int
    worst: float
    sentence: str


def pool_physics(pool: Pool) -> PoolPhysics | None:
    """Holds the step time that the simulator plays against the peaks; None where a name is in neither catalog.

    None also for a bundle, whose roles have devices of their own. A step time that is too fast is not refused: a model
    of a paper may mean it so. It is said.
    """
    if pool.bundle is not None:
        return None
    try:
        shape, chip = model_shape(pool.model), accelerator(pool.accelerator)
    except ScenarioError:
        return None
    # A pool does not say how its KV cache is stored; one byte a number is the least that engines offer.
    limit = floor(shape, chip, tensor_parallel=pool.tensor_parallel, kv_precision="fp8")
    steps = probe(pool.token_budget, pool.max_batch, pool.kv_capacity, pool.chunk)
    found = violations(pool.table or pool.stepper, limit, steps)
    said = f"Pool {pool.name!r}: {found.sentence}"
    if found:
        said += f" (as are {found.count} of {len(steps)} probed steps); {_why(pool)}"
    return PoolPhysics(len(steps), found.count, found.worst, said + ".")


def _why(pool: Pool) -> str:
    if not pool.stepper.coefficients[:, 1:].any():
        return (
            "its step time is the same for every batch, a mean as in queueing models, so that full steps are too short"
        )
    return REMEDY
