"""The engine of a run as a pool: its settings, its memory, its step time, and what of it is not modelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from llmopt.errors import ScenarioError
from llmopt.explain import explain
from llmopt.hardware import Piece
from llmopt.runs import EngineRun, Setting, assumed_for
from llmopt.scenario import Pool
from llmopt.steptable import StepTable
from llmopt.validation.constants import NULL_BLOCKS
from llmopt.validation.fitting import fitted_pieces

StepTimes = Literal["table", "max-affine"]
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
"""vLLM's names of number formats in this package's."""
HALF = ("bf16", "fp16")
"""Formats that vLLM's dtype may name of a checkpoint whose weights are quantised: it is that of the activations."""
QUANTISED = {"fp8": "fp8", "awq": "int4", "gptq": "int4", "mxfp4": "mxfp4", "modelopt": "fp8", "modelopt_fp4": "nvfp4"}
"""Formats of the weights by vLLM's names of quantisation methods, those that leave no doubt."""


@dataclass(frozen=True, eq=False)
class Engine:
    """What is played: the pool without any host overhead, the measured table behind its step time, the settings with
    all that was computed or given, and sentences on what is assumed or not modelled.
    """

    pool: Pool
    table: StepTable
    settings: Mapping[str, Setting]
    notes: tuple[str, ...]


def engine_of(
    run: EngineRun,
    profiles: str | Path | StepTable,
    step_time: StepTimes = "table",
    gpu: str | None = None,
    model: str | None = None,
) -> Engine:
    """The engine that a run was made with.

    Parameters
    ----------
    profiles
        A folder of profiles, where those of the run's GPU and model are looked for, or a step table.
    gpu, model
        Names to use instead of the recorded ones.

    Raises
    ------
    ScenarioError
        If the run names no GPU or model, no profile or catalog entry fits, or it uses what the simulator cannot play.
    """
    settings = dict(run.settings)
    for name, value in (("gpu", gpu), ("model", model)):
        if value is not None:
            settings[name] = Setting(value, "given", f"--{name}")
    settings = assumed_for(settings)
    _refuse_unplayable(run, settings)
    settings["kv_blocks"] = _kv_blocks(run, settings)
    table = profiles if isinstance(profiles, StepTable) else _table(run, profiles, settings)
    pool = _pool(run, settings, table)
    if step_time == "max-affine":
        pool = pool.model_copy(update={"step_time": fitted_pieces(run, pool), "table": None})
    notes = (*_notes(settings), *(f"profile: {note}" for note in table.notes))
    return Engine(pool, table, settings, notes)


def _refuse_unplayable(run: EngineRun, settings: Mapping[str, Setting]) -> None:
    if settings["pipeline_parallel_size"].value > 1:
        size = settings["pipeline_parallel_size"].value
        raise ScenarioError(
            f"{run.path}: has pipeline_parallel_size = {size}, which is not simulated; give another run"
        )
    if settings["speculative_config"].value:
        raise ScenarioError(
            f"{run.path}: decodes speculatively, several tokens a step, which is not simulated; give a run without"
        )


def _required(run: EngineRun, settings: Mapping[str, Setting], name: str) -> str:
    value = settings[name].value
    if value is None:
        raise ScenarioError(f"{run.path}: names no {name} in meta.json; pass --{name} NAME")
    return str(value)


def _kv_blocks(run: EngineRun, settings: Mapping[str, Setting]) -> Setting:
    """KV blocks that requests can use on one replica."""
    replicas = settings["data_parallel_size"].value
    recorded = settings["num_gpu_blocks"].value
    if recorded is not None:
        # vLLM's front end reports the sum over its data-parallel engines (vllm/v1/engine/core_client.py)
        blocks, note = recorded // replicas, f"num_gpu_blocks / {replicas}" if replicas > 1 else "num_gpu_blocks"
    else:
        blocks, note = _computed_blocks(run, settings), "computed from model, memory and utilisation"
    if blocks <= NULL_BLOCKS:
        raise ScenarioError(f"{run.path}: has {blocks} KV blocks a replica, too few for any request; correct meta.json")
    return Setting(blocks - NULL_BLOCKS, "computed", f"{note} - {NULL_BLOCKS}")


def _computed_blocks(run: EngineRun, settings: Mapping[str, Setting]) -> int:
    from llmopt.machines import accelerator, kv_capacity, model_shape

    try:
        shape = model_shape(_required(run, settings, "model"))
        card = accelerator(_required(run, settings, "gpu"))
    except ScenarioError as error:
        raise ScenarioError(
            f"{run.path}: records no num_gpu_blocks, and they cannot be computed: {error}; "
            "name it by --gpu or --model, or record num_gpu_blocks"
        ) from None
    capacity = kv_capacity(
        shape,
        card,
        tensor_parallel=settings["tensor_parallel_size"].value,
        expert_parallel=_expert_parallel(settings),
        precision=precision(settings) or None,
        kv_precision=_kv_precision(settings),
        utilisation=settings["gpu_memory_utilization"].value,
        token_budget=settings["max_num_batched_tokens"].value,
        max_batch=settings["max_num_seqs"].value,
        memory_bytes=settings["gpu_memory_bytes"].value,
    )
    return int(capacity.tokens) // int(settings["block_size"].value)


