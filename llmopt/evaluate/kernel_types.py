"""Tables of the compiled simulator: one record per request, one per replica; and the compile decorator."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])
Table = NDArray[np.void]
MODES = ("reserve", "lookahead", "recompute", "swap", "restart")
RESERVE, LOOKAHEAD, RECOMPUTE, SWAP, RESTART = range(5)
NONE = -1

REQUEST = np.dtype(
    [
        ("arrival", "f8"),
        ("scheduled", "f8"),
        ("first_token", "f8"),
        ("finish", "f8"),
        ("attempt", "i8"),
        ("life", "i8"),
        ("prompt", "i8"),
        ("output", "i8"),
        ("computed", "i8"),
        ("emitted", "i8"),
        ("target", "i8"),
        ("take", "i8"),
        ("preemptions", "i8"),
        ("replica", "i8"),
        ("next", "i8"),
        ("prev", "i8"),
        ("prefilling", "i8"),
        ("prefilled", "i8"),
    ],
    align=True,
)

REPLICA = np.dtype(
    [
        ("pool", "i8"),
        ("mode", "i8"),
        ("first_step", "i8"),
        ("block", "i8"),
        ("slots", "i8"),
        ("blocks", "i8"),
        ("chunk", "i8"),
        ("budget", "i8"),
        ("max_batch", "i8"),
        ("piece", "i8"),
        ("pieces", "i8"),
        ("clock", "f8"),
        ("end", "f8"),
        ("under_way", "i8"),
        ("waiting", "i8"),
        ("running", "i8"),
        ("queue_head", "i8"),
        ("queue_tail", "i8"),
        ("batch_head", "i8"),
        ("batch_tail", "i8"),
        ("used", "i8"),
        ("outstanding", "i8"),
        ("steps", "i8"),
        ("busy", "f8"),
        ("prefill_tokens", "i8"),
        ("decode_tokens", "i8"),
        ("preemptions", "i8"),
        ("held", "i8"),
        ("wasted", "i8"),
        ("held_time", "f8"),
        ("peak", "i8"),
    ],
    align=True,
)


def compiled(function: F) -> F:
    """Compile with numba, cached on disk."""
    return cast(F, numba.njit(cache=True)(function))
