"""Turns a pydantic complaint into one sentence: where, what, and how to fix it."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

Location = tuple[int | str, ...]

_BOUNDS = {
    "greater_than": ("gt", "must be above"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be below"),
    "less_than_equal": ("le", "must be at most"),
}
_BUNDLE = 'problem = "af-ratio" asks for a bundle: add [pools.bundle], or catalog = "afd-...", which has one'
_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text in quotes",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


def explain(error: ValidationError, data: Any, model: type[BaseModel], where: str) -> str:
    """One sentence about the first complaint in `error`, with the places of the others.

    Parameters
    ----------
    error
        What pydantic raised.
    data
        The plain data that were refused; used to name keys as the user wrote them.
    model
        The model that refused them; used to suggest keys.
    where
        The file, or what the data are; starts the sentence.
    """
    problems = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    sentences = [(_path(e["loc"], data, e["type"]), _what(e, data, model)) for e in _without_echoes(problems, model)]
    path, first = sentences[0]
    others = [p or "the whole" for p, _ in sentences[1:]]
    more = f" (and {len(others)} more: {', '.join(others[:5])}{', ...' if len(others) > 5 else ''})" if others else ""
    return f"{where}: {path + ' ' if path else ''}{first}{more}"


def suggestion(word: str, known: Sequence[str]) -> str:
    """``did you mean 'x'?`` for the nearest known word, else the list of them all."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(map(repr, known))}"


def _without_echoes(problems: list[Any], model: type[BaseModel]) -> Iterator[Any]:
    """Leaves out a missing key that a misspelt one was meant to be, and a list too short for want of its bad items."""
    meant: set[tuple[Location, str]] = set()
    places = [problem["loc"] for problem in problems]
    for problem in problems:
        *table, key = here = problem["loc"] or ("",)
        if problem["type"] == "too_short" and any(p[: len(here)] == here and p != here for p in places):
            continue
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(key), _keys_at(model, tuple(table)), n=1, cutoff=0.6)
            meant.update((tuple(table), word) for word in near)
        if problem["type"] != "missing" or (tuple(table), key) not in meant:
            yield problem


def _path(loc: Location, data: Any, kind: str) -> str:
    """`workload.classes[0].prompt.mean`: the location without the tags that pydantic adds for unions."""
    text, node = "", data
    for depth, part in enumerate(loc):
        last = depth == len(loc) - 1
        if isinstance(part, str) and _is_tag(node, part) and not (last and kind in ("missing", "extra_forbidden")):
            continue
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
        node = _child(node, part)
    return text


def _is_tag(node: Any, part: str) -> bool:
    return isinstance(node, Mapping) and part not in node and node.get("law") == part


def _child(node: Any, part: int | str) -> Any:
    try:
        return node[part]
    except (KeyError, IndexError, TypeError):
        return None


def _what(error: Any, data: Any, model: type[BaseModel]) -> str:
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(str(error["loc"][-1]), error["loc"][:-1], model)
    if kind == "missing":
        return "is missing; " + ("add it" if not _wants_bundle(error["loc"], data) else _BUNDLE)
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"= {given!r} {words} {context[bound]:g}{_unit_hint(error['loc'], kind)}"
    if kind == "literal_error":
        known = [w.strip().strip("'") for w in str(context["expected"]).replace(" or ", ", ").split(", ")]
        return f"= {given!r} is not known; {suggestion(str(given), known)}"
    return _what_else(kind, given, context, error["msg"])


def _what_else(kind: str, given: Any, context: Mapping[str, Any], message: str) -> str:
    if kind == "union_tag_invalid":
        known = [w.strip().strip("'") for w in str(context["expected_tags"]).split(",")]
        return f"has law = {context['tag']!r}, which is not known; {suggestion(str(context['tag']), known)}"
    if kind == "union_tag_not_found":
        return 'has no law; add one, e.g. law = "constant" or law = "poisson"'
    if kind == "finite_number":
        return f"= {given} is not a finite number; give one"
    if kind == "tuple_type" and not isinstance(given, str):
        return f"= {_short(given)} must be a list; put it into [ ]"
    if kind in _KINDS:
        return f"= {_short(given)} must be {_KINDS[kind]}"
    if kind == "too_short":
        return "is too short; give at least " + str(context.get("min_length", 1))
    if kind == "string_pattern_mismatch":
        return f"= {given!r} must consist of letters, digits, '.', '_' and '-'"
    if kind == "value_error":
        return str(context["error"])
    return f"= {_short(given)}: {message}; correct it"


def _short(given: Any) -> str:
    text = repr(given)
    text = {"True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= 60 else text[:57] + "..."


def _wants_bundle(loc: Location, data: Any) -> bool:
    """Whether a key of a pool is missing that a bundle would give, and the problem asks for one."""
    asked = isinstance(data, Mapping) and data.get("problem") == "af-ratio" and len(loc) == 3 and loc[0] == "pools"
    return asked and "bundle" not in (_child(data["pools"], loc[1]) or ())


def _unit_hint(loc: Location, kind: str) -> str:
    """Times are in seconds; too large a time is usually one in milliseconds or microseconds."""
    timed = {"base", "prefill", "decode", "kv", "pairs", "ttft", "tpot", "seconds"}
    key = next((part for part in reversed(loc) if isinstance(part, str)), "")
    return "; times are in seconds, not milliseconds" if kind.startswith("less") and key in timed else ""


def _unknown_key(key: str, table: Location, model: type[BaseModel]) -> str:
    known = _keys_at(model, table)
    if difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        return f"is not a known key; {suggestion(key, known)}"
    homes = [home for home, keys in _tables(model) if key in keys]
    if homes:
        return f"is not a key of this table; it belongs in {homes[0]}"
    return f"is not a known key; {suggestion(key, known)}"


def _keys_at(model: type[BaseModel], loc: Location) -> list[str]:
    """Keys that the table at `loc` may have, unions resolved by the tag in `loc`."""
    models = [model]
    for part in loc:
        if isinstance(part, int):
            continue
        tagged = [m for m in models if part in _tags(m)]
        models = tagged or [inner for m in models for name, inner in _inner(m) if name == part]
    return [name for m in models for name, _ in _names(m)]


def _tables(model: type[BaseModel], home: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every table of the file format, as its header is written, with its keys."""
    yield home or "the top of the file", [name for name, _ in _names(model)]
    for name, annotation in _names(model):
        for inner in _models_in(annotation):
            if not _tags(inner):
                path = f"{home.strip('[]')}.{name}" if home else name
                yield from _tables(inner, f"[[{path}]]" if get_origin(annotation) is tuple else f"[{path}]")


def _names(model: type[BaseModel]) -> list[tuple[str, Any]]:
    return [(f.alias or name, f.annotation) for name, f in model.model_fields.items() if not f.exclude]


def _inner(model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    return [(name, m) for name, annotation in _names(model) for m in _models_in(annotation)]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, tuple, Union, types.UnionType):
        return [m for arg in get_args(annotation) for m in _models_in(arg)]
    return []


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("law")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
