"""Plain data and files: what every command writes, whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.errors import ScenarioError


def plain(value: Any) -> Any:
    """`value` as JSON data: dataclasses and mappings become objects, arrays and sorted sets lists, NaN and inf null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=repr)
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def to_json(value: Any) -> str:
    """Indented JSON text of `plain(value)`, with a final newline; equal values give equal bytes."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, with its suffix, that becomes `path` when the block ends well.

    Raises
    ------
    ScenarioError
        If the folder cannot be made or written.
    """
    target = Path(path)
    if not target.name:
        raise ScenarioError(f"{str(path)!r} names no file to write; name one")
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise ScenarioError(f"{target}: cannot be written ({error.strerror}); choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write(path: str | Path, content: str | bytes) -> Path:
    """Write a file at once: a reader, or an interrupt, never sees half of it.

    Raises
    ------
    ScenarioError
        If the folder cannot be made or written.
    """
    with whole(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)
