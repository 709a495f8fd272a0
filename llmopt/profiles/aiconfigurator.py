"""Kernel tables of aiconfigurator (github.com/ai-dynamo/aiconfigurator), Parquet, times in milliseconds.

The tables are of kernels, not of models: matrix products by (m, n, k), attention by heads. A model's operators are
looked up by its shape; what is no table there (norms, activations, rotary embedding, sampler) is not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmopt.arrays import Bools, Floats
from llmopt.errors import ScenarioError
from llmopt.machines import ModelShape
from llmopt.profiles.checks import QUORUM
from llmopt.profiles.data import Curve, Grid, Profile
from llmopt.profiles.files import Rows, need, read_rows, sizes, times, words
from llmopt.profiles.grids import behind_context, full, pivot
from llmopt.profiles.names import same_precision
from llmopt.profiles.tables import attention_table
from llmopt.profiles.transfers import rising

MILLI = 1e-3
KINDS = ("gemm", "context_attention", "generation_attention", "moe", "nccl", "custom_allreduce")
BYTES = {"half": 2, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}


def read_aiconfigurator(
    files: Mapping[str, Path], empty: Profile, shape: ModelShape, expert_parallel: int = 1
) -> Profile:
    """The operators of a model of this shape out of the tables in `files` by kind (`KINDS`), each optional.

    Raises
    ------
    ScenarioError
        If a table holds no kernels of this shape, or something that is no measurement.
    """
    files = {kind: path for kind, path in files.items() if kind in KINDS}
    profile = replace(empty, files=tuple(str(path) for path in files.values()))
    if shape.attention == "mla":
        raise ScenarioError(f"{shape.name}: has latent attention, which these tables do not hold; give another profile")
    if "gemm" in files:
        profile = _with_products(profile, read_rows(files["gemm"]), shape)
    if "context_attention" in files and "generation_attention" in files:
        profile = _with_attention(profile, files, shape)
    if "moe" in files and shape.experts:
        profile = _with_experts(profile, read_rows(files["moe"]), shape, expert_parallel)
    return replace(profile, all_reduce=_all_reduce(files, empty.tensor_parallel))


def products(shape: ModelShape, tensor_parallel: int) -> dict[str, tuple[float, float]]:
    """Output and inner width (n, k) of each matrix product of one GPU; a KV head is never split."""
    tp, wide = tensor_parallel, shape.head_dim
    kv = max(1.0, shape.kv_heads / tp)
    out = {
        "qkv_proj": ((shape.heads / tp + 2 * kv) * wide, float(shape.hidden)),
        "o_proj": (float(shape.hidden), shape.heads / tp * wide),
        "lm_head": (shape.vocab / tp, float(shape.hidden)),
    }
    if shape.layers > shape.expert_layers:
        out["gate_up_proj"] = ((2 if shape.gated else 1) * shape.intermediate / tp, float(shape.hidden))
        out["down_proj"] = (float(shape.hidden), shape.intermediate / tp)
    return out


def _with_products(profile: Profile, rows: Rows, shape: ModelShape) -> Profile:
    need(rows, ["gemm_dtype", "m", "n", "k", "latency"])
    rows = rows.take(_typed(rows, "gemm_dtype", profile.precision))
    if len(rows.line) == 0:
        raise ScenarioError(f"{rows.path}: holds no products in {profile.precision}; ask for another precision")
    seconds = times(rows, "latency") * MILLI
    axes, table = pivot([sizes(rows, name, 1) for name in ("m", "n", "k")], seconds)
    grid = full(axes, table, (1, 2, 0))
    curves = {name: _product(grid, n, k) for name, (n, k) in products(shape, profile.tensor_parallel).items()}
    head = {"lm_head": curves.pop("lm_head")}
    return replace(profile, tokens={**profile.tokens, **curves}, sequences={**profile.sequences, **head})


def _product(grid: Grid, n: float, k: float) -> Curve:
    m = grid.axes[0]
    return Curve(m, grid(m, np.full(len(m), n), np.full(len(m), k)))


def _typed(rows: Rows, column: str, precision: str) -> Bools:
    return np.array([same_precision(name, precision) for name in words(rows, column)], dtype=bool)


def _with_attention(profile: Profile, files: Mapping[str, Path], shape: ModelShape) -> Profile:
    context = _of_heads(read_rows(files["context_attention"]), shape, profile.tensor_parallel)
    alone = sizes(context, "batch_size", 1) == 1
    prefill = _attention(context.take(alone), {"isl": 0.0, "step": 0.0})
    rows = _of_heads(read_rows(files["generation_attention"]), shape, profile.tensor_parallel)
    # a generated token reads itself too: its context is one longer than what was cached
    decode = _attention(rows, {"batch_size": 0.0, "step": 1.0})
    return replace(profile, prefill=behind_context(*prefill), decode=full(*decode, (1, 0)))


def _of_heads(rows: Rows, shape: ModelShape, tensor_parallel: int) -> Rows:
    """Kernels with the heads of one GPU, the whole context, and keys stored as the engine computes."""
    need(
        rows, ["batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "kv_cache_dtype", "step", "latency"]
    )
    heads, kv = shape.heads // tensor_parallel, max(1, shape.kv_heads // tensor_parallel)
    right = (sizes(rows, "num_heads", 1) == heads) & (sizes(rows, "head_dim", 1) == shape.head_dim)
    right &= sizes(rows, "num_key_value_heads") == kv
    right &= _typed(rows, "kv_cache_dtype", "bf16")
    if "window_size" in rows.data.columns:
        right &= sizes(rows, "window_size") == 0
    if not right.any():
        raise ScenarioError(
            f"{rows.path}: holds no kernel with {heads} heads and {kv} KV heads of width {shape.head_dim} (one GPU of "
            f"{tensor_parallel} for {shape.name}); choose another tensor_parallel or profile"
        )
    return rows.take(right)


def _attention(rows: Rows, columns: dict[str, float]) -> tuple[tuple[Floats, ...], Floats]:
    seconds = times(rows, "latency") * MILLI
    values = {name: sizes(rows, name) + shift for name, shift in columns.items()}
    return attention_table(rows, np.ones(len(seconds), dtype=bool), values, seconds, quorum=QUORUM)


def _with_experts(profile: Profile, rows: Rows, shape: ModelShape, expert_parallel: int) -> Profile:
    """The experts' products; their load is the most even one that was measured."""
    need(
        rows, ["moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "latency", "distribution"]
    )
    wanted = {
        "hidden_size": shape.hidden,
        "inter_size": shape.expert_intermediate,
        "topk": shape.experts_per_token,
        "num_experts": shape.experts,
        "moe_ep_size": expert_parallel,
        "moe_tp_size": profile.tensor_parallel // expert_parallel,
    }
    right = _typed(rows, "moe_dtype", profile.precision)
    for column, value in wanted.items():
        right &= sizes(rows, column) == value
    if not right.any():
        given = ", ".join(f"{column} = {value}" for column, value in wanted.items())
        raise ScenarioError(f"{rows.path}: holds no experts of {shape.name} ({given}); give another profile")
    rows = rows.take(right)
    loads = words(rows, "distribution")
    even = min(set(loads.tolist()), key=lambda load: (load not in ("uniform", "balanced"), load))
    rows = rows.take(loads == even)
    curve = pivot([sizes(rows, "num_tokens", 1)], times(rows, "latency") * MILLI)
    note = f"experts: measured with the load {even}, without the gate"
    tokens = {**profile.tokens, "moe": Curve(curve[0][0], curve[1])}
    return replace(profile, tokens=tokens, notes=(*profile.notes, note))


def _all_reduce(files: Mapping[str, Path], gpus: int) -> Curve | None:
    """The all-reduce of vLLM itself under CUDA graphs, else NCCL's; `message_size` counts numbers of the given type.

    That it counts numbers and not bytes shows in NCCL's table, where two-byte numbers take twice the time of one-byte
    ones of the same message_size, and in 222 GB/s per GPU among eight A100, which NVLink 3 allows.
    """
    for kind, graph in (("custom_allreduce", "vllm_graph"), ("nccl", "")):
        if kind in files and gpus > 1:
            rows = read_rows(files[kind])
            dtype = next((name for name in rows.data.columns if name.endswith("_dtype")), "dtype")
            need(rows, ["op_name", dtype, "num_gpus", "message_size", "latency"])
            right = (rows.data["op_name"] == "all_reduce").to_numpy() & (sizes(rows, "num_gpus", 1) == gpus)
            right &= _typed(rows, dtype, "bf16")
            if graph and "backend" in rows.data.columns:
                right &= (rows.data["backend"] == graph).to_numpy()
            if right.any():
                rows = rows.take(right)
                width = rows.data[dtype].map(lambda name: BYTES.get(name, 2)).to_numpy(dtype=float)
                return rising(sizes(rows, "message_size", 1) * width, times(rows, "latency") * MILLI)
    return None
