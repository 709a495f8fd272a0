"""Public models and accelerators: shapes, peaks, and what follows from the two: KV capacity, roofline, limits of physics."""

from __future__ import annotations

from llmopt.machines.accelerators import Accelerator
from llmopt.machines.lookup import accelerator, accelerator_names, model_names, model_shape
from llmopt.machines.memory import KvCapacity, kv_capacity
from llmopt.machines.shapes import ModelShape

__all__ = [
    "Accelerator",
    "KvCapacity",
    "ModelShape",
    "accelerator",
    "accelerator_names",
    "kv_capacity",
    "model_names",
    "model_shape",
]
