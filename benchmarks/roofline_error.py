"""How far is the roofline from measured profiles? And which efficiencies make it closest?

For each profile that composes to whole steps: a seeded sample of decode-only, prefill and mixed steps inside the
measured ranges, with batches of 1 to 256 sequences, 64 to 4096 tokens of context each, and chunks of 32 to 2048 tokens,
uniform in the logarithm, half of the chunks behind up to 2048 cached tokens. Printed: median and 95 % quantile of the
relative error of the roofline's time, over all steps and, with the median bias, in each region; and the least time over
the floor. Models with experts once more without steps too small to touch them all, below 3 E/k tokens.

Then, on points that no efficiency was fitted to: the time per output token of engines on H100, as served benchmarks
measured it, against the roofline of a step that decodes as many sequences as were served at once, with half of their
output behind them, and prefills their share of prompt tokens; and the largest floor of decoding one, over that time.

    python -m benchmarks.roofline_error FOLDER [--fit]

FOLDER holds the public profiles, in folders called vllm-runs, vidur, frontier and aiconfigurator.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from llmopt.arrays import Bools, Floats
from llmopt.errors import ScenarioError
from llmopt.hardware import StepTime
from llmopt.machines import Accelerator, ModelShape, accelerator, floor, kv_capacity, model_shape, roofline
from llmopt.profiles import load_step_table

DENSE = (
    ("vllm-runs", "RTX 4090", "Llama-3.1-8B", 1),
    ("vllm-runs", "RTX PRO 6000", "Llama-3.1-8B", 1),
    ("vidur", "A100", "Llama-2-70B", 2),
    ("frontier", "A800", "Llama-2-7B", 1),
    *(("aiconfigurator", "A100", "Llama-3.1-8B", n) for n in (1, 2, 4)),
    *(("aiconfigurator", "A100", "Qwen3-32B", n) for n in (2, 4, 8)),
    *(("aiconfigurator", "A100", "Llama-3.1-70B", n) for n in (4, 8)),
)
EXPERTS = (
    *(("aiconfigurator", "A100", "Mixtral-8x7B", n) for n in (2, 4)),
    *(("aiconfigurator", "A100", "Qwen3-30B-A3B", n) for n in (1, 2)),
    ("aiconfigurator", "A100", "Qwen3-235B-A22B", 8),
)
"""Folder, accelerator, model and tensor-parallel degree of each profile; larger models only where they fit."""
REGIONS = ("decode", "prefill", "mixed")
STEPS = 600
"""Steps of each region, before those outside of the measured ranges are dropped."""
GRID = np.arange(0.5, 1.0, 0.025)
"""Efficiencies that the fit tries."""


@dataclass(frozen=True)
class Case:
    """A profile's steps: features (n, 4), measured seconds (n,), and the region of each as an index (n,)."""

    shape: ModelShape
    chip: Accelerator
    degree: int
    features: Floats
    seconds: Floats
    region: Floats

    @property
    def error(self) -> Floats:
        """Relative error (n,) of the roofline's time."""
        return self.guess() / self.seconds - 1

    @property
    def over_floor(self) -> float:
        """Least measured time over the floor."""
        limit = floor(self.shape, self.chip, tensor_parallel=self.degree)
        return float((self.seconds / limit.many(self.features)).min())

    def guess(self, **efficiencies: float) -> Floats:
        """The roofline's time (n,)."""
        pieces = roofline(self.shape, self.chip, tensor_parallel=self.degree, **efficiencies)
        return StepTime.from_pieces(pieces).many(self.features)

    def only(self, chosen: Bools) -> Case:
        """The case with some of its steps."""
        return replace(self, features=self.features[chosen], seconds=self.seconds[chosen], region=self.region[chosen])

    @property
    def touching_all(self) -> Case:
        """The case without steps of fewer than 3 E/k tokens."""
        least = 3 * self.shape.experts / self.shape.experts_per_token
        return self.only(self.features[:, 0] + self.features[:, 1] >= least)


def steps(rng: np.random.Generator, most_kv: float) -> tuple[Floats, Floats]:
    """Features (n, 4) and regions (n,) of a sample of steps that fit into `most_kv` KV tokens."""
    region = np.repeat(np.arange(len(REGIONS)), STEPS).astype(float)
    n = len(region)

    def spread(low: float, high: float) -> Floats:
        return np.asarray(np.round(np.exp(rng.uniform(np.log(low), np.log(high), n))))

    decode = np.where(region == 1, 0.0, spread(1, 256))
    prefill = np.where(region == 0, 0.0, np.minimum(spread(32, 2048), 2048 - decode))
    cached = np.where(rng.random(n) < 0.5, 0.0, np.round(rng.uniform(0, 2048, n)))
    kv = np.minimum(decode * spread(64, 4096), most_kv)
    return np.stack([prefill, decode, kv, prefill * (cached + prefill / 2)], axis=1), region


