"""Roofline: a documented first guess of the step time of any model on any accelerator, where nothing was measured.

A step reads every weight once and multiplies it with every token; whichever takes longer is a piece of the max-affine
step time. Attention runs in kernels of its own, so that its time is added to both: decode attention reads the KV cache,
prefill attention multiplies. Tensor parallelism divides both and adds two all-reduces a layer.
"""

from __future__ import annotations

from llmopt.hardware import Piece
from llmopt.machines.accelerators import Accelerator
from llmopt.machines.shapes import UNQUANTISED, ModelShape, weight_size

COMPUTE_EFFICIENCY = 0.70
BANDWIDTH_EFFICIENCY = 0.80
LINK_EFFICIENCY = 0.60


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
) -> tuple[Piece, ...]:
    """Two pieces, ``memory`` and ``compute``, of the step time of a tensor-parallel replica.

        memory:  weights / bandwidth            + attention + transfer
        compute: operations of the tokens / peak + attention + transfer

    Mixture of experts: a batch of t tokens touches about E (1 - (1 - k/E)^t) of E experts, which is concave in t, so
    that no max-affine form follows it. The memory piece reads all experts, the upper bound that a batch of some 3 E/k
    tokens has all but reached; smaller batches are faster than it says.

    Layers with a window read at most `window` tokens of a sequence: charged in full to every decode sequence and
    prefill token, which short contexts do not reach.

    Parameters
    ----------
    compute_efficiency, bandwidth_efficiency, link_efficiency
        Parts of the dense peak, of the memory bandwidth and of the link that a step reaches.
    """
    size = precision or shape.precision
    flops = tensor_parallel * accelerator.peak(size) * compute_efficiency
    bandwidth = tensor_parallel * accelerator.bandwidth * bandwidth_efficiency
    kv, decode, prefill = _attention(shape, tensor_parallel, flops, bandwidth, kv_precision)
    latency, transfer = _transfer(shape, accelerator, tensor_parallel, link_efficiency)
    pairs = shape.flops_per_pair / flops
    memory = Piece(
        name="memory",
        base=shape.step_bytes(size) / bandwidth + latency,
        prefill=transfer + prefill,
        decode=transfer + decode,
        kv=kv,
        pairs=pairs,
    )
    compute = Piece(
        name="compute",
        base=latency,
        prefill=shape.flops_per_token / flops + transfer + prefill,
        decode=(shape.flops_per_token + shape.head_flops) / flops + transfer + decode,
        kv=kv,
        pairs=pairs,
    )
    return memory, compute


def _attention(
    shape: ModelShape, tensor_parallel: int, flops: float, bandwidth: float, kv_precision: str | None
) -> tuple[float, float, float]:
    """Seconds of attention for a KV token read in decode, for a decode sequence, and for a prefill token."""
    number = UNQUANTISED if kv_precision is None else weight_size(kv_precision)
    copies = tensor_parallel / shape.kv_shards(tensor_parallel)
    row = copies * shape.cached_width * number / bandwidth
    kv = max(shape.full_layers * row, shape.flops_per_kv / flops)
    windows = shape.window_layers * shape.window
    return kv, windows * row, windows * 4.0 * shape.heads * shape.head_dim / flops


def _transfer(
    shape: ModelShape, accelerator: Accelerator, tensor_parallel: int, efficiency: float
) -> tuple[float, float]:
    """Seconds a step, and a token, of two all-reduces a layer: a ring moves 2 (n - 1)/n of the data over each link."""
    if tensor_parallel == 1:
        return 0.0, 0.0
    ring = 2.0 * (tensor_parallel - 1) / tensor_parallel
    reduces = 2.0 * shape.layers
    moved = reduces * ring * shape.hidden * UNQUANTISED
    return reduces * accelerator.link_latency, moved / (accelerator.link_bandwidth * efficiency)
