"""Peaks of accelerators: memory, bandwidth, dense arithmetic and links, each with its source.

Each accelerator is a TOML file in `llmopt/machines/accelerators`. Data sheets like to quote arithmetic with sparsity;
here it is always dense, since no serving engine multiplies sparse weights.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmopt.model import InputModel

Rate = Annotated[float, Field(gt=0, le=1e18)]
Precision = Literal["fp32", "bf16", "fp16", "fp8", "int8", "fp4"]
FOUR_BIT = ("nvfp4", "mxfp4", "int4")


class Accelerator(InputModel):
    """One accelerator.

    memory_bytes: what its driver reports to a program, where published, else what it is sold with. bandwidth: of its
    memory, B/s. flops: dense peak by precision with FP32 accumulation, FLOP/s. link, link_bandwidth, link_latency: how
    it is joined to its peers, B/s in one direction, s. power: W. gigabytes: what it is sold with, to tell variants
    apart by name. sources: where each constant comes from, and who says otherwise.
    """

    name: str
    aliases: Annotated[tuple[str, ...], Field(strict=False)] = ()
    gigabytes: Annotated[int, Field(ge=1, le=10_000)]
    memory_bytes: Annotated[int, Field(ge=2**30, le=2**44)]
    bandwidth: Rate
    flops: dict[Precision, Rate]
    link: str
    link_bandwidth: Rate
    link_latency: Annotated[float, Field(ge=0, le=1)]
    power: Annotated[float, Field(gt=0, le=10_000, strict=False)] | None = None
    sources: dict[str, str]

    @model_validator(mode="after")
    def _sourced(self) -> Accelerator:
        if "bf16" not in self.flops:
            raise ValueError("has no flops in bf16; give them")
        missing = {"memory_bytes", "bandwidth", "flops", "link", "link_latency"} - set(self.sources)
        if missing:
            raise ValueError(f"has no source for {', '.join(sorted(missing))}; name one")
        return self

    @property
    def summary(self) -> str:
        """Memory, bandwidth, dense BF16 peak and link in one line."""
        memory = f"{self.gigabytes} GB at {self.bandwidth / 1e12:.4g} TB/s"
        link = f"{self.link} of {self.link_bandwidth / 1e9:.0f} GB/s"
        return f"{memory}, {self.flops['bf16'] / 1e12:,.4g} TFLOP/s in BF16, {link}"

    def peak(self, precision: str) -> float:
        """Dense FLOP/s at which weights of this precision are multiplied.

        Where the accelerator has no arithmetic of that precision, and for the four-bit formats in general, weights are
        expanded to half precision first, as the engines' kernels do (weights of four bits, activations of sixteen).
        """
        exact = [flops for name, flops in self.flops.items() if name == precision]
        return exact[0] if exact else self.flops["bf16"]

    def fastest(self, precision: str) -> float:
        """Highest dense FLOP/s at which weights of this precision could possibly be multiplied."""
        if precision in FOUR_BIT:
            return max(self.flops.values())
        return self.peak(precision)
