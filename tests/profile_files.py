"""Profile files in every layout, with times that follow formulas which interpolation reproduces exactly.

Operators are affine in tokens, decode attention bilinear, prefill attention linear in the cached context of each chunk;
so the time of a step has a closed form, written here once more without the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

TOKENS = np.array([1, 2, 4, 16, 64, 256, 1024, 2048])
CHUNKS = np.array([16, 64, 256, 1024, 2048])
CACHED = np.array([0, 16, 256, 1024, 4096])
BATCH = np.array([1, 4, 16, 64, 256])
CONTEXT = np.array([16, 256, 1024, 4096])
DENSE = {
    "embedding": (2.0, 0.002),
    "layernorm": (2.0, 0.01),
    "qkv_proj": (50.0, 0.3),
    "rotary_emb": (2.0, 0.01),
    "o_proj": (30.0, 0.2),
    "gate_up_proj": (200.0, 1.4),
    "act_fn": (3.0, 0.08),
    "down_proj": (100.0, 0.7),
    "final_layernorm": (2.0, 0.01),
}
"""Microseconds: of a call, and of a token."""
HEADS = {"lm_head": (700.0, 2.0), "sampler": (25.0, 1.0)}
PER_MODEL = ("embedding", "final_layernorm")
TWICE = ("layernorm",)


def prefill_us(chunk: float, cached: float) -> float:
    """Pure prefill attention of one layer; a launch, the tokens, and the pairs."""
    return 8.0 + 0.01 * chunk + 2e-5 * chunk * (cached + 0.5 * chunk)


def decode_us(batch: float, context: float) -> float:
    """Decode-only attention of one layer."""
    return 9.0 + 0.05 * batch + 1e-3 * batch * context


def mixed_us(chunk: float, cached: float, batch: float, context: float) -> float:
    """Attention of a step with both: decode costs twice as much as alone."""
    return prefill_us(chunk, cached) + 2.0 * (0.05 * batch + 1e-3 * batch * context)


@dataclass(frozen=True)
class Tables:
    """The four files as frames; any may be changed before it is written."""

    dense: pd.DataFrame
    per_sequence: pd.DataFrame
    attention: pd.DataFrame
    moe: pd.DataFrame | None = None

    def write(self, folder: Path, prefix: str = "") -> Path:
        """Write them into a folder, each name with the prefix; returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("dense", "per_sequence", "attention", "moe"):
            frame = getattr(self, kind)
            if frame is not None:
                frame.to_csv(folder / f"{prefix}{kind}.csv", index=False)
        return folder


def tables(*, extra: dict[str, tuple[float, float]] | None = None, without: tuple[str, ...] = ()) -> Tables:
    """LLMServingSim's files with the formulas above, older columns."""
    operators = {name: ab for name, ab in {**DENSE, **(extra or {})}.items() if name not in without}
    dense = [(name, t, a + b * t) for name, (a, b) in operators.items() for t in TOKENS]
    heads = [(name, s, a + b * s) for name, (a, b) in HEADS.items() if name not in without for s in BATCH]
    return Tables(
        pd.DataFrame(dense, columns=["layer", "tokens", "time_us"]),
        pd.DataFrame(heads, columns=["layer", "sequences", "time_us"]),
        attention(),
    )


def attention() -> pd.DataFrame:
    """Pure and mixed attention over full grids."""
    rows = [(0, 0, n, k, decode_us(n, k)) for n in BATCH for k in CONTEXT]
    rows += [(c, h, 0, 0, prefill_us(c, h)) for c in CHUNKS for h in CACHED]
    rows += [(c, h, n, k, mixed_us(c, h, n, k)) for c in CHUNKS for h in CACHED for n in BATCH[:-1] for k in CONTEXT]
    return pd.DataFrame(rows, columns=["prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"])


