"""Tables of the compiled simulator: one record per request, one per replica; and the compile decorator.

A running request is either *single*, looked at in every step (it is in prefill, or its first token is still to be
timed), or *gliding*: it decodes one token in every step, so that its computed tokens are `offset` + the replica's step
count and it ends when that count reaches `due`. Gliding requests are never touched between two events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast, get_args

import numba
import numpy as np
from numpy.typing import NDArray

from llmopt.arrays import Floats, Ints
from llmopt.batcher import Mixing

F = TypeVar("F", bound=Callable[..., Any])
Table = NDArray[np.void]
ADMISSIONS = ("reserve", "lookahead", "optimistic")
RESERVE, LOOKAHEAD, OPTIMISTIC = range(3)
OVERFLOWS = ("recompute", "swap", "restart")
RECOMPUTE, SWAP, RESTART = range(3)
ORDERS = ("arrival", "predicted", "keys")
ARRIVAL, PREDICTED, KEYS = range(3)
VICTIMS = ("youngest", "last", "least", "all", "each")
YOUNGEST, LAST, LEAST, ALL, EACH = range(5)
MIXINGS: tuple[str, ...] = get_args(Mixing)
DECODE_FIRST, PREFILL_FIRST, PREFILL_ONLY, DECODE_ONLY = range(4)
UNGATED, BY_CLASS, BY_STAGE, BY_LEVEL = range(4)
PATIENCE = 10_000
"""Preemptions of one request that end a run."""
NONE = -1
NEVER = 2**62
COEFFICIENTS = 5
"""Numbers per piece of a step time."""
WORD = 32
"""Ring slots per word of the occupancy bits."""

SOURCES = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("kernel*.py")))).hexdigest()
"""Digest of the kernel's sources. It names a field of REPLICA, so that the compiled code which numba keeps on disk by
argument types is never older than any of the files it was built from (numba itself looks at one file only)."""

REQUEST = np.dtype(
    [
        *((name, "f8") for name in ("arrival", "queued", "scheduled", "first_token", "finish")),
        # token-steps held by the current prefill, or (restart) by this life; see `start_gliding` for gliding requests
        ("area", "i8"),
        ("offset", "i8"),
        ("due", "i8"),
        # blocks that a preempted request left full; until it is back its offset is their place (see `kernel_cache`)
        ("full", "i4"),
        *((name, "i4") for name in ("prompt", "output", "computed", "emitted", "target", "taken")),
        *((name, "i4") for name in ("preemptions", "replica")),
        # neighbours in the queue or the batch; neighbours in the list of singles or in a bucket of the ring
        *((name, "i4") for name in ("next", "prev", "link_next", "link_prev")),
        *((name, "i4") for name in ("prefilling", "prefilled", "gliding")),
    ],
    align=True,
)

TERMS = np.dtype(
    [
        # place in the queue; not admitted before (s); the request's random number
        *((name, "f8") for name in ("key", "release", "u")),
        # the step that gave it tokens, while victims are sought
        ("served", "i8"),
        # believed output tokens; first child in the heap; neighbours in the bucket of a believed end; 1 if outlived
        *((name, "i4") for name in ("believed", "child", "near_next", "near_prev", "outlived")),
        # class number; 1 if it gets no tokens in the step
        *((name, "i4") for name in ("cls", "paused")),
    ],
    align=True,
)
"""What a batching rule says of one request; no rows under the engine's own rule."""

