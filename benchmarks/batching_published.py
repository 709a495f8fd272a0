"""The published studies of MC-SF, A_max and A_min in rounds, with our schedules and bounds beside the figures reported.

1. Paper size (Jaillet et al., arXiv 2502.07115): models 1 and 2 as `llmopt.rounds` draws them. The optimum of such
   instances is open, so that MC-SF is compared with the best schedule known and with the proven bound: the true ratio
   lies between latency / best and latency / bound. Reported with Gurobi: model 1 average 1.005, worst 1.074, 114 of
   200 optimal; model 2 average 1.047, worst 1.227.
2. Small instances that exact search closes: M ~ U{16..24}, s ~ U{1..3}, o ~ U{1..M-s}, in model 2 arrivals U{0..2n-1},
   sorted; drawn in the order M, arrivals, s, o by one generator of seed 7. MC-SF, the variant that passes over what
   does not fit, and MC-SF's check in order of arrival (MC-Benchmark).
3. Outputs in a known interval [l, 100] (Chen, Ye, Zhou, arXiv 2508.14544): A_max and A_min, which know the interval
   only, against H-SF, shortest first with true outputs. `--n` requests at round 0 with prompts of 10 tokens, memory
   2000; outputs uniform, or l less 1 plus a geometric of mean (100 - l) / 4 + 1, cut at 100.

    python -m benchmarks.batching_published [--quick] [--parts 1 2 3] [--seeds 8] [--limit 60]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from time import perf_counter

import numpy as np

from formulations.batching_exact import ExactHindsight
from formulations.batching_start import admitted, mc_sf
from llmopt.arrays import Floats, Ints
from llmopt.rounds import Rounds, model_1, model_2

SMALL = ((1, 6), (1, 8), (2, 6), (2, 8))
SMALL_SEED, INTERVAL_SEED = 7, 1
UPPER, PROMPT, MEMORY = 100, 10, 2000
LOWERS = (50, 20, 5, 1)


def paper_size(model: int, seeds: int, limit: float) -> None:
    """Part 1: one line an instance, then the averages."""
    draw = {1: model_1, 2: model_2}[model]
    upper, lower, gaps, begin = [], [], [], perf_counter()
    for seed in range(seeds):
        instance = draw(seed)
        best = ExactHindsight(time_limit=limit).solve(instance)
        mine = instance.latency(mc_sf(instance))
        upper.append(mine / best.bound)
        lower.append(mine / best.latency)
        gaps.append(best.gap)
        print(
            f"  model {model}, seed {seed:2}: n = {len(instance):2}, M = {instance.capacity}, MC-SF {mine:6}, "
            f"best {best.latency:6}, bound {best.bound:6}: ratio {lower[-1]:.3f} to {upper[-1]:.3f}, "
            f"{best.seconds:5.1f} s",
            flush=True,
        )
    print(
        f"model {model}, {seeds} instances: MC-SF / best average {np.mean(lower):.3f}, worst {max(lower):.3f}; "
        f"MC-SF / bound average {np.mean(upper):.3f}, worst {max(upper):.3f}; gap median "
        f"{statistics.median(gaps):.1%}; "
        f"best known already by MC-SF {sum(r <= 1 for r in lower)}; {perf_counter() - begin:.0f} s",
        flush=True,
    )


def small_instances(model: int, n: int, count: int) -> Iterator[Rounds]:
    """Instances of part 2."""
    rng = np.random.default_rng(SMALL_SEED)
    for _ in range(count):
        capacity = int(rng.integers(16, 25))
        arrival = np.sort(rng.integers(0, 2 * n, n)) if model == 2 else np.zeros(n, dtype=np.int64)
        prompt = rng.integers(1, 4, n)
        yield Rounds(arrival, prompt, rng.integers(1, capacity - prompt + 1), capacity)


def skipping(instance: Rounds) -> Ints:
    """MC-SF that passes over what does not fit and goes on, starts of shape (n,)."""
    return play(instance, instance.output, skips=len(instance)).start


def by_arrival(instance: Rounds) -> Ints:
    """MC-Benchmark, starts of shape (n,)."""
    return admitted(instance, instance.arrival.astype(float))


RULES: dict[str, Callable[[Rounds], Ints]] = {"MC-SF": mc_sf, "skipping": skipping, "MC-Benchmark": by_arrival}


def optimum(instance: Rounds) -> int:
    """Least total latency in rounds."""
    best = ExactHindsight().solve(instance, mc_sf(instance))
    assert best.gap == 0, "an instance was not closed"
    return best.latency


def ratios(model: int, n: int, count: int) -> dict[str, Floats]:
    """Latency of each rule over the optimum, shape (count,)."""
    found = {name: np.empty(count) for name in RULES}
    for k, instance in enumerate(small_instances(model, n, count)):
        best = optimum(instance)
        for name, rule in RULES.items():
            found[name][k] = instance.latency(rule(instance)) / best
    return found


def small(model: int, n: int, count: int) -> None:
    """Part 2, one line."""
    begin = perf_counter()
    cells = [f"{name} {r.mean():.3f}, {r.max():.3f}, {(r <= 1).sum():2}" for name, r in ratios(model, n, count).items()]
    print(f"model {model}, n = {n}: {'; '.join(cells)}; {perf_counter() - begin:.0f} s", flush=True)


class Played:
    """Outcome of `play`: last start and completion of each request, shape (n,), and the restarts in all."""

    def __init__(self, n: int) -> None:
        self.start = np.full(n, -1, dtype=np.int64)
        self.completion = np.zeros(n, dtype=np.int64)
        self.restarts = 0


def play(instance: Rounds, belief: Ints, skips: int = 0) -> Played:
    """Rounds in which a request is admitted by ascending belief if the batch is believed to fit to its end.

    Each round first cancels running requests of least belief until the round fits, then admits. A cancelled request
    starts over and is believed to produce one token more than it had; who runs on is believed to as well.
    """
    played, belief, done, now = Played(len(instance)), belief.astype(np.int64), np.zeros(len(instance), bool), 0
    while not done.all():
        age = np.where(played.start >= 0, now - played.start, -1)
        done |= (age >= 0) & (age >= instance.output)
        belief = np.maximum(belief, age + 1)
        cancelled = _cancel(instance, played, belief, done, now)
        if not cancelled:
            _admit(instance, played, belief, now, skips)
        now += 1
    return played


def _cancel(instance: Rounds, played: Played, belief: Ints, done: np.ndarray, now: int) -> bool:
    """Whether some running request had to go so that the next round fits."""
    running = np.flatnonzero((played.start >= 0) & ~done)
    usage = int((instance.prompt[running] + now + 1 - played.start[running]).sum())
    order = running[np.lexsort((running, belief[running]))]
    gone = 0
    while usage > instance.capacity:
        i = int(order[gone])
        usage -= int(instance.prompt[i] + now + 1 - played.start[i])
        played.start[i] = -1
        gone += 1
    played.restarts += gone
    return gone > 0


def _admit(instance: Rounds, played: Played, belief: Ints, now: int, skips: int) -> None:
    waiting = np.flatnonzero((played.start < 0) & (instance.arrival <= now))
    batch = np.flatnonzero((played.start >= 0) & (now - played.start < instance.output))
    failures = 0
    for i in waiting[np.argsort(belief[waiting], kind="stable")]:
        played.start[i] = now
        played.completion[i] = now + instance.output[i]
        more = np.append(batch, i)
        if _believed_to_fit(instance, more, played.start[more], belief[more]):
            batch = more
            continue
        played.start[i] = -1
        failures += 1
        if failures > skips:
            break


def _believed_to_fit(instance: Rounds, chosen: Ints, start: Ints, belief: Ints) -> bool:
    """Equation (5) of arXiv 2502.07115 at every believed completion."""
    age = np.unique(start + belief)[:, None] - start
    held = np.where((age <= belief) & (age >= 0), instance.prompt[chosen] + age, 0)
    return bool((held.sum(axis=1) <= instance.capacity).all())


def outputs(law: str, lower: int, n: int, rng: np.random.Generator) -> Ints:
    """Outputs of part 3."""
    if law == "uniform":
        return rng.integers(lower, UPPER + 1, n)
    return np.minimum(lower - 1 + rng.geometric(1 / ((UPPER - lower) / 4 + 1), n), UPPER)


def intervals(law: str, lower: int, n: int, seeds: int) -> tuple[Floats, Floats]:
    """Latency of A_max and of A_min over that of H-SF, shape (seeds,) each."""
    found = np.empty((2, seeds))
    for seed in range(seeds):
        output = outputs(law, lower, n, np.random.default_rng((INTERVAL_SEED, seed)))
        instance = Rounds(np.zeros(n, dtype=np.int64), np.full(n, PROMPT), output, MEMORY)
        best = play(instance, output).completion.sum()
        for k, belief in enumerate((UPPER, lower)):
            found[k, seed] = play(instance, np.full(n, belief)).completion.sum() / best
    return found[0], found[1]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few instances and short limits")
    parser.add_argument("--parts", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--seeds", type=int, default=8, help="instances of parts 1 and 3")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for each instance of part 1")
    parser.add_argument("--n", type=int, default=500, help="requests of part 3")
    options = parser.parse_args()
    seeds, limit, count, n = options.seeds, options.limit, 60, options.n
    if options.quick:
        seeds, limit, count, n = 2, 10.0, 10, 100
    if 1 in options.parts:
        for model in (1, 2):
            paper_size(model, seeds, limit)
    if 2 in options.parts:
        print(f"ratio to the optimum, {count} instances: average, worst, number optimal")
        for model, size in SMALL:
            small(model, size, count)
    if 3 in options.parts:
        print(f"latency over that of H-SF, {n} requests, average of {seeds} instances")
        for law in ("uniform", "geometric"):
            for lower in LOWERS:
                begin = perf_counter()
                most, least = intervals(law, lower, n, seeds)
                print(
                    f"{law:9} l = {lower:2}: A_max {most.mean():.2f}, A_min {least.mean():.2f}; "
                    f"{perf_counter() - begin:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