def newer_attention() -> pd.DataFrame:
    """The same kernel against the mean keys of a query on one axis for all chunks, with the newer columns."""
    keys = np.array([16, 64, 256, 1024, 2048, 4096, 8192])
    rows = [("attention", 0, 0.0, n, k, 1, decode_us(n, k)) for n in BATCH for k in CONTEXT]
    rows += [("attention", c, key, 0, 0, 1, prefill_us(c, key - c / 2)) for c in CHUNKS for key in keys]
    rows += [
        ("attention", c, key, n, k, 1, mixed_us(c, key - c / 2, n, k))
        for c in CHUNKS
        for key in keys
        for n in BATCH[:-1]
        for k in CONTEXT
    ]
    rows += [("indexer", 0, 0.0, n, k, 1, 1.0) for n in BATCH for k in CONTEXT]
    rows += [("attention", 0, 0.0, n, k, 4, 3.0 * decode_us(n, k)) for n in BATCH for k in CONTEXT]
    columns = ["layer", "prefill_chunk", "prefill_key", "n_decode", "kv_decode", "decode_q_len", "time_us"]
    return pd.DataFrame(rows, columns=columns).assign(measurement_runs=3)


def step_us(layers: int, chunk: float, cached: float, batch: float, context: float) -> float:
    """A whole step of one prefill chunk (or none) and `batch` decode sequences, in closed form."""
    tokens, total = chunk + batch, 0.0
    for name, (a, b) in DENSE.items():
        total += (1 if name in PER_MODEL else layers * (2 if name in TWICE else 1)) * (a + b * tokens)
    total += sum(a + b * (batch + (chunk > 0)) for a, b in HEADS.values())
    attention_us = mixed_us(chunk, cached, batch, context) if chunk else decode_us(batch, context)
    return total + layers * attention_us


def kernels(degrees: tuple[int, ...] = (1, 2), heads: int = 64, kv: int = 8, hidden: int = 8192) -> pd.DataFrame:
    """Vidur's mlp.csv: milliseconds by tokens and degree, the formulas above divided by the degree."""
    names = {"emb": "embedding", "input_layernorm": "layernorm", "attn_pre_proj": "qkv_proj", "attn_rope": "rotary_emb"}
    names |= {"attn_post_proj": "o_proj", "post_attention_layernorm": "layernorm", "mlp_up_proj": "gate_up_proj"}
    names |= {"mlp_act": "act_fn", "mlp_down_proj": "down_proj", "add": "layernorm"}
    rows = []
    for degree in degrees:
        for t in TOKENS:
            times = {
                f"time_stats.{own}.median": 1e-3 * (DENSE[n][0] + DENSE[n][1] * t) / degree for own, n in names.items()
            }
            shape = {"n_head": heads, "n_kv_head": kv, "n_embd": hidden, "n_expanded_embd": 28672}
            rows.append({**times, **shape, "num_tokens": t, "num_tensor_parallel_workers": degree})
    return pd.DataFrame(rows)


def kernel_attention(
    degrees: tuple[int, ...] = (1, 2), heads: int = 64, kv: int = 8, hidden: int = 8192
) -> pd.DataFrame:
    """Vidur's attention.csv: prefill of one request where chunk and context fit into 4096, and decode batches."""
    rows = []
    shape = {"n_embd": hidden, "n_q_head": heads, "n_kv_head": kv}
    for degree in degrees:
        for c in CHUNKS:
            for h in (0, 256, 1024, 2048, 4032):
                if c + h <= 4096:
                    rows.append((degree, 1, c, h, True, 1e-3 * prefill_us(c, h) / degree, np.nan))
        for n in BATCH[:-1]:
            for k in CONTEXT:
                rows.append((degree, n, 0, k, False, np.nan, 1e-3 * decode_us(n, k) / degree))
    columns = ["num_tensor_parallel_workers", "batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill"]
    frame = pd.DataFrame(rows, columns=[*columns, "time_stats.attn_prefill.median", "time_stats.attn_decode.median"])
    return frame.assign(
        **shape, **{"time_stats.attn_input_reshape.median": 0.0, "time_stats.attn_output_reshape.median": 1e-3}
    )


def network(bandwidth: float = 1.5e11, latency: float = 2e-5) -> pd.DataFrame:
    """Vidur's all_reduce.csv: an affine all-reduce among 2 and 4 GPUs of one node, and one across nodes."""
    size = np.unique(np.geomspace(2048, 2**26, 40).astype(int))
    rows = [(g, d, s, 1e3 * (latency + s * g / 2 / bandwidth)) for g, d in ((2, 2), (4, 4), (2, 1)) for s in size]
    columns = ["num_workers", "devices_per_node", "size", "time_stats.all_reduce.median"]
    return pd.DataFrame(rows, columns=columns)
