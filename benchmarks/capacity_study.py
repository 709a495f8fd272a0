"""How far the capacity estimate and the outer bound lie from saturated simulation, over random scenarios.

Each draw is one replica and one request class (or `--classes`, with random shares): mean prompt 100 to 4 000, mean
output 30 to 600 (log-uniform), lognormal or gamma with CV 0.2 to 1.3, KV memory for 4 to 60 of the largest requests,
max batch 16 to 2 000, token budget 256 to 8 192, one to three pieces, blocks of 1 or 16 tokens, either place of the
first token; the five preemption modes take turns. Draw i uses seed (20240, i). The estimate sees the laws; the
simulator runs their quantiles in random orders, so that only the order is random, and the mean of the repeats counts
as the truth.

    python -m benchmarks.capacity_study [--draws 200] [--repeats 4] [--first 0] [--classes 1] [--chunks 0]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from llmopt.arrays import Floats, Ints
from llmopt.capacity import Capacity, replica_capacity
from llmopt.evaluate.saturate import saturated_throughput
from llmopt.hardware import Piece
from llmopt.lengths import Gamma, Law, Lognormal
from llmopt.scenario import Pool, Preemption
from llmopt.workload import RequestClass

MODES: tuple[Preemption, ...] = ("reserve", "lookahead", "recompute", "swap", "restart")
WITHIN = 0.03
FEWEST, MOST, GENERATIONS = 12_000, 60_000, 60


@dataclass(frozen=True)
class Draw:
    """One scenario of the study with what was estimated and what was simulated (requests/s)."""

    number: int
    pool: Pool
    classes: list[RequestClass]
    capacity: Capacity
    simulated: float
    noise: float

    @property
    def error(self) -> float:
        """Estimate over simulation, minus 1."""
        return self.capacity.rate / self.simulated - 1

    @property
    def outer_error(self) -> float:
        """Outer bound over simulation, minus 1."""
        return self.capacity.outer / self.simulated - 1

    @property
    def covered(self) -> bool:
        """Whether the simulation lies within the error that the estimate claims."""
        return abs(self.simulated / self.capacity.rate - 1) <= self.capacity.error + 2 * self.noise


def drawn(number: int, classes: int = 1, chunks: float = 0.0) -> tuple[Pool, list[RequestClass], Floats]:
    """Pool, classes and their shares (n_classes,) of one draw; `chunks` as the command line's."""
    rng = np.random.default_rng([20240, number])
    requests = [_class(rng, f"class-{c}") for c in range(classes)]
    pool = Pool(
        name="replica",
        replicas=1,
        kv_capacity=int(max(c.largest for c in requests) * _log(rng, 4, 60)),
        step_time=_pieces(rng),
        max_batch=int(_log(rng, 16, 2000)),
        token_budget=int(_log(rng, 256, 8192)),
        prefill_chunk=max(16, int(requests[0].mean_prompt / chunks)) if chunks else None,
        block_size=int(rng.choice([1, 16])),
        preemption=MODES[number % len(MODES)],
        first_token="prefill" if rng.random() < 0.5 else "decode",
    )
    return pool, requests, rng.dirichlet(np.ones(classes))


def _class(rng: np.random.Generator, name: str) -> RequestClass:
    prompt = _law(rng, _log(rng, 100, 4000), rng.uniform(0.2, 1.3))
    return RequestClass(
        name=name, share=1.0, prompt=prompt, output=_law(rng, _log(rng, 30, 600), rng.uniform(0.2, 1.3))
    )


