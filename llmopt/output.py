"""Plain data and files: what every command writes, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.errors import ScenarioError


def plain(value: Any) -> Any:
    """`value` as JSON data: dataclasses and mappings become objects, arrays lists, NaN and infinity null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def to_json(value: Any) -> str:
    """Indented JSON text of `plain(value)`, with a final newline; equal values give equal bytes."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write(path: str | Path, content: str | bytes) -> Path:
    """Write a file at once: a reader, or an interrupt, never sees half of it.

    Raises
    ------
    ScenarioError
        If the folder cannot be made or written.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).chmod(0o666 & ~_umask())
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ScenarioError(f"{target}: cannot be written ({error.strerror}); choose another place") from error
    return target


def _umask() -> int:
    """The process's mask for new files; mkstemp ignores it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
