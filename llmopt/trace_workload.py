"""A trace as a scenario's workload: classes by prompt length, joint lengths, measured rates, and the replay."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from llmopt.arrays import Bools, Ints
from llmopt.arrivals import Replay
from llmopt.errors import ScenarioError
from llmopt.scenario import Pool, Scenario
from llmopt.trace_data import Trace
from llmopt.traces import read_trace
from llmopt.workload import Pairs, RequestClass, Requests, TraceSource, extent


def with_trace(data: dict[str, Any], file: Path, label: str, given: str | Path | None) -> Scenario:
    """The scenario with its `[workload.trace]`, or the trace `given`, read and put into its classes.

    A trace with ``arrivals = { law = "replay" }`` is replayed; with another law it gives the joint lengths only, and
    shares and rate where the scenario names none. A trace `given` from outside is replayed, whole, unless the
    scenario has a trace of its own that it does not replay: then it takes the place of that one.
    """
    sketch = Scenario.checked(_sketch(data), label)
    source = sketch.workload.trace
    trace = _read(source, file, given)
    _check_memory(trace, sketch.pools)
    law = data["workload"].get("arrivals", {}).get("law")
    filled = dict(data)
    if law == "replay" or (given is not None and source is None):
        scaled = trace.stretched(_time_scale(trace, data["workload"], given is not None))
        evaluation = dict(data.get("evaluation", {}))
        if given is not None or "horizon" not in evaluation:
            evaluation["horizon"] = extent(scaled.arrival)
        played = scaled.take(np.flatnonzero(scaled.arrival < evaluation["horizon"]))
        filled |= {"evaluation": evaluation, "workload": _replayed(data["workload"], played, sketch)}
    else:
        filled["workload"] = _with_lengths(data["workload"], trace, sketch)
    if given is not None:
        filled["workload"]["trace"] = {**data["workload"].get("trace", {}), "file": str(given)}
    return Scenario.checked(filled, label)


def _sketch(data: dict[str, Any]) -> dict[str, Any]:
    """The data with stand-ins for what the trace will give, so that all the rest is checked first."""
    data = deepcopy(data)
    workload = data.get("workload")
    if not isinstance(workload, dict) or not isinstance(workload.get("classes"), list):
        return data
    classes = [one for one in workload["classes"] if isinstance(one, dict)]
    for one in classes:
        one.setdefault("prompt", {"law": "constant", "value": 1})
        one.setdefault("output", {"law": "constant", "value": 2})  # one that decodes
    if not _has_rates(workload):
        for one in classes:
            one["share"] = 1 / len(classes)
    if any("share" in one for one in classes):
        workload.setdefault("rate", 1.0)
    if isinstance(workload.get("arrivals"), dict) and workload["arrivals"].get("law") == "replay":
        ones = np.ones(2, dtype=np.int64)
        workload["replay"] = Requests(np.arange(2.0), ones, ones, ones - 1, np.zeros(2))
    return data


def _has_rates(workload: dict[str, Any]) -> bool:
    return any("share" in one or "rate" in one for one in workload["classes"] if isinstance(one, dict))


def _read(source: TraceSource | None, file: Path, given: str | Path | None) -> Trace:
    """The trace without the requests that `max_tokens` rules out; refused if it has rows that are no requests."""
    if given is None and source is not None:
        trace = read_trace(file.parent / source.file, source.format, source.columns)
    else:
        trace = read_trace(str(given))
    if trace.skipped and not (source and source.skip_bad_rows):
        first, rows = trace.skipped[0], len(trace.skipped) + len(trace)
        raise ScenarioError(
            f"{trace.path}: {len(trace.skipped)} of {rows} rows are no requests, the first is {trace.unit} "
            f"{first.line} ({first.reason}); write a clean copy with llmopt trace FILE --to COPY, or set "
            f"skip_bad_rows = true in [workload.trace]"
        )
    limit = source.max_tokens if source else None
    if limit is None:
        return trace
    keep = np.flatnonzero(trace.prompt + trace.output <= limit)
    if not len(keep):
        raise ScenarioError(f"{trace.path}: every request has more than max_tokens = {limit} tokens; raise it")
    return trace.take(keep)


def _check_memory(trace: Trace, pools: Sequence[Pool]) -> None:
    """Refuses a trace with requests that no pool can hold."""
    total, room = trace.prompt + trace.output, max(p.largest for p in pools)
    large = np.flatnonzero(total > room)
    if len(large):
        i = large[np.argmin(trace.line[large])]
        raise ScenarioError(
            f"{trace.path}: {len(large)} of {len(trace)} requests exceed the KV memory of every pool, the first at "
            f"{trace.unit} {trace.line[i]} with {total[i]} tokens (at most {room} fit); "
            f"raise kv_capacity, or leave them out with max_tokens in [workload.trace]"
        )


def _time_scale(trace: Trace, workload: dict[str, Any], outside: bool) -> float:
    """Factor on the recorded times: `time_scale`, or what gives the `rate` that the scenario names with its replay."""
    if not trace.timed:
        raise ScenarioError(
            f"{trace.path}: has lengths but no arrival times; choose another arrivals law than replay, or name the "
            f"column with columns = {{ arrival = ... }}"
        )
    if len(trace) < 2 or trace.arrival[-1] <= trace.arrival[0]:
        raise ScenarioError(f"{trace.path}: all requests arrive at one instant; give a trace with a span of time")
    law = workload.get("arrivals", {})
    if law.get("law") != "replay":
        return 1.0
    if outside or "rate" not in workload:
        return Replay.model_validate(law).time_scale
    if "time_scale" in law:
        raise ScenarioError(f"{trace.path}: is to be replayed at both a rate and a time_scale; drop one of the two")
    return len(trace) / extent(trace.arrival) / float(workload["rate"])


def _replayed(workload: dict[str, Any], trace: Trace, sketch: Scenario) -> dict[str, Any]:
    """The workload with the trace as its arrivals, its rate and shares as measured in it."""
    if len(trace) < 2:
        raise ScenarioError(f"{trace.path}: fewer than two requests arrive within the horizon; lengthen it")
    cls = _classes(trace, sketch.workload.classes)
    return {
        **workload,
        "arrivals": {"law": "replay"},
        "rate": len(trace) / extent(trace.arrival),
        "classes": _classes_of(workload, trace, cls, shares=True),
        "replay": Requests(trace.arrival, trace.prompt, trace.output, cls, np.zeros(len(trace))),
    }


def _with_lengths(workload: dict[str, Any], trace: Trace, sketch: Scenario) -> dict[str, Any]:
    """The workload with the trace's lengths, and its shares and rate where the scenario names none."""
    cls, shares = _classes(trace, sketch.workload.classes), not _has_rates(workload)
    filled = {**workload, "classes": _classes_of(workload, trace, cls, shares)}
    if shares and "rate" not in workload:
        if not trace.timed or trace.arrival[-1] <= trace.arrival[0]:
            raise ScenarioError(f"{trace.path}: has no arrival times to take a rate from; add rate to [workload]")
        filled["rate"] = len(trace) / extent(trace.arrival)
    return filled


