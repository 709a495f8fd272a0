"""Measured seconds of Attention, FFN and transfers for one layer, out of kernel and network tables.

    Attention worker, decode    norm, query/key/value projection, rotary embedding, writing and reading the KV cache,
                                output projection: B sequences with K KV tokens in all
    Attention worker, prompts   the same for one prompt of P tokens that is not cached, and for both in one step
    FFN server                  norm, and the dense layer or gate, shuffling and experts, for n tokens
    transfer                    one hop between two devices, or one half of an all-to-all among eight

Kernel times of a step are added up, as everywhere in `llmopt.profiles`; nothing is taken to overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmopt.arrays import Bools, Floats
from llmopt.machines import Accelerator, ModelShape
from llmopt.machines.roofline import BANDWIDTH_EFFICIENCY
from llmopt.profiles import find_profile
from llmopt.profiles.data import Curve, Grid, Profile
from llmopt.profiles.estimates import START, moved_bytes
from llmopt.profiles.files import Rows, numbers, read_rows, sizes, times, words
from llmopt.profiles.grids import pivot
from llmopt.profiles.transfers import read_network

MILLI, MICRO = 1e-3, 1e-6
KV_BYTES = 2.0
"""Bytes of a number in the caches and between devices, where nothing is quantised."""
BATCHES, CONTEXTS = (8.0, 512.0), (64.0, 32_768.0)
"""Micro-batches and mean contexts to which Attention is fitted."""
PROMPTS = (32.0, 8192.0)
"""Prompt tokens of a step to which Attention is fitted."""
AITABLES = "aiconfigurator/data"
A100, H100 = "a100_sxm__{}__vllm__0.14.0__{}_perf.parquet", "h100_sxm__{}__{}__{}_perf.parquet"


@dataclass(frozen=True, eq=False)
class Points:
    """Measured steps of one stage: features (n, 4) as of a fit, seconds (n,), and the kind of each, by name, (n,)."""

    features: Floats
    seconds: Floats
    kinds: tuple[str, ...]

    def of(self, kind: str) -> Bools:
        """Which of the steps (n,) are of a kind."""
        return np.array([each == kind for each in self.kinds])

    @property
    def weights(self) -> Floats:
        """Decode steps count as much as all others together, and prompts alone as much as with decode steps."""
        share = {"decode": 2.0, "prompts": 1.0, "both": 1.0}
        return np.array([share[kind] / self.kinds.count(kind) for kind in self.kinds])


@dataclass(frozen=True, eq=False)
class Side:
    """What an Attention worker computes besides reading the cache: curves by tokens, each once a layer."""

    curves: Mapping[str, Curve]

    def __call__(self, tokens: Floats) -> Floats:
        """Seconds (n,) of all of them."""
        return np.sum([curve(tokens) for curve in self.curves.values()], axis=0)


def by_tokens(tokens: Floats, seconds: Floats, low: float, high: float) -> Points:
    """Steps of a stage that only depends on its number of tokens, those from low to high."""
    keep = (tokens >= low) & (tokens <= high)
    features = np.zeros((int(keep.sum()), 4))
    features[:, 1] = tokens[keep]
    return Points(features, seconds[keep], ("decode",) * len(features))


def attention_points(side: Side, decode: tuple[Floats, Floats, Floats], prompts: Curve | None = None) -> Points:
    """Decode steps, then whole prompts, then both in one step.

    Parameters
    ----------
    decode
        Sequences, mean context and seconds (n,) of the kernels that write and read the cache.
    prompts
        Seconds of the kernels for one fresh prompt, by its tokens.
    """
    batch, context, kernel = decode
    keep = (batch >= BATCHES[0]) & (batch <= BATCHES[1]) & (context >= CONTEXTS[0]) & (context <= CONTEXTS[1])
    batch, context, kernel = batch[keep], context[keep], kernel[keep]
    zero = np.zeros(len(batch))
    rows = [np.column_stack([zero, batch, batch * context, zero])]
    seconds, kinds = [kernel + side(batch)], ["decode"] * len(batch)
    if prompts is not None:
        chunk = prompts.at[(prompts.at >= PROMPTS[0]) & (prompts.at <= PROMPTS[1])]
        rows.append(np.column_stack([chunk, 0 * chunk, 0 * chunk, chunk**2 / 2]))
        seconds.append(prompts(chunk) + side(chunk))
        some = np.unique(np.linspace(0, len(batch) - 1, 60).astype(int))
        few = chunk[np.unique(np.linspace(0, len(chunk) - 1, 5).astype(int))]
        p, i = (mesh.ravel() for mesh in np.meshgrid(few, some))
        rows.append(np.column_stack([p, batch[i], (batch * context)[i], p**2 / 2]))
        seconds.append(prompts(p) + kernel[i] + side(p + batch[i]))
        kinds += ["prompts"] * len(chunk) + ["both"] * len(p)
    return Points(np.vstack(rows), np.concatenate(seconds), tuple(kinds))


def elementwise(names: tuple[str, ...], shape: ModelShape, chip: Accelerator) -> dict[str, Curve]:
    """Curves of operators that no table holds: a launch, and their bytes at three quarters of the bandwidth."""
    at = np.array([1.0, 65_536.0])
    speed = BANDWIDTH_EFFICIENCY * chip.bandwidth
    return {name: Curve(at, START + at * moved_bytes(shape, 1)[name] / speed) for name in names}


def product(shared: Path, n: int, k: int) -> Curve:
    """The A100's product of m tokens with n x k weights in bf16, by m."""
    rows = read_rows(shared / AITABLES / A100.format("gemm", "gemm"))
    rows = rows.take((sizes(rows, "n") == n) & (sizes(rows, "k") == k))
    return curve(rows, "m", times(rows, "latency") * MILLI)


