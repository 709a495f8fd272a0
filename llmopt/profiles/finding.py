"""Profile files in a folder: which layout, of which accelerator and model; and the choice among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmopt.errors import ScenarioError
from llmopt.profiles.names import (
    accelerator_key,
    model_key,
    precision_of,
    same_accelerator,
    same_model,
    same_precision,
)

SERVINGSIM, VIDUR, AICONFIGURATOR, NETWORK, HARDWARE, UNKNOWN = (
    "llmservingsim",
    "vidur",
    "aiconfigurator",
    "network",
    "hardware",
    "unknown",
)
FLAT = re.compile(r"(?P<gpu>[^_]+)_(?P<model>.+?)_tp(?P<tp>\d+)_(?P<kind>dense|per_sequence|attention|moe)")
KERNELS = re.compile(r"(?P<gpu>[^_]+)_(?P<model>.+?)(?:_tp\d+)?_(?P<kind>mlp|linear_op|attention|moe)(?:_[\d-]+)?")
NODE = re.compile(r"net_(?P<node>.+)_(?P<kind>all_?reduce|send_?recv)")
SYSTEM = re.compile(r"(?P<gpu>[^_]+(?:_[^_]+)*?)__(?:.+__)?(?P<kind>[a-z_]+)_perf")
BUNDLE = {"dense", "per_sequence", "attention", "moe"}
ASSUMED = "bf16"
"""The precision of files that state none: what LLMServingSim uses by default."""
VIDURS = "fp16"
"""Vidur's: its profilers build every model in torch.float16 (profiling/mlp/mlp_wrapper.py, attention/main.py)."""


@dataclass(frozen=True)
class Found:
    """One file: its layout, what it holds, and of what.

    tensor_parallel is 0 if the file holds several degrees; precision may be a variant such as ``bf16-kvfp8``.
    """

    path: Path
    layout: str
    kind: str
    accelerator: str
    model: str = ""
    tensor_parallel: int = 0
    precision: str = ""

    @property
    def bundle(self) -> tuple[str, str, str, str]:
        """Files with the same value belong together."""
        key = (accelerator_key(self.accelerator), model_key(self.model))
        return (self.layout, *key, self.precision)


def profile_files(paths: Iterable[str | Path]) -> list[Found]:
    """All profile files among files and in folders, searched recursively.

    Raises
    ------
    ScenarioError
        If a path does not exist, or a file is no profile by its name.
    """
    out = []
    for given in map(Path, paths):
        if not given.exists():
            raise ScenarioError(f"{given}: no such folder of profiles; check the path")
        inside = sorted(p for p in given.rglob("*") if p.is_file()) if given.is_dir() else [given]
        known = [found for path in inside if (found := recognise(path)) is not None]
        if given.is_file() and not known:
            raise ScenarioError(
                f"{given}: is no profile in any layout that is read; see docs/profiles.md for their names"
            )
        out += known
    return out


def recognise(path: Path) -> Found | None:
    """What a file is by its name and, for tables of kernels, by its header; nothing if its name is no profile's."""
    if path.name.endswith("hardware.yaml"):
        prefix = path.name.removesuffix("hardware.yaml").rstrip("_-.")
        return Found(path, HARDWARE, "hardware", prefix or path.resolve().parent.name)
    if path.suffix == ".parquet":
        return _system(path)
    return _table(path) if path.suffix == ".csv" else None


def _system(path: Path) -> Found | None:
    """`a100_sxm__gemm__vllm__0.14.0__gemm_perf.parquet`, or `a100_sxm/gemm/vllm/0.14.0/gemm_perf.parquet`."""
    match = SYSTEM.fullmatch(path.stem)
    if match:
        return Found(path, AICONFIGURATOR, match["kind"], match["gpu"])
    parents = path.resolve().parents
    if path.stem.endswith("_perf") and len(parents) > 3:
        return Found(path, AICONFIGURATOR, path.stem.removesuffix("_perf"), parents[3].name)
    return None


def _table(path: Path) -> Found | None:
    parents = [parent.name for parent in path.resolve().parents]
    if path.stem in BUNDLE and len(parents) > 4 and re.fullmatch(r"tp\d+", parents[0]):
        degree, variant = int(parents[0][2:]), parents[1].lower()
        return Found(path, _layout(path), path.stem, parents[4], parents[2], degree, variant)
    if match := NODE.fullmatch(path.stem):
        return Found(path, NETWORK, _collective(match["kind"]), match["node"].split("_")[0])
    if path.stem in ("allreduce", "all_reduce", "send_recv") and parents:
        return Found(path, NETWORK, _collective(path.stem), parents[0].split("_")[0])
    if (match := FLAT.fullmatch(path.stem)) and (layout := _layout(path)) != VIDUR:
        precision = precision_of(match["model"]) or ASSUMED
        return Found(path, layout, match["kind"], match["gpu"], match["model"], int(match["tp"]), precision)
    if match := KERNELS.fullmatch(path.stem):
        kind = "mlp" if match["kind"] == "linear_op" else match["kind"]
        layout = _layout(path, kind)
        precision = precision_of(match["model"]) or _assumed(layout)
        return Found(path, layout, kind, match["gpu"], match["model"], 0, precision)
    if path.stem in ("mlp", "linear_op", "attention", "moe") and len(parents) > 2:
        kind = "mlp" if path.stem == "linear_op" else path.stem
        layout = _layout(path)
        return Found(path, layout, kind, parents[2], parents[0], 0, _assumed(layout))
    return None


