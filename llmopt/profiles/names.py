"""Names of accelerators, models and precisions as people write them, compared by what they mean."""

from __future__ import annotations

import re

from llmopt.machines.lookup import repository

FORM = (
    r"nvidia|geforce|tesla|amd|instinct|blackwell|hopper|ampere|server|workstation|edition|generation|gpu|dgx|hgx|nvlink"
    r"|sxm\d?|pcie|pci|hbm\d?e?|\d+ ?gib|\d+ ?gb|\d+ ?g\b"
)
"""Words of an accelerator's name that tell the form or the memory, which no profile layout states."""
TUNED = {"instruct", "chat", "hf", "it", "base", "meta", "moe", "sxm", "pcie", "bf16", "bfloat16", "fp16", "float16"}
"""Words of a model's name that do not change its shape: how it was tuned, and the usual precision."""
PRECISIONS = ("bf16", "fp16", "fp8", "int8", "nvfp4", "mxfp4", "int4", "fp32")
SPELT = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "e4m3": "fp8", "w8a8": "fp8"}


def accelerator_key(name: str) -> str:
    """`NVIDIA A100-SXM4-80GB`, `a100_sxm` and `A100 80GB` all become `a100`."""
    words = re.sub(rf"(?<![a-z0-9])({FORM})(?![a-z0-9])", " ", re.sub(r"[-_./()\s]+", " ", name.lower()))
    return "".join(words.split())


def model_key(name: str) -> str:
    """`meta-llama/Llama-3.1-8B-Instruct` and `Llama-3.1-8B` become one key; so do `llama2-70b` and `Llama-2-70b-hf`.

    The organisation, case, punctuation, the order of words, and words about tuning, date and release do not count.
    """
    last = repository(name).lower().replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    plain = re.sub(r"v0\.\d(?![a-z0-9])", " ", last)
    words = [word for word in re.split(r"[-_/:()\s]+", plain) if word and word not in TUNED]
    words = [word for word in words if not re.fullmatch(r"\d{4}|20\d{4,6}|fp8|fp4|nvfp4|mxfp4|awq|gptq|int[48]", word)]
    return " ".join(sorted(part for word in words for part in re.findall(r"\d+[a-z]?|[a-z]+", word.replace(".", ""))))


def same_accelerator(one: str, other: str) -> bool:
    """Whether two names mean the same accelerator, whatever its form and memory."""
    return accelerator_key(one) == accelerator_key(other)


def same_model(one: str, other: str) -> bool:
    """Whether two names mean models of the same shape."""
    return model_key(one) == model_key(other)


def precision_of(name: str) -> str:
    """The precision that a name or a folder such as `fp8-kvfp8` states first, or nothing."""
    for word in re.split(r"[-_/.\s]+", name.lower()):
        found = SPELT.get(word, word)
        if found in PRECISIONS:
            return found
    return ""


def same_precision(one: str, other: str) -> bool:
    """Whether two precisions take the same time: bf16 and fp16 do, on every accelerator here."""
    half = {"bf16", "fp16"}
    first, second = SPELT.get(one.lower(), one.lower()), SPELT.get(other.lower(), other.lower())
    return first == second or {first, second} <= half
