"""The compiled loop of the bundle simulator: M micro-batches through L layers, for several numbers of workers at once.

One file of its own, because numba keeps compiled code on disk by the file it stands in. Unlike the other kernels this
one is compiled with its loops vectorised: the loop over the workers is all it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

from llmopt.arrays import Floats

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile with numba, cached on disk; the plain function stays there as `py_func`."""
    return cast(F, numba.njit(cache=True, nogil=True, error_model="numpy")(function))


@compiled
def play(
    times: Floats,
    ffn: Floats,
    hop: Floats,
    send_a: Floats,
    send_f: Floats,
    layers: int,
    first: int,
    end_a: Floats,
    end_f: Floats,
    ready: Floats,
    returned: Floats,
) -> None:
    """Play bundles of first, first + 1, ... workers, n of them, each on the first columns of `times`. All in seconds.

    times: of Attention, shape (M, K, W); ffn, hop: of one FFN server and one hop, shape (n,); send_a, send_f: for how
    long a worker or a server is occupied after computing, shape (n,). The state, zeros before the first step: end_a,
    shape (n, W), and end_f, shape (n,), when a device is free; ready, shape (n, M), when a micro-batch is back.
    returned, shape (n, M, K): when it is back from the last layer of each step.

    In every step, layer and micro-batch m in this order, with T the time of each worker j in this step:

        start_j = max(end_a_j, ready_m),  done_j = start_j + T_j,  end_a_j = done_j + send_a
        done = max(end_f, max_j done_j + hop) + ffn,  end_f = done + send_f,  ready_m = done + hop
    """
    for k in range(times.shape[1]):
        for _ in range(layers):
            for m in range(times.shape[0]):
                for x in range(len(ffn)):
                    latest = 0.0
                    for j in range(first + x):
                        done = max(end_a[x, j], ready[x, m]) + times[m, k, j]
                        end_a[x, j] = done + send_a[x]
                        latest = max(latest, done)
                    back = max(end_f[x], latest + hop[x]) + ffn[x]
                    end_f[x] = back + send_f[x]
                    ready[x, m] = back + hop[x]
        for x in range(len(ffn)):
            for m in range(times.shape[0]):
                returned[x, m, k] = ready[x, m]
