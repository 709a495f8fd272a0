"""Profiles as Vidur and Frontier write them: kernel times in milliseconds, several tensor-parallel degrees in one file.

Vidur (github.com/microsoft/vidur): mlp.csv, attention.csv. Frontier (github.com/NetX-lab/Frontier) adds the precision,
batches of unequal requests, true mixed batches and moe.csv.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmopt.arrays import Floats
from llmopt.errors import ScenarioError
from llmopt.profiles.checks import QUORUM, SINGLE_FALL
from llmopt.profiles.data import Curve, Grid, Profile
from llmopt.profiles.files import Rows, flags, need, numbers, one_value, read_rows, sizes, times, words
from llmopt.profiles.grids import behind_context, full, pivot
from llmopt.profiles.names import precision_of, same_precision
from llmopt.profiles.tables import attention_table, operator_curves

MILLI = 1e-3
OPERATORS = {
    "emb": "embedding",
    "input_layernorm": "input_layernorm",
    "attn_pre_proj": "qkv_proj",
    "attn_rope": "rotary_emb",
    "attn_post_proj": "o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp_up_proj": "gate_up_proj",
    "mlp_act": "act_fn",
    "mlp_down_proj": "down_proj",
    "add": "add",
}
"""Vidur's names and those of LLMServingSim, which are vLLM's. The timer `add` times one of a layer's two additions."""
AROUND = ("attn_input_reshape", "attn_kv_cache_save", "attn_output_reshape")
"""What runs around the attention kernel in every step; may be below the profiler's resolution of a microsecond."""
GATING = ("moe_gating_linear", "moe_gating_routing_topk", "moe_shuffling")
CONSTANTS = {"n_embd": "hidden", "n_kv_head": "kv_heads", "n_expanded_embd": "intermediate"}
DEGREE = "num_tensor_parallel_workers"
CONTRADICTION = 3.0
"""Repeats of one point that differ by more than this factor are no repeats; the largest in the published files is 2."""


def read_vidur(files: Mapping[str, Path], empty: Profile, expert_parallel: int = 1) -> Profile:
    """The profile in `files` by kind (mlp, attention, moe), each optional; `empty` says of what.

    Raises
    ------
    ScenarioError
        If a file holds something that is no measurement, or not this tensor-parallel degree or precision.
    """
    profile = replace(empty, files=tuple(str(path) for path in files.values()))
    if "mlp" in files:
        profile = _with_operators(profile, _degree(read_rows(files["mlp"]), empty))
    if "attention" in files:
        profile = _with_attention(profile, _degree(read_rows(files["attention"]), empty))
    if "moe" in files:
        profile = _with_experts(profile, read_rows(files["moe"]), expert_parallel)
    return profile


def median(operator: str) -> str:
    """The column of an operator's median time."""
    return f"time_stats.{operator}.median"


def degrees(path: Path) -> list[int]:
    """Tensor-parallel degrees of a file."""
    rows = read_rows(path)
    return sorted({int(value) for value in sizes(rows, DEGREE, 1)})


def _degree(rows: Rows, empty: Profile) -> Rows:
    """The rows of the profile's tensor-parallel degree, in its precision."""
    workers = sizes(rows, DEGREE, 1)
    keep = workers == empty.tensor_parallel
    if not keep.any():
        known = ", ".join(f"{int(w)}" for w in np.unique(workers))
        raise ScenarioError(
            f"{rows.path}: tensor_parallel = {empty.tensor_parallel} was not profiled; profiled are {known}"
        )
    rows = rows.take(keep)
    if "profiling_precision" in rows.data.columns:
        names = words(rows, "profiling_precision")
        right = np.array([same_precision(precision_of(name) or name, empty.precision) for name in names])
        if not right.any():
            raise ScenarioError(
                f"{rows.path}: was profiled in {precision_of(names[0])}, not in {empty.precision}; ask for the former"
            )
        rows = rows.take(right)
    return rows


