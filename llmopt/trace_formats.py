"""Layouts of public traces: which columns hold the arrival, the prompt and the output, and in which unit.

A layout is recognised by its column names, which are compared without case, spaces, dashes and underscores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmopt.errors import ScenarioError
from llmopt.explain import suggestion


@dataclass(frozen=True)
class Layout:
    """Column names of one layout.

    scale: seconds per unit of a numeric arrival; hashes: column of prefix block hashes, of `block` tokens each;
    marks: further columns that tell it from its neighbours; source: where the layout is published.
    """

    name: str
    source: str
    prompt: str
    output: str
    arrival: str | None = None
    scale: float = 1.0
    hashes: str | None = None
    block: int = 0
    marks: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns without which the layout cannot be read."""
        return tuple(c for c in (self.arrival, self.prompt, self.output, *self.marks) if c)


LAYOUTS = (
    Layout(
        "azure",
        "Azure LLM inference traces 2023 and 2024 (github.com/Azure/AzurePublicDataset)",
        arrival="TIMESTAMP",
        prompt="ContextTokens",
        output="GeneratedTokens",
    ),
    Layout(
        "burstgpt",
        "BurstGPT (github.com/HPMLL/BurstGPT), releases 1 and 2",
        arrival="Timestamp",
        prompt="Request tokens",
        output="Response tokens",
    ),
    Layout(
        "qwen-bailian",
        "Qwen-Bailian traces (github.com/alibaba-edu/qwen-bailian-usagetraces-anon): seconds, 16-token blocks",
        arrival="timestamp",
        prompt="input_length",
        output="output_length",
        hashes="hash_ids",
        block=16,
        marks=("chat_id",),
    ),
    Layout(
        "mooncake",
        "Mooncake FAST'25 traces (github.com/kvcache-ai/Mooncake): milliseconds, 512-token blocks",
        arrival="timestamp",
        prompt="input_length",
        output="output_length",
        scale=1e-3,
        hashes="hash_ids",
        block=512,
    ),
    Layout(
        "vllm-log",
        "per-request log of a vLLM run (github.com/casys-kaist/LLMServingSim)",
        arrival="arrival_time",
        prompt="input_toks",
        output="output_toks",
    ),
    Layout(
        "vllm-bench",
        "result of vllm bench serve --save-result --save-detailed",
        arrival="start_times",
        prompt="input_lens",
        output="output_lens",
    ),
    Layout(
        "vidur",
        "Vidur traces (github.com/microsoft/vidur)",
        arrival="arrived_at",
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
    ),
    Layout(
        "lengths",
        "length pairs without times (Vidur, Sarathi-Serve)",
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
    ),
)
SERVEGEN = "servegen"
GENERIC = {
    "arrival": ("arrival", "arrival_time", "timestamp", "time", "start_time", "t"),
    "arrival_ms": ("arrival_ms", "timestamp_ms", "time_ms"),
    "prompt": ("prompt", "prompt_tokens", "prompt_len", "input", "input_tokens", "input_length", "input_len"),
    "output": ("output", "output_tokens", "output_length", "output_len", "completion_tokens", "generated_tokens"),
    "hashes": ("hashes", "hash_ids"),
}
GENERIC_BLOCK = 512
NAME_THEM = (
    "name the columns with columns = { arrival = ..., prompt = ..., output = ... } in [workload.trace], or make a copy "
    "with llmopt trace FILE --column prompt=... --column output=... --to COPY"
)


def format_names() -> tuple[str, ...]:
    """Names that `read_trace(format=...)` and a scenario's `[workload.trace] format` take."""
    return (*(layout.name for layout in LAYOUTS), SERVEGEN, "generic")