def precision(settings: Mapping[str, Setting]) -> str:
    """Format of the weights as profiles name it, or "" for the model's own."""
    quantised = settings["quantization"].value
    if quantised is not None:
        return QUANTISED.get(str(quantised).removesuffix("_marlin"), "")
    name = str(settings["dtype"].value).removeprefix("torch.")
    stated = PRECISIONS.get(name, name)
    return "" if name == "auto" or stated in HALF else stated


def _expert_parallel(settings: Mapping[str, Setting]) -> int:
    """GPUs among which the routed experts are divided: all of them, or those of a replica count as one."""
    if not settings["enable_expert_parallel"].value:
        return 1
    return int(settings["tensor_parallel_size"].value * settings["data_parallel_size"].value)


def _kv_precision(settings: Mapping[str, Setting]) -> str | None:
    name = str(settings["kv_cache_dtype"].value).removeprefix("torch.")
    if name == "auto":
        return None
    return "fp8" if name.startswith("fp8") else PRECISIONS.get(name, name)


def _table(run: EngineRun, folder: str | Path, settings: Mapping[str, Setting]) -> StepTable:
    from llmopt.machines import model_shape
    from llmopt.profiles import load_step_table

    gpu, model = _required(run, settings, "gpu"), _required(run, settings, "model")
    quantised, weights = settings["quantization"].value, precision(settings)
    if quantised is not None and not weights and model_shape(model).precision in HALF:
        raise ScenarioError(
            f"{run.path}: has quantization = {quantised!r}, which does not say in which format the weights are; name "
            f"the model with its format, as in --model {Path(model).name}-FP8"
        )
    try:
        return load_step_table(
            folder,
            gpu,
            model,
            tensor_parallel=settings["tensor_parallel_size"].value,
            precision=weights,
            expert_parallel=_expert_parallel(settings),
            data_parallel=settings["data_parallel_size"].value,
        )
    except ScenarioError as error:
        raise ScenarioError(
            f"{error} (GPU {gpu!r} and model {model!r} are those of {run.path}; --gpu and --model name others)"
        ) from None


def _secant(table: StepTable, settings: Mapping[str, Setting]) -> tuple[Piece, ...]:
    """A rough step time through an almost empty and a full prefill step: what a pool needs beside its table, for the
    theory, of which validation asks nothing.
    """
    budget = float(settings["max_num_batched_tokens"].value)
    low, high = table(decode=1, kv=1), table(prefill=budget, pairs=budget**2 / 2)
    return (Piece(name="secant of the table", base=low, prefill=max(0.0, (high - low) / budget)),)


def _pool(run: EngineRun, settings: Mapping[str, Setting], table: StepTable) -> Pool:
    value: dict[str, Any] = {name: setting.value for name, setting in settings.items()}
    data = {
        "name": "engine",
        "replicas": value["data_parallel_size"],
        "step_time": _secant(table, settings),
        "table": table,
        "kv_capacity": value["kv_blocks"] * value["block_size"],
        "block_size": value["block_size"],
        "max_batch": value["max_num_seqs"],
        "token_budget": value["max_num_batched_tokens"],
        "prefill_chunk": value["long_prefill_token_threshold"] or None,
        "async_scheduling": value["async_scheduling"],
        "prefix_caching": value["enable_prefix_caching"],
        "tensor_parallel": value["tensor_parallel_size"],
        "accelerator": value["gpu"] or "",
        "model": value["model"] or "",
        "source": table.source,
    }
    try:
        return Pool.model_validate(data)
    except ValidationError as error:
        raise ScenarioError(explain(error, data, Pool, f"{run.path}: as a pool its engine")) from None


def _notes(settings: Mapping[str, Setting]) -> list[str]:
    """What the reader should know: assumptions, and what the engine did that is not played."""
    assumed = [name for name, s in settings.items() if s.origin == "assumed" and s.value not in (None, "auto")]
    notes = []
    if assumed:
        words = ", ".join(f"{name} = {_plain(settings[name].value)}" for name in assumed)
        notes.append(f"not recorded, taken at vLLM's default: {words}")
    if settings["num_gpu_blocks"].value is None:
        blocks = settings["kv_blocks"].value
        notes.append(f"num_gpu_blocks is not recorded; {blocks} usable blocks of KV memory were computed")
    if settings["data_parallel_size"].value > 1:
        notes.append(
            "data-parallel engines are played as independent replicas behind vLLM's balancer, which here sees their "
            "state without delay; that engines of a model with experts wait for each other in every step is not played"
        )
        if settings["enable_expert_parallel"].value:
            notes.append(
                "the experts are divided among the data-parallel engines; each engine's are taken to serve as many "
                "tokens of every other engine as of its own, that is, the engines as equally loaded"
            )
    kept = _kv_precision(settings)
    if kept is not None and kept not in HALF:
        notes.append(f"the run kept its KV cache in {kept}; attention takes what the profile says for its own")
    if not settings["enable_chunked_prefill"].value:
        notes.append("the run had chunked prefill off; it is played with prompts cut at the token budget")
    if not settings["scheduler_reserve_full_isl"].value:
        notes.append("the run admitted prompts without room for all of them; they are played with room for the whole")
    if settings["policy"].value != "fcfs":
        notes.append(f"the run served by policy {settings['policy'].value!r}; it is played first come, first served")
    return notes


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def with_overhead(engine: Engine, host: float) -> Engine:
    """The engine with `host` seconds in every step besides its table."""
    return replace(engine, pool=engine.pool.model_copy(update={"host_overhead": host}))
