"""Roofline: a documented first guess of the step time of any model on any accelerator, where nothing was measured.

A step reads every weight once and multiplies it with every token; whichever takes longer is a piece of the max-affine
step time. What runs in kernels of its own is added to both: attention (decode reads the KV cache, prefill multiplies),
norms, rotary embedding and activations (which move numbers), and what every kernel costs however small. Tensor
parallelism divides the matrices and adds two all-reduces a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.hardware import Piece
from llmopt.machines.accelerators import Accelerator
from llmopt.machines.shapes import UNQUANTISED, ModelShape, weight_size

COMPUTE_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.675, 0.75
"""Of the dense peak and of the memory bandwidth: the nearest to twelve measured profiles of dense models on four
accelerators, each accelerator weighing the same (`python -m benchmarks.roofline_error FOLDER --fit`). The best for a
single profile lie between 0.50 and 0.90 and between 0.58 and 0.85; see docs/machines.md."""
LINK_EFFICIENCY = 0.60
"""Of the rated link that a ring all-reduce of 64 MiB reaches: 52 to 58 % on two to eight A100 and 61 to 81 % on H100 in
Vidur's network profiles."""
KERNEL_SECONDS = 3e-6
"""What a kernel takes however small: aiconfigurator, mem_empirical_constant_latency in systems/*.yaml at 095f58a5."""
KERNELS, EXPERT_KERNELS = 10, 14
"""Kernels of a layer: two norms, projection of query, key and value, rotary embedding, cache write, attention, output
projection, up projection, activation, down projection; with experts also router, choice, sorting and sum."""


@dataclass(frozen=True)
class Rates:
    """What a tensor-parallel replica reaches: flops, bandwidth and link of all of it, FLOP/s and B/s; degree: GPUs."""

    degree: int
    flops: float
    bandwidth: float
    link: float


def roofline(
    shape: ModelShape,
    accelerator: Accelerator,
    *,
    tensor_parallel: int = 1,
    precision: str | None = None,
    kv_precision: str | None = None,
    compute_efficiency: float = COMPUTE_EFFICIENCY,
    bandwidth_efficiency: float = BANDWIDTH_EFFICIENCY,
    link_efficiency: float = LINK_EFFICIENCY,
    tokens: float | None = None,
) -> tuple[Piece, ...]:
    """Two pieces, ``memory`` and ``compute``, of the step time of a tensor-parallel replica.

        memory:  weights / bandwidth             + attention + elementwise + kernels + transfer
        compute: operations of the tokens / peak + attention + elementwise + kernels + transfer

    Mixture of experts: a batch of t tokens touches about E (1 - (1 - k/E)^t) of E experts, which is concave in t, so
    that no max-affine form follows it. The memory piece reads all experts, the upper bound that a batch of some 3 E/k
    tokens has all but reached; smaller batches are faster than it says, up to E/k times.

    Layers with a window read at most `window` tokens of a sequence: charged in full to every decode sequence and
    prefill token, which short contexts do not reach.

    Parameters
    ----------
    compute_efficiency, bandwidth_efficiency, link_efficiency
        Parts of the dense peak, of the memory bandwidth and of the link that a step reaches.
    tokens
        Tokens of a usual step, where a model with experts serves small batches: as many experts are read as so many
        tokens touch on average.
    """
    size = precision or shape.precision
    rates = Rates(
        tensor_parallel,
        tensor_parallel * accelerator.peak(size) * compute_efficiency,
        tensor_parallel * accelerator.bandwidth * bandwidth_efficiency,
        accelerator.link_bandwidth * link_efficiency,
    )
    common = _common(shape, accelerator, rates, kv_precision)
    read = shape.step_bytes(size, experts=touched(shape, tokens)) / rates.bandwidth
    token = shape.flops_per_token / rates.flops
    head = shape.head_flops / rates.flops
    memory = common.model_copy(update={"name": "memory", "base": common.base + read})
    work = {"prefill": common.prefill + token, "decode": common.decode + token + head}
    return memory, common.model_copy(update={"name": "compute", **work})


def touched(shape: ModelShape, tokens: float | None) -> float | None:
    """Experts of a layer that so many tokens touch on average, if each draws evenly; None for all of them."""
    if tokens is None or not shape.experts:
        return None
    return float(shape.experts * (1 - (1 - shape.experts_per_token / shape.experts) ** tokens))


def _common(shape: ModelShape, accelerator: Accelerator, rates: Rates, kv_precision: str | None) -> Piece:
    """What both pieces have: attention, elementwise kernels, the cost of a kernel, and transfers."""
    kernels = KERNEL_SECONDS * (KERNELS * (shape.layers - shape.expert_layers) + EXPERT_KERNELS * shape.expert_layers)
    kv, window_decode, window_prefill = _attention(shape, rates, kv_precision)
    latency, transfer = _transfer(shape, accelerator, rates)
    token = transfer + _elementwise(shape, rates)
    return Piece(
        base=kernels + latency,
        prefill=token + window_prefill,
        decode=token + window_decode,
        kv=kv,
        pairs=shape.flops_per_pair / rates.flops,
    )


def _attention(shape: ModelShape, rates: Rates, kv_precision: str | None) -> tuple[float, float, float]:
    """Seconds for a KV token read in decode; and of the windows for a decode sequence and for a prefill token."""
    number = UNQUANTISED if kv_precision is None else weight_size(kv_precision)
    copies = rates.degree / shape.kv_shards(rates.degree)
    row = copies * shape.cached_width * number / rates.bandwidth
    kv = max(shape.full_layers * row, shape.flops_per_kv / rates.flops)
    windows = shape.window_layers * shape.window
    return kv, windows * row, windows * 4.0 * shape.heads * shape.head_dim / rates.flops


def _elementwise(shape: ModelShape, rates: Rates) -> float:
    """Seconds of norms, rotary embedding and activations for a token: the numbers that they read and write.

    A norm reads and writes the token and the residual stream, on every GPU; the rotary embedding reads and writes
    queries and keys, the activation reads one or two projections and writes one, divided among the GPUs.
    """
    inputs = 3 if shape.gated else 2
    width = shape.intermediate if not shape.experts else shape.experts_per_token * shape.expert_intermediate
    divided = 2 * (shape.heads + shape.kv_heads) * shape.head_dim + inputs * (width + shape.shared_intermediate)
    whole = 2 * 4 * shape.hidden * rates.degree
    return UNQUANTISED * shape.layers * (whole + divided) / rates.bandwidth


def _transfer(shape: ModelShape, accelerator: Accelerator, rates: Rates) -> tuple[float, float]:
    """Seconds a step, and a token, of two all-reduces a layer: a ring moves 2 (n - 1)/n of the data over each link."""
    if rates.degree == 1:
        return 0.0, 0.0
    ring = 2.0 * (rates.degree - 1) / rates.degree
    reduces = 2.0 * shape.layers
    moved = reduces * ring * shape.hidden * UNQUANTISED
    return reduces * accelerator.link_latency, moved / rates.link