def case(folder: Path, name: str, gpu: str, model: str, degree: int) -> Case:
    """The measured steps of one profile.

    Raises
    ------
    ScenarioError
        If the folder does not hold it.
    """
    shape, chip = model_shape(model), accelerator(gpu)
    table = load_step_table(folder / name, gpu, model, tensor_parallel=degree)
    features, region = steps(np.random.default_rng(1), kv_capacity(shape, chip, tensor_parallel=degree).tokens)
    inside = table.covers(features)
    return Case(shape, chip, degree, features[inside], table.many(features[inside]), region[inside])


def row(one: Case, mark: str = "") -> str:
    """Errors over all steps and by region, and the least time over the floor."""
    head = f"{one.chip.name:14s}{one.shape.name + mark:17s}{one.degree:3d}  {_errors(one.error)}"
    parts = [one.error[one.region == r] for r in range(len(REGIONS))]
    return head + "".join(f"  {_errors(p)} {np.median(p):+5.0%}" for p in parts) + f"{one.over_floor:9.2f}"


def _errors(error: Floats) -> str:
    return f"{np.median(np.abs(error)):5.0%} {np.quantile(np.abs(error), 0.95):5.0%}"


def best(cases: list[Case]) -> tuple[float, float, float]:
    """Mean absolute log error, every accelerator weighing the same, and the two efficiencies at which it is least."""
    chips = [one.chip.name for one in cases]
    weights = [1 / chips.count(name) for name in chips]

    def loss(compute: float, bandwidth: float) -> float:
        guesses = [one.guess(compute_efficiency=compute, bandwidth_efficiency=bandwidth) for one in cases]
        errors = [np.abs(np.log(g / one.seconds)).mean() for g, one in zip(guesses, cases, strict=True)]
        return float(np.average(errors, weights=weights))

    return min((loss(c, b), float(c), float(b)) for c in GRID for b in GRID)


def served(file: Path) -> pd.DataFrame:
    """Points served on H100 by one tensor-parallel group: model, engine, ratios of roofline and floor to the TPOT."""
    points = pd.read_csv(file)
    points = points[(points["mode"] == "agg") & (points.system == "h100_sxm") & (points.pp_size == 1)]
    points = points[points.attention_dp_size.fillna(1) == 1]
    chip, rows = accelerator("H100"), []
    for point in points.itertuples():
        try:
            shape = model_shape(str(point.model_path))
        except ScenarioError:
            continue
        fp8 = str(point.gemm_quant_mode).startswith("fp8") or point.precision == "fp8"
        kind = {"tensor_parallel": int(point.tp_size), "precision": "fp8" if fp8 else None}
        n, prefill = point.batch_size, point.batch_size * point.isl / point.osl
        step = np.array([[prefill, n, n * (point.isl + point.osl / 2), prefill * point.isl / 2]])
        guess = StepTime.from_pieces(roofline(shape, chip, **kind)).many(step)[0]
        least = floor(shape, chip, **kind).many(np.array([[0.0, 1.0, point.isl, 0.0]]))[0]
        measured = point.silicon_tpot_ms / 1e3
        rows.append(
            (shape.name, kind["precision"] or shape.precision, point.backend, guess / measured, least / measured)
        )
    return pd.DataFrame(rows, columns=["model", "weights", "engine", "ratio", "floor"])


def show_served(file: Path) -> None:
    """One row for each model, precision and engine."""
    print(f"\n{'model':17s}{'weights':9s}{'engine':8s}points   median ratio  error: median  95 %   floor")
    for key, group in served(file).groupby(["model", "weights", "engine"]):
        error = (group.ratio - 1).abs()
        cells = f"{len(group):6d}{group.ratio.median():13.2f}{error.median():15.0%}{error.quantile(0.95):8.0%}"
        print("{:17s}{:9s}{:8s}".format(*key) + cells + f"{group.floor.max():8.2f}")


def main() -> None:
    """Print one row for each profile, and the best efficiencies with --fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fit", action="store_true", help="also find the efficiencies nearest to the dense profiles")
    chosen = parser.parse_args()
    print(f"{'accelerator':14s}{'model':16s}GPUs  {'all':>11}" + "".join(f"{r:>19}" for r in REGIONS) + "  t/floor")
    dense = [case(chosen.folder, *profile) for profile in DENSE]
    for one in dense:
        print(row(one))
    for profile in EXPERTS:
        print(row(one := case(chosen.folder, *profile)))
        print(row(one.touching_all, " *"))
    show_served(chosen.folder / "aiconfigurator" / "silicon_sample.csv")
    if chosen.fit:
        for name, group in [("all dense", dense), *((f"{d.chip.name} {d.shape.name} {d.degree}", [d]) for d in dense)]:
            loss, compute, bandwidth = best(group)
            print(f"{name:33s} compute {compute:.3f} bandwidth {bandwidth:.3f} mean log error {loss:.3f}")


if __name__ == "__main__":
    main()
