"""Calibration from a benchmark log: TTFT and TPOT of one server against concurrency and lengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmopt.arrays import Floats
from llmopt.calibrate.bench import BenchFit, fit_benchmarks
from llmopt.calibrate.bench_fit import BenchOptions
from llmopt.calibrate.bench_table import read_benchmarks
from llmopt.calibrate.result import DIGITS, Calibration, Caps, Machine, Points, memory, physics, rounded
from llmopt.errors import ScenarioError
from llmopt.hardware import StepTime
from llmopt.machines.accelerators import FOUR_BIT
from llmopt.machines.lookup import QUANTISED
from llmopt.machines.physics import Steps, probe

if TYPE_CHECKING:
    import pandas as pd

PRECISIONS = {"fp8": "fp8", "fp8_block": "fp8", "nvfp4": "nvfp4", "bfloat16": "bf16", "float16": "fp16"}
"""Precision of the weights by the name that aiconfigurator gives their multiplication."""
TOKEN_BUDGET = 8192
"""Default of vLLM on data-centre GPUs, of SGLang and of TensorRT-LLM, with which such logs are made."""
MAX_BATCH = 256


def calibrate_benchmarks(
    path: str | Path,
    *,
    accelerator: str = "",
    model: str = "",
    tensor_parallel: int | None = None,
    select: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    max_batch: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    kv_capacity: int | None = None,
    allow_unphysical: bool = False,
) -> Calibration:
    """The max-affine step time that explains the benchmark points of one server.

    Parameters
    ----------
    path
        A CSV file; `llmopt.calibrate.bench_table` says which columns it needs.
    accelerator, model, tensor_parallel
        Which server, if the log has several; where it states none, what was measured.
    select
        Which server, by further keys of `bench_table.SETTING`.
    columns
        Names of columns that are not recognised.
    max_batch, token_budget, kv_capacity
        Limits of the engine that was measured. Without a max batch it is vLLM's default of 256, or the largest
        concurrency; without a KV capacity what the points show, or, where they show none, what `llmopt.machines`
        computes.
    allow_unphysical
        Note instead of refusing what peak arithmetic and bandwidth do not allow.

    Raises
    ------
    ScenarioError
        In one sentence, if the log cannot be read, or the fit is impossible.
    """
    log = read_benchmarks(path, columns)
    names = {"system": accelerator, "model": model, "tp": str(tensor_parallel or "")}
    stated = {key for key in names if any(table.setting[key] for table in log.tables)}
    table = log.choose({key: names[key] for key in stated if names[key]} | dict(select or {}))
    setting = {**table.setting, **{key: name for key, name in names.items() if key not in stated}}
    fit = fit_benchmarks(table, BenchOptions(token_budget=float(token_budget), kv_capacity=kv_capacity))
    machine = _machine(setting)
    max_batch = max(MAX_BATCH, int(table.load.concurrency.max())) if max_batch is None else max_batch
    room, why = _memory(fit, machine, max_batch, token_budget)
    caps = Caps(max_batch, token_budget, room)
    pieces = rounded(fit.pieces)
    steps = probe(token_budget, min(max_batch, int(table.load.concurrency.max())), room)
    claims: dict[str, tuple[Steps, Floats]] = {"the fit": (StepTime.from_pieces(pieces), steps)}
    return Calibration(
        machine=machine,
        caps=caps,
        pieces=pieces,
        errors=_errors(fit),
        points=_points(fit),
        summary=_summary(fit),
        kind="fitted to a benchmark log",
        source=f"{Path(table.source).name}: {table.label}",
        method=f"least relative errors of TTFT and TPOT at {len(table.load)} points, to {DIGITS} digits",
        physics=tuple(_physics(setting, machine, claims, allow_unphysical)),
        notes=tuple(_notes(fit)),
        constants={"kv_capacity": (room, why)},
    )


def _memory(fit: BenchFit, machine: Machine, max_batch: int, token_budget: int) -> tuple[int, str]:
    """KV tokens of a replica: given, else shown by the points, else computed, else what the points need at least."""
    if fit.options.kv_capacity is not None:
        return int(fit.options.kv_capacity), "given by the user"
    if np.isfinite(fit.kv_capacity):
        return int(fit.kv_capacity), "where the points show requests waiting for memory"
    try:
        return memory(machine, max_batch, token_budget, None)
    except ScenarioError:
        load = fit.table.load
        held = load.concurrency * (load.prompt + load.output)
        return int(held.max()), "at least, since a point holds as many; the machine is in no catalog"


def _machine(setting: Mapping[str, str]) -> Machine:
    stated = (setting["gemm"] or setting["precision"]).lower()
    precision = PRECISIONS.get(stated) or QUANTISED.get(stated, "")
    names = setting["system"], setting["model"], int(float(setting["tp"] or 1))
    published = Machine.named(*names)
    if precision in FOUR_BIT and published.shape is not None and published.shape.precision in FOUR_BIT:
        return published  # a log's "fp4" is the format that the model is published in
    return Machine.named(*names, precision)


def _physics(
    setting: Mapping[str, str], machine: Machine, claims: dict[str, tuple[Steps, Floats]], allow: bool
) -> Iterator[str]:
    """What the peaks say, if one tensor-parallel group computes everything that a rank does."""
    spread = {key: int(float(setting[key] or 1)) for key in ("pp", "dp", "ep")}
    if spread["pp"] > 1 or spread["dp"] > 1 or spread["ep"] > machine.tensor_parallel:
        yield "not checked against peak arithmetic and bandwidth, since experts or layers are spread over further GPUs"
    else:
        yield from physics(machine, claims, allow)


def _errors(fit: BenchFit) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([vars(error) for error in fit.errors])


def _points(fit: BenchFit) -> Points:
    """TPOT of all points, and the TTFT of those whose TTFT the step time speaks of."""
    judged = fit.judged
    kind = np.repeat([0, 1], [len(judged), int(judged.sum())])
    measured = np.concatenate([fit.table.tpot, fit.table.ttft[judged]])
    return Points(measured, np.concatenate([fit.tpot, fit.ttft[judged]]), kind, ("TPOT", "TTFT"), "time")


def _summary(fit: BenchFit) -> str:
    return "; ".join(
        f"{error.what} of {error.points} points: median {error.median:.1%}, 90 % within {error.q90:.1%}, largest "
        f"{error.largest:.0%}"
        for error in fit.errors
        if error.region == "all" and error.points
    )


def _notes(fit: BenchFit) -> Iterator[str]:
    load, harness = fit.table.load, fit.harness
    yield (
        f"measured at concurrency {_span(load.concurrency)} with prompts of {_span(load.prompt)} and outputs of "
        f"{_span(load.output)} tokens; beyond them the fit is extrapolated"
    )
    if (harness.fixed, harness.steps, harness.together) != (0.0, 0.0, 1.0):
        yield (
            f"a mean TTFT also holds {1e3 * harness.fixed:.3g} ms besides the engine and {harness.steps:.3g} steps "
            f"waited for, with {harness.together:.3g} prompts prefilled at once"
        )
    if fit.queueing.any():
        yield f"at {int(fit.queueing.sum())} points requests wait for memory, and their TTFT says nothing of prefill"


def _span(values: Floats) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:g} to {high:g}" if low < high else f"{low:g}"
