"""Experts divided among data-parallel engines: each engine's serve the tokens of all, which are gathered before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from llmopt.arrays import Floats
from llmopt.errors import ScenarioError
from llmopt.machines import Accelerator, ModelShape
from llmopt.profiles.data import EXPERT_OPERATORS, Curve, Profile
from llmopt.profiles.estimates import ACTIVATION, described, link_of
from llmopt.profiles.stretch import stretched
from llmopt.profiles.transfers import ring

GATHERED = tuple(name for name in EXPERT_OPERATORS if name != "moe_gating_linear")
"""Operators that run on the tokens of all engines; the gate runs before they are gathered."""


def shared(profile: Profile, shape: ModelShape, engines: int) -> tuple[Profile, float]:
    """The profile with the expert block by the tokens of one of `engines` equally loaded ones, and up to how many of
    these it was measured; beyond, it follows the chord of its upper half, so that it cuts off no other operator.

    Raises
    ------
    ScenarioError
        If there is no such number of engines.
    """
    if engines < 1:
        raise ScenarioError(f"{profile.name}: data_parallel = {engines} is no number of engines; give at least 1")
    block = {name: curve for name, curve in profile.tokens.items() if name in GATHERED}
    rest = [curve.at for name, curve in profile.tokens.items() if name not in block]
    if engines == 1 or not shape.expert_layers or not block or not rest:
        return profile, np.inf
    first, last = engines * min(at[0] for at in rest), engines * min(at[-1] for at in rest)
    tokens = {**profile.tokens, **{name: _by_own(curve, first, last, engines) for name, curve in block.items()}}
    reach = float(min(curve.at[-1] for curve in block.values()))
    note = (
        f"experts: divided among {engines} equally loaded engines, so that each step's serve {engines} times its own "
        "tokens; that the engines wait for each other in every step (lockstep) is not modelled"
    )
    notes = (*profile.notes, note)
    if reach < last:
        notes = (*notes, f"experts: extrapolated beyond {reach:g} tokens of all engines, those of {last:g} are needed")
    return replace(profile, tokens=tokens, notes=notes), reach / engines


def _by_own(curve: Curve, first: float, last: float, engines: int) -> Curve:
    """A curve by the tokens of all engines, from `first` to `last`, as one by those of each."""
    (at,), seconds = stretched((curve.at,), curve.seconds)
    knots = np.unique(np.append(np.clip(curve.at, first, last), last))
    return Curve(knots / engines, Curve(at, seconds)(knots))


def exchange(profile: Profile, chip: Accelerator | None, engines: int) -> tuple[Callable[[Floats], Floats], str]:
    """Seconds of an all-gather and a reduce-scatter by the bytes of one GPU, and a note unless they were measured.

    As a ring they take g - 1 rounds each, together as long as an all-reduce of the bytes of all g GPUs.

    Raises
    ------
    ScenarioError
        If neither measurements nor a link is known.
    """
    if profile.exchange is not None:
        return profile.exchange, ""
    gpus = engines * profile.tensor_parallel
    link = link_of(profile, chip, f"all-gather and reduce-scatter among {gpus} GPUs")
    note = f"all-gather and reduce-scatter around the experts: not measured, {described(link)}, {gpus} GPUs"
    return lambda own: ring(gpus * own, gpus, link), note


def exchanged(own: Floats, shape: ModelShape, tensor_parallel: int) -> Floats:
    """Bytes that one GPU adds to what is gathered, for `own` tokens of its engine."""
    return own * shape.hidden * ACTIVATION / tensor_parallel
