"""Fit every step time of the catalog that comes from measurements, and check the catalog against it or write it anew.

    python -m benchmarks.catalog_fits --shared ../shared/data            compare, exit with 1 where a digit differs
    python -m benchmarks.catalog_fits --shared ../shared/data --write    write llmopt/catalog/*.toml

What is not here is not fitted: the rooflines a100-llama31-8b and h100-llama31-8b follow from data sheets, and
nie-a100-llama3-8b is published. No profile at hand has the matrix products of an H100, so that its only measured
entries are Splitwise's; Frontier's tables of Qwen3-30B-A3B time attention heads of half the model's width.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import llmopt.catalog
from llmopt.calibrate.bench_entries import FittedEntry, distserve_entry, splitwise_entry
from llmopt.calibrate.entry import entry_text, toml_entry
from llmopt.calibrate.fit import FitOptions
from llmopt.calibrate.from_profile import calibrate_profile
from llmopt.calibrate.result import Calibration, rounded
from llmopt.machines import accelerator, kv_capacity, model_shape

DATE = "2026-11-24"
COMMAND = "python -m benchmarks.catalog_fits"
EFFORT = FitOptions(kicks=0, thin=100)
"""Kicks, and more steps to compare starts on, find nothing better in any of these tables."""
Constants = Mapping[str, tuple[Any, str]]

A100_PRICE = (
    "{n} x RunPod A100 PCIe secure-cloud list price, skypilot-catalog catalogs/v8/runpod/vms.csv at 01acdfd419ce; "
    "not live"
)
H100_PRICE = (
    "{n} x Nebius H100 on-demand list price, skypilot-catalog catalogs/v8/nebius/vms.csv at 0082b0435f39; not live"
)
SERVINGSIM = "LLMServingSim (github.com/casys-kaist/LLMServingSim, commit 5daddb21), kernel profiles of an {gpu}"
VIDUR = "Vidur (github.com/microsoft/vidur, commit 7d475133; attention at acb95f6c), data/profiling"
FRONTIER = "Frontier (github.com/NetX-lab/Frontier, commit a4b22df8), data/profiling/compute"
AICONFIGURATOR = (
    "aiconfigurator (github.com/ai-dynamo/aiconfigurator, commit 095f58a5), systems/data/a100_sxm, vLLM 0.14.0"
)
DEFAULTS: Constants = {
    "token_budget": (2048, "vLLM default max_num_batched_tokens with chunked prefill"),
    "block_size": (16, "vLLM default block_size"),
}
MEASURED = "vLLM default max_num_seqs is 256; decode was measured up to {n}"
ENGINE: Constants = {
    "host_overhead": (
        0.0006,
        "one constant for all machines: 0.6 ms a step meets the recorded runs of the RTX 4090 and the RTX PRO 6000 "
        "best together (benchmarks/fidelity.py)",
    ),
    "async_scheduling": (True, "vLLM default since 0.14, and in the recorded run (vLLM 0.19)"),
    "prefix_caching": (True, "vLLM default enable_prefix_caching, and in the recorded run"),
}


def price(each: float, gpus: int, words: str) -> Constants:
    """USD/hour of a replica of these GPUs."""
    return {"price": (round(each * gpus, 2), words.format(n=gpus).removeprefix("1 x "))}


@dataclass(frozen=True)
class Profiled:
    """An entry from operator tables: where they are, which they are, and for what engine.

    constants: keys of the pool with their sources; the KV capacity is computed if it is not among them.
    """

    folders: tuple[str, ...]
    accelerator: str
    model: str
    source: str
    description: str
    tensor_parallel: int = 1
    constants: Constants = field(default_factory=dict)

    def calibrated(self, shared: Path, options: FitOptions = EFFORT, **pieces: int) -> Calibration:
        """The fit, with other numbers of pieces if given."""
        constants = {**DEFAULTS, **self.constants}
        known = {key: constants[key][0] for key in ("max_batch", "token_budget", "kv_capacity") if key in constants}
        found = calibrate_profile(
            [shared / folder for folder in self.folders],
            accelerator=self.accelerator,
            model=self.model,
            tensor_parallel=self.tensor_parallel,
            options=options,
            **known,
            **pieces,
        )
        return found.with_constants(constants)

    def __call__(self, shared: Path) -> str:
        """The text of the entry."""
        found = self.calibrated(shared)
        return entry_text(found, date=DATE, command=COMMAND, description=self.description, source=self.source)


def published(shared: Path, build: Callable[[Path], FittedEntry], title: str, constants: Constants) -> str:
    """An entry whose pieces come from a published file of another form."""
    entry = build(shared)
    names = {key: (constants[key][0], entry.sources[key]) for key in ("accelerator", "model")}
    told = f"{entry.sources['step_time']}; fitted on {DATE} by {COMMAND}"
    return toml_entry(
        f"{title}: {entry.description.split(': ')[1]}", {**constants, **names}, rounded(entry.pieces), told
    )


def splitwise(hardware: str, chip: str, gpus: int, each: float, words: str) -> Callable[[Path], str]:
    """Llama-2-70B in Splitwise's table of static batches."""
    room = kv_capacity(model_shape("Llama-2-70B"), accelerator(chip), tensor_parallel=gpus)
    parts = ", ".join(f"{part.name} {part.bytes / 2**30:+.2f} GiB" for part in room.parts)
    constants: Constants = {
        "accelerator": (accelerator(chip).name, ""),
        "model": ("Llama-2-70B", ""),
        "tensor_parallel": (gpus, f"same: tensor_parallel {gpus}"),
        **price(each, gpus, words),
        "kv_capacity": (room.tokens, f"computed: {parts}; {room.bytes_per_token:,.0f} B a token on one GPU"),
        "max_batch": (256, f"vLLM default max_num_seqs; measured up to {32 if gpus == 2 else 64}"),
        **DEFAULTS,
    }
    title = f"{accelerator(chip).name} x {gpus}, Llama-2-70B in fp16, tensor parallel {gpus}"

    def build(shared: Path) -> FittedEntry:
        return splitwise_entry(shared / "splitwise-sim/perf_model.csv", hardware=hardware, tensor_parallel=gpus)

    return partial(published, build=build, title=title, constants=constants)