def find_layout(
    path: str | Path, found: Iterable[str], format: str | None, columns: Mapping[str, str] | None
) -> Layout | str:
    """The layout of a file with the columns `found`, with columns as spelt in it; or ``"servegen"``.

    Raises
    ------
    ScenarioError
        If none fits; the message names the missing column and those that were found.
    """
    spelt = {_plain(name): name for name in found}
    if format is not None and format not in format_names():
        raise ScenarioError(f"{path}: trace format {format!r} is not known; {suggestion(format, format_names())}")
    if columns is not None:
        return _mapped(path, spelt, columns)
    if format == SERVEGEN or (format is None and {"ts", "rate", "cv", "pattern"} <= set(spelt)):
        return SERVEGEN
    if format == "generic":
        return _generic(path, spelt)
    candidates = [layout for layout in LAYOUTS if format in (None, layout.name)]
    complete = [layout for layout in candidates if not _missing(layout, spelt)]
    if complete:
        return _respelt(complete[0], spelt)
    return _closest(path, spelt, candidates) if format else _generic(path, spelt, candidates)


def _plain(name: object) -> str:
    return "".join(ch for ch in str(name).lower() if ch not in " _-")


def _missing(layout: Layout, spelt: Mapping[str, str]) -> list[str]:
    return [column for column in layout.needs if _plain(column) not in spelt]


def _respelt(layout: Layout, spelt: Mapping[str, str]) -> Layout:
    def at(column: str | None) -> str | None:
        return None if column is None else spelt.get(_plain(column))

    return Layout(
        layout.name,
        layout.source,
        prompt=spelt[_plain(layout.prompt)],
        output=spelt[_plain(layout.output)],
        arrival=at(layout.arrival),
        scale=layout.scale,
        hashes=at(layout.hashes),
        block=layout.block,
    )


def _closest(path: str | Path, spelt: Mapping[str, str], candidates: list[Layout]) -> Layout:
    """Refuses, naming what the layout that fits best lacks."""
    best = min(candidates, key=lambda layout: len(_missing(layout, spelt)) / len(layout.needs))
    missing = ", ".join(map(repr, _missing(best, spelt)))
    raise ScenarioError(
        f"{path}: looks like a trace in {best.name} layout but has no column {missing} (found {_list(spelt)}); "
        f"add it, or {NAME_THEM}"
    )


def _generic(path: str | Path, spelt: Mapping[str, str], candidates: list[Layout] | None = None) -> Layout:
    roles = {role: next((n for n in names if _plain(n) in spelt), None) for role, names in GENERIC.items()}
    mapping = {role: name for role, name in roles.items() if name}
    if "prompt" in mapping and "output" in mapping:
        return _mapped(path, spelt, mapping)
    near = [c for c in candidates or () if len(_missing(c, spelt)) < len(c.needs) and len(c.needs) > 2]
    if near:
        return _closest(path, spelt, near)
    lacks = " and ".join(role for role in ("prompt", "output") if role not in mapping)
    raise ScenarioError(f"{path}: has no column for {lacks} tokens (found {_list(spelt)}); {NAME_THEM}")


def _mapped(path: str | Path, spelt: Mapping[str, str], columns: Mapping[str, str]) -> Layout:
    unknown = [role for role in columns if role not in GENERIC]
    if unknown:
        raise ScenarioError(f"{path}: columns has {unknown[0]!r}; {suggestion(unknown[0], tuple(GENERIC))}")
    for role in ("prompt", "output"):
        if role not in columns:
            raise ScenarioError(f"{path}: columns names no {role}; add {role} = the column with {role} tokens")
    lost = [name for name in columns.values() if _plain(name) not in spelt]
    if lost:
        raise ScenarioError(f"{path}: has no column {lost[0]!r} (found {_list(spelt)}); correct columns")
    at = {role: spelt[_plain(name)] for role, name in columns.items()}
    arrival = at.get("arrival", at.get("arrival_ms"))
    scale = 1.0 if "arrival" in at else 1e-3
    return Layout("generic", "", at["prompt"], at["output"], arrival, scale, at.get("hashes"), GENERIC_BLOCK)


def _list(spelt: Mapping[str, str]) -> str:
    names = [str(name) for name in spelt.values()]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
