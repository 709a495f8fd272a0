"""What a profile did not measure and an engine still does: estimated from what was measured, and said in a note."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from llmopt.arrays import Floats
from llmopt.errors import ScenarioError
from llmopt.machines import Accelerator, ModelShape
from llmopt.machines.roofline import BANDWIDTH_EFFICIENCY, LINK_EFFICIENCY
from llmopt.profiles.data import Curve, Experts, Link, Profile
from llmopt.profiles.transfers import ring

ACTIVATION = 2
"""Bytes of a number between two operators; engines keep them in half precision whatever the weights have."""
START = 3e-6
"""Seconds before an elementwise kernel moves data: mem_empirical_constant_latency in aiconfigurator's systems."""


def completed(profile: Profile, shape: ModelShape, chip: Accelerator | None) -> Profile:
    """The profile with curves for what its layout never measures; each adds a note."""
    for complete in (_output_head, _last_norm, _elementwise):
        profile = complete(profile, shape, chip)
    return profile


def _noted(profile: Profile, note: str) -> tuple[str, ...]:
    return (*profile.notes, note)


def _output_head(profile: Profile, shape: ModelShape, _: Accelerator | None) -> Profile:
    """The output head as the product with the same inner width that was measured, scaled by the outputs."""
    tp = profile.tensor_parallel
    widths = {
        "gate_up_proj": (2 if shape.gated else 1) * shape.intermediate / tp,
        "qkv_proj": (shape.heads / tp + 2 * max(1.0, shape.kv_heads / tp)) * shape.head_dim,
    }
    known = next((name for name in widths if name in profile.tokens and widths[name]), None)
    if profile.layout == "llmservingsim" or known is None:
        return profile
    notes, sequences = profile.notes, dict(profile.sequences)
    if "lm_head" not in sequences:
        like, scale = profile.tokens[known], shape.vocab / tp / widths[known]
        sequences["lm_head"] = Curve(like.at, like.seconds * scale)
        notes = _noted(profile, f"lm_head: not measured, {known} times the ratio of their widths ({scale:.2f})")
    if "sampler" not in sequences:
        notes = (*notes, "sampler: not measured, left out")
    return replace(profile, sequences=sequences, notes=notes)


def _last_norm(profile: Profile, shape: ModelShape, _: Accelerator | None) -> Profile:
    first = profile.tokens.get("input_layernorm")
    if first is None or "final_layernorm" in profile.tokens:
        return profile
    tokens = {**profile.tokens, "final_layernorm": first}
    notes = _noted(profile, "final_layernorm: not measured, taken for input_layernorm")
    if shape.qk_norm and "qk_norm" not in profile.tokens:
        notes = (*notes, "qk_norm: not measured, left out")
    return replace(profile, tokens=tokens, notes=notes)


def moved_bytes(shape: ModelShape, tensor_parallel: int) -> dict[str, float]:
    """Bytes that each elementwise operator reads and writes for one token on one GPU.

    A norm reads and writes the hidden state and the residual; rotary embedding and query/key norm read and write the
    heads of query and key; a gated activation reads two numbers and writes one.
    """
    tp = tensor_parallel
    heads = 2.0 * (shape.heads / tp + max(1.0, shape.kv_heads / tp)) * shape.head_dim
    out = {"layernorm": 4.0 * shape.hidden, "final_layernorm": 4.0 * shape.hidden, "embedding": 2.0 * shape.hidden}
    out |= {} if shape.positions else {"rotary_emb": heads}
    out |= {"qk_norm": heads} if shape.qk_norm else {}
    if shape.layers > shape.expert_layers:
        out["act_fn"] = (3.0 if shape.gated else 2.0) * shape.intermediate / tp
    return {name: ACTIVATION * numbers for name, numbers in out.items()}


def _elementwise(profile: Profile, shape: ModelShape, chip: Accelerator | None) -> Profile:
    """Norms, activation, rotary embedding, embedding from the memory bandwidth, where only products were measured."""
    if profile.layout != "aiconfigurator" or "qkv_proj" not in profile.tokens:
        return profile
    missing = {n: b for n, b in moved_bytes(shape, profile.tensor_parallel).items() if n not in profile.tokens}
    names = ", ".join(sorted(missing))
    if chip is None:
        return replace(profile, notes=_noted(profile, f"{names}: not measured, left out for want of a bandwidth"))
    at = profile.tokens["qkv_proj"].at
    speed = BANDWIDTH_EFFICIENCY * chip.bandwidth
    curves = {name: Curve(at, START + at * moved / speed) for name, moved in missing.items()}
    note = f"{names}: not measured, {START * 1e6:g} us and their bytes at {BANDWIDTH_EFFICIENCY:.0%} of the bandwidth"
    return replace(profile, tokens={**profile.tokens, **curves}, notes=_noted(profile, note))


def transfer(profile: Profile, chip: Accelerator | None) -> tuple[Callable[[Floats], Floats], str]:
    """Seconds of an all-reduce by bytes, and a note unless it was measured.

    Raises
    ------
    ScenarioError
        If neither an all-reduce nor a link is known.
    """
    gpus = profile.tensor_parallel
    if profile.all_reduce is not None:
        return profile.all_reduce, ""
    link = link_of(profile, chip, f"all-reduce among {gpus} GPUs")
    return lambda size: ring(size, gpus, link), f"all-reduce: not measured, {described(link)}"


def link_of(profile: Profile, chip: Accelerator | None, what: str) -> Link:
    """The link from which a transfer that was not measured, `what`, is estimated: the profile's, else the chip's.

    Raises
    ------
    ScenarioError
        If none is known.
    """
    link = profile.link
    if link is None and chip is not None:
        # an all-reduce reaches 52 to 65 % of the link's peak on two A100, 61 % on two H100, 60 % on two RTX PRO 6000
        link = Link(LINK_EFFICIENCY * chip.link_bandwidth, chip.link_latency, f"{chip.link} of {chip.name}")
    if link is None:
        raise ScenarioError(
            f"{profile.name}: has no {what} and no link to estimate one; add a hardware.yaml or "
            "network table, or name an accelerator of the catalog"
        )
    return link


def described(link: Link) -> str:
    """How notes describe an estimate from a link."""
    return f"a ring over {link.source} ({link.bandwidth / 1e9:.0f} GB/s, {link.latency * 1e6:.1f} us a round)"


def expert_curve(experts: Experts, shape: ModelShape) -> Curve:
    """The expert block by tokens, at the expected number of activated experts under uniform routing.

    t tokens that choose k of E experts each activate E (1 - (1 - k/E)^t) of them in the mean; with the experts divided
    among GPUs, the same share of those of one GPU.
    """
    last = experts.tokens[-1]
    knots = np.unique(np.concatenate([experts.tokens, np.rint(np.geomspace(1.0, last, 64))]))
    share = 1.0 - (1.0 - shape.experts_per_token / shape.experts) ** knots
    active = shape.experts / experts.expert_parallel * share
    values = np.array([block(active) for block in experts.blocks])
    low = np.clip(np.searchsorted(experts.tokens, knots, side="right") - 1, 0, max(0, len(experts.tokens) - 2))
    high = np.minimum(low + 1, len(experts.tokens) - 1)
    width = np.maximum(experts.tokens[high] - experts.tokens[low], 1e-9)
    weight = np.clip((knots - experts.tokens[low]) / width, 0.0, 1.0)
    column = np.arange(len(knots))
    return Curve(knots, values[low, column] * (1.0 - weight) + values[high, column] * weight)