def _facts(rows: Rows) -> dict[str, int]:
    heads = "n_q_head" if "n_q_head" in rows.data.columns else "n_head"
    names = {heads: "heads"} | CONSTANTS
    found = {name: one_value(rows, column) for column, name in names.items() if column in rows.data.columns}
    if {"hidden", "heads"} <= set(found):
        # both profilers take the width of a head to be the hidden size over the heads
        found["head_dim"] = found["hidden"] // found["heads"]
    return found


def _repeats(rows: Rows, columns: list[str]) -> None:
    """Refuse rows that say the same of themselves and contradict each other; some points were measured twice."""
    keys = [column for column in rows.data.columns if not column.startswith(("time_stats.", "Unnamed"))]
    groups = rows.data.groupby(keys, dropna=False)
    for column in columns:
        low, high = groups[column].transform("min").to_numpy(), groups[column].transform("max").to_numpy()
        bad = (high > CONTRADICTION * low) & (high - low > 0.01)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise ScenarioError(
                f"{rows.place(row)}: is a duplicate that contradicts another row ({column} is {low[row]:g} ms in one "
                f"and {high[row]:g} ms in the other); keep one of the two"
            )


def _curves(found: Mapping[str, Rows]) -> dict[str, Curve]:
    """One curve by tokens for each operator out of its rows, named as Vidur names it; together they are weighed."""
    names = list(found)
    tokens = np.concatenate([sizes(rows, "num_tokens", 1) for rows in found.values()])
    seconds = np.concatenate([times(rows, median(name)) for name, rows in found.items()]) * MILLI
    code = np.repeat(np.arange(len(names), dtype=float), [len(rows.line) for rows in found.values()])
    first = next(iter(found.values()))
    every = Rows(first.path, first.data, np.concatenate([rows.line for rows in found.values()]), first.unit)
    shown = [OPERATORS.get(name, name) for name in names]
    return operator_curves(every, shown, tokens, code, seconds, SINGLE_FALL, "tokens")


def _unchecked(rows: Rows, name: str) -> Curve:
    (tokens,), seconds = pivot([sizes(rows, "num_tokens", 1)], times(rows, median(name)) * MILLI)
    return Curve(tokens, seconds)


def _with_operators(profile: Profile, rows: Rows) -> Profile:
    need(rows, ["num_tokens"])
    found = [name for name in OPERATORS if median(name) in rows.data.columns]
    if not found:
        raise ScenarioError(f"{rows.path}: has no column {median('attn_pre_proj')!r}; add the operators' times")
    _repeats(rows, [median(name) for name in found])
    curves = _curves(dict.fromkeys(found, rows))
    return replace(profile, tokens={**profile.tokens, **curves}, facts={**profile.facts, **_facts(rows)})


def _with_attention(profile: Profile, rows: Rows) -> Profile:
    need(rows, ["batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill"])
    is_prefill, uneven = flags(rows, "is_prefill"), flags(rows, "is_mixed_batch")
    alone = sizes(rows, "batch_size", 1) == 1
    prefill = _attention(rows.take(is_prefill & alone & ~uneven), "attn_prefill", "prefill_chunk_size")
    decode = _attention(rows.take(~is_prefill & ~uneven), "attn_decode", "batch_size")
    mixed = _mixed_note(rows.take(flags(rows, "is_true_mixed_batch")), prefill, decode)
    facts = {**profile.facts, **_facts(rows)}
    notes = (*profile.notes, *_saving_note(rows.take(is_prefill & alone & ~uneven)), *mixed)
    return replace(profile, prefill=prefill, decode=decode, facts=facts, notes=notes)


def _attention(rows: Rows, kernel: str, batch: str) -> Grid:
    """One attention kernel with what runs around it, against (chunk, cached) or (sequences, context)."""
    if len(rows.line) == 0:
        raise ScenarioError(f"{rows.path}: has no rows of {kernel} alone; measure them")
    need(rows, [median(kernel)])
    _repeats(rows, [median(kernel)])
    seconds = times(rows, median(kernel)) * MILLI
    columns = {batch: sizes(rows, batch, 1), "kv_cache_size": sizes(rows, "kv_cache_size")}
    every = np.ones(len(seconds), dtype=bool)
    axes, table = attention_table(rows, every, columns, seconds + _around(rows), checked=seconds, quorum=QUORUM)
    return behind_context(axes, table) if kernel == "attn_prefill" else full(axes, table, (1, 0))


