"""From operators to the time of a whole step: layers, tensor parallelism, transfers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmopt.arrays import Floats
from llmopt.errors import ScenarioError
from llmopt.machines import Accelerator, ModelShape
from llmopt.profiles.data import DENSE_FFN, EXPERT_OPERATORS, PER_MODEL, TWICE, Grid, Profile
from llmopt.profiles.estimates import ACTIVATION, completed, expert_curve, transfer
from llmopt.profiles.exchange import exchange, exchanged, shared
from llmopt.profiles.grids import thinned
from llmopt.profiles.names import same_precision
from llmopt.profiles.stretch import by_chunks, stretched
from llmopt.steptable import StepTable

REDUCES = 2
"""All-reduces of a layer under tensor parallelism: after attention's output and after the feed-forward product
(Shoeybi et al., Megatron-LM, arXiv 1909.08053, figure 4)."""
MOST = (24, 16, 16, 16)
"""Most knots on the axes of a table of mixed steps that is only the sum of two measured ones."""


def compose(
    profile: Profile,
    shape: ModelShape,
    link: Accelerator | None = None,
    *,
    precision: str = "",
    data_parallel: int = 1,
) -> StepTable:
    """The time of an engine step of this model from the profile's operators.

    Parameters
    ----------
    shape
        The model: layers, heads, experts. Norms count twice a layer, others once, embedding and last norm once a step.
    link
        The accelerator, from whose link an all-reduce is estimated that was not measured, and from whose bandwidth
        the elementwise operators that a layout leaves out.
    precision
        Of the weights, by default the model's own; the profile must have been measured in it.
    data_parallel
        Engines among which the experts are divided, with equal loads: the expert block serves the tokens of all of
        them, which are gathered before it and scattered after. Steps count the tokens of one.

    Raises
    ------
    ScenarioError
        If the profile is of another model or precision, or lacks an operator.
    """
    _agree(profile, shape, precision or shape.precision)
    own, reach = shared(_with_expert_curve(profile, shape), shape, data_parallel)
    whole = completed(own, shape, link)
    _complete(whole, shape)
    tokens, token_time, notes = _by_tokens(whole, shape, link, data_parallel)
    sequences, sequence_time = _by_sequences(whole)
    decode, mixed = _attention(whole, shape)
    limits = (min(float(tokens[-1]), reach), float(sequences[-1]), *decode.limits, *mixed.limits)
    (tokens,), token_time = stretched((tokens,), token_time)
    (sequences,), sequence_time = stretched((sequences,), sequence_time)
    (batch, context), decode_time = stretched(decode.axes, decode.seconds)
    (chunk, cached, mixed_batch, mixed_context), mixed_time = by_chunks(mixed.axes, mixed.seconds)
    return StepTable(
        tokens=tokens,
        token_time=token_time,
        sequences=sequences,
        sequence_time=sequence_time,
        decode_batch=batch,
        decode_context=context,
        decode_time=decode_time,
        chunk=chunk,
        cached=cached,
        mixed_batch=mixed_batch,
        mixed_context=mixed_context,
        mixed_time=mixed_time,
        separate=profile.mixed is not None,
        source=f"{profile.name}, {profile.layout}: {', '.join(Path(name).name for name in profile.files)}",
        notes=tuple(_notes(whole, shape.window_layers, notes, decode, mixed)),
        limits=limits,
    )


def _with_expert_curve(profile: Profile, shape: ModelShape) -> Profile:
    if profile.experts is None or not shape.experts:
        return profile
    note = "experts: the expected number for uniform routing; routing of real text activates fewer"
    tokens = {**profile.tokens, "moe": expert_curve(profile.experts, shape)}
    return replace(profile, tokens=tokens, notes=(*profile.notes, note))


def _agree(profile: Profile, shape: ModelShape, precision: str) -> None:
    """Refuse a model that contradicts what the files state."""
    if not same_precision(profile.precision, precision):
        raise ScenarioError(
            f"{profile.name}: was measured in {profile.precision}, not in the {precision} of {shape.name}; give a "
            f"profile in {precision} or ask for {profile.precision}"
        )
    if shape.heads % profile.tensor_parallel:
        raise ScenarioError(
            f"{profile.name}: {shape.heads} heads of {shape.name} do not divide by tensor parallel "
            f"{profile.tensor_parallel}; choose another degree"
        )
    for name, value in profile.facts.items():
        expected = getattr(shape, name)
        if expected != value and not (name == "intermediate" and shape.experts):
            raise ScenarioError(
                f"{profile.name}: was measured with {name} = {value}, but {shape.name} has {expected}; "
                "give the profile of that model"
            )
    experts = profile.experts is not None or bool(set(EXPERT_OPERATORS) & set(profile.tokens))
    if experts and not shape.experts:
        raise ScenarioError(f"{profile.name}: holds experts, but {shape.name} has none; give the profile of that model")


def needed(profile: Profile, shape: ModelShape) -> Iterator[str]:
    """Operators without which no step of this model can be composed."""
    yield from ("embedding", "final_layernorm", "o_proj")
    yield from ("mla_qkv_a_proj", "mla_b_proj") if shape.attention == "mla" else ("qkv_proj",)
    yield from ("input_layernorm", "post_attention_layernorm", "add") if profile.layout == "vidur" else ("layernorm",)
    if not shape.positions:
        yield "rotary_emb"
    if shape.qk_norm and profile.layout != "vidur":
        yield "qk_norm"
    if shape.layers > shape.expert_layers:
        yield from DENSE_FFN
    if shape.expert_layers:
        yield "moe_grouped_gemm" if "moe_grouped_gemm" in profile.tokens else "moe"


def _complete(profile: Profile, shape: ModelShape) -> None:
    """Refuse a profile that lacks an operator of this model."""
    heads = ("lm_head", "sampler") if profile.layout == "llmservingsim" else ("lm_head",)
    lacks = [name for name in needed(profile, shape) if name not in profile.tokens]
    lacks += [name for name in heads if name not in profile.sequences]
    lacks += [] if profile.prefill is not None and profile.decode is not None else ["attention"]
    # an elementwise operator that could not even be estimated is left out, as its note says
    lacks = [name for name in lacks if not any(name in note and "left out" in note for note in profile.notes)]
    if lacks:
        files = ", ".join(profile.files) or "no file"
        names = ", ".join(lacks[:4]) + (f" and {len(lacks) - 4} more" if len(lacks) > 4 else "")
        plural = "operators" if len(lacks) > 1 else "operator"
        raise ScenarioError(
            f"{profile.name}: lacks the {plural} {names} (read: {files}); measure and add what is missing"
        )


def calls(operator: str, shape: ModelShape) -> int:
    """How often one step runs an operator by tokens."""
    if operator in PER_MODEL:
        return 1
    if operator in DENSE_FFN:
        return shape.layers - shape.expert_layers
    if operator in EXPERT_OPERATORS:
        return shape.expert_layers
    return shape.layers * (2 if operator in TWICE else 1)


def _by_tokens(
    profile: Profile, shape: ModelShape, link: Accelerator | None, engines: int
) -> tuple[Floats, Floats, list[str]]:
    """Knots and seconds of everything that depends on the tokens of a step, and notes on transfers."""
    counts = {name: calls(name, shape) for name in profile.tokens}
    used = {name: curve for name, curve in profile.tokens.items() if counts[name]}
    knots = np.unique(np.concatenate([curve.at for curve in used.values()]))
    knots = knots[knots <= min(curve.at[-1] for curve in used.values())]
    seconds = np.asarray(sum((counts[name] * curve(knots) for name, curve in used.items()), np.zeros(len(knots))))
    notes = []
    if profile.tensor_parallel > 1:
        reduce, note = transfer(profile, link)
        seconds = seconds + REDUCES * shape.layers * reduce(knots * shape.hidden * ACTIVATION)
        notes.append(note)
    if engines > 1 and shape.expert_layers:
        swap, note = exchange(profile, link, engines)
        seconds = seconds + shape.expert_layers * swap(exchanged(knots, shape, profile.tensor_parallel))
        notes.append(note)
    return knots, seconds, notes


def _by_sequences(profile: Profile) -> tuple[Floats, Floats]:
    curves = list(profile.sequences.values())
    knots = np.unique(np.concatenate([curve.at for curve in curves]))
    knots = knots[knots <= min(curve.at[-1] for curve in curves)]
    return knots, np.asarray(sum((curve(knots) for curve in curves), np.zeros(len(knots))))


def _attention(profile: Profile, shape: ModelShape) -> tuple[Grid, Grid]:
    """Decode-only and mixed attention of all layers; mixed_batch starts with 0, the pure prefill."""
    prefill, decode, mixed = profile.prefill, profile.decode, profile.mixed
    assert prefill is not None and decode is not None
    every = replace(decode, seconds=shape.layers * decode.seconds)
    if mixed is not None:
        chunk, cached, batch, context = mixed.axes
        alone = np.repeat(prefill.seconds[:, :, None, None], len(context), axis=3)
        table = np.concatenate([alone, mixed.seconds], axis=2)
        joint = (chunk, cached, np.append(0.0, batch), context)
        return every, Grid(joint, shape.layers * table, mixed.filled, mixed.extended, mixed.ends)
    few, rest = thinned(prefill, MOST[:2]), thinned(decode, MOST[2:])
    padded = np.concatenate([np.zeros((1, len(rest.axes[1]))), rest.seconds])
    table = few.seconds[:, :, None, None] + padded[None, None]
    added = (*few.axes, np.append(0.0, rest.axes[0]), rest.axes[1])
    ends = (*prefill.limits, *decode.limits)
    return every, Grid(added, shape.layers * table, prefill.filled, prefill.extended, ends)


def _notes(profile: Profile, windowed: int, transfers: list[str], decode: Grid, mixed: Grid) -> Iterator[str]:
    yield from profile.notes
    yield from filter(None, transfers)
    for name, grid in (("decode", decode), ("prefill" if profile.mixed is None else "mixed", mixed)):
        if grid.filled + grid.extended > 0:
            yield (
                f"attention, {name}: {grid.filled:.0%} of the grid interpolated between measurements, "
                f"{grid.extended:.0%} extrapolated"
            )
    if windowed:
        yield f"attention: {windowed} layers have a window, but count like those that see the whole context"
    if profile.mixed is None:
        yield "attention, mixed: not measured, the sum of prefill and decode"
