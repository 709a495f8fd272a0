"""DistServe's fitted coefficients as affine pieces (github.com/LLMServe/DistServe, simdistserve/estimators)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.errors import ScenarioError
from llmopt.hardware import Piece
from llmopt.profiles.names import same_model

MILLI = 1e-3


@dataclass(frozen=True)
class FittedSteps:
    """Step times of pure batches, fitted by DistServe on A100-80GB; pieces in seconds, as `llmopt.hardware.Piece`.

    prefill: a batch of whole prompts. small, large: decode-only batches of fewer than `threshold` sequences, and of at
    least as many. notes: what was changed to make them step times.
    """

    prefill: Piece
    small: Piece
    large: Piece
    threshold: int
    notes: tuple[str, ...] = ()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All three, whose maximum is a max-affine step time."""
        return (self.prefill, self.small, self.large)


def read_distserve(path: str | Path, model: str, tensor_parallel: int = 1) -> FittedSteps:
    """The pieces of one model.

    In the file, in milliseconds: prefill = a + b x (sum of lengths) + c x (sum of squared lengths), and decode = a +
    b x (sum of contexts) + c x (sequences). A prompt of n tokens has n^2/2 attention pairs, hence pairs = 2 c.

    Raises
    ------
    ScenarioError
        If the file, the model or the degree does not exist, or three coefficients are missing.
    """
    data = _read(Path(path))
    name = next((known for known in data if same_model(known, model)), None)
    if name is None:
        raise ScenarioError(f"{path}: has no model {model!r}; it has {', '.join(data)}")
    if str(tensor_parallel) not in data[name]:
        known = ", ".join(data[name])
        raise ScenarioError(f"{path}: {name} was not fitted at tensor parallel {tensor_parallel}; fitted are {known}")
    entry = data[name][str(tensor_parallel)]
    a, b, c = _three(path, entry, "prefill")
    notes = () if c >= 0 else (f"prefill: {c:.3g} ms per squared length, which is negative, is taken as 0",)
    prefill = Piece(name="prefill", base=a * MILLI, prefill=b * MILLI, pairs=2.0 * max(c, 0.0) * MILLI)
    small, large = (_decode(path, entry, kind) for kind in ("smallbs", "largebs"))
    return FittedSteps(prefill, small, large, int(entry.get("decoding_large_small_bs_threshold", 0)), notes)


def _decode(path: str | Path, entry: dict[str, Any], kind: str) -> Piece:
    a, b, c = _three(path, entry, f"decoding_{kind}")
    return Piece(name=f"decode {kind.removesuffix('bs')}", base=a * MILLI, kv=b * MILLI, decode=c * MILLI)


def _three(path: str | Path, entry: dict[str, Any], key: str) -> tuple[float, float, float]:
    values = entry.get(key)
    if not (isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)):
        raise ScenarioError(f"{path}: {key} holds no three coefficients; give base, per token and per square in ms")
    a, b, c = (float(v) for v in values)
    if a < 0 or b < 0 or (c < 0 and key != "prefill"):
        raise ScenarioError(f"{path}: {key} has a negative coefficient ({a:g}, {b:g}, {c:g} ms); fit it again")
    return a, b, c


def _read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError:
        raise ScenarioError(f"{path}: is not valid JSON; give DistServe's profiler file") from None
    if not isinstance(data, dict) or not all(isinstance(v, dict) for v in data.values()):
        raise ScenarioError(f"{path}: holds no models; give DistServe's profiler file")
    return data
