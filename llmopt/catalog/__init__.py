"""Catalog of pools: engine settings and step times of one model on one accelerator, each constant with its source.

An entry is a TOML file beside this module: the keys of a `[[pools]]` table except name and replicas, a one-line
`description`, and a `[sources]` table that says for every constant where it was measured or published. Users' own
entries are files of the same form.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.errors import ScenarioError
from llmopt.explain import suggestion


@dataclass(frozen=True)
class Entry:
    """One catalog entry: `pool` holds keys of a `[[pools]]` table, `sources` the origin of each of them."""

    name: str
    description: str
    pool: dict[str, Any]
    sources: dict[str, str]


def catalog_names() -> tuple[str, ...]:
    """Names of all entries, sorted."""
    return tuple(sorted(file.stem for file in Path(__file__).parent.glob("*.toml")))


def catalog_entry(name: str) -> Entry:
    """The entry called `name`.

    Raises
    ------
    ScenarioError
        If there is none, with the nearest name.
    """
    if name not in catalog_names():
        raise ScenarioError(f"catalog entry {name!r} does not exist; {suggestion(name, catalog_names())}")
    return read_entry(Path(__file__).with_name(f"{name}.toml"))


def read_entry(file: str | Path) -> Entry:
    """The entry in a file of one's own, such as `llmopt calibrate -o` writes; description and sources may lack.

    Raises
    ------
    ScenarioError
        If the file cannot be read or is not valid TOML, or has no constants.
    """
    try:
        pool = tomllib.loads(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ScenarioError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise ScenarioError(f"{file}: is not valid TOML ({error}); correct it, or name a catalog entry") from None
    description, sources = pool.pop("description", ""), pool.pop("sources", {})
    if not isinstance(description, str) or not isinstance(sources, dict):
        raise ScenarioError(f"{file}: description must be a text and sources a table; correct them")
    strange = {"pools", "workload", "name", "replicas", "catalog"} & pool.keys()
    if strange:
        raise ScenarioError(f"{file}: is no catalog entry, since it has {', '.join(sorted(strange))}; name one")
    return Entry(Path(file).stem, description, pool, sources)