def _assumed(layout: str) -> str:
    return VIDURS if layout == VIDUR else ASSUMED


def _collective(kind: str) -> str:
    return "send_recv" if kind.startswith("send") else "all_reduce"


def _layout(path: Path, kind: str = "") -> str:
    """By the header: microseconds of LLMServingSim, or statistics of Vidur; by the kind if there is no header."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            header = file.readline()
    except OSError:
        return UNKNOWN
    if "time_stats." in header or (kind == "mlp" and not header.strip()):
        return VIDUR
    return SERVINGSIM if "time_us" in header or not header.strip() else UNKNOWN


@dataclass(frozen=True)
class Wanted:
    """What is looked for; empty: whatever there is, if it is one."""

    accelerator: str = ""
    model: str = ""
    tensor_parallel: int | None = None
    precision: str = ""

    def __str__(self) -> str:
        return f"{self.model or 'any model'} on {self.accelerator or 'any accelerator'}"

    def is_on(self, found: Found) -> bool:
        """Whether the file is of the wanted accelerator."""
        return not self.accelerator or same_accelerator(self.accelerator, found.accelerator)

    def is_of(self, found: Found) -> bool:
        """Whether the file is of the wanted accelerator and model."""
        return self.is_on(found) and (not self.model or same_model(self.model, found.model))

    def is_in(self, found: Found) -> bool:
        """Whether the file is in the wanted precision, whatever that of the KV cache."""
        return found.precision == self.precision or same_precision(stated(found.precision), self.precision)


def stated(variant: str) -> str:
    """The precision of the weights that a variant states, or the variant itself."""
    return precision_of(variant) or variant


def choose(files: Sequence[Found], wanted: Wanted, where: str) -> list[Found]:
    """The files of the one profile of what is wanted.

    Raises
    ------
    ScenarioError
        If there is none, or several; the sentence names what there is.
    """
    modelled = [f for f in files if f.layout in (SERVINGSIM, VIDUR, UNKNOWN)]
    mine = [f for f in modelled if wanted.is_of(f)]
    if not mine and wanted.model:
        mine = [f for f in files if f.layout == AICONFIGURATOR and wanted.is_on(f)]
        modelled += [f for f in files if f.layout == AICONFIGURATOR]
    kernels = [f for f in files if f.layout == AICONFIGURATOR and wanted.is_on(f)]
    if kernels and not mine and not wanted.model:
        raise ScenarioError(f"{where}: holds no profile of one model, {listed(kernels)}; name the model")
    if not mine:
        near = [f for f in modelled if wanted.is_on(f) or same_model(wanted.model, f.model)]
        raise ScenarioError(f"{where}: holds no profile of {wanted}; {listed(near or modelled)}")
    unknown = [f for f in mine if f.layout == UNKNOWN]
    if unknown:
        raise ScenarioError(
            f"{unknown[0].path}: is named like a profile, but its layout is unknown (neither a column time_us nor "
            "time_stats.*); see docs/profiles.md for those that are read"
        )
    mine = _of_precision(mine, wanted, where)
    bundles = sorted({f.bundle for f in mine})
    if len(bundles) > 1:
        raise ScenarioError(
            f"{where}: holds several profiles of {wanted}; {listed(mine)}; name accelerator and model, or choose a "
            "folder with one"
        )
    return _of_degree(mine, wanted, where)


def _of_precision(files: list[Found], wanted: Wanted, where: str) -> list[Found]:
    known = sorted({f.precision for f in files if f.layout != AICONFIGURATOR})
    if not wanted.precision:
        if len(known) > 1:
            names = " and ".join(known)
            raise ScenarioError(f"{where}: profiles {wanted} in {names}; name the precision")
        return files
    right = [f for f in files if f.layout == AICONFIGURATOR or wanted.is_in(f)]
    if not right:
        raise ScenarioError(
            f"{where}: profiles {wanted} in {', '.join(known)}, not in {wanted.precision}; measure it, or ask for "
            f"{known[0]}"
        )
    exact = [f for f in right if f.precision == wanted.precision]
    return exact or right


def _of_degree(files: list[Found], wanted: Wanted, where: str) -> list[Found]:
    degrees = sorted({f.tensor_parallel for f in files if f.tensor_parallel})
    if not degrees:
        return files
    if wanted.tensor_parallel is None and len(degrees) > 1:
        names = ", ".join(map(str, degrees))
        raise ScenarioError(f"{where}: profiles {wanted} at tensor parallel {names}; name one")
    degree = degrees[0] if wanted.tensor_parallel is None else wanted.tensor_parallel
    if degree not in degrees:
        names = ", ".join(map(str, degrees))
        raise ScenarioError(f"{where}: tensor_parallel = {degree} was not profiled for {wanted}; profiled are {names}")
    return [f for f in files if f.tensor_parallel == degree]


def listed(files: Sequence[Found]) -> str:
    """What there is, as the end of a sentence."""
    names = {}
    for f in files:
        degree = f" tp{f.tensor_parallel}" if f.tensor_parallel else ""
        of = f.model or "any model (kernel tables)"
        names[(*f.bundle, f.tensor_parallel)] = f"{of} on {f.accelerator}{degree} {f.precision}".rstrip()
    shown = sorted(set(names.values()))
    if not shown:
        return "it holds none at all"
    return f"it holds {', '.join(shown[:8])}{f' and {len(shown) - 8} more' if len(shown) > 8 else ''}"
