"""Step times for the catalog from published files: Splitwise's static batches, DistServe's coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmopt.arrays import Floats
from llmopt.calibrate.bench import BenchError, BenchFit, fit_benchmarks, relative_error
from llmopt.calibrate.bench_fit import BenchOptions, physical_floor
from llmopt.calibrate.bench_table import read_benchmarks
from llmopt.calibrate.fit import fit_step_time
from llmopt.errors import ScenarioError
from llmopt.hardware import Piece, StepTime
from llmopt.machines import accelerator, floor, model_shape, roofline
from llmopt.profiles.distserve import FittedSteps, read_distserve

SPLITWISE = "splitwise-sim (github.com/Mutinifni/splitwise-sim, commit 8f99e7dc), data/perf_model.csv"
DISTSERVE = "DistServe (github.com/LLMServe/DistServe, commit 82831f16), simdistserve/estimators/profile_data"
TOKEN_BUDGET = 2048.0
"""vLLM's default max_num_batched_tokens with chunked prefill, which is what the entries' pools have."""


@dataclass(frozen=True)
class FittedEntry:
    """A step time for the catalog: its pieces, its errors on what was measured, and where it comes from.

    sources: by key of a catalog entry, what `accelerator`, `model` and `step_time` rest on.
    """

    description: str
    pieces: tuple[Piece, ...]
    errors: tuple[BenchError, ...]
    sources: Mapping[str, str]


def splitwise_fit(path: str | Path, model: str, hardware: str, tensor_parallel: int, token_budget: float) -> BenchFit:
    """The fit behind `splitwise_entry`.

    Prefill attention pairs were not varied apart from tokens below the token budget, so their cost is the roofline's
    for models of the catalog, and no coefficient is below what the peaks allow; for others it is fitted with the rest.
    """
    table = read_benchmarks(path).choose({"model": model, "system": hardware, "tp": str(tensor_parallel)})
    options = BenchOptions(token_budget=token_budget)
    try:
        shape, chip = model_shape(model), accelerator(hardware)
    except ScenarioError:
        return fit_benchmarks(table, options)
    least = physical_floor(floor(shape, chip, tensor_parallel=tensor_parallel))
    pairs = roofline(shape, chip, tensor_parallel=tensor_parallel)[0].pairs
    return fit_benchmarks(table, options.model_copy(update={"pairs": pairs, "floor": least}))


def splitwise_entry(
    path: str | Path,
    model: str = "llama2-70b",
    hardware: str = "a100-80gb",
    tensor_parallel: int = 8,
    token_budget: float = TOKEN_BUDGET,
) -> FittedEntry:
    """The step time of one server in Splitwise's perf_model.csv, for pools whose steps have at most `token_budget`.

    Prefill and decode were measured apart; in a step that does both, the decode terms are added to those of prefill.

    Raises
    ------
    ScenarioError
        If the file has no such server.
    """
    fit = splitwise_fit(path, model, hardware, tensor_parallel, token_budget)
    load = fit.table.load
    tokens = (load.concurrency * load.prompt)[fit.judged]
    pairs = fit.options.pairs
    words = (
        f"same file, medians of 5 repeats: token_time over batches of {load.concurrency.min():.0f} to "
        f"{load.concurrency.max():.0f} and contexts to {load.context.max():.0f} tokens, prompt_time of "
        f"{tokens.min():.0f} to {tokens.max():.0f} tokens, by llmopt.calibrate.bench (least relative errors; "
        f"{_told(fit.errors)}); prefill and decode were measured apart and are added; outputs that ended early count "
        f"with the length that they reached"
    )
    origin = (
        "pairs: the roofline's, not measured apart; none below the peaks"
        if pairs is not None
        else "pairs: fitted with the rest"
    )
    return FittedEntry(
        description=f"{hardware.upper()} x {tensor_parallel}, {model}: fitted to times measured for Splitwise",
        pieces=fit.pieces,
        errors=fit.errors,
        sources={
            "accelerator": f"{SPLITWISE}: {hardware}, tensor parallel {tensor_parallel}",
            "model": f"same: {model}; Patel et al., Splitwise, ISCA 2024",
            "step_time": f"{words}; {origin}",
        },
    )


def _told(errors: tuple[BenchError, ...]) -> str:
    """`decode: median 1 %, largest 6 %; prefill: ...` of the errors on all points."""
    names = {"TPOT": "decode", "TTFT": "prefill"}
    return "; ".join(
        f"{names[e.what]}: median {e.median:.1%}, 90 % within {e.q90:.1%}, largest {e.largest:.1%}"
        for e in errors
        if e.region == "all"
    )


def distserve_entry(path: str | Path, model: str, tensor_parallel: int = 1, kv_capacity: float = np.inf) -> FittedEntry:
    """DistServe's coefficients as pieces of one max-affine step time.

    The file times pure batches: prefill, and decode of few and of many sequences, which differ at the threshold between
    them; two decode pieces are fitted to both. The mixed piece adds the terms of the decode piece with the longest base
    to those of prefill; its base is at most that base, or steps without prefill would be charged for it. Errors are
    those against the file's own formulas, for decode steps that read at most `kv_capacity` tokens.

    Raises
    ------
    ScenarioError
        If the file has no such model or degree.
    """
    steps = read_distserve(path, model, tensor_parallel)
    decode, seconds = _decode_steps(steps, kv_capacity)
    pieces = fit_step_time(decode, seconds, decode_pieces=2, mixed_pieces=0).pieces
    slow = max(pieces, key=lambda piece: piece.base)
    base = min(steps.prefill.base, slow.base)
    shared = {"name": "mixed", "base": base, "decode": slow.decode, "kv": slow.kv}
    pieces = (*pieces, steps.prefill.model_copy(update=shared))
    notes = "".join(f"; {note}" for note in steps.notes)
    if base < steps.prefill.base:
        notes += f"; prefill: base {steps.prefill.base * 1e3:.1f} ms lowered to {base * 1e3:.1f} ms, a decode step's"
    step_time, prefill = StepTime.from_pieces(pieces), _prompts(TOKEN_BUDGET)
    alone = StepTime.from_pieces((steps.prefill,)).many(prefill)
    errors = (
        relative_error("TPOT", "all", step_time.many(decode), seconds),
        relative_error("TTFT", "all", step_time.many(prefill), alone),
    )
    return FittedEntry(
        description=f"A100 80GB x {tensor_parallel}, {model.rsplit('/', 1)[-1]}: DistServe's coefficients",
        pieces=pieces,
        errors=errors,
        sources={
            "accelerator": f"{DISTSERVE}/{Path(path).name}: A100-80GB, tensor parallel {tensor_parallel}",
            "model": f"same: {model}; Zhong et al., DistServe, OSDI 2024",
            "step_time": f"same file: coefficients of its authors; against its formulas {_told(errors)}{notes}",
        },
    )


def _decode_steps(steps: FittedSteps, kv_capacity: float) -> tuple[Floats, Floats]:
    """Steps (n, 4) of 1 to 256 sequences with contexts of 128 to 2048 tokens, and the file's seconds for them (n,)."""
    batch, context = (grid.ravel() for grid in np.meshgrid(2.0 ** np.arange(9), 128.0 * 2.0 ** np.arange(5)))
    held = batch * context <= kv_capacity
    batch, context = batch[held], context[held]
    decode = np.column_stack([np.zeros_like(batch), batch, batch * context, np.zeros_like(batch)])
    small, large = (StepTime.from_pieces((piece,)).many(decode) for piece in (steps.small, steps.large))
    return decode, np.where(batch < steps.threshold, small, large)


def _prompts(budget: float) -> Floats:
    """Pure prefill steps (n, 4) of equal prompts within the budget."""
    count, tokens = (grid.ravel() for grid in np.meshgrid(2.0 ** np.arange(5), 64.0 * 2.0 ** np.arange(6)))
    mine = count * tokens <= budget
    count, tokens = count[mine], tokens[mine]
    return np.column_stack([count * tokens, np.zeros_like(count), np.zeros_like(count), count * tokens**2 / 2.0])
