"""The base of every input model: strict, frozen, no unknown keys, no NaN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from llmopt.errors import ScenarioError

Name = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class InputModel(BaseModel):
    """A validated, immutable piece of a scenario file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with fields replaced, not validated; what was computed from the old fields is dropped."""
        copy = super().model_copy(update=update, deep=deep)
        for name in set(copy.__dict__) - set(type(self).model_fields):
            del copy.__dict__[name]
        return copy

    def __eq__(self, other: object) -> bool:
        """Equal fields; pydantic would compare cached arrays too, and fail."""
        return type(self) is type(other) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((type(self), *self._key()))

    def _key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in type(self).model_fields)


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the place in a scenario's plain data that `key` names with dots.

    Raises
    ------
    ScenarioError
        If there is no such place.
    """
    *path, last = key.split(".")
    node: Any = data
    try:
        for part in path:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (ValueError, IndexError, AttributeError, TypeError):
        raise ScenarioError(f"{key}: no such place in a scenario; write it like pools.0.replicas") from None
