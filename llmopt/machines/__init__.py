"""Public models and accelerators: shapes, peaks, and what follows: KV capacity, roofline, limits of physics."""

from __future__ import annotations

from llmopt.machines.accelerators import Accelerator
from llmopt.machines.lookup import accelerator, accelerator_names, model_names, model_shape
from llmopt.machines.memory import KvCapacity, kv_capacity
from llmopt.machines.physics import Floor, Violations, floor, violations
from llmopt.machines.roofline import roofline
from llmopt.machines.shapes import ModelShape

__all__ = [
    "Accelerator",
    "Floor",
    "KvCapacity",
    "ModelShape",
    "Violations",
    "accelerator",
    "accelerator_names",
    "floor",
    "kv_capacity",
    "model_names",
    "model_shape",
    "roofline",
    "violations",
]
