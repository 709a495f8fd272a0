"""Shapes of public models: what their parameters, KV cache and floating-point operations follow from.

Each model is a TOML file in `llmopt/machines/models`, with the constants of its published config.json and their source.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmopt.errors import ScenarioError
from llmopt.model import InputModel

Count = Annotated[int, Field(ge=0, le=10_000_000)]
Positive = Annotated[int, Field(ge=1, le=10_000_000)]

BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "nvfp4": 9 / 16,
    "mxfp4": 17 / 32,
    "int4": 33 / 64,
}
"""Bytes of one weight. Four-bit formats with their scales: one byte for 16 weights (NVFP4), one for 32 (OCP MXFP4), one
half-precision number for 128 (GPTQ and AWQ with their usual group)."""
UNQUANTISED = 2.0
"""Bytes of a weight that no checkpoint quantises: embeddings, output head, norms, biases, router."""


def weight_size(precision: str) -> float:
    """Bytes of one weight of this precision.

    Raises
    ------
    ScenarioError
        If the precision is not known.
    """
    if precision not in BYTES:
        raise ScenarioError(f"precision {precision!r} is not known; known are {', '.join(map(repr, BYTES))}")
    return BYTES[precision]


class ModelShape(InputModel):
    """Constants of a decoder-only transformer, named as in its config.json where possible.

    layers, hidden, heads, kv_heads, head_dim, vocab: as published; head_dim is the width of a query and key head.
    intermediate: width of a dense feed-forward layer, 0 if every layer has experts; gated: three matrices, not two.
    tied: the output head is the embedding. biases: none, of the query, key and value projections, or of everything.
    qk_norm: norms of query and key heads. positions: rows of a learnt position table, 0 for rotary positions.

    experts, experts_per_token, expert_intermediate: routed experts of a layer, how many a token visits, their width;
    shared_intermediate: width of all shared experts of a layer together; dense_layers: first layers without experts.

    attention: "gqa" (grouped or multi-head: keys and values of `kv_heads` heads are cached) or "mla" (multi-head latent
    attention: one compressed vector of kv_lora_rank + qk_rope_head_dim is cached for all heads, DeepSeek-V2, arXiv
    2405.04434); q_lora_rank, kv_lora_rank, qk_rope_head_dim, v_head_dim belong to the latter.

    window, window_layers: that many layers see only the last `window` tokens. precision: of the published weights.
    """

    name: str
    aliases: Annotated[tuple[str, ...], Field(strict=False)] = ()
    layers: Positive
    hidden: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    intermediate: Count
    vocab: Positive
    gated: bool = True
    tied: bool = False
    biases: Literal["none", "qkv", "all"] = "none"
    qk_norm: bool = False
    positions: Count = 0
    attention: Literal["gqa", "mla"] = "gqa"
    q_lora_rank: Count = 0
    kv_lora_rank: Count = 0
    qk_rope_head_dim: Count = 0
    v_head_dim: Count = 0
    experts: Count = 0
    experts_per_token: Count = 0
    expert_intermediate: Count = 0
    shared_intermediate: Count = 0
    dense_layers: Count = 0
    window: Count = 0
    window_layers: Count = 0
    precision: str = "bf16"
    source: Annotated[str, Field(min_length=10)]

    @model_validator(mode="after")
    def _whole(self) -> ModelShape:
        if self.precision not in BYTES:
            raise ValueError(f"has precision = {self.precision!r}; known are {', '.join(map(repr, BYTES))}")
        if self.experts and not (0 < self.experts_per_token <= self.experts and self.expert_intermediate):
            raise ValueError(
                "has experts without experts_per_token (at most experts) and expert_intermediate; give both"
            )
        if self.attention == "mla" and not (self.q_lora_rank and self.kv_lora_rank and self.v_head_dim):
            raise ValueError('has attention = "mla" without q_lora_rank, kv_lora_rank and v_head_dim; give all three')
        return self

    @property
    def summary(self) -> str:
        """Size, kind and KV cache in one line."""
        active = f", {self.active_parameters / 1e9:.3g} active ({self.experts_per_token} of {self.experts} experts)"
        kind = f"{self.kv_heads} heads" if self.attention == "gqa" else "latent"
        window = f", {self.window_layers} of them with a window of {self.window}" if self.window_layers else ""
        return (
            f"{self.parameters / 1e9:.3g} billion parameters{active if self.experts else ''}, {self.precision}, "
            f"{self.layers} layers{window}, KV of {self.kv_bytes_per_token() / 1024:,.4g} KiB a token ({kind})"
        )

    @property
    def expert_layers(self) -> int:
        """Layers with routed experts."""
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def full_layers(self) -> int:
        """Layers whose attention sees the whole context."""
        return self.layers - self.window_layers

    @property
    def attention_weights(self) -> int:
        """Weights of the attention matrices of one layer."""
        if self.attention == "gqa":
            return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        nope = self.head_dim - self.qk_rope_head_dim
        query = self.q_lora_rank * (self.hidden + self.heads * self.head_dim)
        latent = self.hidden * (self.kv_lora_rank + self.qk_rope_head_dim)
        expand = self.kv_lora_rank * self.heads * (nope + self.v_head_dim)
        return query + latent + expand + self.heads * self.v_head_dim * self.hidden

    def ffn_weights(self, width: int) -> int:
        """Weights of the matrices of a feed-forward layer of this width."""
        return (3 if self.gated else 2) * self.hidden * width

    @property
    def head_weights(self) -> int:
        """Weights of the output head, which may be those of the embedding."""
        return self.hidden * self.vocab

    @property
    def router_weights(self) -> int:
        """Weights of all routers together."""
        return self.expert_layers * self.hidden * self.experts

    @property
    def expert_weights(self) -> int:
        """Weights of all routed experts together."""
        return self.expert_layers * self.experts * self.ffn_weights(self.expert_intermediate)

    @property
    def visited_expert_weights(self) -> int:
        """Weights of the routed experts that one token visits."""
        return self.expert_layers * self.experts_per_token * self.ffn_weights(self.expert_intermediate)

    @property
    def dense_weights(self) -> int:
        """Weights of the matrices that every token meets: attention, dense and shared feed-forward, routers."""
        dense = (self.layers - self.expert_layers) * self.ffn_weights(self.intermediate)
        shared = self.expert_layers * self.ffn_weights(self.shared_intermediate)
        return self.layers * self.attention_weights + dense + shared + self.router_weights

    @property
    def small_parameters(self) -> int:
        """Norms and biases."""
        norms = (2 * self.layers + 1) * self.hidden * (2 if self.biases == "all" else 1)
        norms += 2 * self.head_dim * self.layers if self.qk_norm else 0
        norms += (self.q_lora_rank + self.kv_lora_rank) * self.layers if self.attention == "mla" else 0
        return norms + self._bias_parameters

    @property
    def _bias_parameters(self) -> int:
        if self.biases == "none":
            return 0
        qkv = self.layers * self.head_dim * (self.heads + 2 * self.kv_heads)
        if self.biases == "qkv":
            return qkv
        up = 2 if self.gated else 1
        dense = (self.layers - self.expert_layers) * (up * self.intermediate + self.hidden)
        routed = self.expert_layers * self.experts * (up * self.expert_intermediate + self.hidden + 1)
        return qkv + self.layers * self.hidden + dense + routed

    @property
    def embedding_parameters(self) -> int:
        """Token and position embeddings and the output head; a tied head counts once."""
        return self.head_weights * (1 if self.tied else 2) + self.positions * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.dense_weights + self.expert_weights + self.small_parameters + self.embedding_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: of the routed experts those that it visits."""
        return self.parameters - self.expert_weights + self.visited_expert_weights

    def weight_bytes(self, precision: str | None = None) -> float:
        """Bytes of all weights on all GPUs together.

        Embeddings, output head, norms, biases and routers stay in half precision in every quantised checkpoint
        (`UNQUANTISED`); with MXFP4 only the experts are quantised (OpenAI, gpt-oss model card, section 2.1).
        """
        chosen = precision or self.precision
        size = weight_size(chosen)
        dense = UNQUANTISED if chosen == "mxfp4" else size
        plain = max(size, UNQUANTISED)
        rest = self.small_parameters + self.embedding_parameters + self.router_weights
        return self.expert_weights * size + (self.dense_weights - self.router_weights) * dense + rest * plain

    def step_bytes(self, precision: str | None = None, *, experts: float | None = None) -> float:
        """Bytes of the weights that one step reads, on all GPUs together: no embedding rows, but the output head.

        Parameters
        ----------
        experts
            Routed experts of a layer that the batch touches; all of them if absent.
        """
        size = weight_size(precision or self.precision)
        touched = self.experts if experts is None else experts
        unread = self.expert_weights * (1 - touched / self.experts) * size if self.experts else 0.0
        unread += max(size, UNQUANTISED) * (self.embedding_parameters - self.head_weights)
        return self.weight_bytes(precision) - unread

    @property
    def cached_width(self) -> int:
        """Numbers that the KV cache holds for one token in one layer."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.kv_heads * self.head_dim

    def kv_bytes_per_token(self, precision: str | None = None) -> float:
        """Bytes of KV cache of one token in all layers, on all GPUs together.

        Half precision if absent, whatever the weights have, as with vLLM's kv_cache_dtype = "auto". A layer with a
        window counts in full: vLLM reports its capacity so, and the sequence holds less than that beyond the window.
        """
        return self.layers * self.cached_width * (UNQUANTISED if precision is None else weight_size(precision))

    def kv_shards(self, tensor_parallel: int) -> int:
        """Among how many GPUs of a tensor-parallel group the KV cache is divided: a KV head is never split.

        Raises
        ------
        ScenarioError
            If the heads cannot be divided evenly among so many GPUs, as every engine demands.
        """
        shared = 1 if self.attention == "mla" else self.kv_heads
        if self.heads % tensor_parallel or (shared % tensor_parallel and tensor_parallel % shared):
            known = [n for n in (1, 2, 4, 8, 16) if self.heads % n == 0 and not (shared % n and n % shared)]
            raise ScenarioError(
                f"{self.name} has {self.heads} heads and {self.kv_heads} KV heads, which tensor_parallel = "
                f"{tensor_parallel} does not divide evenly; take one of {', '.join(map(str, known))}"
            )
        return 1 if self.attention == "mla" else min(tensor_parallel, self.kv_heads)

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of a token in all layers without attention itself and without the output head.

        Two for each weight that it meets (one multiplication, one addition).
        """
        return 2.0 * (self.dense_weights + self.visited_expert_weights)

    @property
    def head_flops(self) -> float:
        """Floating-point operations of the output head for one sequence."""
        return 2.0 * self.head_weights

    @property
    def flops_per_pair(self) -> float:
        """Floating-point operations of one (query, key) pair of prefill attention in the layers with whole context.

        Two products of the width of a head: scores with the key, weights with the value. MLA prefills in its expanded,
        multi-head form (192 and 128 wide in DeepSeek-V3), which has the fewest operations a pair.
        """
        wide = self.head_dim + (self.v_head_dim if self.attention == "mla" else self.head_dim)
        return 2.0 * self.full_layers * self.heads * wide

    @property
    def flops_per_kv(self) -> float:
        """Floating-point operations of decode attention for one KV token of one sequence, layers with whole context.

        MLA decodes in its absorbed form: every head works on the compressed vector itself, so that it need not be
        expanded; scores are kv_lora_rank + qk_rope_head_dim wide and values kv_lora_rank (576 and 512 in DeepSeek-V3).
        """
        if self.attention == "mla":
            return 2.0 * self.full_layers * self.heads * (self.cached_width + self.kv_lora_rank)
        return self.flops_per_pair
