"""The step table against scipy's interpolator inside its grid, closed forms outside, and what it must keep."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from llmopt.arrays import Floats
from llmopt.steptable import StepTable, interpolate

AXES = {
    "tokens": [1.0, 8, 64, 512, 2048],
    "sequences": [1.0, 32, 256],
    "decode_batch": [1.0, 16, 256],
    "decode_context": [16.0, 512, 8192],
    "chunk": [16.0, 256, 2048],
    "cached": [0.0, 1024, 8192],
    "mixed_batch": [0.0, 1, 64, 128],
    "mixed_context": [16.0, 2048, 16384],
}
GROUPS = {"token_time": 1, "sequence_time": 1, "decode_time": 2, "mixed_time": 4}


def table(rng: np.random.Generator | None = None, **changes: Any) -> StepTable:
    """A table of random entries, or of entries that rise along every axis."""
    axes = {name: np.array(axis) for name, axis in AXES.items()}
    names, tables = iter(axes), {}
    for name, count in GROUPS.items():
        shape = [len(axes[next(names)]) for _ in range(count)]
        values = np.random.default_rng(7).uniform(0.1, 1.0, shape) if rng is None else rng.uniform(0.0, 1.0, shape)
        for d in range(count if rng is None else 0):
            values = np.cumsum(values, axis=d)
        tables[name] = values * 1e-3
    return StepTable(**{**axes, **tables, **changes})


def reference(t: StepTable, prefill: float, decode: float, kv: float, pairs: float) -> float:
    """A step inside the grid by scipy."""
    context, cached = kv / max(decode, 1.0), max(0.0, pairs / max(prefill, 1.0) - prefill / 2)
    total = RegularGridInterpolator((t.tokens,), t.token_time)([prefill + decode])[0]
    total += RegularGridInterpolator((t.sequences,), t.sequence_time)([decode + (prefill > 0)])[0]
    if prefill > 0:
        axes = (t.chunk, t.cached, t.mixed_batch, t.mixed_context)
        return float(total + RegularGridInterpolator(axes, t.mixed_time)([[prefill, cached, decode, context]])[0])
    return float(
        total + RegularGridInterpolator((t.decode_batch, t.decode_context), t.decode_time)([[decode, context]])[0]
    )


INSIDE = st.tuples(
    st.sampled_from([0.0, 1.0]),
    st.floats(16, 1900),
    st.floats(0, 8192),
    st.floats(1, 128),
    st.floats(16, 8192),
)


@given(INSIDE, st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_inside_the_grid_it_is_scipys_linear_interpolation(point: tuple[float, ...], seed: int) -> None:
    has_prefill, chunk, cached, decode, context = point
    t = table(np.random.default_rng(seed))
    prefill = has_prefill * chunk
    pairs = prefill * (cached + prefill / 2)
    expected = reference(t, prefill, decode, decode * context, pairs)
    assert t(prefill, decode, decode * context, pairs) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_many_steps_at_once_are_the_same_as_one_by_one() -> None:
    t, rng = table(np.random.default_rng(3)), np.random.default_rng(4)
    features = rng.uniform(0, 1, (50, 4)) * [3000, 300, 500_000, 3e6]
    features[::3, 0] = 0
    features[::3, 3] = 0
    assert t.many(features) == pytest.approx([t(*row) for row in features])


def test_below_the_first_knot_it_is_constant_and_above_the_last_it_goes_on() -> None:
    axis, values = np.array([2.0, 4.0, 8.0]), np.array([10.0, 20.0, 60.0])
    at = np.array([0.0, 2.0, 3.0, 8.0, 10.0, 16.0])
    assert interpolate((axis,), values, (at,)) == pytest.approx([10, 10, 15, 60, 80, 140])


def test_beyond_two_axes_at_once_a_product_stays_a_product() -> None:
    # n k is bilinear, hence exact everywhere, also far beyond both ends
    n, k = np.array([1.0, 2.0, 4.0]), np.array([16.0, 64.0])
    product = n[:, None] * k
    assert interpolate((n, k), product, (np.array([40.0]), np.array([1000.0])))[0] == pytest.approx(40_000)


def test_one_knot_is_constant() -> None:
    assert interpolate((np.array([5.0]),), np.array([3.0]), (np.array([0.0, 5.0, 99.0]),)).tolist() == [3.0, 3.0, 3.0]


def test_nothing_extrapolated_below_zero_counts() -> None:
    t = table(token_time=np.array([1e-3, 1e-3, 1e-3, 1e-3, 1e-9]))
    assert t(prefill=0, decode=100_000, kv=0) >= 0
    falling = table(token_time=np.array([5e-3, 4e-3, 3e-3, 2e-3, 1e-3]), sequence_time=np.full(3, 1e-4))
    assert falling(decode=1e6, kv=1e6 * 16) >= 0


def test_several_short_prompts_are_scaled_by_their_pairs() -> None:
    t = table()
    whole, half = 256**2 / 2, 256**2 / 4
    alone = t.attention(np.array([[256.0, 0, 0, whole]]))[0]
    assert t.attention(np.array([[256.0, 0, 0, half]]))[0] == pytest.approx(t.launch + (alone - t.launch) / 2)
    assert t.attention(np.array([[256.0, 0, 0, 0.0]]))[0] == pytest.approx(t.launch)
    assert t.launch == t.mixed_time[:, :, 0, :].min()


def steps(draw: Any) -> Floats:
    prefill = draw(st.one_of(st.just(0.0), st.floats(1, 5000)))
    decode = float(draw(st.integers(1 if prefill == 0 else 0, 400)))
    cached = draw(st.floats(-0.5, 20_000))
    pairs = prefill * max(0.0, prefill / 2 * (1 + cached) if cached < 0 else cached + prefill / 2)
    return np.array([prefill, decode, decode * draw(st.floats(0, 40_000)), pairs])


@st.composite
def some_step(draw: Any) -> Floats:
    return steps(draw)


@given(some_step(), st.sampled_from([0, 1, 2, 3]))
@settings(max_examples=200, deadline=None)
def test_more_of_anything_never_takes_less_where_the_tables_rise(step: Floats, what: int) -> None:
    t = table()
    if what == 0 and step[0] == 0:
        return
    more = step.copy()
    more[what] = step[what] * 1.1 + 1
    if what == 0:
        # the same cached context behind a longer chunk
        cached = step[3] / step[0] - step[0] / 2
        more[3] = more[0] * (max(cached, 0.0) + more[0] / 2)
    if what == 1:
        # one sequence more, of the same mean context
        more[1] = step[1] + 1
        more[2] = step[2] * more[1] / step[1] if step[1] else 1000.0
    if what == 3 and step[0] == 0:
        return
    assert t(*more) >= t(*step) * (1 - 1e-9)


@given(some_step())
@settings(max_examples=200, deadline=None)
def test_it_is_continuous_in_each_of_its_features(step: Floats) -> None:
    t = table()
    here = t(*step)
    for what in (0, 2, 3) if step[0] > 0 else (2,):
        near = step.copy()
        near[what] = step[what] * (1 + 1e-9) + 1e-9
        assert t(*near) == pytest.approx(here, rel=1e-5, abs=1e-9)


def test_it_says_what_was_measured() -> None:
    t = table()
    features = np.array(
        [
            [0, 10, 10 * 500, 0],  # inside
            [0, 300, 300 * 500, 0],  # too many sequences
            [0, 10, 10 * 9000, 0],  # too long a context
            [1024, 0, 0, 1024 * 512],  # inside
            [1024, 64, 64 * 9000, 1024 * 512],  # inside: mixed contexts reach further
            [4096, 0, 0, 4096 * 2048],  # too many tokens
            [1024, 0, 0, 1024 * (9000 + 512)],  # too much cached
            [16, 130, 130 * 500, 16 * 8],  # too many sequences beside a chunk
        ]
    )
    assert t.covers(features).tolist() == [True, False, False, True, True, False, False, False]


def test_limits_say_where_measurements_end_before_the_last_knots() -> None:
    ends = (1024.0, 256.0, 256.0, 4096.0, 1024.0, 512.0, 64.0, 1024.0)
    t, features = table(limits=ends), np.array([[0, 10, 10 * 5000.0, 0], [1024, 0, 0, 1024 * 512], [0, 10, 1000, 0]])
    assert table().covers(features).all()
    assert t.covers(features).tolist() == [False, True, True]
    assert t.ends == ends
    assert table().ends == tuple(axis[-1] for axis in AXES.values())


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        table(token_time=np.ones(3))
    with pytest.raises(ValueError, match="increase"):
        table(sequences=np.array([1.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="limits"):
        table(limits=(1.0, 2.0))


def test_its_content_is_plain_and_whole() -> None:
    content = table(notes=("a note",), source="here").content()
    again = json.loads(json.dumps(content))
    assert again["notes"] == ["a note"]
    restored = {k: np.array(v) if isinstance(v, list) and k not in ("notes", "limits") else v for k, v in again.items()}
    copy = StepTable(**{**restored, "notes": tuple(again["notes"]), "limits": tuple(again["limits"])})
    assert copy(512, 3, 900, 512 * 256) == table()(512, 3, 900, 512 * 256)
