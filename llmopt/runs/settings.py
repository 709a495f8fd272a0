"""What an engine ran with: settings recorded in meta.json, and vLLM's defaults for those that are not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmopt.errors import ScenarioError
from llmopt.machines import accelerator
from llmopt.machines.lookup import repository

Origin = Literal["recorded", "assumed", "computed", "given"]
Version = tuple[int, int]
NEWEST: Version = (999, 0)
LARGE_GPU = 70 * 2**30
"""Bytes from which vLLM takes larger defaults for the batch, A100 excepted (vllm/engine/arg_utils.py)."""


@dataclass(frozen=True)
class Setting:
    """One setting: its value, where it comes from, and a note for the reader."""

    value: Any
    origin: Origin
    note: str = ""


class Known(NamedTuple):
    """What a default may depend on."""

    version: Version
    gpu: str
    memory: float

    @property
    def large(self) -> bool:
        """Whether vLLM takes the GPU for a large one."""
        return self.memory >= LARGE_GPU and "a100" not in self.gpu.lower()


Default = Callable[[Known], tuple[Any, str]]


def _always(value: Any, note: str = "vLLM's default") -> Default:
    return lambda known: (value, note)


def _async(known: Known) -> tuple[Any, str]:
    return known.version >= (0, 14), "vLLM's default since 0.14 (release notes: async scheduling enabled by default)"


def _utilisation(known: Known) -> tuple[Any, str]:
    """0.9 is recorded by a 0.19 run; vllm/config/cache.py of 0.25 has 0.92."""
    return (0.92, "vLLM's default by 0.25") if known.version >= (0, 20) else (0.9, "vLLM's default up to 0.19")


def _sequences(known: Known) -> tuple[Any, str]:
    return (1024 if known.large else 256), "vLLM's default for a server on this GPU"


def _tokens(known: Known) -> tuple[Any, str]:
    return (8192 if known.large else 2048), "vLLM's default for a server on this GPU"


class Field(NamedTuple):
    """A setting: where meta.json may have it, first place first; what kind of value it is; its default."""

    kind: str
    places: tuple[str, ...]
    default: Default = _always(None, "not recorded")


ARGS, RESOLVED = "engine_kwargs.", "resolved_config."
PARALLEL, SCHEDULER, CACHE = (f"{RESOLVED}{name}_config." for name in ("parallel", "scheduler", "cache"))
FIELDS: Mapping[str, Field] = {
    "vllm_version": Field("text", ("vllm_version",)),
    "model": Field("text", ("model", f"{ARGS}model", f"{RESOLVED}model_config.model", "config.model_name")),
    "gpu": Field("text", ("hardware.device_name", "config.hardware", "folder.gpu")),
    "gpu_memory_bytes": Field("count", ("hardware.device_total_memory_bytes",)),
    "tensor_parallel_size": Field(
        "count",
        (f"{PARALLEL}tensor_parallel_size", f"{ARGS}tensor_parallel_size", "config.tp_size"),
        _always(1),
    ),
    "data_parallel_size": Field("count", (f"{PARALLEL}data_parallel_size", f"{ARGS}data_parallel_size"), _always(1)),
    "pipeline_parallel_size": Field(
        "count", (f"{PARALLEL}pipeline_parallel_size", f"{ARGS}pipeline_parallel_size"), _always(1)
    ),
    "enable_expert_parallel": Field(
        "flag", (f"{PARALLEL}enable_expert_parallel", f"{ARGS}enable_expert_parallel"), _always(False)
    ),
    "max_num_seqs": Field("count", (f"{SCHEDULER}max_num_seqs", f"{ARGS}max_num_seqs"), _sequences),
    "max_num_batched_tokens": Field(
        "count",
        (
            f"{SCHEDULER}max_num_scheduled_tokens",
            f"{SCHEDULER}max_num_batched_tokens",
            f"{ARGS}max_num_batched_tokens",
        ),
        _tokens,
    ),
    "long_prefill_token_threshold": Field(
        "whole",
        (f"{SCHEDULER}long_prefill_token_threshold", f"{ARGS}long_prefill_token_threshold"),
        _always(0, "vLLM's default: no threshold"),
    ),
    "async_scheduling": Field("flag", (f"{SCHEDULER}async_scheduling", f"{ARGS}async_scheduling"), _async),
    "enable_prefix_caching": Field(
        "flag",
        (f"{CACHE}enable_prefix_caching", "kv_cache.enable_prefix_caching", f"{ARGS}enable_prefix_caching"),
        _always(True),
    ),
    "enable_chunked_prefill": Field(
        "flag", (f"{SCHEDULER}enable_chunked_prefill", f"{ARGS}enable_chunked_prefill"), _always(True)
    ),
    "scheduler_reserve_full_isl": Field(
        "flag", (f"{SCHEDULER}scheduler_reserve_full_isl", f"{ARGS}scheduler_reserve_full_isl"), _always(True)
    ),
    "policy": Field("text", (f"{SCHEDULER}policy", f"{ARGS}scheduling_policy"), _always("fcfs")),
    "speculative_config": Field(
        "any", (f"{RESOLVED}speculative_config", f"{ARGS}speculative_config"), _always(None, "vLLM's default: none")
    ),
    "dtype": Field("text", (f"{RESOLVED}model_config.dtype", f"{ARGS}dtype"), _always("auto")),
    "kv_cache_dtype": Field("text", (f"{CACHE}cache_dtype", f"{ARGS}kv_cache_dtype"), _always("auto")),
    "quantization": Field(
        "text", (f"{RESOLVED}model_config.quantization", f"{ARGS}quantization"), _always(None, "vLLM's default: none")
    ),
    "block_size": Field("count", (f"{CACHE}block_size", "kv_cache.block_size", f"{ARGS}block_size"), _always(16)),
    "num_gpu_blocks": Field("count", (f"{CACHE}num_gpu_blocks", "kv_cache.num_gpu_blocks")),
    "gpu_memory_utilization": Field(
        "share",
        (f"{CACHE}gpu_memory_utilization", "kv_cache.gpu_memory_utilization", f"{ARGS}gpu_memory_utilization"),
        _utilisation,
    ),
}


def read_settings(meta: Mapping[str, Any], path: Path) -> dict[str, Setting]:
    """All settings of `FIELDS`; `meta` are the recorded ones, `path` the file that errors name.

    A recorded null counts as absent.

    Raises
    ------
    ScenarioError
        If a recorded value cannot be.
    """
    found = {name: _recorded(meta, name, field, path) for name, field in FIELDS.items()}
    return assumed_for({name: setting for name, setting in found.items() if setting})


def assumed_for(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """All settings of `FIELDS`: those that were not assumed as they are, the others at their defaults beside them."""
    sure = {name: setting for name, setting in settings.items() if setting.origin != "assumed"}
    gpu = str(sure["gpu"].value) if "gpu" in sure else ""
    memory = float(sure["gpu_memory_bytes"].value) if "gpu_memory_bytes" in sure else _memory(gpu)
    known = Known(version_of(sure.get("vllm_version")), gpu, memory)
    return {name: sure.get(name) or Setting(*_assumed(field, known)) for name, field in FIELDS.items()}


def _memory(gpu: str) -> float:
    """Bytes of a GPU of the catalog, 0 if it is in none."""
    try:
        return accelerator(gpu).memory_bytes
    except ScenarioError:
        return 0.0


def version_of(setting: Setting | None) -> Version:
    """Major and minor version; one that is not recorded, or cannot be read, is taken for the newest."""
    numbers = re.match(r"\D*(\d+)\.(\d+)", str(setting.value) if setting else "")
    return (int(numbers[1]), int(numbers[2])) if numbers else NEWEST


def _assumed(field: Field, known: Known) -> tuple[Any, Origin, str]:
    value, note = field.default(known)
    return value, "assumed", note


def _recorded(meta: Mapping[str, Any], name: str, field: Field, path: Path) -> Setting | None:
    for place in field.places:
        value = _at(meta, place)
        if value is not None:
            _check(value, field.kind, place, path)
            return Setting(repository(value) if name == "model" else value, "recorded", place)
    return None


def _at(meta: Any, place: str) -> Any:
    for key in place.split("."):
        meta = meta.get(key) if isinstance(meta, Mapping) else None
    return meta


KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text", lambda v: isinstance(v, str) and bool(v.strip())),
    "flag": ("true or false", lambda v: isinstance(v, bool)),
    "count": ("a whole number of at least 1", lambda v: _is_whole(v) and v >= 1),
    "whole": ("a whole number of at least 0", lambda v: _is_whole(v) and v >= 0),
    "share": ("a number above 0 and at most 1", lambda v: isinstance(v, int | float) and 0 < v <= 1),
    "any": ("anything", lambda v: True),
}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(value: Any, kind: str, place: str, path: Path) -> None:
    words, holds = KINDS[kind]
    if not holds(value):
        raise ScenarioError(f"{path}: {place} = {value!r} must be {words}; correct it, or remove it")
