"""Catalog of pools: engine settings and step times of one model on one accelerator, each constant with its source.

An entry is a TOML file beside this module: the keys of a `[[pools]]` table except name and replicas, a one-line
`description`, and a `[sources]` table that says for every constant where it was measured or published.
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
    pool = tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))
    return Entry(name, pool.pop("description"), sources=pool.pop("sources"), pool=pool)