def experts(shared: Path, shape: ModelShape, degree: int) -> Curve:
    """The A100's expert products of the busiest of `degree` GPUs that divide the experts, by the tokens of all."""
    rows = read_rows(shared / AITABLES / A100.format("moe", "moe"))
    wanted = {"hidden_size": shape.hidden, "inter_size": shape.expert_intermediate, "moe_ep_size": degree}
    wanted |= {"topk": shape.experts_per_token, "num_experts": shape.experts, "moe_tp_size": 1}
    right = words(rows, "distribution") == "power_law_1.01"
    for column, value in wanted.items():
        right &= sizes(rows, column) == value
    rows = rows.take(right)
    return curve(rows, "num_tokens", times(rows, "latency") * MILLI)


def curve(rows: Rows, column: str, seconds: Floats) -> Curve:
    """Medians of seconds (n,) by a column."""
    (at,), table = pivot([sizes(rows, column)], seconds)
    return Curve(at, table)


def measured_decode(shared: Path, gpu: str, shape: ModelShape) -> tuple[Floats, Floats, Floats]:
    """Sequences, context and seconds of every measured decode kernel with the model's heads, vLLM's FlashAttention."""
    name = A100.format("attention", "{}") if gpu == "a100" else H100.format("attention", "vllm__0.19.0", "{}")
    rows = _of_heads(read_rows(shared / AITABLES / name.format("generation_attention")), shape)
    # a generated token reads itself too
    return sizes(rows, "batch_size"), sizes(rows, "step") + 1.0, times(rows, "latency") * MILLI


def measured_prompts(shared: Path, gpu: str, shape: ModelShape) -> Curve:
    """Seconds of the kernel of one fresh prompt, by its tokens."""
    name = A100.format("attention", "{}") if gpu == "a100" else H100.format("attention", "vllm__0.19.0", "{}")
    rows = _of_heads(read_rows(shared / AITABLES / name.format("context_attention")), shape)
    rows = rows.take(sizes(rows, "batch_size") == 1)
    return curve(rows, "isl", times(rows, "latency") * MILLI)


def _of_heads(rows: Rows, shape: ModelShape) -> Rows:
    right = (sizes(rows, "num_heads") == shape.heads) & (sizes(rows, "num_key_value_heads") == shape.kv_heads)
    right &= (sizes(rows, "head_dim") == shape.head_dim) & (words(rows, "kv_cache_dtype") == "bfloat16")
    if "window_size" in rows.data.columns:
        right &= sizes(rows, "window_size") == 0
    return rows.take(right)


def whole_grid(grid: Grid | None) -> tuple[Floats, Floats, Floats]:
    """Sequences, context and seconds (n,) of a measured decode grid whose batches are multiples of the smallest."""
    assert grid is not None
    assert grid.filled == grid.extended == 0, "only measured entries"
    batch, context = (mesh.ravel() for mesh in np.meshgrid(*grid.axes, indexing="ij"))
    keep = batch % BATCHES[0] == 0
    return batch[keep], context[keep], grid.seconds.ravel()[keep]


def fresh(grid: Grid | None) -> Curve:
    """Seconds of a prompt with nothing cached, by its tokens."""
    assert grid is not None
    return Curve(grid.axes[0], grid.seconds[:, 0])


def frontier(shared: Path, model: str) -> Profile:
    """Frontier's tables of the A800."""
    return find_profile(shared / "frontier", "A800", model)


def send_recv(shared: Path, hidden: float) -> Points:
    """Two A100 of one node, over NVLink: seconds by tokens of `hidden` half-precision numbers."""
    found = read_network(shared / "vidur/net_a100_dgx_send_recv.csv", "send_recv", 2)
    assert found is not None
    return by_tokens(found.at / (KV_BYTES * hidden), found.seconds, 1.0, 16_384.0)


def deepep(shared: Path, shape: ModelShape) -> Iterator[tuple[str, Points]]:
    """DeepEP's low-latency kernels among the 8 H100 of a node: seconds by the tokens that each of them sends."""
    rows = read_rows(shared / AITABLES / H100.format("comm", "sglang__0.5.12", "wideep_deepep_ll"))
    wanted = {"hidden_size": shape.hidden, "num_topk": shape.experts_per_token, "num_experts": shape.experts}
    right = np.ones(len(rows.line), dtype=bool)
    for column, value in wanted.items():
        right &= sizes(rows, column) == value
    rows = rows.take(right)
    tokens = sizes(rows, "num_token")
    hops = {name: numbers(rows, f"{name}_avg_t_us") * MICRO for name in ("dispatch", "combine")}
    for name, seconds in (*hops.items(), ("mean of both", (hops["dispatch"] + hops["combine"]) / 2)):
        yield name, by_tokens(tokens, seconds, 1.0, 1024.0)
