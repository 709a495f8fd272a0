"""Reading a scenario file: TOML, bundled names, catalog entries, profiles, a trace; every refusal is one sentence."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from llmopt.catalog import catalog_entry, read_entry
from llmopt.errors import ScenarioError
from llmopt.explain import suggestion
from llmopt.scenario import Scenario

SCENARIOS = Path(__file__).parent.parent / "scenarios"


def bundled_scenarios() -> dict[str, Path]:
    """Names and files of the scenarios that come with the package, sorted by name."""
    return {file.stem: file for file in sorted(SCENARIOS.glob("*.toml"))}


def load_scenario(path: str | Path, trace: str | Path | None = None) -> Scenario:
    """Read, resolve and validate a scenario file.

    Parameters
    ----------
    path
        A TOML file, or the name of a bundled scenario such as ``quickstart``.
    trace
        A trace file to replay instead of the arrivals and lengths in the file.

    Raises
    ------
    ScenarioError
        With file, key, reason and remedy in one sentence.
    """
    file = _locate(path)
    data = _toml(file)
    data.setdefault("name", file.stem)
    pools = data.get("pools")
    if isinstance(pools, list):
        data["pools"] = [_resolved(pool, f"{path}: pools[{i}]", file.parent) for i, pool in enumerate(pools)]
    if trace is None and not _names_trace(data):
        return Scenario.checked(data, str(path))
    from llmopt.trace_workload import with_trace

    return with_trace(data, file, str(path), trace)


def _locate(path: str | Path) -> Path:
    """The file meant by a path or a bundled name; a plain word is a name first."""
    bundled, word = bundled_scenarios(), str(path)
    if word in bundled:
        return bundled[word]
    file = Path(path)
    if file.is_dir():
        raise ScenarioError(f"{path}: is a folder; give a scenario file in it")
    if file.exists():
        return file
    if file.suffix == "" and len(file.parts) == 1:
        raise ScenarioError(f"{path}: no such file or bundled scenario; {suggestion(word, tuple(bundled))}")
    raise ScenarioError(f"{path}: no such file; check the path, or name a bundled scenario ({', '.join(bundled)})")


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise ScenarioError(f"{file}: is not a text file; give a scenario in TOML") from None
    except tomllib.TOMLDecodeError as error:
        hint = "pass a trace with --trace" if file.suffix in (".csv", ".jsonl", ".json") else "correct that line"
        raise ScenarioError(f"{file}: is not valid TOML: {error}; {hint}") from None
    except OSError as error:
        raise ScenarioError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None


def _names_trace(data: dict[str, Any]) -> bool:
    workload = data.get("workload")
    return isinstance(workload, dict) and "trace" in workload


def _resolved(pool: Any, where: str, folder: Path) -> Any:
    """The pool with what its catalog entry, its profile, or its accelerator and model say of the keys it leaves out."""
    if not isinstance(pool, dict):
        return pool
    return _with_profile(_from_machines(_from_catalog(pool, f"{where}.catalog", folder), where), where, folder)


def _from_catalog(pool: dict[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """The pool with the constants of its catalog entry, a name or a file relative to the scenario's, under its keys."""
    name = pool.get("catalog")
    if not isinstance(name, str):
        return pool
    try:
        entry = read_entry(folder / name) if name.endswith(".toml") else catalog_entry(name)
    except ScenarioError as error:
        raise ScenarioError(f"{where}: {error}") from None
    constants = {"source": entry.description} | entry.pool
    if pool.get("preemption", "recompute") != "recompute":
        constants.pop("prefix_caching", None)  # only what is computed twice can be found in a cache
    return constants | pool | _bundle_of(constants.get("bundle"), pool.get("bundle"))


def _bundle_of(known: Any, given: Any) -> dict[str, Any]:
    """The entry's bundle with the keys that the scenario gives; its FFN times replace the entry's, in whatever form."""
    if not isinstance(known, dict) or not isinstance(given, dict):
        return {}
    times = {"ffn", "ffn_table"}
    kept = {key: value for key, value in known.items() if not (key in times and times & given.keys())}
    return {"bundle": kept | given}


def _from_machines(pool: dict[str, Any], where: str) -> dict[str, Any]:
    """The pool with a first guess of what its accelerator and model imply, where it gives no such constants."""
    if pool.get("bundle") is not None:
        return pool  # it determines both
    missing = {"step_time", "kv_capacity"} - set(pool) - ({"step_time"} if pool.get("profile") else set())
    named = all(isinstance(pool.get(key), str) and pool[key] for key in ("accelerator", "model"))
    if not missing or not named:
        return pool
    from llmopt.machines.guess import first_guess

    try:
        return first_guess(pool, missing) | pool
    except ScenarioError as error:
        raise ScenarioError(f"{where}: {error} (or give {' and '.join(sorted(missing))})") from None


def _with_profile(pool: dict[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """The pool with the step table of its profile, a folder named relative to the scenario file's."""
    profile, degree = pool.get("profile"), pool.get("tensor_parallel", 1)
    if not isinstance(profile, str) or not profile or not isinstance(degree, int) or degree < 1:
        return pool
    where = f"{where} ({pool['name']!r})" if isinstance(pool.get("name"), str) else where
    for key in ("accelerator", "model"):
        if not isinstance(pool.get(key), str) or not pool[key]:
            raise ScenarioError(f"{where}: has a profile but no {key}, which chooses among its tables; add {key}")
    if "step_time" not in pool:
        raise ScenarioError(
            f"{where}: has a profile but no step_time, which the theory and the programs use; fit one with "
            f"llmopt calibrate {profile}, or name a catalog entry"
        )
    from llmopt.profiles import load_step_table

    try:
        table = load_step_table(folder / profile, pool["accelerator"], pool["model"], tensor_parallel=degree)
    except ScenarioError as error:
        raise ScenarioError(f"{where}.profile: {error}") from None
    return pool | {"table": table}