def distserve(model: str, gpus: int) -> Callable[[Path], str]:
    """DistServe's coefficients of an OPT model."""
    title = f"A100 SXM 80GB{f' x {gpus}' * (gpus > 1)}, {model} in fp16"

    def build(shared: Path, tokens: int) -> FittedEntry:
        path = shared / "distserve/profiler-a100-80g.distserve.json"
        return distserve_entry(path, f"facebook/{model.lower()}", gpus, tokens)

    def text(shared: Path) -> str:
        tokens = _distserve_tokens(shared, model, gpus)
        constants: dict[str, tuple[Any, str]] = {
            "accelerator": ("A100 SXM 80GB", ""),
            "model": (model, ""),
            **({"tensor_parallel": (gpus, f"same: tensor parallel {gpus}")} if gpus > 1 else {}),
            **price(1.39, gpus, A100_PRICE),
            "kv_capacity": (tokens, f"same repository, max_num_tokens.csv: tensor parallel {gpus}, one pipeline stage"),
            "max_batch": (256, "vLLM default max_num_seqs; decode was fitted on both sides of 95 sequences"),
            **DEFAULTS,
        }
        return published(shared, partial(build, tokens=tokens), title, constants)

    return text


def _distserve_tokens(shared: Path, model: str, gpus: int) -> int:
    with (shared / "distserve/max_num_tokens.csv").open() as file:
        rows = {(row["model"], row["tp"], row["pp"]): int(row["max_num_tokens"]) for row in csv.DictReader(file)}
    return rows[f"facebook/{model.lower()}", str(gpus), "1"]


def _vllm(gpu: str, name: str, title: str, batch: int, constants: Constants) -> Profiled:
    batches = {"max_batch": (batch, f"same repository, vLLM run meta.json: max_num_seqs {batch}")}
    return Profiled(
        folders=("vllm-runs/profiles",),
        accelerator=gpu,
        model="Llama-3.1-8B",
        source=SERVINGSIM.format(gpu=name),
        description=f"{title}, Llama-3.1-8B in bf16, vLLM 0.19: fitted to measured kernel times",
        constants={**constants, **batches, **ENGINE},
    )