REPLICA = np.dtype(
    [
        # mode: how requests are admitted; overflow: what a preempted one keeps
        *((name, "i8") for name in ("pool", "mode", "overflow", "first_step", "block", "slots", "blocks")),
        *((name, "i8") for name in ("chunk", "budget", "max_batch", "piece", "pieces")),
        # 1 if schedules are formed one step ahead; 1 if a preempted request may find its blocks again
        *((name, "i8") for name in ("ahead", "caching")),
        # where this replica's part of the flat arrays starts (table: NONE without one); the ring's size is mask + 1
        *((name, "i8") for name in ("ring", "mask", "bits", "classes", "scratch", "table")),
        # the rule: 1 if there is one; 1 if the queue is a heap; 1 if beliefs count and may err; blocks kept free
        *((name, "i8") for name in ("ruled", "heap", "guess", "order", "victims", "skips", "kept")),
        # how the keys begin; `order` is how a preempted request gets its own
        ("first_order", "i8"),
        # look-ahead: 1 if projections come true; 1 if that of the batch alone is known to fit; blocks of all
        # who run at their believed ends
        *((name, "i8") for name in ("steady", "sound", "peaks")),
        # requests put to the front so far, rounds of clearing, the request preempted too often
        *((name, "i8") for name in ("fronts", "rounds", "stuck")),
        # believed ends: their ring; steps up to which it is swept; gliding requests that outlived their belief
        *((name, "i8") for name in ("near_ring", "near_mask", "near_bits", "swept")),
        *((name, "i8") for name in ("spent", "spent_tokens", "spent_classes")),
        ("clearing", "f8"),
        # rules in which running requests may pause: whether this is one, who moves, whether prompts are never cut, what
        # is held back, whether that has ended; where the numbers for it start in `classes`, counts and marks
        *((name, "i8") for name in ("stepwise", "mixing", "whole", "gating", "flush", "gates", "counts", "marks")),
        # when a waiting request is released; do not end a step after `halt`; seconds of the step that would have
        *((name, "f8") for name in ("wake", "halt", "pending")),
        # seconds of every step that are not in its table
        ("host", "f8"),
        # end of the last step, which is the start of the next; when the queue was last emptied
        ("clock", "f8"),
        ("drained", "f8"),
        *((name, "i8") for name in ("waiting", "running", "gliding")),
        *((name, "i8") for name in ("queue_head", "queue_tail", "batch_head", "batch_tail")),
        *((name, "i8") for name in ("single_head", "single_tail")),
        # scheduling ahead, in the next schedule: requests too new to be seen, blocks and batch slots freed too late
        *((name, "i8") for name in ("fresh", "late_blocks", "late_slots")),
        # blocks ever put into the queue of free blocks; first of the preempted requests that may find theirs
        ("pushed", "i8"),
        ("lost_head", "i8"),
        # blocks held; outstanding tokens; computed tokens of the gliding requests and of the singles
        *((name, "i8") for name in ("used", "outstanding", "kv", "single_kv")),
        # what a router sees before the clock, while the last step is under way
        *((name, "i8") for name in ("seen_waiting", "seen_running", "seen_used", "seen_outstanding")),
        # step counts: before `due`, if that lies ahead, no gliding request ends; before `retry` nobody can be admitted
        *((name, "i8") for name in ("due", "retry")),
        # the last step: tokens, and new blocks of the requests that ran before it
        *((name, "i8") for name in ("prefill", "decode", "need")),
        *((name, "i8") for name in ("steps", "prefill_tokens", "decode_tokens", "preemptions", "held", "wasted")),
        *((name, "i8") for name in ("peak", "extrapolated")),
        ("busy", "f8"),
        ("held_time", "f8"),
        (f"sources_{SOURCES[:16]}", "i8"),
    ],
    align=True,
)


class World(NamedTuple):
    """All arrays of a run.

    terms: what the batching rule says of each request; costs: step times, first all pieces, five numbers each, then all
    tables (see `kernel_table`); ring: first request of the bucket of each finishing step; bits: which buckets are
    filled; classes: how many gliding requests have (offset + slots) mod block = k, so that one look tells the new
    blocks of a step, behind them room for one replica's, and the thresholds of `kernel_hold`. They are few because
    every call hands all of them over.
    """

    reqs: Table
    reps: Table
    terms: Table
    costs: Floats
    ring: NDArray[np.int32]
    bits: Ints
    classes: Ints


# _nrt: kernels allocate nothing and borrow all arrays, so they do without reference counts, which are atomic and took
# nine tenths of the time. nogil: they touch no Python object, so simulations in several threads run side by side.
# error_model: divisors are positive, and a check for zero at each division would raise a Python error.
_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "_nrt": False}


def compiled(function: F) -> F:
    """Compile with numba, cached on disk."""
    return cast(F, _plainly(numba.njit(**_OPTIONS)(function)))


def inlined(function: F) -> F:
    """As `compiled`, for functions with one caller: handing all arrays over would cost more than the call's work."""
    return cast(F, _plainly(numba.njit(forceinline=True, **_OPTIONS)(function)))


def _plainly(dispatcher: Any) -> Any:
    """Compile without trying to vectorise loops: kernels follow links, and the attempt takes half of the time."""
    compile_now, config = dispatcher.compile, cast(Any, numba.config)

    def compile_plainly(signature: Any) -> Any:
        before, config.LOOP_VECTORIZE = config.LOOP_VECTORIZE, 0
        try:
            return compile_now(signature)
        finally:
            config.LOOP_VECTORIZE = before

    dispatcher.compile = compile_plainly
    return dispatcher