def _classes_of(workload: dict[str, Any], trace: Trace, cls: Ints, shares: bool) -> list[dict[str, Any]]:
    """The classes with the trace's joint lengths, their marginals as laws, and on demand its shares."""
    filled = []
    for c, one in enumerate(workload["classes"]):
        mine = cls == c
        pairs = Pairs(trace.prompt[mine], trace.output[mine])
        laws = {"pairs": pairs, "prompt": _histogram(pairs.prompt), "output": _histogram(pairs.output)}
        share = {"share": float(mine.mean())} if shares else {}
        filled.append({key: value for key, value in one.items() if not (shares and key == "rate")} | laws | share)
    return filled


def _classes(trace: Trace, classes: Sequence[RequestClass]) -> Ints:
    """The first class whose `prompts` hold the prompt, for every request; a class without takes any."""
    inside = np.array([_holds(one, trace.prompt) for one in classes])
    lost = np.flatnonzero(~inside.any(axis=0))
    if len(lost):
        i = lost[np.argmin(trace.line[lost])]
        raise ScenarioError(
            f"{trace.path}: {len(lost)} of {len(trace)} requests belong to no class, the first at {trace.unit} "
            f"{trace.line[i]} with a prompt of {trace.prompt[i]} tokens; widen prompts = [low, high] of a class"
        )
    cls = np.asarray(inside.argmax(axis=0), dtype=np.int64)
    for c, one in enumerate(classes):
        if not (cls == c).any():
            raise ScenarioError(
                f"{trace.path}: none of {len(trace)} requests belongs to class {one.name!r} "
                f"(prompts = {list(one.prompts or [])}); give prompts = [low, high], or remove the class"
            )
    return cls


def _holds(one: RequestClass, prompt: Ints) -> Bools:
    low, high = one.prompts or (1, np.iinfo(np.int64).max)
    return (prompt >= low) & (prompt <= high)


def _histogram(lengths: Ints) -> dict[str, Any]:
    values, counts = np.unique(lengths, return_counts=True)
    return {"law": "histogram", "values": values.tolist(), "weights": counts.astype(float).tolist()}