ENTRIES: dict[str, Callable[[Path], str]] = {
    "rtx4090-llama31-8b": _vllm(
        "RTX4090",
        "NVIDIA GeForce RTX 4090",
        "RTX 4090 24GB",
        256,
        {
            "price": (0.53, "Spheron list price of May 2026 (spheron.network/blog/rtx-5090-vs-rtx-4090); not live"),
            "kv_capacity": (
                41392,
                "same repository, vLLM run meta.json: 2588 blocks of 16 tokens at gpu_memory_utilization 0.9, of which "
                "vLLM keeps block 0 as a placeholder",
            ),
        },
    ),
    "rtxpro6000-llama31-8b": _vllm("RTXPRO6000", "NVIDIA RTX PRO 6000", "RTX PRO 6000 Blackwell 96GB", 128, {}),
    "a100-tp2-llama2-70b": Profiled(
        folders=("vidur",),
        accelerator="a100",
        model="Llama-2-70B",
        tensor_parallel=2,
        source=f"{VIDUR}: A100 80GB (DGX), Llama-2-70b-hf, tensor parallel 2",
        description="A100 SXM 80GB x 2, Llama-2-70B in fp16: fitted to measured kernel times of Vidur",
        constants={**price(1.39, 2, A100_PRICE), "max_batch": (128, MEASURED.format(n=128))},
    ),
    "a100-llama3-8b": Profiled(
        folders=("vidur", "aiconfigurator/data"),
        accelerator="a100",
        model="Meta-Llama-3-8B",
        source=f"{VIDUR}: A100 80GB, Meta-Llama-3-8B; attention: {AICONFIGURATOR}",
        description="A100 SXM 80GB, Llama-3-8B in fp16: dense kernels of Vidur, attention of aiconfigurator",
        constants={**price(1.39, 1, A100_PRICE), "max_batch": (256, "vLLM default max_num_seqs")},
    ),
    "a100-sxm-llama31-8b": Profiled(
        folders=("aiconfigurator/data",),
        accelerator="a100_sxm",
        model="Llama-3.1-8B",
        source=AICONFIGURATOR,
        description="A100 SXM 80GB, Llama-3.1-8B in bf16: fitted to measured kernel times of aiconfigurator",
        constants={**price(1.39, 1, A100_PRICE), "max_batch": (256, "vLLM default max_num_seqs")},
    ),
    "a800-llama2-7b": Profiled(
        folders=("frontier",),
        accelerator="a800",
        model="Llama-2-7B",
        source=f"{FRONTIER}: A800, Llama-2-7b-hf",
        description="A800 80GB, Llama-2-7B in fp16: fitted to measured kernel times of Frontier",
        constants={"max_batch": (128, MEASURED.format(n=128))},
    ),
    "a100-opt-13b": distserve("OPT-13B", 1),
    "a100-tp4-opt-66b": distserve("OPT-66B", 4),
    "a100-tp8-llama2-70b": splitwise("a100-80gb", "A100 SXM 80GB", 8, 1.39, A100_PRICE),
    "h100-tp8-llama2-70b": splitwise("h100-80gb", "H100 SXM 80GB", 8, 2.95, H100_PRICE),
    "h100-tp2-llama2-70b": splitwise("h100-80gb", "H100 SXM 80GB", 2, 2.95, H100_PRICE),
}


def catalog_file(name: str) -> Path:
    """Where the entry lies."""
    return Path(llmopt.catalog.__file__).with_name(f"{name}.toml")


def differences(name: str, text: str) -> Iterator[str]:
    """Lines in which the catalog differs from the fit."""
    file = catalog_file(name)
    before = file.read_text().splitlines() if file.exists() else []
    yield from difflib.unified_diff(before, text.splitlines(), f"{name}.toml", "fit", lineterm="", n=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with the measurements")
    parser.add_argument("--write", action="store_true", help="write the catalog instead of comparing")
    parser.add_argument("names", nargs="*", choices=[*ENTRIES, []], help="entries; all if absent")
    options = parser.parse_args()
    differing = 0
    for name in options.names or ENTRIES:
        text = ENTRIES[name](options.shared)
        if options.write:
            catalog_file(name).write_text(text)
        changed = list(differences(name, text))
        differing += bool(changed)
        print("\n".join([f"{name}: {'differs' if changed else 'as fitted'}", *changed]))
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
