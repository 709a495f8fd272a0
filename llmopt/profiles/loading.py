"""From a folder of profile files to one `Profile`, and on to a step table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llmopt.errors import ScenarioError
from llmopt.machines import Accelerator, model_shape
from llmopt.machines import accelerator as chip_of
from llmopt.profiles.aiconfigurator import read_aiconfigurator
from llmopt.profiles.compose import compose
from llmopt.profiles.data import Curve, Profile
from llmopt.profiles.finding import (
    AICONFIGURATOR,
    HARDWARE,
    NETWORK,
    SERVINGSIM,
    VIDUR,
    Found,
    Wanted,
    choose,
    profile_files,
    stated,
)
from llmopt.profiles.servingsim import read_servingsim
from llmopt.profiles.transfers import read_hardware, read_network
from llmopt.profiles.vidur import degrees, read_vidur
from llmopt.steptable import StepTable


def find_profile(
    folder: str | Path,
    accelerator: str,
    model: str,
    *,
    tensor_parallel: int = 1,
    precision: str = "",
    expert_parallel: int = 1,
    data_parallel: int = 1,
) -> Profile:
    """The profile of a model on an accelerator in a folder, which is searched recursively.

    Names are compared without case, punctuation, organisation, form factor, memory size and words about tuning. Files
    that state no precision are taken for bf16, Vidur's for fp16. An all-reduce among `tensor_parallel` of these
    accelerators is taken from wherever in the folder it was measured, and
    an all-gather among those of `data_parallel` engines that share experts from the accelerator's hardware.yaml.

    Raises
    ------
    ScenarioError
        If there is none or several, or a file holds something that is no measurement; one sentence, with the file.
    """
    wanted = Wanted(accelerator, model, tensor_parallel, precision)
    return _read([folder], wanted, str(folder), expert_parallel, data_parallel)


def read_profile(
    *paths: str | Path,
    accelerator: str = "",
    model: str = "",
    tensor_parallel: int | None = None,
    precision: str = "",
    expert_parallel: int = 1,
) -> Profile:
    """The one profile in these files and folders; what is not asked for must be unique.

    Raises
    ------
    ScenarioError
        As `find_profile`.
    """
    wanted = Wanted(accelerator, model, tensor_parallel, precision)
    return _read(paths, wanted, ", ".join(map(str, paths)), expert_parallel)


def load_step_table(
    folder: str | Path,
    accelerator: str,
    model: str,
    *,
    tensor_parallel: int = 1,
    precision: str = "",
    expert_parallel: int = 1,
    data_parallel: int = 1,
) -> StepTable:
    """`find_profile` and `compose` in one: the step time of a model of the catalog on an accelerator.

    With `data_parallel` engines, whose experts are divided among more GPUs than one engine has, the expert block serves
    the tokens of all of them (see `compose`); otherwise the engines are separate, and their number does not matter.

    Raises
    ------
    ScenarioError
        As both, or if the model is not in the catalog of models.
    """
    shape = model_shape(model)
    engines = data_parallel if shape.experts and expert_parallel > tensor_parallel else 1
    profile = find_profile(
        folder,
        accelerator,
        model,
        tensor_parallel=tensor_parallel,
        precision=precision or shape.precision,
        expert_parallel=expert_parallel,
        data_parallel=engines,
    )
    return compose(profile, shape, _chip(accelerator), precision=precision, data_parallel=engines)


def _chip(name: str) -> Accelerator | None:
    """The accelerator of the catalog, if it is in it."""
    try:
        return chip_of(name)
    except ScenarioError:
        return None


def _read(
    paths: Sequence[str | Path], wanted: Wanted, where: str, expert_parallel: int, data_parallel: int = 1
) -> Profile:
    files = profile_files(paths)
    chosen = choose(files, wanted, where)
    kinds = _by_kind(_with_experts(chosen, files, expert_parallel))
    first = chosen[0]
    if first.layout == AICONFIGURATOR and wanted.tensor_parallel is None:
        raise ScenarioError(f"{where}: holds kernels for any tensor-parallel degree; name one, 1 for a single GPU")
    empty = Profile(
        accelerator=wanted.accelerator or first.accelerator,
        model=wanted.model or first.model,
        tensor_parallel=first.tensor_parallel or wanted.tensor_parallel or _single_degree(kinds),
        precision=stated(first.precision) or wanted.precision or "bf16",
        layout=first.layout,
    )
    profile = _READERS[first.layout](kinds, empty, expert_parallel)
    profile = _with_attention(profile, files, wanted)
    return _with_transfers(profile, files, wanted, data_parallel)


def _with_experts(chosen: list[Found], files: list[Found], expert_parallel: int) -> list[Found]:
    """With expert parallelism experts are not split any further, and may stand in the folder of one GPU alone."""
    if expert_parallel == 1 or chosen[0].layout != SERVINGSIM or any(f.kind == "moe" for f in chosen):
        return chosen
    same = [f for f in files if f.kind == "moe" and f.bundle == chosen[0].bundle and f.tensor_parallel == 1]
    return chosen + same[:1]


def _by_kind(files: Sequence[Found]) -> dict[str, Path]:
    """One file of each kind; of several versions of a kernel table the last by name."""
    out: dict[str, Path] = {}
    for file in files:
        if file.kind in out and file.layout != AICONFIGURATOR:
            raise ScenarioError(f"{file.path}: holds what {out[file.kind]} holds too; take one of the two away")
        out[file.kind] = file.path
    return out


def _single_degree(kinds: dict[str, Path]) -> int:
    """The tensor-parallel degree of files that hold only one."""
    known = sorted(set.intersection(*(set(degrees(path)) for path in kinds.values()))) if kinds else []
    if len(known) != 1:
        names = ", ".join(map(str, known)) or "none"
        raise ScenarioError(f"{next(iter(kinds.values()))}: tensor-parallel degrees in it are {names}; name one")
    return known[0]


def _servingsim(kinds: dict[str, Path], empty: Profile, expert_parallel: int) -> Profile:
    return read_servingsim(kinds, empty, expert_parallel)


def _vidur(kinds: dict[str, Path], empty: Profile, expert_parallel: int) -> Profile:
    return read_vidur(kinds, empty, expert_parallel)


def _aiconfigurator(kinds: dict[str, Path], empty: Profile, expert_parallel: int) -> Profile:
    return read_aiconfigurator(kinds, empty, model_shape(empty.model), expert_parallel)


_READERS = {SERVINGSIM: _servingsim, VIDUR: _vidur, AICONFIGURATOR: _aiconfigurator}


def _with_attention(profile: Profile, files: list[Found], wanted: Wanted) -> Profile:
    """Attention out of the kernel tables of the same accelerator in the folder, where the profile has none."""
    kernels = [f for f in files if f.layout == AICONFIGURATOR and wanted.is_on(f) and f.kind.endswith("_attention")]
    if profile.layout != VIDUR or profile.prefill is not None or len(kernels) < 2 or not wanted.model:
        return profile
    other = read_aiconfigurator(_by_kind(kernels), profile, model_shape(wanted.model))
    note = f"attention: not in these files, from {', '.join(sorted(f.path.name for f in kernels))}"
    files_used = profile.files + other.files
    return replace(profile, prefill=other.prefill, decode=other.decode, files=files_used, notes=(*profile.notes, note))


def _with_transfers(profile: Profile, files: list[Found], wanted: Wanted, engines: int) -> Profile:
    """All-reduce, send/receive and link of the accelerator; a DGX before other machines, the profile's own first."""
    gpus = profile.tensor_parallel
    if gpus * engines == 1:
        return profile
    mine = [f for f in files if wanted.is_on(f)]
    for file in (f for f in mine if f.layout == HARDWARE):
        hardware = read_hardware(file.path)
        if hardware.gpus == gpus and hardware.all_reduce is not None:
            profile = replace(profile, all_reduce=hardware.all_reduce, files=(*profile.files, str(file.path)))
        if engines > 1 and hardware.gpus == gpus * engines and hardware.exchange is not None:
            profile = replace(profile, exchange=hardware.exchange, files=(*profile.files, str(file.path)))
        profile = replace(profile, link=profile.link or hardware.link)
    reduce = profile.all_reduce or _network(mine, "all_reduce", gpus)
    return replace(profile, all_reduce=reduce, send_recv=_network(mine, "send_recv", 2))


def _network(files: list[Found], collective: str, gpus: int) -> Curve | None:
    tables = [f for f in files if f.layout == NETWORK and f.kind == collective]
    for file in sorted(tables, key=lambda f: "dgx" not in str(f.path).lower()):
        if (curve := read_network(file.path, collective, gpus)) is not None:
            return curve
    return None
