"""Finding models and accelerators by the names that people, logs and profiles give them."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import TypeVar

from llmopt.errors import ScenarioError
from llmopt.explain import suggestion
from llmopt.machines.accelerators import Accelerator
from llmopt.machines.shapes import ModelShape
from llmopt.model import InputModel

Entry = TypeVar("Entry", bound=InputModel)

DECORATION = re.compile(
    r"meta|hf|base|chat|instruct|instruction|it|thinking|preview|dynamic|bf16|fp16|fp8|w8a8|int8|w8a16|awq|gptq|int4|"
    r"w4a16|4bit|nvfp4|mxfp4|fp4|\d{4}"
)
"""Words of a model's name that say how it was trained further or stored, and not what shape it has."""
QUANTISED = {
    "fp8": "fp8",
    "w8a8": "int8",
    "int8": "int8",
    "awq": "int4",
    "gptq": "int4",
    "int4": "int4",
    "w4a16": "int4",
}
QUANTISED |= {"4bit": "int4", "nvfp4": "nvfp4", "fp4": "nvfp4", "mxfp4": "mxfp4", "bf16": "bf16", "fp16": "fp16"}
"""What such a word says of the weights."""
VENDOR = re.compile(
    r"nvidia|geforce|tesla|amd|instinct|huawei|gpu|tensor|core|hbm\d?e?|dgx|hgx|blackwell|edition|ada|generation|graphics|card"
)
"""Words of an accelerator's name that tell it from nothing."""


def model_names() -> tuple[str, ...]:
    """Names of all models of the catalog, sorted."""
    return tuple(sorted((m.name for m in models()), key=str.lower))


def accelerator_names() -> tuple[str, ...]:
    """Names of all accelerators of the catalog, sorted."""
    return tuple(sorted((a.name for a in accelerators()), key=str.lower))


@cache
def models() -> tuple[ModelShape, ...]:
    """The models of the catalog."""
    return _read("models", ModelShape)


@cache
def accelerators() -> tuple[Accelerator, ...]:
    """The accelerators of the catalog."""
    return _read("accelerators", Accelerator)


def _read(folder: str, kind: type[Entry]) -> tuple[Entry, ...]:
    files = sorted((Path(__file__).parent / folder).glob("*.toml"))
    return tuple(kind.model_validate(tomllib.loads(file.read_text(encoding="utf-8"))) for file in files)


@cache
def model_shape(name: str) -> ModelShape:
    """The model that `name` means, whatever its publisher, folder, fine-tuning, case and punctuation.

    ``meta-llama/Llama-3.1-8B-Instruct``, ``/data/model/Llama-3.1-8B``, ``llama31-8b`` and a folder of Hugging Face's
    cache, ``.../models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f``, are one. A word for a
    quantisation, as in ``Qwen3-32B-FP8``, sets the precision.

    Raises
    ------
    ScenarioError
        If no model has that name, with the nearest.
    """
    words = _words(repository(name))
    wanted = "".join(word for word in words if not DECORATION.fullmatch(word))
    stored = [QUANTISED[word] for word in words if word in QUANTISED]
    for shape in models():
        if wanted in {_plain_model(known) for known in (shape.name, *shape.aliases)}:
            return shape.model_copy(update={"precision": stored[0]}) if stored else shape
    raise ScenarioError(f"model {name!r} is not in the catalog of models; {suggestion(Path(name).name, model_names())}")


@cache
def accelerator(name: str) -> Accelerator:
    """The accelerator that `name` means, whatever its vendor's prefix, case, punctuation and number of pieces.

    ``NVIDIA GeForce RTX 4090``, ``RTX4090`` and ``RTX 4090 24GB`` are one. Without a memory size the larger variant is
    meant, without a form factor the one on a board with fast links.

    Raises
    ------
    ScenarioError
        If no accelerator has that name, with the nearest.
    """
    single = re.sub(r"^\s*\d+\s*x\s+|\s+x\s*\d+\s*$", "", name.lower())
    wanted, gigabytes = _plain_accelerator(single)
    found = [a for a in accelerators() if wanted in {_plain_accelerator(known)[0] for known in (a.name, *a.aliases)}]
    if gigabytes:
        found = [a for a in found if a.gigabytes == gigabytes]
    if found:
        return max(found, key=lambda a: a.gigabytes)
    raise ScenarioError(f"accelerator {name!r} is not in the catalog; {suggestion(name, accelerator_names())}")


def repository(name: str) -> str:
    """The repository that a folder of Hugging Face's cache holds; any other name as it is."""
    folder = re.search(r"(?:^|[/\\])models--([^/\\]+)", name)
    return folder[1].replace("--", "/") if folder else name


def _words(name: str) -> list[str]:
    """Words of the last part of a path, without the version of its training (v0.1)."""
    last = re.sub(r"v0\.\d", "", name.rstrip("/").rsplit("/", 1)[-1].lower())
    return re.findall(r"[a-z0-9]+", last)


def _plain_model(name: str) -> str:
    return "".join(word for word in _words(name) if not DECORATION.fullmatch(word))


def _plain_accelerator(name: str) -> tuple[str, int]:
    """The name without what tells nothing apart, and the memory size in it or 0."""
    words = [w for w in re.findall(r"[a-z0-9]+", name.lower()) if not VENDOR.fullmatch(w)]
    sizes = [int(m[1]) for w in words if (m := re.fullmatch(r"(\d+)(gb|gib|g)", w))]
    rest = [re.sub(r"^sxm\d?$", "sxm", w) for w in words if not re.fullmatch(r"\d+(gb|gib|g)", w)]
    joined = "".join(rest)
    glued = re.fullmatch(r"(.*?)(\d{2,3})gb", joined)
    return (glued[1], int(glued[2])) if glued and not sizes else (joined, sizes[0] if sizes else 0)