def _around(rows: Rows) -> Floats:
    found = [median(name) for name in AROUND if median(name) in rows.data.columns]
    return np.asarray(sum((times(rows, column, zero=True) for column in found), np.zeros(len(rows.line))) * MILLI)


def _saving_note(rows: Rows) -> tuple[str, ...]:
    """A warning where writing the KV cache takes longer than attention itself, which no engine's kernel does."""
    column = median("attn_kv_cache_save")
    if column not in rows.data.columns:
        return ()
    chunk = sizes(rows, "prefill_chunk_size")
    rows = rows.take(chunk == chunk.max())
    saving, kernel = (float(np.median(times(rows, name, zero=True))) for name in (column, median("attn_prefill")))
    if saving <= kernel:
        return ()
    return (
        f"writing the KV cache of a chunk of {chunk.max():g} tokens takes {saving:.2g} ms, its attention "
        f"{kernel:.2g} ms; both are counted as measured",
    )


def _mixed_note(rows: Rows, prefill: Grid, decode: Grid) -> tuple[str, ...]:
    """What the few measured mixed steps say about the sum of the pure ones, by which mixed steps are composed."""
    if len(rows.line) == 0 or "prefill_seq_lens" not in rows.data.columns:
        return ()
    seconds = (times(rows, median("attn_prefill")) + times(rows, median("attn_decode"))) * MILLI + _around(rows)
    chunk = rows.data["prefill_seq_lens"].astype(str).str.extract(r"(\d+)")[0].to_numpy(dtype=float)
    count, context = sizes(rows, "num_decode_seqs"), sizes(rows, "decode_avg_kv_cache_size")
    ratio = (prefill(chunk, np.zeros(len(chunk))) + decode(count, context)) / seconds
    return (
        f"{len(ratio)} mixed steps were measured, too few for a table: the sum of prefill and decode is "
        f"{ratio.min():.2f} to {ratio.max():.2f} of them",
    )


def _with_experts(profile: Profile, rows: Rows, expert_parallel: int) -> Profile:
    """Gate, top-k, shuffling and the experts' products by tokens, for uniform routing as measured."""
    need(rows, ["num_tokens", DEGREE, "expert_parallel_size", median("moe_grouped_gemm")])
    if "routing_runtime_path" in rows.data.columns:
        # vLLM's own top-k kernel; the other path spreads tokens round robin
        engine = words(rows, "routing_runtime_path") == "standard_fused_topk"
        rows = rows.take(engine) if engine.any() else rows
    spread = rows.take(sizes(rows, "expert_parallel_size", 1) == expert_parallel)
    mine = spread.take(sizes(spread, DEGREE, 1) == profile.tensor_parallel)
    if len(mine.line) == 0:
        raise ScenarioError(
            f"{rows.path}: tensor parallel {profile.tensor_parallel} with expert parallel {expert_parallel} was not "
            "profiled; choose degrees that were"
        )
    # gate and top-k do not depend on the tensor-parallel degree, and were not measured at every one
    gates = {name: spread.take(np.isfinite(numbers(spread, median(name)))) for name in GATING}
    empty = next((name for name, some in gates.items() if len(some.line) == 0), None)
    if empty is not None:
        raise ScenarioError(f"{rows.path}: has no times of {empty}; measure them")
    # their times are those of a waiting host (43 us up to 1016 tokens, 15 us at 1024), so that falling means nothing
    curves = _curves({"moe_grouped_gemm": mine}) | {name: _unchecked(some, name) for name, some in gates.items()}
    facts = {"experts": one_value(rows, "num_experts"), "experts_per_token": one_value(rows, "router_topk")}
    return replace(profile, tokens={**profile.tokens, **curves}, facts={**profile.facts, **facts})
