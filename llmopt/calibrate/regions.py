"""Fit errors by region: which steps a few affine pieces follow well, and which they do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from llmopt.arrays import Floats, Ints

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("decode only", "small prefill", "large prefill")
"""Steps without prefill; with up to a quarter of the token budget; with more."""
SMALL = 0.25
BATCHES = {0.0: "none", 8.0: "1 to 8", 64.0: "9 to 64", np.inf: "over 64"}
"""Bands of the decode batch by their largest number of sequences."""
CONTEXTS = {1024.0: "to 1,024", 8192.0: "to 8,192", np.inf: "over 8,192"}
"""Bands of the mean context by their largest number of tokens."""


def kind_of(features: Floats, token_budget: int) -> Ints:
    """Index into `KINDS` of each step (n,)."""
    return np.searchsorted([0.0, SMALL * token_budget], features[:, 0], side="left")


def error_table(features: Floats, seconds: Floats, predicted: Floats, token_budget: int) -> pd.DataFrame:
    """Relative errors by kind of step, decode batch and mean context; one row for each band that has steps.

    Parameters
    ----------
    features
        Steps, shape (n, 4).
    seconds, predicted
        Measured and predicted times (n,), s.
    token_budget
        Tokens that a step may have, which says what a large prefill is.

    Returns
    -------
    Columns ``kind``, ``batch``, ``context`` (texts, ``all`` in the rows that sum up), ``steps``, ``bias`` (mean of the
    signed errors), ``median``, ``p95``, ``largest`` (of their sizes), and of the worst step ``prefill``, ``decode``,
    ``kv``, ``pairs``, ``measured`` and ``predicted`` (s).
    """
    import pandas as pd

    steps = pd.DataFrame(features, columns=["prefill", "decode", "kv", "pairs"])
    steps["measured"], steps["predicted"] = seconds, predicted
    steps["error"] = predicted / seconds - 1.0
    steps["kind"] = np.array(KINDS)[kind_of(features, token_budget)]
    context = features[:, 2] / np.maximum(features[:, 1], 1.0)
    for name, values, bands in (("batch", features[:, 1], BATCHES), ("context", context, CONTEXTS)):
        steps[name] = pd.cut(values, [-np.inf, *bands], labels=list(bands.values()))
    return pd.DataFrame(_rows(steps))


def _rows(steps: pd.DataFrame) -> Iterator[dict[str, object]]:
    yield _row("all", "all", "all", steps)
    for kind in KINDS:
        of_kind = steps[steps["kind"] == kind]
        if len(of_kind):
            yield _row(kind, "all", "all", of_kind)
        for batch, of_batch in of_kind.groupby("batch", observed=True):
            if batch == BATCHES[0.0]:
                yield _row(kind, str(batch), "none", of_batch)
                continue
            for context, some in of_batch.groupby("context", observed=True):
                yield _row(kind, str(batch), str(context), some)


def _row(kind: str, batch: str, context: str, steps: pd.DataFrame) -> dict[str, object]:
    sizes = steps["error"].abs()
    worst = steps.iloc[int(sizes.to_numpy().argmax())]
    return {
        "kind": kind,
        "batch": batch,
        "context": context,
        "steps": len(steps),
        "bias": float(steps["error"].mean()),
        "median": float(sizes.median()),
        "p95": float(sizes.quantile(0.95)),
        "largest": float(sizes.max()),
        **{name: float(worst[name]) for name in ("prefill", "decode", "kv", "pairs", "measured", "predicted")},
    }