def _log(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _law(rng: np.random.Generator, mean: float, cv: float) -> Law:
    most = int(mean * (rng.uniform(3, 6) if cv > 0.5 else 1 + 4 * cv))
    if rng.random() < 0.5:
        return Lognormal(law="lognormal", mean=mean, cv=cv, max=most)
    return Gamma(law="gamma", mean=mean, cv=cv, max=most)


def _pieces(rng: np.random.Generator) -> tuple[Piece, ...]:
    """One linear piece, a roofline of two, or three as of an attention / FFN pipeline."""
    p, k, d = _log(rng, 1e-5, 2e-4), _log(rng, 1e-8, 5e-7), _log(rng, 1e-6, 1e-4)
    q = _log(rng, 1e-10, 2e-8) * rng.integers(0, 2)
    first, second = _log(rng, 3e-3, 3e-2), _log(rng, 3e-3, 3e-2)
    shapes = (
        (Piece(base=first, prefill=p, decode=d, kv=k, pairs=q),),
        (Piece(base=first, kv=k, decode=d / 3), Piece(base=first / 3, prefill=p, decode=d, pairs=q)),
        (
            Piece(base=first, kv=k, pairs=q),
            Piece(base=second, prefill=p, decode=d),
            Piece(base=second / 3, prefill=p / 2, decode=d / 2),
        ),
    )
    return shapes[rng.integers(0, 3)]


def simulate(
    pool: Pool, classes: list[RequestClass], shares: Floats, capacity: Capacity, number: int, repeats: int
) -> tuple[float, float]:
    """Saturated throughput (requests/s) and its relative standard error over the repeats."""
    steps = shares @ [c.mean_output + c.mean_prompt / pool.chunk for c in classes]
    n = int(np.clip(GENERATIONS * capacity.outer * capacity.step_time * steps, FEWEST, MOST))
    rates = []
    for repeat in range(repeats):
        prompt, output = requests(classes, shares, n, np.random.default_rng([number, repeat]))
        rates.append(saturated_throughput(pool, prompt, output).rate)
    return float(np.mean(rates)), float(np.std(rates) / np.mean(rates) / np.sqrt(repeats))


def requests(classes: list[RequestClass], shares: Floats, n: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """The quantiles of the laws as `n` requests in random order: prompts and outputs, shape (n,)."""
    cls = rng.permutation(np.searchsorted(np.cumsum(shares)[:-1], (np.arange(n) + 0.5) / n, side="right"))
    prompt, output = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for c, one in enumerate(classes):
        mine = np.flatnonzero(cls == c)
        quantiles = (np.arange(len(mine)) + 0.5) / max(len(mine), 1)
        prompt[mine] = one.prompt.sample(rng.permutation(quantiles))
        output[mine] = one.output.sample(rng.permutation(quantiles))
    return prompt, output


def study(first: int, draws: int, repeats: int, classes: int, chunks: float) -> tuple[list[Draw], float]:
    """The draws, and the mean seconds of one estimate."""
    done, spent = [], 0.0
    for number in range(first, first + draws):
        pool, drawn_classes, shares = drawn(number, classes, chunks)
        start = perf_counter()
        capacity = replica_capacity(pool, drawn_classes, shares)
        spent += perf_counter() - start
        truth = simulate(pool, drawn_classes, shares, capacity, number, repeats)
        done.append(Draw(number, pool, drawn_classes, capacity, *truth))
    return done, spent / draws


def show(draws: list[Draw], seconds: float, worst: int) -> None:
    """Print the tables."""
    print(f"{len(draws)} draws; one estimate takes {1000 * seconds:.1f} ms; errors in % of the simulated capacity\n")
    print(
        f"{'':12}{'draws':>6}{'5 %':>8}{'median':>8}{'95 %':>8}{'largest':>9}{'|median|':>10}{'|95 %|':>8}{'in 3 %':>8}"
    )
    _row("outer bound", np.array([d.outer_error for d in draws]))
    _row("estimate", np.array([d.error for d in draws]))
    for mode in MODES:
        _row(f"  {mode}", np.array([d.error for d in draws if d.pool.preemption == mode]))
    for resource in ("kv", "batch", "tokens"):
        _row(f"  {resource}", np.array([d.error for d in draws if d.capacity.resource == resource]))
    print(f"\nlowest outer bound: {100 * min(d.outer_error for d in draws):+.2f} %")
    print(f"noise of the simulation (standard error): median {100 * np.median([d.noise for d in draws]):.2f} %")
    print(f"simulation within the claimed error: {100 * np.mean([d.covered for d in draws]):.1f} %")
    print(f"claimed error: median {100 * np.median([d.capacity.error for d in draws]):.1f} %")
    print(f"\nthe {worst} worst")
    for d in sorted(draws, key=lambda d: -abs(d.error))[:worst]:
        print(_line(d))


def _row(name: str, errors: Floats) -> None:
    if not len(errors):
        return
    low, mid, high = 100 * np.quantile(errors, [0.05, 0.5, 0.95])
    size = np.abs(errors)
    print(
        f"{name:12}{len(errors):6d}{low:8.2f}{mid:8.2f}{high:8.2f}{100 * errors[size.argmax()]:9.2f}"
        f"{100 * np.median(size):10.2f}{100 * np.quantile(size, 0.95):8.2f}{100 * np.mean(size < WITHIN):8.1f}"
    )


def _line(d: Draw) -> str:
    fit = d.pool.kv_capacity / max(c.largest for c in d.classes)
    prompt, output = (np.mean([f(c) for c in d.classes]) for f in (_prompt, _output))
    return (
        f"  draw {d.number:3d} {d.pool.preemption:9s} {100 * d.error:+6.2f} % (noise {100 * d.noise:.2f}, claimed "
        f"{100 * d.capacity.error:.1f}): {d.capacity.resource} binds, memory for {fit:.1f} of the largest, prompt "
        f"{prompt:.0f}, output {output:.0f}, budget {d.pool.token_budget}, max batch "
        f"{d.pool.max_batch}, {len(d.pool.step_time)} pieces\n      {_why(d, fit)}"
    )


def _prompt(c: RequestClass) -> float:
    return c.mean_prompt


def _output(c: RequestClass) -> float:
    return c.mean_output


def _why(d: Draw, fit: float) -> str:
    """The likeliest reason, from what the estimate leaves out."""
    if abs(d.error) < 2.5 * d.noise:
        return "within the noise of the simulation"
    if d.pool.prefill_chunk and d.pool.preemption in ("recompute", "restart", "swap"):
        return "prompts of several chunks are admitted against memory that others still have to fill"
    if max(c.mean_prompt for c in d.classes) > d.pool.token_budget and fit < 15:
        return "prompts take several steps of the whole budget and few fit: admission waits for both, correlated"
    if fit < 10:
        return "few requests fit, so the running set is far from its mean"
    if d.capacity.locked is not None:
        return "two regimes; the estimate is their middle"
    return "two budgets, or two pieces of the step time, are close: their fluctuations are taken as normal"


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200, help="how many scenarios")
    parser.add_argument("--repeats", type=int, default=4, help="simulated orders of each")
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--classes", type=int, default=1, help="request classes of each, with random shares")
    parser.add_argument(
        "--chunks", type=float, default=0.0, help="cut a mean prompt into so many chunks; 0: budget only"
    )
    parser.add_argument("--worst", type=int, default=8, help="how many of the worst to list")
    args = parser.parse_args()
    show(*study(args.first, args.draws, args.repeats, args.classes, args.chunks), args.worst)


if __name__ == "__main__":
    main()
