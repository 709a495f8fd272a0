"""KV capacity of a replica: how many tokens fit beside weights and activations.

The engine's own rule, vLLM's `Worker.determine_available_memory` (vllm/v1/worker/gpu_worker.py): of the memory that the
utilisation setting grants, what weights, the peak of a profiling run and memory outside of PyTorch leave is the cache.
The profiling run forwards as many tokens as the budget allows and samples for as many sequences as the batch may hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.errors import ScenarioError
from llmopt.machines.accelerators import Accelerator
from llmopt.machines.shapes import UNQUANTISED, ModelShape, weight_size

SAMPLER_BYTES = 38.0
"""Bytes that sampling needs at its peak for one logit: the logits in half and in single precision, and top-p sampling,
which sorts them with 64-bit indices and scratch space. vLLM logs of 256 sequences say 1.19 GiB for Llama-3.1-8B and
1.40 GiB for Qwen3-8B, 38.4 and 38.2 bytes; vLLM's pull request 32558 measured 37 for the sort alone. Sampling without a
sort needs less than half."""
ENGINE_BYTES = 80e6
"""Memory outside of PyTorch, mostly kernels and cuBLAS workspaces: non_torch_memory in four public vLLM logs of one GPU
is 0.05, 0.06, 0.09 and 0.12 GiB. The CUDA context is not in it: it lies in what the utilisation setting leaves."""
NCCL_PAIR, NCCL_MANY = 358612992.0, 411041792.0
"""Buffers of the collective library on each GPU of a group of two, and of more: aiconfigurator, nccl_mem in
systems/*.yaml at 095f58a5; public vLLM logs have 0.2 to 0.25 GiB in all."""
GRAPHS = (
    "CUDA graphs are not subtracted: before 0.21 vLLM did not either, since then it takes off an estimate of its own, "
    "from next to nothing to 2 GiB, which --kv-cache-memory-bytes or the log of a start says"
)


@dataclass(frozen=True)
class Part:
    """One term of the sum, bytes on one GPU, with its reason."""

    name: str
    bytes: float
    source: str


@dataclass(frozen=True)
class KvCapacity:
    """KV tokens of a replica, and the sum behind them.

    tokens: whole blocks; bytes_per_token: of one GPU; parts: what the GPU grants (positive) and what takes from it
    (negative), so that they add up to the cache; caveat: what is left out.
    """

    tokens: int
    bytes_per_token: float
    parts: tuple[Part, ...]
    caveat: str = GRAPHS

    @property
    def cache_bytes(self) -> float:
        """What remains for the cache on one GPU."""
        return sum(part.bytes for part in self.parts)

    def lines(self) -> list[str]:
        """The sum, one line a term, in GiB."""
        rows = [(part.name, part.bytes, part.source) for part in self.parts]
        total = f"{self.tokens:,} tokens of {self.bytes_per_token:,.0f} bytes in whole blocks; {self.caveat}"
        return [
            f"{size / 2**30:9.3f} GiB  {name}: {why}" for name, size, why in [*rows, ("cache", self.cache_bytes, total)]
        ]


def kv_capacity(
    shape: ModelShape,
    accelerator: Accelerator,
    *,
    tensor_parallel: int = 1,
    expert_parallel: int = 1,
    precision: str | None = None,
    kv_precision: str | None = None,
    utilisation: float = 0.9,
    token_budget: int = 2048,
    max_batch: int = 256,
    block_size: int = 16,
    memory_bytes: float | None = None,
) -> KvCapacity:
    """KV tokens that a replica of `tensor_parallel` GPUs holds.

    floor((utilisation memory - weights - activations - engine - collectives) / bytes of a token on one GPU), in blocks.

    Parameters
    ----------
    tensor_parallel, expert_parallel
        GPUs that share every matrix; GPUs that share the routed experts, at least as many.
    precision, kv_precision
        Of weights, the published one if absent; of the cache, half precision if absent.
    utilisation
        Part of the memory that the engine may use (vLLM gpu_memory_utilization).
    token_budget, max_batch, block_size
        As of a pool.
    memory_bytes
        What the driver reports for this machine, if it is known better than the catalog does.

    Raises
    ------
    ScenarioError
        If a precision is not known, or if nothing is left for a block.
    """
    total = memory_bytes or accelerator.memory_bytes
    parts = (
        Part("granted", utilisation * total, f"{utilisation:g} of {total / 2**30:.2f} GiB"),
        _weights(shape, tensor_parallel, expert_parallel, precision),
        _activations(shape, tensor_parallel, token_budget, max_batch),
        Part("engine", -ENGINE_BYTES, "kernels and workspaces outside of PyTorch, as in public vLLM logs"),
        *_collectives(tensor_parallel),
    )
    per_token = shape.kv_bytes_per_token(kv_precision) / shape.kv_shards(tensor_parallel)
    left = sum(part.bytes for part in parts)
    blocks = int(left // (per_token * block_size))
    if blocks < 1:
        raise ScenarioError(_too_large(shape, accelerator, tensor_parallel, parts))
    return KvCapacity(blocks * block_size, per_token, parts)


def _weights(shape: ModelShape, tensor_parallel: int, expert_parallel: int, precision: str | None) -> Part:
    chosen = precision or shape.precision
    experts = shape.expert_weights * weight_size(chosen)
    sharing = max(tensor_parallel, expert_parallel)
    size = (shape.weight_bytes(chosen) - experts) / tensor_parallel + experts / sharing
    among = f" on {tensor_parallel} GPUs" if tensor_parallel > 1 else ""
    among += f", experts on {sharing}" if sharing > tensor_parallel else ""
    return Part("weights", -size, f"{shape.parameters:,} parameters in {chosen}{among}")


def _collectives(tensor_parallel: int) -> tuple[Part, ...]:
    if tensor_parallel == 1:
        return ()
    size = NCCL_PAIR if tensor_parallel == 2 else NCCL_MANY
    return (Part("collectives", -size, f"NCCL buffers of {tensor_parallel} GPUs"),)


def _activations(shape: ModelShape, tensor_parallel: int, tokens: int, sequences: int) -> Part:
    """The larger of the widest layer for all tokens of the budget and the sampling of all sequences of the batch."""
    layer = tokens * UNQUANTISED * (2 * shape.hidden + _widest(shape) / tensor_parallel)
    sampling = tokens * UNQUANTISED * shape.hidden + SAMPLER_BYTES * sequences * shape.vocab
    if layer > sampling:
        return Part("activations", -layer, f"the widest layer for {tokens:,} tokens")
    return Part("activations", -sampling, f"sampling for {sequences:,} sequences, {SAMPLER_BYTES:g} bytes a logit")


def _widest(shape: ModelShape) -> float:
    """Numbers that a layer holds at once for one token besides the residual stream, on all GPUs together."""
    up = 3 if shape.gated else 1
    dense = up * max(shape.intermediate, shape.shared_intermediate)
    # Fused expert kernels keep both projections, and the outputs before they are summed, of every visited expert.
    visit = max((up - 1) * shape.expert_intermediate, shape.hidden) + shape.expert_intermediate
    latent = shape.head_dim + shape.v_head_dim if shape.attention == "mla" else 0
    attention = 2 * shape.heads * (shape.head_dim + latent / 2) + 2 * shape.kv_heads * shape.head_dim
    return float(max(dense, shape.experts_per_token * visit, attention))


def _too_large(shape: ModelShape, accelerator: Accelerator, tensor_parallel: int, parts: tuple[Part, ...]) -> str:
    granted, taken = parts[0].bytes, -sum(part.bytes for part in parts[1:])
    return (
        f"{shape.name} leaves no KV memory on {tensor_parallel} x {accelerator.name}: weights, activations and engine "
        f"take {taken / 2**30:.1f} of {granted / 2**30:.1f} GiB of each; raise tensor_parallel or lower the precision"
    )
